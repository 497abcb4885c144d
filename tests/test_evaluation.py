"""Nets evaluated alone and as one, against plain numpy in float64; and `alexprep eval`: classes, submissions, words for what is wrong."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from scipy.io import savemat
from scipy.special import softmax

from alexprep.pipeline.loader import Loader
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.storage import publish_bytes
from alexprep.train import recipes
from alexprep.train.ensemble import WeightSearch, mixture, shares
from alexprep.train.evaluation import (
    Scores,
    check_submission,
    class_csv,
    evaluate,
    evaluate_run,
    make_submission,
    publish_evaluation,
    ranked,
)
from alexprep.train.metrics import image_errors
from alexprep.train.predictions import Predicted, open_net
from alexprep.train.run_dir import Place, place_named
from tests.made_up import make_run, pooled_network

CPU = torch.device("cpu")
Array = NDArray[np.float64]
WNIDS = ["n05", "n03", "n01", "n06", "n02", "n04"]  # by ILSVRC ID, from 1
UNREADABLE = "ILSVRC2012_test_00000003.JPEG"


@pytest.fixture
def wide_and_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny`, and a recipe that cuts its images otherwise."""
    tiny = recipes.TINY
    narrow = replace(tiny, name="narrow", augmentation=replace(tiny.augmentation, crop=48), stored_sizes=(48, 96))
    monkeypatch.setitem(recipes.RECIPES, "narrow", narrow)


def probabilities(run: Path, data: Path, views: Any) -> tuple[Array, NDArray[np.int64]]:
    """Float64 numpy from a net's float32 logits: the softmax, its mean over the views; and the labels."""
    net = open_net(Place(run), CPU)
    rows, labels = [], []
    with Loader(
        data, "val", batch_size=7, augmentation=net.recipe.augmentation, views=views, order="sequential"
    ) as loader:
        for batch in loader:
            images = batch.images if views == "ten" else batch.images[:, None]
            with torch.inference_mode():
                logits = torch.stack([net.network(images[:, view]) for view in range(images.shape[1])], dim=1)
            rows.append(softmax(logits.double().numpy(), axis=-1).mean(axis=1))
            labels.append(batch.labels.numpy())
    return np.concatenate(rows), np.concatenate(labels)


@pytest.mark.parametrize("views", ["centre", "ten"])
def test_an_ensemble_equals_numpy(views: Any, data: Path, tmp_path: Path, wide_and_narrow: None) -> None:
    """Three nets, one of which sees smaller crops; weights 3, 2, 1; image_errors of each and of all."""
    made = [
        make_run(tmp_path, name, data, seed, recipe=recipe)
        for name, seed, recipe in (("a", 1, "tiny"), ("b", 2, "narrow"), ("c", 3, "tiny"))
    ]
    each = [probabilities(run, data, views) for run in made]
    labels = each[0][1]
    whole = np.tensordot(np.array([3, 2, 1]) / 6, np.stack([p for p, _ in each]), axes=1)
    found = evaluate(
        [Place(run) for run in made], views=views, weights=[3, 2, 1], batch_size=60, threads=1, device="cpu"
    )
    for document, p in zip([*found.document["nets"], found.document], [*(p for p, _ in each), whole], strict=True):
        error, loss = 100 * np.mean(p.argmax(axis=1) != labels), -np.log(p[np.arange(len(labels)), labels]).mean()
        assert document["top1_error"] == pytest.approx(error)
        assert document["loss"] == pytest.approx(loss, rel=1e-5)  # other batch sizes round convolutions otherwise
        assert document["top1_standard_error"] == pytest.approx(np.sqrt(error * (100 - error) / len(labels)))
    assert found.document["top5_error"] == 0  # of four classes
    np.testing.assert_array_equal(found.scores.best, np.argsort(-whole, axis=1))
    assert (found.document["images"], found.document["samples"]) == (20, 20)
    assert [net["weight"] for net in found.document["nets"]] == [1 / 2, 1 / 3, 1 / 6]


def test_weights_searched_on_a_split(data: Path, tmp_path: Path) -> None:
    """On the evaluated split from the predictions kept on disk, on another from a pass of its own: as if given, up to rounding."""
    places = [Place(make_run(tmp_path, name, data, seed)) for name, seed in (("a", 1), ("b", 2))]

    def found(**options: Any) -> dict[str, Any]:
        return evaluate(places, threads=1, device="cpu", batch_size=16, **options).document

    same, other = found(weights="search"), found(weights="search", weights_from="train")
    assert (same["weights_from"], other["weights_from"]) == ("val", "train")
    for document in (same, other):
        weights = [net["weight"] for net in document["nets"]]
        given = found(weights=weights)
        assert document["loss"] == pytest.approx(given["loss"], rel=1e-6)
        assert document["top1_error"] == pytest.approx(given["top1_error"])
    assert same["loss"] <= found()["loss"] + 1e-6
    assert other["images"] == 20


def predicted(p: Array, labels: NDArray[np.int64]) -> Predicted:
    return Predicted(torch.from_numpy(np.log(p)), torch.from_numpy(labels), torch.arange(len(labels)))


def scored(p: Array, labels: NDArray[np.int64]) -> Scores:
    scores = Scores()
    scores.add(predicted(p, labels))
    return scores


def test_images_without_a_label_are_left_out_of_errors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = softmax(rng.normal(size=(40, 9)), axis=-1)
    labels = rng.integers(-1, 9, size=40)
    known = labels >= 0
    scores = scored(p, labels)
    assert scores.summary() == scored(p[known], labels[known]).summary()
    assert scores.images == 40 and len(scores.best) == 40
    assert set(scored(p, np.full(40, -1)).summary().values()) == {None}


def test_classes_and_confusions() -> None:
    labels = np.array([0, 0, 0, 1, 1, 3, 3, -1])  # no image of class 2
    p = np.full((8, 4), 0.1)
    p[np.arange(8), [0, 1, 1, 1, 1, 0, 1, 2]] = 0.7
    scores = scored(p, labels)
    names = ["cat", "dog", "emu, grey", "fox"]
    table = scores.by_class(names)
    assert [row.images for row in table] == [3, 2, 0, 2]
    assert [row.top1_error for row in table] == [pytest.approx(200 / 3), 0, None, 100]
    assert [row.name for row in ranked(table)] == ["dog", "cat", "fox"]
    pairs = [("cat", "dog", 2, 3), ("fox", "cat", 1, 2), ("fox", "dog", 1, 2)]
    assert [tuple(pair.values()) for pair in scores.confusions(names)] == pairs
    lines = class_csv(table).decode().splitlines()
    assert lines[0] == "label,class,images,top1_error,top5_error" and lines[3] == '2,"emu, grey",0,,'
    assert lines[1] == "0,cat,3,66.6667,0.0000"


def test_ties_go_to_the_lower_label_in_guesses_and_are_shared_in_errors() -> None:
    scores = scored(np.array([[0.1, 0.3, 0.3, 0.3]]), np.array([3]))
    assert scores.best.tolist() == [[1, 2, 3, 0]]
    assert scores.summary()["top1_error"] == pytest.approx(100 * 2 / 3)
    levels = np.random.default_rng(0).integers(1, 10, size=(400, 11)).astype(np.float64)
    best = scored(levels, np.zeros(400, np.int64)).best
    np.testing.assert_array_equal(best, np.argsort(-levels, axis=1, kind="stable")[:, :5])


def test_checkpoints_of_one_run(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", data, 1, steps=(2, 4, 6))
    assert place_named(tmp_path, "a@4") == (run, 4) and place_named(tmp_path, None) == (run, None)
    assert evaluate_run(run, threads=1)["step"] == 6
    found = evaluate([Place(run, 4), Place(run)], threads=1)
    assert [net["step"] for net in found.document["nets"]] == [4, 6]
    assert "run" not in found.document and publish_evaluation(found.document, tmp_path).parent == tmp_path
    for text, words in (("a@x", "'x' is no step"), ("a@", "'' is no step")):
        with pytest.raises(AlexprepError, match=words):
            place_named(tmp_path, text)
    with pytest.raises(AlexprepError, match="named twice"):
        evaluate([Place(run), Place(run, 6)])
    file = next((run / "checkpoints").glob("step-00000004-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AlexprepError, match=r"checkpoint of step 4 .* is damaged"):
        evaluate_run(run, 4)


def sharded(source: Path, folder: Path, **options: Any) -> Path:
    """A data set with statistics."""
    convert(source, folder, ShardOptions(Target(size=64), **options), 1)
    rgb_statistics.publish_statistics(rgb_statistics.pca_stats(folder, "train", 1), folder, "train")
    return folder


def relative(photos: Path, folder: Path, numbers: str) -> Path:
    """A set like `data`, whose classes come in another order or not."""
    labels = folder.with_suffix(".txt")
    labels.write_text("\n".join(f"class{n}" for n in numbers))
    return sharded(photos, folder, limit=8, seed=5, labels=str(labels))


def test_a_recipe_may_change_in_what_an_evaluation_does_not_show(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tiny = make_run(tmp_path, "a", data, 1), recipes.TINY
    noisier = replace(tiny, lr=1.0, decay=0.1, augmentation=replace(tiny.augmentation, noise_sigma=0.2))
    monkeypatch.setitem(recipes.RECIPES, "tiny", noisier)
    assert open_net(Place(run), CPU).step == 2
    monkeypatch.setitem(recipes.RECIPES, "tiny", replace(tiny, width=0.5))
    with pytest.raises(AlexprepError, match=r"recipe tiny has changed .*: width was 1.0, is now 0.5"):
        open_net(Place(run), CPU)


def test_a_network_that_another_release_has_changed_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "a", data, 1)

    def tiny_net(classes: int, crop: int, **options: Any) -> torch.nn.Module:
        return pooled_network(classes, crop, **options)

    monkeypatch.setitem(recipes.RECIPES, "tiny", replace(recipes.TINY, network=tiny_net))
    with pytest.raises(
        AlexprepError, match=r"the network of recipe tiny has changed since step 2 was saved: .*; train anew"
    ):
        open_net(Place(run), CPU)


def test_nets_that_do_not_go_together(data: Path, photos: Path, tmp_path: Path) -> None:
    other = relative(photos, tmp_path / "other", "1023")
    here, there = make_run(tmp_path, "a", data, 1), make_run(tmp_path, "b", other, 2)
    with pytest.raises(AlexprepError, match=r"different data: data was .*--data"):
        evaluate([Place(here), Place(there)])
    with pytest.raises(AlexprepError, match=r"2 of 4 labels differ, classes\[0\] was 'class1', is now 'class0'"):
        evaluate([Place(here), Place(there)], data=data)


def test_another_data_set_of_the_same_classes_is_seen_less_the_mean_of_the_training(
    data: Path, photos: Path, tmp_path: Path
) -> None:
    run, same = make_run(tmp_path, "a", data, 1), relative(photos, tmp_path / "same", "0123")
    spy = mock.Mock(wraps=Loader)
    found = evaluate_run(run, data=same, threads=1, device="cpu", open_loader=spy)
    assert spy.call_args.kwargs["statistics"] == data and found["notes"] == [] and found["images"] == 8
    (run / "config.json").write_text((run / "config.json").read_text().replace(str(data), str(data / "gone")))
    found = evaluate_run(run, data=same, threads=1, device="cpu", open_loader=spy)
    assert "statistics" not in spy.call_args.kwargs
    assert ["cannot be told" in found["notes"][0], "less their own mean" in found["notes"][1]] == [True, True]


def test_loaders_that_disagree_are_noticed(data: Path, tmp_path: Path, wide_and_narrow: None) -> None:
    places = [Place(make_run(tmp_path, f"r{n}", data, n, recipe=recipe)) for n, recipe in enumerate(("tiny", "narrow"))]

    class Other(Loader):
        def __init__(self, *place: Any, **options: Any) -> None:
            late = options["augmentation"].crop == 48
            super().__init__(*place, **(options | {"order": "shuffle" if late else "sequential"}))

    with pytest.raises(AlexprepError, match="give different ones"):
        evaluate(places, threads=1, device="cpu", open_loader=Other)


# Weights


def test_mixture_equals_numpy_even_where_probabilities_vanish(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = softmax(rng.normal(scale=3, size=(50, 7, 30)), axis=-1)
    weights = shares(rng.random(7).tolist(), 7)
    found = mixture(torch.from_numpy(np.log(p)), weights).numpy()
    np.testing.assert_allclose(found, np.log(np.tensordot(p, weights, axes=(1, 0))), rtol=1e-12)
    logs = torch.tensor([[[-2000.0, 0.0], [-3000.0, 0.0]]], dtype=torch.float64)
    assert mixture(logs, [0.5, 0.5])[0, 0].item() == pytest.approx(-2000 + np.log(0.5))
    assert mixture(logs, [0.0, 1.0])[0, 0].item() == -3000


def test_what_the_search_keeps_decides_every_weighting(seed: int) -> None:
    """The error that the search computes from undecided classes alone is the error, ties included, for any weights."""
    rng = np.random.default_rng(seed)
    levels = np.array([0.01, 0.02, 0.04, 0.08])  # so few values that many tie
    p = levels[rng.integers(0, 4, size=(300, 3, 12))]
    labels = rng.integers(-1, 12, size=300)
    search = WeightSearch()
    for first in range(0, 300, 64):
        search.add(predicted(p[first : first + 64], labels[first : first + 64]))
    search.best_weights()
    for coefficients in ([1, 0, 0], [10, 10, 10], [20, 5, 1], [0, 3, 7], [1, 2, 4]):
        exact = np.zeros((300, 12))
        for net, coefficient in enumerate(coefficients):  # multiples of 0.01 as integers: ties are exact
            exact += coefficient * np.round(100 * p[:, net])
        columns = image_errors(torch.from_numpy(np.log(exact)), torch.from_numpy(labels)).numpy()[:, labels >= 0]
        assert search.error(coefficients) == pytest.approx(1 - columns[2].mean(), abs=1e-12)
        shared = mixture(torch.from_numpy(np.log(p)), shares(coefficients, 3))
        losses = image_errors(shared, torch.from_numpy(labels)).numpy()[0, labels >= 0]
        assert search.loss(coefficients) == pytest.approx(losses.mean(), rel=1e-12)


def test_the_search_finds_the_known_optimum() -> None:
    """Six classes, the label's rivals all alike: half of the images need a share of net a above 0.6, half one below 0.7."""

    def image(a: float, b: float) -> Array:
        return np.array([[q, *[(1 - q) / 5] * 5] for q in (a, b)])

    p = np.stack([image(0.2, (1 / 6 - 0.6 * 0.2) / 0.4)] * 10 + [image((1 / 6 - 0.3 * 0.2) / 0.7, 0.2)] * 10)
    search = WeightSearch()
    search.add(predicted(p, np.zeros(20, np.int64)))
    found = search.best_weights()
    assert 0.6 < found[0] < 0.7 and sum(found) == pytest.approx(1)
    assert search.error([13, 7]) == 0 and search.error([10, 10]) == search.error([20, 5]) == 0.5


def test_the_search_leaves_a_harmful_net_out() -> None:
    """Equal top-5 errors are told apart by the cross-entropy; here there are four classes, so top-5 never errs."""
    good, bad = [0.7, 0.1, 0.1, 0.1], [0.01, 0.33, 0.33, 0.33]
    search = WeightSearch()
    search.add(predicted(np.array([[good, bad]] * 9), np.zeros(9, np.int64)))
    assert search.best_weights() == [1, 0]
    nothing = WeightSearch()
    nothing.add(predicted(np.array([[good, bad]]), np.array([-1])))
    with pytest.raises(AlexprepError, match="none of the images has a label"):
        nothing.best_weights()


@pytest.mark.parametrize("weights", [[1.0], [1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_make_no_sense(weights: list[float]) -> None:
    with pytest.raises(AlexprepError, match="--weights"):
        shares(weights, 2)


# The command


@pytest.fixture
def runs(data: Path, tmp_path: Path) -> Path:
    """Two runs on `data`, in ./runs."""
    for name, seed in (("a", 1), ("b", 2)):
        make_run(tmp_path / "runs", name, data, seed, steps=(0,))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def ilsvrc(photo: Any, encoded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Kaggle has it, in six classes numbered by the devkit: 12 train, 6 val, and 9 test images of which one cannot be read."""
    source, out = tmp_path_factory.mktemp("kaggle"), tmp_path_factory.mktemp("ilsvrc")
    images = source / "ILSVRC/Data/CLS-LOC"
    files = {f"train/{WNIDS[n % 6]}/{n}.JPEG": n for n in range(12)}
    files |= {f"val/ILSVRC2012_val_{n:08d}.JPEG": 100 + n for n in range(1, 7)}
    files |= {f"test/ILSVRC2012_test_{n:08d}.JPEG": 200 + n for n in range(1, 10)}
    for name, seed in files.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(b"no image" if name.endswith(UNREADABLE) else encoded(photo(70, 64, seed)))
    rows = ["ImageId,PredictionString", *(f"ILSVRC2012_val_{n:08d},{WNIDS[n - 1]} 1 2 3 4" for n in range(1, 7))]
    (source / "LOC_val_solution.csv").write_text("\n".join(rows))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([(n + 1, wnid, "w", "g", 0) for n, wnid in enumerate(WNIDS)], dtype=fields)
    (source / "ILSVRC2012_devkit_t12/data").mkdir(parents=True)
    savemat(source / "ILSVRC2012_devkit_t12/data/meta.mat", {"synsets": synsets.reshape(-1, 1)})
    return sharded(source, out, shard_samples=4, labels="ilsvrc-id")


Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def told(command: Told) -> Told:
    """Runs `alexprep eval` in this process and in `tmp_path`: exit status, stdout, stderr."""
    return lambda *arguments: command("eval", *arguments, "--threads", "1", "--device", "cpu")


def test_two_nets_and_their_classes(runs: Path, told: Told) -> None:
    status, out, err = told("a", "b@0", "--weights", "3,1", "--json", "--classes")
    assert status == 0 and err == ""
    document = json.loads(out.splitlines()[-1])
    assert [net["weight"] for net in document["nets"]] == [0.75, 0.25]
    assert document["weights"] == "given" and document["precision"] == "fp32"
    assert min(document["images_per_second"], document["data_wait_ms"], document["step_ms"]) > 0
    assert "All as one, the mean of their softmax outputs" in out and "All classes" in out
    assert "of the time waiting for data" in out and "(standard error " in out
    assert sum("class" in line and " % " in line for line in out.splitlines()) == 4
    written = json.loads(Path(document["result_file"]).read_text())
    assert Path(document["result_file"]).parent == Path("runs")
    assert written["top1_error"] == document["top1_error"] and written["confusions"] == document["confusions"]
    status, out, _ = told("a", "b", "--weights", "search")
    assert status == 0 and "Weights chosen on 'val', the very images that are measured" in out


def test_all_classes_in_a_file(runs: Path, told: Told) -> None:
    status, out, _ = told("a", "--classes", "classes.csv", "--json")
    rows = list(csv.DictReader(Path("classes.csv").read_text().splitlines()))
    assert status == 0 and [row["class"] for row in rows] == [f"class{n}" for n in range(4)]
    assert [int(row["images"]) for row in rows] == [5] * 4
    document = json.loads(out.splitlines()[-1])
    assert np.mean([float(row["top1_error"]) for row in rows]) == pytest.approx(document["top1_error"])
    assert document["result_file"].startswith("runs/a/eval-val-centre-")


def test_a_submission_is_in_the_order_of_the_file_names(ilsvrc: Path, told: Told, tmp_path: Path) -> None:
    """Each line is held against the plan (key -> file name) and the shards (row -> key), independently of the ledger."""
    make_run(tmp_path / "runs", "a", ilsvrc, 7, steps=(0,))
    status, out, err = told("a", "--split", "test", "--submission", "guesses.txt", "--json", "--classes")
    document = json.loads(out.splitlines()[-1])
    assert status == 0, err
    assert (document["top1_error"], document["loss"], document["samples"], document["images"]) == (None, None, 0, 8)
    assert "unknown: no image has a label" in out
    assert "9 lines in guesses.txt, from ILSVRC2012_test_00000001.JPEG to ILSVRC2012_test_00000009.JPEG" in out
    assert f"1 images could not be read when the set was made, among them ILSVRC/Data/CLS-LOC/test/{UNREADABLE}" in err

    keys = []
    for path in sorted((ilsvrc / "test").glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += [int(name[:8]) for name in tar.getnames() if name.endswith(".jpg")]
    plan = pq.read_table(ilsvrc / "plan.parquet").to_pylist()
    names = {row["row"]: row["path"].decode().rsplit("/", 1)[1] for row in plan if row["split"] == "test"}
    best = evaluate([Place(tmp_path / "runs/a")], split="test", threads=1, device="cpu").scores.best
    wanted = {names[key]: [label + 1 for label in row] for key, row in zip(keys, best.tolist(), strict=True)}
    wanted[UNREADABLE] = [1, 2, 3, 4, 5]
    lines = Path("guesses.txt").read_text().splitlines()
    assert [list(map(int, line.split(" "))) for line in lines] == [wanted[name] for name in sorted(wanted)]
    assert len({tuple(row) for row in wanted.values()}) > 2  # so that an order by chance would be seen

    make_run(tmp_path / "runs", "b", ilsvrc, 8, steps=(0,))
    status, _, err = told("a", "b", "--split", "test", "--weights", "search")
    assert status == 1 and "none of the images has a label" in err
    status, out, _ = told("a", "b", "--split", "test", "--weights", "search", "--weights-from", "val")
    assert status == 0 and "Weights chosen on 'val'." in out


def test_a_submission_must_mean_something(data: Path, ilsvrc: Path, tmp_path: Path) -> None:
    with pytest.raises(AlexprepError, match=r"those of .* are 'auto': shard with `--labels ilsvrc-id`"):
        check_submission(data, "val")
    check_submission(ilsvrc, "test")
    with pytest.raises(AlexprepError, match="lists 8 images, 7 were predicted"):
        make_submission(ilsvrc, "test", np.zeros((7, 5), np.int32), np.arange(7))
    twice = tmp_path / "twice"
    shutil.copytree(ilsvrc, twice)
    ledger = pq.read_table(twice / "test" / "samples.parquet")
    names = ["one/same.JPEG", "other/same.JPEG", *ledger["source"].to_pylist()[2:]]
    pq.write_table(
        ledger.set_column(ledger.column_names.index("source"), "source", [names]), twice / "test" / "samples.parquet"
    )
    with pytest.raises(AlexprepError, match=r"two images named same\.JPEG"):
        check_submission(twice, "test")


@pytest.mark.parametrize("full", ["guesses.txt", "classes.csv"])
def test_a_file_that_cannot_be_written_costs_no_result(
    full: str, ilsvrc: Path, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "runs", "a", ilsvrc, 7, steps=(0,))

    def write(path: Path, content: bytes) -> None:
        if path.name == full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        publish_bytes(path, content)

    monkeypatch.setattr("alexprep.shards.storage.publish_bytes", write)
    status, _, err = told("a", "--split", "val", "--submission", "guesses.txt", "--classes", "classes.csv")
    assert status == 1 and full in err
    assert len(list(tmp_path.glob("runs/a/eval-*.json"))) == 1
    if full == "guesses.txt":
        status, _, err = told("a", "--split", "test", "--submission", full, "--classes", "others.csv")
        assert status == 1 and "there are no errors by class to show" in err and not Path("others.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["c"], 1, "there is no run runs/c: there are a, b"),
        (["a@7"], 1, "runs/a has no checkpoint of step 7: there are 0"),
        (["a", "--weights", "1,2"], 1, "--weights 1,2 are 2 numbers for 1 nets"),
        (["a", "b", "--weights", "big"], 1, "neither equal, search, nor numbers"),
        (["a", "--weights", "search"], 1, "needs several nets"),
        (["a", "b", "--weights-from", "val"], 1, "is the split for --weights search"),
        (["--classes", "a"], 1, "name a file that ends in .csv"),
        (["a", "--classes", "no/where.csv"], 1, "there is no folder no"),
        (["a", "--classes", "folder.csv"], 1, "folder.csv is a folder: name a file in it"),
        (["a", "--submission", "guesses.txt"], 1, "needs labels that are ILSVRC IDs less 1"),
        (["a", "--split", "test"], 1, "no samples in split 'test'"),
        (["a", "--views", "five"], 2, "'five' is not one of"),
        (["a", "--data", "nowhere"], 1, "make one with `alexprep shard SOURCE`"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], status: int, words: str, runs: Path, told: Told) -> None:
    Path("folder.csv").mkdir()
    found, out, err = told(*arguments)
    assert found == status and words in err and out == ""
    assert not list(runs.glob("**/eval-*"))


def test_ctrl_c_and_runs_that_cannot_be_written(runs: Path, told: Told) -> None:
    full = PermissionError(13, "Permission denied", "runs/a/eval-val.json")
    with mock.patch("alexprep.train.evaluation.publish_json", side_effect=full):
        status, out, err = told("a")
        assert status == 0 and "top-1 error" in out and "was not written (Permission denied" in err

    with mock.patch("alexprep.train.evaluation.predictions", side_effect=KeyboardInterrupt):
        status, out, err = told("a")
    assert status == 130 and out == "" and not list(runs.glob("**/eval-*"))
