"""`alexprep eval` from the command line: several nets, classes, submissions, words for what is wrong."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat

from alexprep.cli.main import main
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.storage import publish_bytes
from alexprep.train import checkpoint, evaluation
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.evaluation import evaluate_nets
from alexprep.train.run_dir import Place
from alexprep.train.training_state import TrainingState

WNIDS = ["n05", "n03", "n01", "n06", "n02", "n04"]  # by ILSVRC ID, from 1
UNREADABLE = "ILSVRC2012_test_00000003.JPEG"


pytestmark = pytest.mark.usefixtures("one_thread")


def untrained(runs: Path, name: str, data: Path, seed: int) -> None:
    """A run with a checkpoint after no step."""
    job = prepare(TrainConfig(data=data, recipe="tiny", seed=seed, runs=runs, name=name, device="cpu"))
    state = TrainingState(job.recipe, job.facts.classes, seed, job.device)
    facts = {"identity": job.identity, **state.facts(), "versions": {}}
    checkpoint.save(job.run / "checkpoints", 0, state.tensors(), facts, keep=1)


@pytest.fixture
def runs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs on `data`, in ./runs."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        untrained(tmp_path / "runs", name, data, seed)
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
    convert(source, out, ShardOptions(Target(size=64), shard_samples=4, labels="ilsvrc-id"), 1)
    rgb_statistics.publish_statistics(rgb_statistics.pca_stats(out, "train", 1), out, "train")
    return out


Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    """Runs `alexprep eval` in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["alexprep", "eval", *arguments, "--threads", "1", "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


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


def test_searched_weights_say_where_they_come_from(runs: Path, told: Told) -> None:
    status, out, _ = told("a", "b", "--weights", "search")
    assert status == 0 and "Weights chosen on 'val', the very images that are measured" in out
    status, out, _ = told("a", "b", "--weights", "search", "--weights-from", "train")
    assert status == 0 and "Weights chosen on 'train'.\n" in out


def test_all_classes_in_a_file(runs: Path, told: Told) -> None:
    status, out, _ = told("a", "--classes", "classes.csv", "--json")
    rows = list(csv.DictReader(Path("classes.csv").read_text().splitlines()))
    assert status == 0 and [row["class"] for row in rows] == [f"class{n}" for n in range(4)]
    assert [int(row["images"]) for row in rows] == [5] * 4
    document = json.loads(out.splitlines()[-1])
    assert np.mean([float(row["top1_error"]) for row in rows]) == pytest.approx(document["top1_error"])
    assert Path(document["result_file"]).parent == runs / "a" or document["result_file"].startswith(
        "runs/a/eval-val-centre-"
    )


def test_a_submission_is_in_the_order_of_the_file_names(
    ilsvrc: Path, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is held against the plan (key -> file name) and the shards (row -> key), independently of the ledger."""
    monkeypatch.chdir(tmp_path)
    untrained(tmp_path / "runs", "a", ilsvrc, 7)
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
    best = evaluate_nets([Place(tmp_path / "runs/a")], split="test", threads=1, device="cpu").scores.best
    wanted = {names[key]: [label + 1 for label in row] for key, row in zip(keys, best.tolist(), strict=True)}
    wanted[UNREADABLE] = [1, 2, 3, 4, 5]
    lines = Path("guesses.txt").read_text().splitlines()
    assert [list(map(int, line.split(" "))) for line in lines] == [wanted[name] for name in sorted(wanted)]
    assert len({tuple(row) for row in wanted.values()}) > 2  # so that an order by chance would be seen

    status, _, err = told("a", "a@0", "--split", "test")
    assert status == 1 and "one net is named twice" in err
    untrained(tmp_path / "runs", "b", ilsvrc, 8)
    status, _, err = told("a", "b", "--split", "test", "--weights", "search")
    assert status == 1 and "none of the images has a label" in err
    status, out, _ = told("a", "b", "--split", "test", "--weights", "search", "--weights-from", "val")
    assert status == 0 and "Weights chosen on 'val'." in out


def test_a_submission_must_mean_something(data: Path, ilsvrc: Path, tmp_path: Path) -> None:
    with pytest.raises(AlexprepError, match=r"those of .* are 'auto': shard with `--labels ilsvrc-id`"):
        evaluation.check(data, "val")
    evaluation.check(ilsvrc, "test")
    with pytest.raises(AlexprepError, match="lists 8 images, 7 were predicted"):
        evaluation.submission(ilsvrc, "test", np.zeros((7, 5), np.int32), np.arange(7))
    twice = tmp_path / "twice"
    shutil.copytree(ilsvrc, twice)
    ledger = pq.read_table(twice / "test" / "samples.parquet")
    names = ["one/same.JPEG", "other/same.JPEG", *ledger["source"].to_pylist()[2:]]
    pq.write_table(
        ledger.set_column(ledger.column_names.index("source"), "source", [names]), twice / "test" / "samples.parquet"
    )
    with pytest.raises(AlexprepError, match=r"two images named same\.JPEG"):
        evaluation.check(twice, "test")


def test_a_submission_that_fails_costs_no_result(
    ilsvrc: Path, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    untrained(tmp_path / "runs", "a", ilsvrc, 7)

    def full(path: Path, content: bytes) -> None:
        if path.name == "guesses.txt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        publish_bytes(path, content)

    monkeypatch.setattr("alexprep.shards.storage.publish_bytes", full)
    status, _, err = told("a", "--split", "test", "--submission", "guesses.txt", "--classes", "classes.csv")
    assert status == 1 and "guesses.txt" in err and "there are no errors by class to show" in err
    assert len(list(tmp_path.glob("runs/a/eval-*.json"))) == 1 and not Path("classes.csv").exists()


def test_a_table_of_classes_that_fails_costs_no_result(runs: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.name == "classes.csv":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        publish_bytes(path, content)

    monkeypatch.setattr("alexprep.shards.storage.publish_bytes", full)
    before = set(runs.rglob("eval-*.json"))
    status, _, err = told("a", "--classes", "classes.csv")
    assert status == 1 and "classes.csv" in err
    assert len(set(runs.rglob("eval-*.json")) - before) == 1


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


def test_ctrl_c_and_runs_that_cannot_be_written(runs: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "runs/a/eval-val.json")

    with monkeypatch.context() as patch:
        patch.setattr("alexprep.train.evaluation.publish_json", full)
        status, out, err = told("a")
        assert status == 0 and "top-1 error" in out and "was not written (Permission denied" in err

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("alexprep.train.ensemble.predictions", interrupted)
    status, out, err = told("a")
    assert status == 130 and out == "" and not list(runs.glob("**/eval-*"))
