"""What a training says: log.jsonl, a terminal, and TensorBoard's events, which say what log.jsonl says, also of a run that went on."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexprep.pipeline.batch import Batch
from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.train.config import TrainConfig
from alexprep.train.data import OpenLoader
from alexprep.train.logger import QUALITY, Board, Meter, duration, forecast
from alexprep.train.metrics import SPEED, Means
from alexprep.train.trainer import train

MEANS = Means(loss=1.5, top1_error=50.0, top5_error=10.0)
Series = dict[str, list[tuple[int, float]]]  # step and value of each event, by tag


@pytest.mark.parametrize("terminal", [True, False])
def test_meter_logs_on_a_terminal_and_elsewhere(tmp_path: Path, terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=80)
    with Meter(tmp_path / "log.jsonl", step=0, total_steps=10, epochs=30, console=console) as meter:
        for step in (1, 2, 3):
            meter.timer.count(8, 0.01, 0.03)
            assert meter.record_steps(MEANS, step=step, epoch=0, lr=0.01) == pytest.approx(0.04)
        val = {"split": "val", "top1_error": 40.0, "top5_error": 5.0, "loss": 1.0}
        meter.record_epoch(MEANS, step=3, epoch=0, lr=0.01, seconds=90.0, val=val, best={"step": 3})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    speed = {"images_per_second": pytest.approx(200), "data_wait_ms": pytest.approx(10), "step_ms": pytest.approx(30)}
    assert lines[0] == {"kind": "steps", "step": 1, "epoch": 0, **MEANS._asdict(), "lr": 0.01, **speed}
    assert lines[3]["val"] == val
    shown = screen.getvalue()
    for line in (
        "epoch  1/30 in 90 s, rate 0.01",
        "  train  loss 1.5000  top-1 error  50.00 %  top-5 error  10.00 %",
        "  val    loss 1.0000  top-1 error  40.00 %  top-5 error   5.00 %  best so far",
    ):
        assert f"{line}\n" in shown.replace("\r", "")
    assert ("\x1b[" in shown) == terminal  # the bar moves the cursor
    plain = "epoch  1/30   1/10  loss 1.5000  error  50.0 %    200 images/s  wait 25 %\n"
    assert shown.count(plain) == (0 if terminal else 1)  # a line every ten seconds, not every record


def test_a_terminal_of_80_columns_shows_bar_count_time_left_and_figures(tmp_path: Path) -> None:
    """At the length of an ImageNet training, and after minutes in which nothing was recorded."""
    now = 0.0
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=24, get_time=lambda: now, color_system=None)
    with Meter(None, step=900_000, total_steps=900_900, epochs=90, console=console) as meter:
        for step in (900_100, 900_200):
            now += 300.0
            meter.timer.count(128, 1.0, 2.0)
            meter.record_steps(Means(6.9078, 99.9, 99.5), step=step, epoch=89, lr=0.01)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", screen.getvalue())
    first, second = [line.strip() for line in printed.splitlines() if line.strip()][-2:]
    assert re.fullmatch(r"epoch 90/90 [━╸╺]{20,} 900200/900900 0:35:00 left", first), first
    assert second == "loss 6.9078  top-1 error 99.9 %  43 images/s  data 1000 ms  step 2000 ms"
    assert max(map(len, printed.splitlines())) <= 80


def resumed(
    log: Path, records: list[dict[str, Any]], tail: bytes = b"", *, step: int, epoch: int | None = None
) -> list[dict[str, Any]]:
    """What is left of these records, and of what follows them, when a run goes on from a place."""
    log.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode() + tail)
    with Meter(log, step=step, total_steps=10, epoch=epoch, console=Console(quiet=True)):
        pass
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_resumed_log_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    kept = [{"kind": "steps", "step": step} for step in (2, 4)]
    for tail in (b'{"kind": "st', b'{"step": 3}', b"[]\n", b"\xff\n", b'{"loss": 1}\n', b""):
        assert resumed(tmp_path / "log.jsonl", [*kept, {"step": 6}], tail, step=4) == kept


def test_an_epoch_that_still_lacks_its_evaluation_is_logged_once(tmp_path: Path) -> None:
    """Stopped after its last step, gone on with, and killed between its record and its checkpoint."""
    records: list[dict[str, Any]] = [
        {"kind": "epoch", "step": 3, "epoch": 0},
        {"kind": "steps", "step": 6},
        {"kind": "epoch", "step": 6, "epoch": 1},
    ]
    for epoch, kept in ((2, records), (1, records[:2])):
        assert resumed(tmp_path / "log.jsonl", records, step=6, epoch=epoch) == kept


def test_a_loss_that_is_no_number_is_told_with_its_steps(tmp_path: Path) -> None:
    with Meter(tmp_path / "log.jsonl", step=20, total_steps=99, console=Console(quiet=True)) as meter:
        meter.timer.count(8, 0.1, 0.1)
        meter.record_steps(MEANS, step=40, epoch=0, lr=0.5)
        for loss in (float("nan"), float("inf")):
            with pytest.raises(AlexprepError, match=f"loss became {loss} within steps 41 to 60$"):
                meter.record_steps(Means(loss, 90.0, 50.0), step=60, epoch=0, lr=0.5)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_forecast_is_honest_about_a_cpu() -> None:
    days = (0.1 * 86400 / 10010, 10010, 30)  # seconds a step, steps an epoch, epochs
    assert "about 2.4 hours an epoch, 3.0 days" in forecast("alexnet", torch.device("cpu"), *days)
    advised = [(device, "or a GPU" in forecast("alexnet", torch.device(device), *days)) for device in ("cpu", "cuda")]
    assert advised == [("cpu", True), ("cuda", False)]
    assert "or a GPU" not in forecast("tiny", torch.device("cpu"), 0.02, 50, 12)
    assert (duration(119), duration(120)) == ("119 s", "2 minutes")


# TensorBoard


def run(data: Path, folder: Path, open_loader: OpenLoader | None = None, **changes: Any) -> dict[str, Any]:
    """Six steps an epoch."""
    usual: dict[str, Any] = {"recipe": "tiny", "batch_size": 8, "log_steps": 2, "device": "cpu", "tensorboard": True}
    return train(TrainConfig(data, runs=folder, **usual | changes), open_loader)


def shown(folder: Path) -> Series:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(log: Path) -> Series:
    """What the log says, in the precision of TensorBoard."""
    series: Series = {}
    for record in map(json.loads, log.read_text().splitlines()):
        whole = record["kind"] == "epoch"
        values = {f"{'epoch' if whole else 'train'}/{name}": record[name] for name in QUALITY}
        if whole:
            values |= {f"val/{name}": record["val"][name] for name in QUALITY}
        else:
            values |= {f"speed/{name}": record[name] for name in SPEED} | {"train/learning_rate": record["lr"]}
        for tag, value in values.items():
            series.setdefault(tag, []).append((record["step"], float(np.float32(value))))
    return series


class BrokenOff(Loader):
    """Leaves the training at once when it is asked for the batch of step 11."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.epoch * len(self) + self.step == 11:
                raise KeyboardInterrupt
            yield batch


def test_a_run_that_was_broken_off_and_resumed_has_every_point_once(data: Path, tmp_path: Path) -> None:
    """After step 10 was logged, with its last checkpoint at step 7: steps 8 to 10 come twice, and are shown once."""
    options: dict[str, Any] = {"epochs": 3, "checkpoint_steps": 7}
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path, BrokenOff, **options)
    events = tmp_path / "tiny" / "tensorboard"
    assert [step for step, _ in shown(events)["train/loss"]] == [1, 2, 4, 6, 8, 10]
    summary = run(data, tmp_path, **options, resume=True)
    assert summary["steps"] == 18
    found, expected = shown(events), logged(tmp_path / "tiny" / "log.jsonl")
    assert [step for step, _ in expected["train/loss"]] == [1, 2, 4, 6, 8, 10, 12, 13, 14, 16, 18]
    assert found == expected
    assert len(list(events.iterdir())) == 2
    assert "tensorflow" not in sys.modules


def test_a_shorter_run_that_goes_on(data: Path, tmp_path: Path) -> None:
    """Nothing is dropped, whether or not an epoch ends there."""
    for steps in (5, 6, 9):
        run(data, tmp_path, steps=steps, resume=steps > 5)
    found = shown(tmp_path / "tiny" / "tensorboard")
    assert found == logged(tmp_path / "tiny" / "log.jsonl")
    assert [step for step, _ in found["val/loss"]] == [6]


def test_skipped_steps_show_their_loss_scale(tmp_path: Path) -> None:
    """Every event has left the process when `write` returns, so that a kill loses none."""
    board = Board(tmp_path, 0)
    for step in range(1, 31):
        board.write({"kind": "skip", "step": step, "epoch": 0, "loss_scale": 2.0**-step})
    board.write({"kind": "not finite", "step": 31, "epoch": 0, "lr": 0.01, "began": None})  # nothing to draw
    found = shown(tmp_path)
    board.close()
    assert found == {"train/loss_scale": [(step, 2.0**-step) for step in range(1, 31)]}


def test_a_missing_package_is_told_before_the_run_is_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "tensorboard" in (importlib.metadata.metadata("alexprep").get_all("Provides-Extra") or ())
    with pytest.raises(AlexprepError, match=r'pip install "alexprep\[tensorboard\]"'):
        run(data, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    run(data, tmp_path / "runs", steps=1, tensorboard=False)  # for which nobody needs it
    assert not (tmp_path / "runs/tiny/tensorboard").exists()
