"""TensorBoard's events say what log.jsonl says, also of a run that was killed and resumed.

Run as a program, this file trains until it is killed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alexprep.pipeline.loader import Batch, Loader
from alexprep.shards.errors import AlexprepError
from alexprep.train.config import TrainConfig
from alexprep.train.data import OpenLoader
from alexprep.train.logger import Board
from alexprep.train.trainer import train

DEADLINE = 60.0  # seconds
Series = dict[str, list[tuple[int, float]]]  # step and value of each event, by tag

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Six steps an epoch."""
    usual = {"data": str(data), "runs": str(folder), "recipe": "tiny", "batch_size": 8, "log_steps": 2, "device": "cpu"}
    return {**usual, "tensorboard": True, **changes}


def run(options: dict[str, Any], open_loader: OpenLoader | None = None) -> dict[str, Any]:
    paths = {name: Path(options[name]) for name in ("data", "runs")}
    return train(TrainConfig(**options | paths), open_loader)


def shown(folder: Path) -> Series:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(log: Path) -> Series:
    """What the log says, in the precision of TensorBoard."""
    series: Series = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        kind = record["kind"]
        values = {f"{'train' if kind == 'steps' else 'epoch'}/{name}": record[name] for name in ("loss", *ERRORS)}
        if kind == "steps":
            values["train/learning_rate"] = record["lr"]
            values |= {f"speed/{name}": record[name] for name in ("images_per_second", "data_wait_ms", "step_ms")}
        else:
            values |= {f"val/{name}": record["val"][name] for name in ("loss", *ERRORS)}
        for tag, value in values.items():
            (single,) = struct.unpack("f", struct.pack("f", value))
            series.setdefault(tag, []).append((record["step"], single))
    return series


ERRORS = ("top1_error", "top5_error")


def test_a_killed_and_resumed_run_has_every_point_once(data: Path, tmp_path: Path) -> None:
    """Killed after step 10 was logged, with its last checkpoint at step 7: steps 8 to 10 come twice, and are shown once."""
    options = settings(data, tmp_path, epochs=3, checkpoint_steps=7)
    command = [sys.executable, __file__, json.dumps(options)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    events = tmp_path / "tiny" / "tensorboard"
    before = shown(events)
    assert [step for step, _ in before["train/loss"]] == [1, 2, 4, 6, 8, 10]  # nothing was lost by the kill
    summary = run(options | {"resume": True})
    assert summary["steps"] == 18
    found, expected = shown(events), logged(tmp_path / "tiny" / "log.jsonl")
    assert [step for step, _ in expected["train/loss"]] == [1, 2, 4, 6, 8, 10, 12, 13, 14, 16, 18]
    assert found == expected
    assert len(list(events.iterdir())) == 2
    assert "tensorflow" not in sys.modules


def test_a_shorter_run_that_goes_on(data: Path, tmp_path: Path) -> None:
    """Without any kill nothing is dropped, whether or not an epoch ends there."""
    for steps in (5, 6, 9):
        run(settings(data, tmp_path, steps=steps, resume=steps > 5))
    found = shown(tmp_path / "tiny" / "tensorboard")
    assert found == logged(tmp_path / "tiny" / "log.jsonl")
    assert [step for step, _ in found["val/loss"]] == [6]


def test_skipped_steps_show_their_loss_scale(tmp_path: Path) -> None:
    """Every event has left the process when `write` returns."""
    board = Board(tmp_path, 0)
    for step in range(1, 31):
        board.write({"kind": "skip", "step": step, "epoch": 0, "loss_scale": 2.0**-step})
    board.write({"kind": "not finite", "step": 31, "epoch": 0, "lr": 0.01, "began": None})  # nothing to draw
    found = shown(tmp_path)
    board.close()
    assert found == {"train/loss_scale": [(step, 2.0**-step) for step in range(1, 31)]}


def test_no_events_unless_asked_for(data: Path, tmp_path: Path) -> None:
    run(settings(data, tmp_path, steps=1, tensorboard=False))
    assert not (tmp_path / "tiny" / "tensorboard").exists()


def test_a_missing_package_is_told_before_the_run_is_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(AlexprepError, match=r'pip install "alexprep\[tensorboard\]"'):
        run(settings(data, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_the_extra_installs_it_and_no_tensorflow() -> None:
    extra = [line for line in importlib.metadata.requires("alexprep") or () if 'extra == "tensorboard"' in line]
    assert len(extra) == 1 and extra[0].startswith("tensorboard>=")
    assert not any(line.startswith("tensorflow") for line in importlib.metadata.requires("tensorboard") or ())


class Killing(Loader):
    """Kills the process when it is asked for the batch of step 11."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.epoch * len(self) + self.step == 11:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(sys.argv[1]), Killing)
