"""Traces of real trainings on real shards, read back as JSON: what a step shows, and what becomes of a trace that is cut short."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from alexprep.pipeline.batch import Batch
from alexprep.pipeline.loader import Loader
from alexprep.train import signals_and_memory
from alexprep.train.config import TrainConfig
from alexprep.train.distributed.world import World
from alexprep.train.logger import Meter
from alexprep.train.profiler import COUNTER, Trace
from alexprep.train.trainer import train

PARTS = ["wait for data", "forward", "backward", "gradient sums", "update"]  # of every step, in this order
EPOCH_STEPS = 12  # of 4 images


def config(data: Path, folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"recipe": "tiny", "runs": folder, "batch_size": 4, "epochs": 2, "device": "cpu"}
    return TrainConfig(data=data, **settings | changes)


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        document: dict[str, Any] = json.load(file)
    events: list[dict[str, Any]] = document["traceEvents"]
    return events


def ranges(events: list[dict[str, Any]], category: str = "user_annotation") -> dict[str, list[tuple[float, float]]]:
    """When each range begins and ends, microseconds, by its name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for event in sorted((event for event in events if event.get("cat") == category), key=lambda event: event["ts"]):
        found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def within(inner: tuple[float, float], outer: tuple[float, float]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def test_a_trace_shows_what_each_step_did(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Steps 11 to 13: after the second of them an epoch ends with its evaluation and its checkpoint."""
    traced = train(config(data, tmp_path, steps=16, trace=3, name="traced"))
    told = capfd.readouterr().err
    path = tmp_path / "traced" / "trace" / "steps-00000011-00000013.json.gz"
    assert f"trace of steps 11 to 13: {path}; open it at https://ui.perfetto.dev" in told.replace("\n", "")
    assert "USDT" not in told  # the profiler's own lines
    assert [file.name for file in path.parent.iterdir()] == [path.name]

    events = read(path)
    found = ranges(events)
    steps = [found[f"ProfilerStep#{number}"][0] for number in (11, 12, 13)]
    assert sum(name.startswith("ProfilerStep#") for name in found) == 3
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(steps))
    for number, step in enumerate(steps):
        parts = [found[name][number] for name in PARTS]
        assert all(len(found[name]) == 3 and within(part, step) for name, part in zip(PARTS, parts, strict=True))
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(parts))
    (evaluation,), (checkpoint,) = found["evaluate"], found["checkpoint"]
    assert within(evaluation, steps[1]) and within(checkpoint, steps[1])
    assert found["update"][1][1] <= evaluation[0] <= evaluation[1] <= checkpoint[0]

    operators = ranges(events, "cpu_op")
    outside = [part for part in operators["aten::conv2d"] if not within(part, evaluation)]
    layers = len(outside) // 3
    assert layers >= 1 and all(within(part, found["forward"][n // layers]) for n, part in enumerate(outside))

    busy = [event for event in events if event["name"] == COUNTER]
    assert [event["ph"] for event in busy] == ["C"] * 4
    cores = [event["args"]["cores busy"] for event in busy]
    assert cores[-1] == 0 and all(core >= 0 for core in cores) and sum(cores) > 0
    for event, step in zip(busy, steps, strict=False):
        assert abs(event["ts"] - step[0]) < 1e6, "the counter's clock is not the ranges'"

    plain = train(config(data, tmp_path, steps=16, name="plain"))
    assert plain["weights_sha256"] == traced["weights_sha256"]
    assert not (tmp_path / "plain" / "trace").exists()


def test_nothing_is_recorded_without_a_trace(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a training with one, outside of the steps that were asked for."""
    spy = mock.Mock(wraps=torch.autograd.profiler.record_function)
    monkeypatch.setattr(signals_and_memory, "record_function", spy)
    train(config(data, tmp_path, steps=4))
    assert not spy.called
    train(config(data, tmp_path, steps=EPOCH_STEPS, trace=1, name="traced"))
    assert [
        call.args[0] for call in spy.call_args_list
    ] == PARTS  # the run's last checkpoint and evaluation come after the epoch's end, and the trace's


def interrupted(step: int, action: Callable[[], object]) -> type[Loader]:
    """Real batches; when that of a step is asked for, something happens. Steps are counted from 1."""

    class Interrupted(Loader):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                if self.epoch * len(self) + self.step == step:
                    action()
                yield batch

    return Interrupted


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_training_that_is_stopped_keeps_the_steps_so_far(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(config(data, tmp_path, trace=9, name="stopped"), interrupted(12, terminate))
    assert (summary["steps"], summary["stopped_by"]) == (12, "SIGTERM")
    (path,) = (tmp_path / "stopped" / "trace").iterdir()
    assert path.name == "steps-00000011-00000012.json.gz"
    assert [len(ranges(read(path))[name]) for name in PARTS] == [2] * 5
    assert "trace of steps 11 to 12 (of 9 asked for)" in capsys.readouterr().err

    # Going on with another one: the first ten steps of the process are again not recorded.
    train(config(data, tmp_path, name="stopped", resume=True, trace=1))
    again = ranges(read(tmp_path / "stopped" / "trace" / "steps-00000023-00000023.json.gz"))
    assert [name for name in again if name.startswith("ProfilerStep")] == ["ProfilerStep#23"]


@pytest.mark.parametrize("step", [5, 12], ids=["before", "among"])
def test_a_training_that_is_broken_off_leaves_no_trace(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config(data, tmp_path, trace=4), interrupted(step, mock.Mock(side_effect=KeyboardInterrupt)))
    assert "the trace is dropped, nothing of it is left" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "trace").exists()
    assert not signals_and_memory.recording
    train(config(data, tmp_path, steps=14, trace=2, name="after"))  # torch's profiler can be used again
    assert (tmp_path / "after" / "trace" / "steps-00000011-00000012.json.gz").exists()


@pytest.mark.parametrize(
    ("steps", "trace", "stop", "files", "words"),
    [
        (5, 5, 0, ["steps-00000002-00000005.json.gz"], "trace of steps 2 to 5 (of 5 asked for)"),
        (8, 3, 0, ["steps-00000006-00000008.json.gz"], "trace of steps 6 to 8: "),
        (1, 3, 0, [], "nothing is traced: fewer than two steps are left"),
        (24, 4, 3, [], "nothing is traced: the training ended before step 11"),
    ],
)
def test_short_trainings_are_traced_as_far_as_they_go(
    data: Path, tmp_path: Path, capsys: Any, steps: int, trace: int, stop: int, files: list[str], words: str
) -> None:
    train(config(data, tmp_path, steps=steps, trace=trace), interrupted(stop, terminate))
    assert [file.name for file in tmp_path.glob("tiny/trace/*")] == files
    assert words in capsys.readouterr().err.replace("\n", "")


def test_every_rank_has_a_file_and_a_clock_that_leaves_it_out(tmp_path: Path) -> None:
    """What it takes to start, to stop and to write is no waiting for data: the clock goes on when that is done."""
    for rank in (0, 1):
        with Meter(None, step=0, total_steps=20) as meter, mock.patch.object(meter.timer, "lap") as lap:
            world = World(rank, 2, torch.device("cpu"))
            with Trace(tmp_path / "run" / "trace", 2, meter, world, step=100, last_step=120) as trace:
                for _ in trace.steps(range(20)):
                    with signals_and_memory.span("forward"):
                        torch.ones(3).sum()
        assert lap.call_count == 13  # at the beginning of each step until the file is written
    names = sorted(file.name for file in (tmp_path / "run" / "trace").iterdir())
    assert names == [f"steps-00000111-00000112-rank{rank}.json.gz" for rank in (0, 1)]


def test_a_trace_that_cannot_be_written_stops_no_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_way = interrupted(2, lambda: (tmp_path / "tiny" / "trace").write_text("a file"))
    assert train(config(data, tmp_path, steps=14, trace=2), in_the_way)["steps"] == 14
    assert "the trace could not be written, the training goes on" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_trace_on_a_gpu_shows_its_kernels(data: Path, tmp_path: Path) -> None:
    """And on the GPU's own rows the ranges whose kernels the training's thread launches: those of "backward" come from a thread of torch's."""
    train(config(data, tmp_path, steps=16, trace=3, device="cuda"))
    (path,) = (tmp_path / "tiny" / "trace").iterdir()
    events = read(path)
    assert any(event.get("cat") == "kernel" for event in events)
    on_gpu = ranges(events, "gpu_user_annotation")
    assert [len(on_gpu[name]) for name in ("forward", "update")] == [3, 3]
