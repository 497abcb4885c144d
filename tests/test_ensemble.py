"""Several nets as one, weights that are searched for, figures by class, and unknown labels: against plain numpy in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from alexprep.pipeline.loader import Loader
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.train import checkpoint, recipes
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.ensemble import Contest, Scores, class_csv, mixture, parse_weights, ranked, shares
from alexprep.train.evaluation import evaluate_nets, evaluate_run, publish
from alexprep.train.metrics import evaluate, figures
from alexprep.train.predictions import Predicted, open_net
from alexprep.train.run_dir import Place, place_named
from alexprep.train.training_state import TrainingState

CPU = torch.device("cpu")
Array = NDArray[np.float64]


pytestmark = pytest.mark.usefixtures("one_thread")


def make_run(runs: Path, name: str, data: Path, seed: int, steps: tuple[int, ...] = (2,), recipe: str = "tiny") -> Path:
    """A run with untrained checkpoints, each of other weights."""
    job = prepare(TrainConfig(data=data, recipe=recipe, seed=seed, runs=runs, name=name, device="cpu"))
    for step in steps:
        state = TrainingState(job.recipe, job.facts.classes, seed + 100 * step, CPU)
        state.position.step = step
        facts = {"identity": job.identity, **state.facts(), "versions": {}}
        checkpoint.save(job.run / "checkpoints", step, state.tensors(), facts, keep=9)
    return job.run


@pytest.fixture
def wide_and_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny`, and a recipe that cuts its images otherwise."""
    tiny = recipes.TINY
    narrow = replace(tiny, name="narrow", augmentation=replace(tiny.augmentation, crop=48), stored_sizes=(48, 96))
    monkeypatch.setitem(recipes.RECIPES, "narrow", narrow)


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return total


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
            rows.append(softmax(logits.double().numpy()).mean(axis=1))
            labels.append(batch.labels.numpy())
    return np.concatenate(rows), np.concatenate(labels)


def numpy_figures(p: Array, labels: NDArray[np.int64], k: int) -> tuple[float, float]:
    """Error in percent among the k best, and the mean cross-entropy; for probabilities without ties."""
    best = np.argsort(-p, axis=1)[:, :k]
    error = 100 * float(np.mean(~(best == labels[:, None]).any(axis=1)))
    return error, float(-np.log(p[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("views", ["centre", "ten"])
def test_an_ensemble_equals_numpy(views: Any, data: Path, tmp_path: Path, wide_and_narrow: None) -> None:
    """Three nets, one of which sees smaller crops; weights 3, 2, 1; figures of each and of all."""
    made = [
        make_run(tmp_path, name, data, seed, recipe=recipe)
        for name, seed, recipe in (("a", 1, "tiny"), ("b", 2, "narrow"), ("c", 3, "tiny"))
    ]
    each = [probabilities(run, data, views) for run in made]
    labels = each[0][1]
    whole = np.tensordot(np.array([3, 2, 1]) / 6, np.stack([p for p, _ in each]), axes=1)
    found = evaluate_nets(
        [Place(run) for run in made], views=views, weights=[3, 2, 1], batch_size=60, threads=1, device="cpu"
    )
    for document, p in zip([*found.document["nets"], found.document], [*(p for p, _ in each), whole], strict=True):
        error, loss = numpy_figures(p, labels, 1)
        assert document["top1_error"] == pytest.approx(error)
        assert document["loss"] == pytest.approx(loss, rel=1e-5)  # other batch sizes round convolutions otherwise
        share = error / 100
        assert document["top1_standard_error"] == pytest.approx(100 * np.sqrt(share * (1 - share) / len(labels)))
    assert found.document["top5_error"] == 0  # of four classes
    np.testing.assert_array_equal(found.scores.best, np.argsort(-whole, axis=1))
    assert (found.document["images"], found.document["samples"]) == (20, 20)
    assert [net["weight"] for net in found.document["nets"]] == [1 / 2, 1 / 3, 1 / 6]


def test_mixture_equals_numpy_even_where_probabilities_vanish(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = softmax(rng.normal(scale=3, size=(50, 7, 30)))
    weights = shares(rng.random(7).tolist(), 7)
    found = mixture(torch.from_numpy(np.log(p)), weights).numpy()
    np.testing.assert_allclose(found, np.log(np.tensordot(p, weights, axes=(1, 0))), rtol=1e-12)
    logs = torch.tensor([[[-2000.0, 0.0], [-3000.0, 0.0]]], dtype=torch.float64)
    assert mixture(logs, [0.5, 0.5])[0, 0].item() == pytest.approx(-2000 + np.log(0.5))
    assert mixture(logs, [0.0, 1.0])[0, 0].item() == -3000


def predicted(p: Array, labels: NDArray[np.int64]) -> Predicted:
    return Predicted(torch.from_numpy(np.log(p)), torch.from_numpy(labels), torch.arange(len(labels)))


def test_what_the_search_keeps_decides_every_weighting(seed: int) -> None:
    """The error that the search computes from undecided classes alone is the error, ties included, for any weights."""
    rng = np.random.default_rng(seed)
    levels = np.array([0.01, 0.02, 0.04, 0.08])  # so few values that many tie
    p = levels[rng.integers(0, 4, size=(300, 3, 12))]
    labels = rng.integers(-1, 12, size=300)
    contest = Contest()
    for first in range(0, 300, 64):
        contest.add(predicted(p[first : first + 64], labels[first : first + 64]))
    contest.search()
    for coefficients in ([1, 0, 0], [10, 10, 10], [20, 5, 1], [0, 3, 7], [1, 2, 4]):
        exact = np.zeros((300, 12))
        for net, coefficient in enumerate(coefficients):  # multiples of 0.01 as integers: ties are exact
            exact += coefficient * np.round(100 * p[:, net])
        columns = figures(torch.from_numpy(np.log(exact)), torch.from_numpy(labels)).numpy()[:, labels >= 0]
        assert contest.error(coefficients) == pytest.approx(1 - columns[2].mean(), abs=1e-12)
        shared = mixture(torch.from_numpy(np.log(p)), shares(coefficients, 3))
        losses = figures(shared, torch.from_numpy(labels)).numpy()[0, labels >= 0]
        assert contest.loss(coefficients) == pytest.approx(losses.mean(), rel=1e-12)


def test_the_search_finds_the_known_optimum() -> None:
    """Six classes, the label's rivals all alike: half of the images need a share of net a above 0.6, half one below 0.7."""

    def image(a: float, b: float) -> Array:
        return np.array([[q, *[(1 - q) / 5] * 5] for q in (a, b)])

    p = np.stack([image(0.2, (1 / 6 - 0.6 * 0.2) / 0.4)] * 10 + [image((1 / 6 - 0.3 * 0.2) / 0.7, 0.2)] * 10)
    contest = Contest()
    contest.add(predicted(p, np.zeros(20, np.int64)))
    found = contest.search()
    assert 0.6 < found[0] < 0.7 and sum(found) == pytest.approx(1)
    assert contest.error([13, 7]) == 0 and contest.error([10, 10]) == contest.error([20, 5]) == 0.5


def test_the_search_leaves_a_harmful_net_out() -> None:
    """Equal top-5 errors are told apart by the cross-entropy; here there are four classes, so top-5 never errs."""
    good, bad = [0.7, 0.1, 0.1, 0.1], [0.01, 0.33, 0.33, 0.33]
    contest = Contest()
    contest.add(predicted(np.array([[good, bad]] * 9), np.zeros(9, np.int64)))
    assert contest.search() == [1, 0]
    nothing = Contest()
    nothing.add(predicted(np.array([[good, bad]]), np.array([-1])))
    with pytest.raises(AlexprepError, match="none of the images has a label"):
        nothing.search()


def test_the_search_keeps_little(images: int = 2000) -> None:
    """7 nets with errors like AlexNet's on 1,000 classes; docs/evaluation.md quotes this for 50,000 images."""
    generator = torch.Generator().manual_seed(1)
    contest, whole, single = Contest(), Scores(), Scores()
    for first in range(0, images, 100):
        labels = torch.randint(0, 1000, (100,), generator=generator)
        easy = 7.3 + 2.5 * torch.randn(100, 1, generator=generator)
        logits = 1.6 * torch.randn(100, 1, 1000, generator=generator) + torch.randn(100, 7, 1000, generator=generator)
        logits[torch.arange(100), :, labels] += easy
        batch = Predicted(logits.double().log_softmax(dim=2), labels, torch.arange(first, first + 100))
        contest.add(batch)
        single.add(batch.logs[:, 0], batch)
        whole.add(mixture(batch.logs, [1 / 7] * 7), batch)
    one: dict[str, Any] = single.summary()
    together: dict[str, Any] = whole.summary()
    assert 30 < one["top1_error"] < 40 and 20 < one["top5_error"] < 26
    assert len(contest._others) < 0.04 * images * 1000
    assert contest.error([10] * 7) == pytest.approx(together["top5_error"] / 100, abs=1e-9)
    found = contest.search()
    assert contest.error(found) <= contest.error([10] * 7)


def test_weights_searched_on_a_split(data: Path, tmp_path: Path) -> None:
    """On the evaluated split from the predictions kept on disk, on another from a pass of its own: as if given, up to rounding."""
    places = [Place(make_run(tmp_path, name, data, seed)) for name, seed in (("a", 1), ("b", 2))]

    def found(**options: Any) -> dict[str, Any]:
        return evaluate_nets(places, threads=1, device="cpu", batch_size=16, **options).document

    same, other = found(weights="search"), found(weights="search", weights_from="train")
    assert (same["weights_from"], other["weights_from"]) == ("val", "train")
    for document in (same, other):
        weights = [net["weight"] for net in document["nets"]]
        given = found(weights=weights)
        assert document["loss"] == pytest.approx(given["loss"], rel=1e-6)
        assert document["top1_error"] == pytest.approx(given["top1_error"])
    assert same["loss"] <= found()["loss"] + 1e-6
    assert other["images"] == 20


@pytest.mark.parametrize("weights", [[1.0], [1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_make_no_sense(weights: list[float]) -> None:
    with pytest.raises(AlexprepError, match="--weights"):
        shares(weights, 2)
    with pytest.raises(AlexprepError, match="neither equal, search, nor numbers"):
        parse_weights("much")


def test_images_without_a_label_are_left_out_of_errors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logs = torch.from_numpy(np.log(softmax(rng.normal(size=(40, 9)))))
    labels = torch.from_numpy(rng.integers(-1, 9, size=40))
    known = labels >= 0
    scores, reference = Scores(guesses=True), Scores()
    scores.add(logs, Predicted(logs[:, None], labels, torch.arange(40)))
    reference.add(logs[known], Predicted(logs[known][:, None], labels[known], torch.arange(int(known.sum()))))
    assert scores.summary() == reference.summary() and scores.images == 40 and len(scores.best) == 40
    unknown = Scores()
    unknown.add(logs, Predicted(logs[:, None], torch.full((40,), -1), torch.arange(40)))
    assert set(unknown.summary().values()) == {None}
    with pytest.raises(AlexprepError, match="no errors by class"):
        class_csv(unknown.by_class(list("abcdefghi")))

    class Batch:
        images, labels = torch.zeros(2, 3, 1, 1), torch.tensor([-1, -1])

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2))
    with pytest.raises(AlexprepError, match="none of the images has a label"):
        evaluate(network, [Batch()])


def test_classes_and_confusions() -> None:
    guesses = [
        (0, 0),
        (0, 1),
        (0, 1),
        (1, 1),
        (1, 1),
        (3, 0),
        (3, 1),
        (-1, 2),
    ]  # (label, best guess); no image of class 2
    p = np.full((8, 4), 0.1)
    for row, (_, guess) in enumerate(guesses):
        p[row, guess] = 0.7
    labels = np.array([label for label, _ in guesses])
    scores = Scores(guesses=True)
    scores.add(torch.from_numpy(np.log(p)), predicted(p[:, None], labels))
    names = ["cat", "dog", "emu, grey", "fox"]
    table = scores.by_class(names)
    assert [row.images for row in table] == [3, 2, 0, 2]
    assert [row.top1_error for row in table] == [pytest.approx(200 / 3), 0, None, 100]
    assert [row.name for row in ranked(table)] == ["dog", "cat", "fox"]
    assert scores.confusions(names)[0] == ("cat", "dog", 2, 3)
    assert [pair[:3] for pair in scores.confusions(names)[1:]] == [("fox", "cat", 1), ("fox", "dog", 1)]
    lines = class_csv(table).decode().splitlines()
    assert lines[0] == "label,class,images,top1_error,top5_error" and lines[3] == '2,"emu, grey",0,,'
    assert lines[1] == "0,cat,3,66.6667,0.0000"


def test_ties_go_to_the_lower_label_in_guesses_and_are_shared_in_errors() -> None:
    logs = torch.log(torch.tensor([[0.1, 0.3, 0.3, 0.3]], dtype=torch.float64))
    scores = Scores(guesses=True)
    scores.add(logs, Predicted(logs[:, None], torch.tensor([3]), torch.arange(1)))
    assert scores.best.tolist() == [[1, 2, 3, 0]]
    assert scores.summary()["top1_error"] == pytest.approx(100 * 2 / 3)
    levels = np.random.default_rng(0).integers(0, 9, size=(400, 11)).astype(np.float64)
    many = Scores(guesses=True)
    many.add(torch.from_numpy(levels), Predicted(torch.zeros(400, 1, 11), torch.zeros(400).long(), torch.arange(400)))
    np.testing.assert_array_equal(many.best, np.argsort(-levels, axis=1, kind="stable")[:, :5])


def test_checkpoints_of_one_run(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", data, 1, steps=(2, 4, 6))
    assert place_named(tmp_path, "a@4") == (run, 4) and place_named(tmp_path, None) == (run, None)
    assert evaluate_run(run, threads=1)["step"] == 6
    found = evaluate_nets([Place(run, 4), Place(run)], threads=1)
    assert [net["step"] for net in found.document["nets"]] == [4, 6]
    assert "run" not in found.document and publish(found.document, tmp_path).parent == tmp_path
    for text, words in (("a@x", "'x' is no step"), ("a@", "'' is no step"), ("b@2", "there is no run")):
        with pytest.raises(AlexprepError, match=words):
            place_named(tmp_path, text)
    with pytest.raises(AlexprepError, match="no checkpoint of step 5: there are 2, 4, 6"):
        evaluate_run(run, 5)
    with pytest.raises(AlexprepError, match="named twice"):
        evaluate_nets([Place(run), Place(run, 6)])
    file = next((run / "checkpoints").glob("step-00000004-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AlexprepError, match=r"checkpoint of step 4 .* is damaged"):
        evaluate_run(run, 4)


@pytest.fixture(scope="module")
def relatives(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Sets like `data`: of the same classes, of others, of fewer."""
    root = tmp_path_factory.mktemp("relatives")

    def make(kind: str) -> Path:
        out = root / kind
        if not out.exists():
            names = {"same": [0, 1, 2, 3], "other": [1, 0, 2, 3]}[kind]
            (root / f"{kind}.txt").write_text("\n".join(f"class{n}" for n in names))
            convert(photos, out, ShardOptions(Target(size=64), limit=8, seed=5, labels=str(root / f"{kind}.txt")), 1)
            rgb_statistics.publish_statistics(rgb_statistics.pca_stats(out, "train", 1), out, "train")
        return out

    return make


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


def test_nets_that_do_not_go_together(data: Path, relatives: Callable[[str], Path], tmp_path: Path) -> None:
    here, there = make_run(tmp_path, "a", data, 1), make_run(tmp_path, "b", relatives("other"), 2)
    with pytest.raises(AlexprepError, match=r"different data: data was .*--data"):
        evaluate_nets([Place(here), Place(there)])
    with pytest.raises(AlexprepError, match=r"2 of 4 labels differ, classes\[0\] was 'class1', is now 'class0'"):
        evaluate_nets([Place(here), Place(there)], data=data)
    assert not list(tmp_path.glob("*.json"))


def test_another_data_set_of_the_same_classes_is_seen_less_the_mean_of_the_training(
    data: Path, relatives: Callable[[str], Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path, "a", data, 1)
    asked: list[dict[str, Any]] = []

    def spying(*place: Any, **options: Any) -> Loader:
        asked.append(options)
        return Loader(*place, **options)

    found = evaluate_run(run, data=relatives("same"), threads=1, device="cpu", open_loader=spying)
    assert asked[0]["statistics"] == data and found["notes"] == [] and found["images"] == 8
    (run / "config.json").write_text((run / "config.json").read_text().replace(str(data), str(data / "gone")))
    found = evaluate_run(run, data=relatives("same"), threads=1, device="cpu", open_loader=spying)
    assert "statistics" not in asked[1]
    assert ["cannot be told" in found["notes"][0], "less their own mean" in found["notes"][1]] == [True, True]


def test_loaders_that_disagree_are_noticed(data: Path, tmp_path: Path, wide_and_narrow: None) -> None:
    places = [Place(make_run(tmp_path, f"r{n}", data, n, recipe=recipe)) for n, recipe in enumerate(("tiny", "narrow"))]

    class Other(Loader):
        def __init__(self, *place: Any, **options: Any) -> None:
            late = options["augmentation"].crop == 48
            super().__init__(*place, **(options | {"order": "shuffle" if late else "sequential"}))

    with pytest.raises(AlexprepError, match="give different ones"):
        evaluate_nets(places, threads=1, device="cpu", open_loader=Other)


def test_weights_may_be_as_large_and_as_small_as_a_float_can_be() -> None:
    assert shares([1e308, 1e308, 0], 3) == [0.5, 0.5, 0]
    assert shares([5e-324, 5e-324], 2) == [0.5, 0.5]
