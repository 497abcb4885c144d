"""The training on a made-up loader: it learns, and being stopped, killed or broken off anywhere changes nothing.

Run as a program, this file trains once; a test starts it to have something to kill.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import digest_json, is_temporary
from alexprep.train import checkpoint, logger, recipes, trainer
from alexprep.train.distributed.world import World
from alexprep.train.evaluation import evaluate_run
from alexprep.train.lr_schedule import Plateau
from alexprep.train.models.layers import PaperDropout
from alexprep.train.run_dir import place_named
from alexprep.train.signals_and_memory import StopRequest
from alexprep.train.trainer import train
from tests import training_ranks as ranks
from tests.made_up import BATCH, Batch, MadeUpLoader, changed, small_recipe, write_data
from tests.training_ranks import records
from tests.training_ranks import small_config as config

DEADLINE = 120.0  # seconds, for everything that waits
ROOT = Path(__file__).parents[1]
EPOCH_STEPS = 6  # of the made-up loader
# Of a resumed run and a whole one.
SAME = ("steps", "epochs", "val_top1_error", "val_loss", "train_loss", "weights_sha256")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return ranks.registered(tmp_path, monkeypatch, MadeUpLoader)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with a checkpoint of every step. Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        folder = ranks.registered(tmp_path_factory.mktemp("whole"), patch, MadeUpLoader)
        return Path(train(config(folder, checkpoint_steps=1, keep=20), MadeUpLoader)["run"])


@pytest.fixture(scope="module")
def whole(whole_run: Path) -> dict[str, Any]:
    """Its summary."""
    summary: dict[str, Any] = json.loads((whole_run / "summary.json").read_text())
    return summary


def same(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in SAME}


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{**record, "seconds": 0} for record in records(run, "epoch")]


def test_it_learns_and_tells(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train(config(data), MadeUpLoader)
    run = data.parent / "runs" / "small"
    assert summary["val_top1_error"] < 20
    assert summary == json.loads((run / "summary.json").read_text())
    keys = "run recipe device precision ranks steps epochs epoch_steps train_loss val_split val_top1_error val_top5_error val_loss"
    keys += " best_step best_epoch best_top1_error"
    keys += " images_per_second data_wait_ms step_ms skipped_steps seconds weights_sha256 stopped_by doubts"
    assert list(summary) == keys.split()
    assert (summary["steps"], summary["epochs"], summary["val_split"], summary["stopped_by"]) == (18, 3, "val", None)
    epochs = records(run, "epoch")
    assert [(record["epoch"], record["step"]) for record in epochs] == [(0, 6), (1, 12), (2, 18)]
    assert [record["lr"] for record in epochs] == [0.01, 0.01, 0.001]
    assert epochs[-1]["val"]["top1_error"] == summary["val_top1_error"]
    assert epochs[-1]["loss"] == summary["train_loss"] < epochs[0]["loss"]
    assert [record["step"] for record in records(run, "steps")] == [1, 4, 6, 8, 12, 16, 18]
    assert all(record["step_ms"] > 0 and record["data_wait_ms"] > 0 for record in records(run, "steps"))
    told = capsys.readouterr().err
    assert "small on this CPU: about" in told
    assert "epoch 3/3 " in told
    found = evaluate_run(run, batch_size=BATCH, device="cpu", open_loader=MadeUpLoader)
    assert (found["top1_error"], found["loss"]) == (summary["val_top1_error"], summary["val_loss"])
    assert (found["step"], found["epochs"], found["split"], found["samples"]) == (18, 3, "val", 20)
    other = write_data(data.parent / "other", classes=["a", "b"])
    with pytest.raises(AlexprepError, match=r"has 2 classes, .* was trained on 3"):
        evaluate_run(run, data=other, device="cpu", open_loader=MadeUpLoader)


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


def test_resuming_from_any_step_ends_with_the_same_bits(
    data: Path, whole_run: Path, whole: dict[str, Any], seed: int
) -> None:
    """Grain's rule: a checkpoint after a step, continued to the end; after steps within an epoch and one that ends it."""
    others = [step for step in range(1, whole["steps"]) if step != EPOCH_STEPS]
    for step in [EPOCH_STEPS, *random.Random(seed).sample(others, 3)]:
        part = shutil.copytree(whole_run, data.parent / "runs" / f"part{step}")
        for later in range(step + 1, whole["steps"] + 1):
            (part / f"checkpoints/step-{later:08d}.json").unlink()
        rest = train(config(data, name=f"part{step}", resume=True), MadeUpLoader)
        assert same(rest) == same(whole), f"stopped after step {step}"
        assert timeless(part) == timeless(whole_run)


def test_killed_at_a_random_moment_it_ends_with_the_same_bits(data: Path, whole: dict[str, Any], seed: int) -> None:
    """While it lives, nobody else trains the run."""
    run = data.parent / "runs" / "killed"
    settings = {"data": str(data), "name": "killed", "checkpoint_steps": 1}
    command = [sys.executable, "-m", "tests.test_trainer", json.dumps(settings)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        limit = time.monotonic() + DEADLINE
        while not (run / "checkpoints/step-00000008.json").exists():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.005)
        with pytest.raises(AlexprepError, match="another process is training"):
            train(config(data, name="killed", resume=True), MadeUpLoader)
        time.sleep(random.Random(seed).random() * 0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        print(process.communicate(timeout=DEADLINE)[0])  # noqa: T201
    assert process.returncode == -signal.SIGKILL
    assert same(train(config(data, name="killed", resume=True), MadeUpLoader)) == same(whole)
    assert [record["step"] for record in records(run, "epoch")] == [6, 12, 18]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_and_leaves(
    number: signal.Signals, data: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes before the fifth step of the first epoch, which is still taken."""

    def signalled(loader: MadeUpLoader, images: torch.Tensor) -> torch.Tensor:
        if (loader.split, loader.epoch, loader.step) == ("train", 0, 5):
            os.kill(os.getpid(), number)
        return images

    before = signal.getsignal(number)
    summary = train(config(data), changed(signalled))
    assert signal.getsignal(number) == before
    assert (summary["stopped_by"], summary["steps"]) == (number.name, 5)
    assert summary["val_loss"] is None  # there is none of these weights
    told = f"stopped by {number.name} after step 5: go on with --resume --runs {data.parent / 'runs'} --device cpu\n"
    assert told in capsys.readouterr().err
    assert same(train(config(data, resume=True), MadeUpLoader)) == same(whole)


@pytest.mark.parametrize("evaluation", [0, 2])
def test_a_signal_during_evaluation_is_heeded(evaluation: int, data: Path, whole: dict[str, Any]) -> None:
    def signalled(loader: MadeUpLoader, images: torch.Tensor) -> torch.Tensor:
        if (loader.split, loader.epoch, loader.step) == ("val", evaluation, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return images

    part = train(config(data, name="part"), changed(signalled))
    done = ("SIGTERM", EPOCH_STEPS * (evaluation + 1), evaluation, None)
    assert (part["stopped_by"], part["steps"], part["epochs"], part["val_loss"]) == done
    if evaluation:  # the epoch's steps are done and no more are wanted: what is missing is the evaluation
        fewer = train(config(data, name="part", resume=True, epochs=evaluation), MadeUpLoader)
        assert (fewer["steps"], fewer["epochs"]) == (18, evaluation) and fewer["val_loss"] == whole["val_loss"]
    rest = train(config(data, name="part", resume=True, epochs=3), MadeUpLoader)
    names = ("steps", "epochs", "val_loss", "weights_sha256")
    assert {name: rest[name] for name in names} == {name: whole[name] for name in names}
    assert [record["step"] for record in records(data.parent / "runs" / "part", "epoch")] == [6, 12, 18]


def test_a_closing_terminal_s_signals_are_one_request() -> None:
    """Under nohup, which ignores them, they are none."""
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: heard.append(number))
    try:
        with StopRequest().listening() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGHUP and not heard
        signal.raise_signal(signal.SIGHUP)
        assert heard  # whoever listened before listens again
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest().listening() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_words_that_nobody_can_read_cost_no_step(
    data: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """stderr is a pipe whose reader has gone, as `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    summary = train(config(data), MadeUpLoader)
    monkeypatch.undo()
    with suppress(OSError):
        stream.close()
    assert same(summary) == same(whole)


@pytest.mark.parametrize("before", [False, True])
def test_a_request_to_stop_is_heard_while_the_network_is_compiled(
    before: bool, data: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or `before`. Compiling takes for ever here, mistakes any `Exception` for its own, and has drawn random numbers by then."""

    def compiling(network: torch.nn.Module, **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        if before:
            os.kill(os.getpid(), signal.SIGTERM)

        def compiled(images: torch.Tensor) -> torch.Tensor:
            network(images)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            try:
                time.sleep(DEADLINE)
            except Exception as error:
                raise AssertionError from error
            return images

        return compiled

    monkeypatch.setattr(torch, "compile", compiling)
    began = time.monotonic()
    summary = train(config(data, compile=True), MadeUpLoader)
    assert (summary["stopped_by"], summary["steps"]) == ("SIGTERM", 0)
    assert time.monotonic() - began < DEADLINE
    assert same(train(config(data, resume=True, compile=False), MadeUpLoader)) == same(whole)


def with_batch_norm(classes: int, crop: int, *, seed: int, width: float) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    layers = torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8)
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, classes))


def test_a_last_step_of_one_image_is_left_out_where_batch_normalisation_cannot_take_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(MadeUpLoader):
        training = 3 * BATCH + 1

    monkeypatch.setitem(recipes.RECIPES, "small", small_recipe(network=with_batch_norm))
    whole = train(config(data, name="whole"), Odd)
    assert (whole["steps"], whole["epoch_steps"]) == (9, 3)
    assert (
        "of 25 images the last step of an epoch would have one, too few for this network, as for batch norm"
        in capsys.readouterr().err
    )
    for step in (2, 3):  # within an epoch, and after its last step
        train(config(data, name=f"part{step}", steps=step), Odd)
        rest = train(config(data, name=f"part{step}", resume=True, epochs=3), Odd)
        assert same(rest) == same(whole)
    Odd.training = 1
    with pytest.raises(
        AlexprepError, match="this network needs two images a step, as batch normalisation does, and there is one"
    ):
        train(config(data, name="single"), Odd)
    monkeypatch.setitem(recipes.RECIPES, "small", small_recipe())
    Odd.training = 2 * BATCH + 1
    assert train(config(data, name="plain", epochs=1), Odd)["steps"] == 3  # other networks take one image


def test_the_newest_damaged_checkpoint_is_skipped_with_a_word(
    data: Path, whole_run: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole_run, data.parent / "runs" / "small")
    newest = max((run / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = train(config(data, resume=True), MadeUpLoader)
    assert "skipped the checkpoint of step 18" in capsys.readouterr().err
    assert same(resumed) == same(whole)
    assert evaluate_run(run, device="cpu", open_loader=MadeUpLoader)["step"] == 18


@pytest.mark.parametrize("last", ["none", "steps", "epoch"])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    last: str, data: Path, whole_run: Path, whole: dict[str, Any]
) -> None:
    """The records of a step are logged before its checkpoint is saved."""
    run = shutil.copytree(whole_run, data.parent / "runs" / "small", ignore=shutil.ignore_patterns("checkpoints"))
    (run / "summary.json").unlink()
    options = json.loads((run / "config.json").read_text())
    options["options"]["checkpoint_steps"] = 1000
    (run / "config.json").write_text(json.dumps(options))
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    count = {"none": 0, "steps": kinds.index("epoch"), "epoch": kinds.index("epoch") + 1}[last]
    (run / "log.jsonl").write_text("".join(lines[:count]) + '{"kind": "st')
    assert same(train(config(data, resume=True), MadeUpLoader)) == same(whole)
    assert [record["step"] for record in records(run, "epoch")] == [6, 12, 18]


def test_resuming_a_finished_run_says_what_it_had(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(config(data), MadeUpLoader)
    again = train(config(data, resume=True), MadeUpLoader)
    assert again == whole == json.loads((data.parent / "runs/small/summary.json").read_text())
    words = "nothing left to do: step 18 is done, which --epochs 3 does not go beyond; --resume with more --epochs or"
    assert words in capsys.readouterr().err
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


def test_an_endless_loss_stops_before_anything_is_spoilt(data: Path, whole: dict[str, Any]) -> None:
    poisoned = changed(lambda loader, images: images * math.inf if (loader.epoch, loader.step) == (1, 4) else images)
    with pytest.raises(AlexprepError, match=r"loss became nan within steps 9 to 12, at learning rate 0.01"):
        train(config(data, checkpoint_steps=3), poisoned)
    run = data.parent / "runs" / "small"
    assert max(path.name for path in (run / "checkpoints").glob("*.json")) == "step-00000009.json"
    assert records(run, "not finite")
    assert same(train(config(data, resume=True), MadeUpLoader)) == same(whole)
    assert not records(run, "not finite")  # the cause is gone


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (None, RuntimeError, "the loader ended after 1 of 6 steps"),
        (NO_MEMORY, AlexprepError, r"allocate 2\.00 GiB\. Take a smaller --batch-size, or --precision bf16$"),
    ],
)
def test_what_happens_to_the_loader_is_told(
    failure: Exception | None, kind: type[Exception], words: str, data: Path
) -> None:
    class Failing(MadeUpLoader):
        def __iter__(self) -> Iterator[Batch]:
            yield next(super().__iter__())
            if failure is not None:
                raise failure

    with pytest.raises(kind, match=words):
        train(config(data), Failing)


def test_the_schedule_can_end_the_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = Plateau(patience=1, margin=100.0, drops=1)
    monkeypatch.setitem(recipes.RECIPES, "small", small_recipe(schedule=stuck, epochs=50))
    summary = train(config(data), MadeUpLoader)
    assert summary["epochs"] == 3
    assert [record["lr"] for record in records(data.parent / "runs/small", "epoch")] == [0.01, 0.01, 0.001]
    assert train(config(data, resume=True), MadeUpLoader)["epochs"] == 3


def test_the_best_checkpoint_is_kept_and_found(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An early end keeps the epoch that it waited for a better one since; from there the run goes on to the same bits."""
    scripted = [(60.0, 2.0), (40.0, 2.0), (40.0, 1.5), (70.0, 3.0), (70.0, 3.0)]

    def measured(*arguments: Any) -> dict[str, float]:
        errors = scripted[int(json.loads((run / "log.jsonl").read_bytes().splitlines()[-1])["epoch"])]
        return {"top1_error": errors[0], "top5_error": 0.0, "loss": errors[1], "samples": 20}

    monkeypatch.setattr(trainer, "validate", measured)
    run, other = data.parent / "runs" / "small", data.parent / "runs" / "other"
    summary = train(config(data, early_stop=2, epochs=9, keep=1, name="small"), MadeUpLoader)
    assert (summary["epochs"], summary["best_epoch"], summary["best_step"], summary["best_top1_error"]) == (
        4,
        3,
        18,
        40.0,
    )
    assert sorted(checkpoint.marks(run / "checkpoints")) == [18, 24]
    assert "small@best" in capsys.readouterr().err
    assert [record["best"]["epoch"] for record in records(run, "epoch")] == [1, 2, 3, 3]
    assert place_named(run.parent, "small@best") == (run, 18)
    for mark in checkpoint.marks(shutil.copytree(run, other) / "checkpoints").values():
        if mark.stem.endswith("24"):
            mark.unlink()
    run = other  # whose log `measured` reads
    again = train(config(data, name="other", resume=True), MadeUpLoader)
    assert again["weights_sha256"] == summary["weights_sha256"] and again["best_step"] == 18


def test_evaluations_can_be_rare_and_change_no_weight(data: Path) -> None:
    """After every second epoch, and after the last one, also where that is cut short; a run that goes on has kept the rhythm."""
    whole = train(config(data, epochs=5, name="whole"), MadeUpLoader)
    run = data.parent / "runs" / "rare"
    assert train(config(data, epochs=3, evaluate_every=2, name="rare"), MadeUpLoader)["val_loss"] is not None
    rare = train(config(data, epochs=5, name="rare", resume=True), MadeUpLoader)
    assert [record["val"] is not None for record in records(run, "epoch")] == [False, True, True, True, True]
    same = ("weights_sha256", "val_top1_error", "val_loss")
    assert [rare[name] for name in same] == [whole[name] for name in same]
    cut = train(config(data, epochs=9, steps=7, evaluate_every=9, name="cut"), MadeUpLoader)
    assert cut["val_loss"] is not None and [each["val"] for each in records(run.parent / "cut", "epoch")] == [None]
    for wants_all in ({"schedule": "plateau"}, {"early_stop": 2}):
        with pytest.raises(AlexprepError, match="--evaluate-every 2 does not go with a schedule that looks at every"):
            train(config(data, evaluate_every=2, name="plateau", **wants_all), MadeUpLoader)


def test_early_stopping_is_switched_off_on_resuming(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it has ended the training, and where the process that was told so was killed at once."""
    monkeypatch.setattr(
        trainer, "validate", lambda *_: {"top1_error": 50.0, "top5_error": 0.0, "loss": 1.0, "samples": 20}
    )

    def killed(loader: MadeUpLoader, images: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    run = data.parent / "runs" / "small"
    words = "no error lower than the best for 1 epochs, the end by --early-stop 1; --resume --early-stop 0 goes on"
    assert train(config(data, early_stop=1, epochs=5), MadeUpLoader)["epochs"] == 2
    assert words in capsys.readouterr().err
    bare = config(data, name="small", recipe=None, resume=True)
    assert train(bare, MadeUpLoader)["epochs"] == 2
    assert f"nothing left to do: step 12 was the last: {words}" in capsys.readouterr().err
    assert train(replace(bare, early_stop=2), MadeUpLoader)["epochs"] == 3
    with pytest.raises(KeyboardInterrupt):
        train(replace(bare, early_stop=0), changed(killed))
    assert train(bare, MadeUpLoader)["epochs"] == 5
    history = json.loads((run / "config.json").read_text())["history"]
    assert [each["changes"]["early_stop"] for each in history] == [{"was": 1, "is": 2}, {"was": 2, "is": 0}]


def test_the_best_of_an_older_run_is_in_its_log(data: Path) -> None:
    run = data.parent / "runs" / "small"
    train(config(data, epochs=2, keep=1), MadeUpLoader)
    (mark,) = [mark for step, mark in checkpoint.marks(run / "checkpoints").items() if step == 12]
    document = json.loads(mark.read_text())
    del document["facts"]["position"]["best"], document["digest"]
    mark.write_text(json.dumps(document | {"digest": digest_json(document)}))
    logged = {record["step"]: record["val"]["top1_error"] for record in records(run, "epoch")}
    there = {step: error for step, error in logged.items() if step in checkpoint.marks(run / "checkpoints")}
    assert logged[place_named(run.parent, "small@best").step or 0] == min(there.values())
    (run / "log.jsonl").unlink()
    with pytest.raises(AlexprepError, match="none is the best: name its step"):
        place_named(run.parent, "small@best")


def test_a_training_that_ends_no_better_than_a_guess_says_so(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = changed(lambda loader, images: images * 0)
    summary = train(config(data, epochs=1, lr=0.5), blind)
    told = " ".join(summary["doubts"])
    assert "far above 1.10, that of a guess among 3 classes: the training diverges" in told
    assert "is no better than chance, 66.7 % for 3 classes, as far as 20 images tell" in told
    said = capsys.readouterr().err
    assert all(doubt in said for doubt in summary["doubts"])


def test_a_run_goes_on_with_as_many_threads(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user says how many; what was before comes back afterwards."""
    seen: list[int] = []

    def counting(loader: MadeUpLoader, images: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return images

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train(config(data, steps=1), MadeUpLoader)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        train(config(data, resume=True, steps=2), changed(counting))
        monkeypatch.delenv("OMP_NUM_THREADS")
        train(config(data, name="free", steps=1), changed(counting))
        torch.set_num_threads(before)
        monkeypatch.setattr(trainer, "cores", lambda: before + 1)
        train(config(data, name="free", resume=True, steps=2), changed(counting))
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {before + 1}


def test_loaders_are_asked_for_the_views_that_training_and_evaluation_need(data: Path) -> None:
    spy = mock.Mock(wraps=MadeUpLoader)
    train(config(data, epochs=1, threads=1), spy)
    asked = {call.args[1]: call.kwargs for call in spy.call_args_list}
    assert (asked["train"]["views"], asked["train"]["order"]) == ("random", "shuffle")
    assert (asked["val"]["views"], asked["val"]["order"]) == ("centre", "sequential")
    assert asked["train"]["augmentation"] == small_recipe().augmentation
    assert (asked["train"]["threads"], asked["train"]["memory_format"]) == (1, "channels_last")


@pytest.mark.parametrize(
    ("call", "code", "words", "saved"),
    [
        (1, errno.EIO, r"runs/narrow cannot be written \(Input/output error\): mend that and run the same", []),
        (1, errno.ENOSPC, r"runs/narrow .* it needs [\d,]+ bytes, [\d,]+ are free, make room and run the same", []),
        (9, errno.ENOSPC, r"checkpoints/step-00000002-.* are free, make room and go on with --resume", [1]),
    ],
)
def test_a_disk_that_fails_costs_no_checkpoint(
    call: int, code: int, words: str, saved: list[int], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fsync fails: of config.json, or of the second checkpoint."""
    fsync, calls, run = os.fsync, itertools.count(1), data.parent / "runs" / "narrow"

    def failing(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(AlexprepError, match=words):
        patch.setattr(os, "fsync", failing)
        ranks.begun(World.alone("cpu"), data, steps=3, checkpoint_steps=1)
    assert not [path for path in run.parent.rglob("*") if is_temporary(path.name)]
    assert list(checkpoint.marks(run / "checkpoints")) == saved and run.exists() == bool(saved)
    assert train(ranks.config(data, resume=bool(saved), steps=3), ranks.MadeUp)["steps"] == 3


def test_a_log_that_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's /dev/full refuses every byte; closing the log does not try again."""
    monkeypatch.setattr(logger, "_keep_until", lambda log, step, epoch: None)
    words = r"/dev/full cannot be written \(No space left on device\): it needs 59 bytes"
    with pytest.raises(AlexprepError, match=words), logger.Meter(Path("/dev/full"), step=0, total_steps=1) as log:
        log.record_skip(step=1, epoch=0, loss_scale=2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_same_loop_trains_on_a_gpu(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PaperDropout, "forward", lambda layer, values: values)  # whose draws differ on a GPU
    gpu = train(config(data, device="cuda", epochs=1, name="gpu"), MadeUpLoader)
    cpu = train(config(data, epochs=1, name="cpu"), MadeUpLoader)
    first = [records(data.parent / "runs" / name, "steps")[0]["loss"] for name in ("gpu", "cpu")]
    assert first[0] == pytest.approx(first[1], rel=1e-3)
    assert (gpu["device"], cpu["device"]) == ("cuda", "cpu")
    train(config(data, device="cuda", steps=4, name="part"), MadeUpLoader)
    assert train(config(data, device="cuda", epochs=1, name="part", resume=True), MadeUpLoader)["steps"] == 6


def slow(loader: MadeUpLoader, images: torch.Tensor) -> torch.Tensor:
    """Leaves a parent the time to disturb its training, and never comes to an end by itself."""
    time.sleep(0.05 if (loader.epoch, loader.step) < (2, 0) else DEADLINE)
    return images


if __name__ == "__main__":
    ranks.register()
    settings = json.loads(sys.argv[1])
    train(config(Path(settings.pop("data")), **settings), changed(slow))
