"""The loop on a made-up loader: it learns, and being stopped, killed or broken off anywhere changes nothing.

Run as a program, this file trains once; the tests start it to have something to kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alexprep.shards.dataset_format import INDEX_DTYPE
from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint, recipes, run_dir
from alexprep.train.config import CHECKPOINT_STEPS, KEEP, REMEMBERED, TrainConfig, prepare
from alexprep.train.evaluation import evaluate_run
from alexprep.train.lr_schedule import Plateau
from alexprep.train.runtime import Forwarded, StopRequest
from alexprep.train.trainer import train
from tests.made_up import BATCH, Batch, MadeUpLoader, small_recipe, write_data

DEADLINE = 60.0  # seconds, for everything that waits
ROOT = Path(__file__).parents[1]
EPOCH_STEPS = 6  # of the made-up loader


class Stopping(MadeUpLoader):
    """SIGTERM comes before the fifth step of the first epoch, which is still taken."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.split == "train" and (self.epoch, self.step) == (0, 5):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set's facts without its images, and the recipe "small" in the registry."""
    monkeypatch.setitem(recipes.RECIPES, "small", small_recipe())
    return write_data(tmp_path / "data")


def config(folder: Path, **changes: Any) -> TrainConfig:
    """Settings for a run beside the data set in `folder`."""
    settings: dict[str, Any] = {
        "data": folder,
        "recipe": "small",
        "runs": folder.parent / "runs",
        "device": "cpu",
        "log_steps": 4,
    }
    return TrainConfig(**settings | changes)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def child(data: Path, stderr: Any = subprocess.PIPE, **settings: Any) -> subprocess.Popen[str]:
    """Trains in a process of its own."""
    environment = os.environ | {"PAUSE": str(settings.pop("pause", 0))}
    command = [sys.executable, "-m", "tests.test_loop", json.dumps({"data": str(data), **settings})]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """Its summary and what it said."""
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + DEADLINE
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"no {pattern} in {path}"
        time.sleep(0.005)


def test_it_learns_and_tells(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(config(data), MadeUpLoader)
    run = data.parent / "runs" / "small"
    assert summary["val_top1_error"] < 20
    assert summary == json.loads((run / "summary.json").read_text())
    keys = "run recipe device precision ranks steps epochs epoch_steps train_loss val_split val_top1_error val_top5_error val_loss"
    keys += " images_per_second data_wait_ms step_ms skipped_steps seconds weights_sha256 stopped_by"
    assert list(summary) == keys.split()
    assert (summary["steps"], summary["epochs"], summary["val_split"], summary["stopped_by"]) == (18, 3, "val", None)
    epochs = records(run, "epoch")
    assert [(record["epoch"], record["step"], record["lr"]) for record in epochs] == [
        (0, 6, 0.01),
        (1, 12, 0.01),
        (2, 18, 0.001),
    ]
    assert epochs[-1]["val"]["top1_error"] == summary["val_top1_error"]
    assert epochs[-1]["loss"] == summary["train_loss"] < epochs[0]["loss"]
    assert [record["step"] for record in records(run, "steps")] == [1, 4, 6, 8, 12, 16, 18]
    assert all(record["step_ms"] > 0 and record["data_wait_ms"] > 0 for record in records(run, "steps"))
    told = capsys.readouterr().err
    assert "small on this CPU: about" in told
    assert "epoch 3 in" in told


def test_a_steps_record_is_the_mean_since_the_last(data: Path) -> None:
    """Losses of single steps, averaged by hand, are those of the coarser log."""
    train(config(data, log_steps=1, epochs=1, name="fine"), MadeUpLoader)
    train(config(data, log_steps=5, epochs=1, name="coarse"), MadeUpLoader)
    fine = {record["step"]: record["loss"] for record in records(data.parent / "runs/fine", "steps")}
    sizes = [8, 8, 8, 8, 8, 6]
    coarse = {record["step"]: record["loss"] for record in records(data.parent / "runs/coarse", "steps")}
    assert list(coarse) == [1, 5, 6]
    assert coarse[5] == pytest.approx(np.mean([fine[step] for step in (2, 3, 4, 5)]), rel=1e-12)
    epoch = records(data.parent / "runs/coarse", "epoch")[0]["loss"]
    assert epoch == pytest.approx(np.average([fine[step] for step in range(1, 7)], weights=sizes), rel=1e-12)


def test_resuming_from_any_step_ends_with_the_same_bits(data: Path) -> None:
    """Grain's rule: a checkpoint after every step, each of them continued to the end."""
    whole = train(config(data, name="whole", checkpoint_steps=1, keep=20), MadeUpLoader)
    run = data.parent / "runs" / "whole"
    logged = records(run, "epoch")
    for step in range(1, whole["steps"]):
        part = shutil.copytree(run, run.with_name(f"part{step}"))
        for later in range(step + 1, whole["steps"] + 1):
            (part / f"checkpoints/step-{later:08d}.json").unlink()
        rest = train(config(data, name=f"part{step}", resume=True), MadeUpLoader)
        assert rest["weights_sha256"] == whole["weights_sha256"], f"stopped after step {step}"
        same = ("val_top1_error", "val_loss", "train_loss", "epochs")
        assert {key: rest[key] for key in same} == {key: whole[key] for key in same}
        again = records(data.parent / "runs" / f"part{step}", "epoch")
        timeless = [[{**record, "seconds": 0} for record in log] for log in (logged, again)]
        assert timeless[0] == timeless[1]


def test_killed_at_random_moments_it_ends_with_the_same_bits(data: Path) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    whole = train(config(data), MadeUpLoader)["weights_sha256"]
    checkpoints = data.parent / "runs" / "killed" / "checkpoints"
    options: dict[str, Any] = {"name": "killed", "checkpoint_steps": 1, "pause": 0.03}
    for kills, step in enumerate((2, 8, 13)):
        process = child(data, resume=kills > 0, **options)
        wait_for(checkpoints, f"step-{step:08d}.json", process)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE)
        assert process.returncode == -signal.SIGKILL
    summary, _ = finished(child(data, name="killed", resume=True))
    assert summary["weights_sha256"] == whole, f"seed {seed}"
    steps = [record["step"] for record in records(data.parent / "runs" / "killed", "epoch")]
    assert steps == [6, 12, 18]


@pytest.mark.parametrize(
    ("number", "name"), [(number, number.name) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
)
def test_a_signal_saves_and_leaves(data: Path, number: signal.Signals, name: str) -> None:
    process = child(data, name="asked", checkpoint_steps=3, pause=0.03)
    wait_for(data.parent / "runs" / "asked" / "checkpoints", "step-00000003.json", process)
    process.send_signal(number)
    summary, said = finished(process)
    assert summary["stopped_by"] == name
    assert 3 <= summary["steps"] < 18
    if summary["steps"] % EPOCH_STEPS:
        assert summary["val_loss"] is None  # the last epoch's was of other weights
    assert f"stopped by {name} after step {summary['steps']}" in said
    resumed = train(config(data, name="asked", resume=True), MadeUpLoader)
    assert resumed["weights_sha256"] == train(config(data, name="whole"), MadeUpLoader)["weights_sha256"]


def test_a_closing_terminal_s_signals_are_one_request() -> None:
    """Under nohup, which ignores them, they are none."""
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: heard.append(number))
    try:
        with StopRequest().listening() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
        with Forwarded([]) as forwarded:
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
        assert stop.signal == forwarded.sent == signal.SIGHUP and not heard
        signal.raise_signal(signal.SIGHUP)
        assert heard  # whoever listened before listens again
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest().listening() as stop, Forwarded([]) as forwarded:
            signal.raise_signal(signal.SIGHUP)
        assert (stop.signal, forwarded.sent) == (None, None)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("place", ["pipe", "full"])
def test_words_that_nobody_can_read_cost_no_step(data: Path, place: str) -> None:
    """The pipe is closed after a line, as by `head`; the disk that stderr goes to is full."""
    whole = train(config(data), MadeUpLoader)["weights_sha256"]
    with open("/dev/full", "w") as full:
        process = child(data, full if place == "full" else subprocess.PIPE, name=place)
        if process.stderr:
            process.stderr.readline()
            process.stderr.close()
        out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert json.loads(out.splitlines()[-1])["weights_sha256"] == whole


@pytest.mark.parametrize("evaluation", [0, 2])
def test_a_signal_during_evaluation_is_heeded(evaluation: int, data: Path) -> None:
    class Signalling(MadeUpLoader):
        def __iter__(self) -> Iterator[Batch]:
            now = self.split == "val" and self.epoch == evaluation
            for batch in super().__iter__():
                if now:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    whole = train(config(data, name="whole"), MadeUpLoader)
    before = signal.getsignal(signal.SIGTERM)
    part = train(config(data, name="part"), Signalling)
    done = ("SIGTERM", EPOCH_STEPS * (evaluation + 1), evaluation, None)
    assert (part["stopped_by"], part["steps"], part["epochs"], part["val_loss"]) == done
    assert signal.getsignal(signal.SIGTERM) == before
    rest = train(config(data, name="part", resume=True), MadeUpLoader)
    same = ("steps", "epochs", "val_loss", "weights_sha256")
    assert {key: rest[key] for key in same} == {key: whole[key] for key in same}
    assert [record["step"] for record in records(data.parent / "runs" / "part", "epoch")] == [6, 12, 18]


def test_the_newest_damaged_checkpoint_is_skipped_with_a_word(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(config(data), MadeUpLoader)
    run = data.parent / "runs" / "small"
    newest = max((run / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = train(config(data, resume=True), MadeUpLoader)
    assert "skipped the checkpoint of step 18" in capsys.readouterr().err
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert evaluate_run(run, device="cpu", open_loader=MadeUpLoader)["step"] == 18


@pytest.mark.parametrize("last", ["none", "steps", "epoch"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(data: Path, last: str) -> None:
    """The records of a step are logged before its checkpoint is saved."""
    whole = train(config(data), MadeUpLoader)
    run = data.parent / "runs" / "small"
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    count = {"none": 0, "steps": kinds.index("epoch"), "epoch": kinds.index("epoch") + 1}[last]
    (run / "log.jsonl").write_text("".join(lines[:count]) + '{"kind": "st')
    assert (
        train(config(data, resume=True, checkpoint_steps=1), MadeUpLoader)["weights_sha256"]
        == (whole["weights_sha256"])
    )
    assert [record["step"] for record in records(run, "epoch")] == [6, 12, 18]


@pytest.mark.parametrize("gone", ["moved", "emptied", "damaged"])
@pytest.mark.parametrize("summary", [True, False])
@pytest.mark.parametrize("every", [2, 1000])
def test_a_run_whose_checkpoints_are_out_of_sight_is_not_begun_again(
    data: Path, gone: str, summary: bool, every: int
) -> None:
    """The summary tells of them, or a log that goes on after the first one."""
    train(config(data, steps=3 if every == 2 else 8, log_steps=1, checkpoint_steps=every), MadeUpLoader)
    run = data.parent / "runs" / "small"
    folder = run / "checkpoints"
    if gone == "moved":
        folder.rename(data.parent / "elsewhere")
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"x") if gone == "damaged" else path.unlink()
    for path in folder.glob("*.json") if gone == "emptied" else ():
        path.unlink()
    if not summary:
        (run / "summary.json").unlink()
    log = (run / "log.jsonl").read_text()
    with pytest.raises(
        AlexprepError, match=rf"small had checkpoints \(.*\), but in {folder} there is none .*bring the"
    ):
        train(config(data, resume=True), MadeUpLoader)
    assert (run / "log.jsonl").read_text() == log
    if gone == "moved":
        (data.parent / "elsewhere").rename(folder)
        assert train(config(data, resume=True, epochs=3), MadeUpLoader)["steps"] == 18
    else:
        for path in (run / "log.jsonl", run / "summary.json", *folder.iterdir()):
            path.unlink(missing_ok=True)
        assert train(config(data, resume=True, epochs=3), MadeUpLoader)["steps"] == 18


def test_resuming_a_finished_run_says_what_it_had(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(config(data), MadeUpLoader)
    again = train(config(data, resume=True), MadeUpLoader)
    assert again == whole == json.loads((data.parent / "runs/small/summary.json").read_text())
    said = capsys.readouterr().err
    assert (
        "nothing left to do: step 18 is done, which --epochs 3 does not go beyond; --resume with more --epochs or --steps"
        in said
    )
    train(config(data, name="part", steps=8), MadeUpLoader)
    saved = list((data.parent / "runs/part/checkpoints").iterdir())
    assert train(config(data, name="part", resume=True), MadeUpLoader)["step_ms"] is not None
    assert "nothing left to do: step 8 is done, which --steps 8 does not go beyond" in capsys.readouterr().err
    assert list((data.parent / "runs/part/checkpoints").iterdir()) == saved


def test_a_run_that_was_killed_before_its_summary_has_one_in_the_end(data: Path) -> None:
    whole = train(config(data, steps=8), MadeUpLoader)
    summary = data.parent / "runs/small/summary.json"
    for left in (None, whole | {"steps": 6}, whole | {"stopped_by": "SIGTERM"}):
        summary.unlink()
        if left:
            summary.write_text(json.dumps(left))
        again = train(config(data, resume=True), MadeUpLoader)
        assert (again["steps"], again["val_loss"], again["stopped_by"]) == (8, whole["val_loss"], None)
        assert again == json.loads(summary.read_text())


def _options(run: Path) -> dict[str, Any]:
    options: dict[str, Any] = json.loads((run / "config.json").read_text())["options"]
    return options


def _saved(run: Path) -> list[int]:
    return sorted(checkpoint.marks(run / "checkpoints"))


def test_a_bare_resume_goes_on_as_the_run_began(data: Path) -> None:
    """With its data, its length, and as many checkpoints as often."""
    run = data.parent / "runs" / "small"
    train(config(data, epochs=2, keep=6, checkpoint_steps=2), Stopping)
    assert _saved(run) == [2, 4, 5]
    bare = TrainConfig(runs=run.parent, device="cpu", resume=True)
    assert train(bare, MadeUpLoader)["epochs"] == 2
    assert _saved(run) == [4, 5, 6, 8, 10, 12]
    assert json.loads((run / "config.json").read_text())["data"] == str(data)


def test_what_is_given_on_resuming_holds_from_then_on(data: Path) -> None:
    """Epochs and steps are one choice: either takes the place of both."""
    run = data.parent / "runs" / "small"
    bare = TrainConfig(runs=run.parent, device="cpu", resume=True)
    assert train(config(data, epochs=1, keep=1), MadeUpLoader)["steps"] == 6
    assert train(replace(bare, steps=8, keep=2, checkpoint_steps=1), MadeUpLoader)["steps"] == 8
    assert {name: _options(run)[name] for name in REMEMBERED} == {
        "epochs": None,
        "steps": 8,
        "keep": 2,
        "checkpoint_steps": 1,
    }
    assert train(bare, MadeUpLoader)["steps"] == 8
    assert train(replace(bare, epochs=2), MadeUpLoader)["steps"] == 12
    assert _saved(run) == [11, 12]
    assert train(bare, MadeUpLoader)["steps"] == 12
    assert (
        train(replace(bare, epochs=3), MadeUpLoader)["weights_sha256"]
        == (train(config(data, name="whole"), MadeUpLoader)["weights_sha256"])
    )


def test_an_older_run_that_remembers_less_goes_on(data: Path) -> None:
    train(config(data, steps=2, keep=5), MadeUpLoader)
    file = data.parent / "runs" / "small" / "config.json"
    document = json.loads(file.read_text())
    document["options"] = {name: value for name, value in document["options"].items() if name not in REMEMBERED}
    file.write_text(json.dumps(document))
    assert train(config(data, resume=True), MadeUpLoader)["epochs"] == 3
    options = _options(file.parent)
    assert (options["keep"], options["checkpoint_steps"]) == (KEEP, CHECKPOINT_STEPS) == (3, 1000)


def test_data_that_moved_is_told_and_found_again(data: Path) -> None:
    run = data.parent / "runs" / "small"
    train(config(data, steps=1), MadeUpLoader)
    moved = data.rename(data.with_name("moved"))
    bare = TrainConfig(runs=run.parent, device="cpu", resume=True, steps=2)
    words = rf"small was trained on {data}, which holds no data set now: say with --data where it is"
    with pytest.raises(AlexprepError, match=words):
        train(bare, MadeUpLoader)
    with pytest.raises(AlexprepError, match=words):
        evaluate_run(run, device="cpu", open_loader=MadeUpLoader)
    assert train(replace(bare, data=moved), MadeUpLoader)["steps"] == 2
    assert train(replace(bare, steps=3), MadeUpLoader)["steps"] == 3
    assert evaluate_run(run, device="cpu", open_loader=MadeUpLoader)["step"] == 3


def test_a_beginning_needs_data() -> None:
    with pytest.raises(AlexprepError, match="data is None: name the folder"):
        TrainConfig(recipe="small")


def test_a_stopped_run_says_what_goes_on_with_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(data), Stopping)
    told = f"stopped by SIGTERM after step 5: go on with --resume --runs {data.parent / 'runs'} --device cpu\n"
    assert told in capsys.readouterr().err
    job = prepare(config(data, name="two", ranks=2, scheme="ddp", runs=Path("runs"), device=None), rehearsal=True)
    assert job.go_on() == "--resume --gpus 2 --scheme ddp"


def test_a_gpu_without_enough_memory_is_told(data: Path) -> None:
    class Large(MadeUpLoader):
        def __iter__(self) -> Iterator[Batch]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")

    with pytest.raises(AlexprepError, match=r"allocate 2\.00 GiB\. Take a smaller --batch-size, or --precision bf16$"):
        train(config(data), Large)


def test_more_epochs_can_be_added(data: Path) -> None:
    train(config(data, epochs=1), MadeUpLoader)
    longer = train(config(data, resume=True, epochs=3), MadeUpLoader)
    assert longer["weights_sha256"] == train(config(data, name="whole"), MadeUpLoader)["weights_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, r"recipe.lr was 0.01, is now 0.02"),
        ({"batch_size": 4}, r"recipe.batch_size was 8, is now 4"),
        ({"seed": 5}, r"seed was 0, is now 5"),
        ({"recipe": "other"}, r"recipe.name was 'small', is now 'other'"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(recipes.RECIPES, "other", small_recipe(name="other"))
    train(config(data, steps=1), MadeUpLoader)
    with pytest.raises(AlexprepError, match=message):
        train(config(data, resume=True, **changes), MadeUpLoader)
    assert train(config(data, resume=True, recipe=None, steps=2), MadeUpLoader)["steps"] == 2


def test_resuming_with_other_data_is_refused(data: Path) -> None:
    train(config(data, steps=1), MadeUpLoader)
    other = write_data(data.parent / "other", digest="another")
    with pytest.raises(AlexprepError, match="data_digest was 'made up', is now 'another'"):
        train(config(data, resume=True, data=other), MadeUpLoader)


def test_an_endless_loss_stops_before_anything_is_spoilt(data: Path) -> None:
    class Poisoned(MadeUpLoader):
        def __iter__(self) -> Iterator[Batch]:
            for images, labels in super().__iter__():
                yield Batch(images * (float("inf") if (self.epoch, self.step) == (1, 4) else 1.0), labels)

    with pytest.raises(AlexprepError, match=r"loss became nan within steps 9 to 12, at learning rate 0.01"):
        train(config(data, checkpoint_steps=3), Poisoned)
    run = data.parent / "runs" / "small"
    assert max(path.name for path in (run / "checkpoints").glob("*.json")) == "step-00000009.json"
    resumed = train(config(data, resume=True), MadeUpLoader)
    assert resumed["weights_sha256"] == train(config(data, name="whole"), MadeUpLoader)["weights_sha256"]


def test_spoilt_weights_are_not_saved(data: Path) -> None:
    """The loss of step 6 is finite, its gradient is not: only the weights tell."""

    class Poisoned(MadeUpLoader):
        def __iter__(self) -> Iterator[Batch]:
            for images, labels in super().__iter__():
                yield Batch(images * (1e37 if (self.epoch, self.step) == (0, 5) else 1.0), labels)

    with pytest.raises(AlexprepError, match=r"(within steps|after step) "):
        train(config(data, checkpoint_steps=1), Poisoned)
    saved = [path.name for path in (data.parent / "runs/small/checkpoints").glob("*.json")]
    assert max(saved) == "step-00000004.json"


def test_the_schedule_can_end_the_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = Plateau(patience=1, margin=100.0, drops=1)
    monkeypatch.setitem(recipes.RECIPES, "small", small_recipe(schedule=stuck, epochs=50))
    summary = train(config(data), MadeUpLoader)
    assert summary["epochs"] == 3
    assert [record["lr"] for record in records(data.parent / "runs/small", "epoch")] == [0.01, 0.01, 0.001]
    assert train(config(data, resume=True), MadeUpLoader)["epochs"] == 3


def test_without_a_validation_split_it_says_so(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write_data(data.parent / "bare", splits=("train",))
    summary = train(config(bare, epochs=1), MadeUpLoader)
    assert "there is no val or test split" in capsys.readouterr().err
    assert [summary[key] for key in ("val_split", "val_top1_error", "val_top5_error", "val_loss")] == [None] * 4
    tested = write_data(data.parent / "tested", splits=("train", "test"))
    assert train(config(tested, epochs=1), MadeUpLoader)["val_split"] == "test"


def test_an_evaluation_split_without_labels_is_skipped(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def labelled(split: str, *labels: int) -> None:
        (data / split).mkdir(exist_ok=True)
        np.save(data / split / "index.npy", np.array([(0, 0, 0, label) for label in labels], INDEX_DTYPE))

    labelled("val", -1, -1)
    summary = train(config(data, epochs=1), MadeUpLoader)
    said = capsys.readouterr().err
    assert "the split val is skipped: none of its images has a label" in said
    assert "there is no val or test split with labels" in said
    assert (summary["epochs"], summary["val_split"], summary["val_loss"]) == (1, None, None)
    labelled("val", -1, 2)
    assert train(config(data, epochs=1), MadeUpLoader)["val_split"] == "val"
    both = write_data(data.parent / "both", splits=("train", "val", "test"))
    (both / "val").mkdir()
    np.save(both / "val" / "index.npy", np.array([(0, 0, 0, -1)], INDEX_DTYPE))
    assert train(config(both, epochs=1), MadeUpLoader)["val_split"] == "test"


def test_the_checkpoint_that_a_run_begins_with_is_read_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(data, name="source", steps=1), MadeUpLoader)
    read, paths = checkpoint.read, list[Path]()

    def noted(mark: Path) -> checkpoint.Checkpoint:
        paths.append(mark)
        return read(mark)

    monkeypatch.setattr(checkpoint, "read", noted)
    train(config(data, name="begun", steps=1, init_from="source"), MadeUpLoader)
    assert paths == [data.parent / "runs" / "source" / "checkpoints" / "step-00000001.json"]


def test_evaluation_loader_is_asked_for_plain_views(data: Path) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def spying(data: str | Path, split: str = "train", **options: Any) -> MadeUpLoader:
        asked[split] = options
        return MadeUpLoader(data, split, **options)

    train(config(data, epochs=1, threads=1), spying)
    assert (asked["train"]["views"], asked["train"]["order"]) == ("random", "shuffle")
    assert (asked["val"]["views"], asked["val"]["order"]) == ("centre", "sequential")
    assert asked["train"]["augmentation"] == small_recipe().augmentation
    assert (asked["train"]["threads"], asked["train"]["layout"]) == (1, "channels_last")


def test_evaluate_run_gives_the_error_of_the_last_epoch(data: Path) -> None:
    summary = train(config(data), MadeUpLoader)
    run = data.parent / "runs" / "small"
    found = evaluate_run(run, batch_size=BATCH, device="cpu", open_loader=MadeUpLoader)
    assert (found["top1_error"], found["loss"]) == (summary["val_top1_error"], summary["val_loss"])
    assert (found["step"], found["epochs"], found["split"], found["samples"]) == (18, 3, "val", 20)
    other = write_data(data.parent / "other", classes=["a", "b"])
    with pytest.raises(AlexprepError, match=r"has 2 classes, .* was trained on 3"):
        evaluate_run(run, data=other, device="cpu", open_loader=MadeUpLoader)


def test_runs_are_named_and_found(data: Path) -> None:
    folder = data.parent / "runs"
    names = [Path(train(config(data, steps=1), MadeUpLoader)["run"]).name for _ in range(3)]
    assert names == ["small", "small-2", "small-3"]
    assert train(config(data, resume=True, steps=2), MadeUpLoader)["run"] == str(folder / "small-3")
    assert train(config(data, resume=True, steps=3, name="small"), MadeUpLoader)["run"] == str(folder / "small")
    assert run_dir.find_run(folder, None) == folder / "small"  # active last
    with pytest.raises(AlexprepError, match="already a run"):
        train(config(data, name="small"), MadeUpLoader)
    with pytest.raises(AlexprepError, match=r"there is no run .*nowhere: there are small, small-2, small-3"):
        train(config(data, name="nowhere", resume=True), MadeUpLoader)
    with pytest.raises(AlexprepError, match="cannot name a run"):
        train(config(data, name="../out"), MadeUpLoader)
    with pytest.raises(AlexprepError, match="there is no run in"):
        train(config(data, runs=data.parent / "empty", resume=True), MadeUpLoader)


def test_a_run_is_trained_by_one_process(data: Path) -> None:
    process = child(data, name="busy", checkpoint_steps=1, pause=0.2)
    wait_for(data.parent / "runs" / "busy" / "checkpoints", "step-00000001.json", process)
    with pytest.raises(AlexprepError, match="another process is training"):
        train(config(data, name="busy", resume=True), MadeUpLoader)
    process.kill()
    process.communicate(timeout=DEADLINE)
    assert train(config(data, name="busy", resume=True), MadeUpLoader)["steps"] == 18


def test_an_unfitting_data_set_is_refused(data: Path) -> None:
    large = write_data(data.parent / "large", image={"size": 256})
    with pytest.raises(
        AlexprepError, match=r"side of 256 pixels, recipe small is for 67: train with --recipe alexnet, or shard"
    ):
        train(config(large), MadeUpLoader)
    single = write_data(data.parent / "single", classes=["only"])
    with pytest.raises(AlexprepError, match="has 1 classes"):
        train(config(single), MadeUpLoader)
    assert not (data.parent / "runs").exists()  # nothing is begun that cannot go on


@pytest.mark.parametrize("changes", [{"steps": 0}, {"epochs": 0}, {"keep": 0}, {"seed": -1}, {"threads": 0}])
def test_senseless_settings_are_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(AlexprepError, match=f"{next(iter(changes))} is "):
        TrainConfig(data=tmp_path, **changes)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_loop_trains_on_a_gpu(data: Path) -> None:
    gpu = train(config(data, device="cuda", epochs=1, name="gpu"), MadeUpLoader)
    cpu = train(config(data, epochs=1, name="cpu"), MadeUpLoader)
    first = [records(data.parent / "runs" / name, "steps")[0]["loss"] for name in ("gpu", "cpu")]
    assert first[0] == pytest.approx(first[1], rel=0.05)  # dropout draws differ, the weights and the images do not
    assert gpu["device"] == "cuda"
    assert cpu["device"] == "cpu"
    train(config(data, device="cuda", steps=4, name="part"), MadeUpLoader)
    assert train(config(data, device="cuda", epochs=1, name="part", resume=True), MadeUpLoader)["steps"] == 6


class Slow(MadeUpLoader):
    """Leaves a parent the time to disturb its training."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            time.sleep(float(os.environ["PAUSE"]))
            yield batch


if __name__ == "__main__":
    recipes.RECIPES["small"] = small_recipe()
    settings = json.loads(sys.argv[1])
    print(json.dumps(train(config(Path(settings.pop("data")), **settings), Slow)))  # noqa: T201
