"""`alexprep bench overlap`: what its turns do, by a clock that the test sets, and what its figures mean."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from alexprep.cli.main import cli
from alexprep.pipeline.batch import Batch
from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.train import loader_overlap
from alexprep.train.config import TrainConfig
from alexprep.train.loader_overlap import KINDS, Bench, Timing, figures, measure
from alexprep.train.precision import memory
from alexprep.train.recipes import recipe as recipe_named
from alexprep.train.training_state import TrainingState, take_step

PAUSE, STEP = 0.25, 0.125  # seconds, by the clock below, for a batch and for a step


def options(data: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"recipe": "tiny", "batch_size": 8, "device": "cpu"}
    return TrainConfig(data=data, **settings | changes)


class Clock:
    """In place of the module `time`: stands still, but for who sleeps, asks for a batch or takes a step."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def slow_loader(monkeypatch: pytest.MonkeyPatch) -> type[Loader]:
    """Takes `PAUSE` a batch, and does nothing ahead; a step takes `STEP`."""
    clock = Clock()

    class Slow(Loader):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                clock.sleep(PAUSE)
                yield batch

    def step(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        clock.sleep(STEP)
        return take_step(*arguments)

    monkeypatch.setattr(loader_overlap, "time", clock)
    monkeypatch.setattr(loader_overlap, "take_step", step)
    return Slow


def test_a_slow_loader_is_the_bottleneck(data: Path, slow_loader: type[Loader]) -> None:
    found = measure(options(data), steps=6, rounds=3, open_loader=slow_loader)  # an epoch a turn
    rates = {"training": 8 / (PAUSE + STEP), "cached_batch": 8 / STEP, "loader": 8 / PAUSE}
    assert found["images_per_second"] == rates
    assert found["rounds_images_per_second"] == {kind: [rate] * 3 for kind, rate in rates.items()}
    assert (found["data_wait_ms"], found["step_ms"]) == (1000 * PAUSE, 1000 * STEP)
    assert found["overlap"] == STEP / (PAUSE + STEP)
    assert found["steps"] == dict.fromkeys(KINDS, 6)


@pytest.mark.parametrize(("seconds", "steps"), [(2.0, (8, 16, 8)), (0.5, (5, 5, 5))])
def test_without_a_number_of_steps_turns_take_their_time(
    seconds: float, steps: tuple[int, ...], data: Path, slow_loader: type[Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_overlap, "TURN_SECONDS", seconds)
    found = measure(options(data), rounds=1, open_loader=slow_loader)
    assert found["steps"] == dict(zip(KINDS, steps, strict=True))


def test_what_each_turn_does(data: Path) -> None:
    """Asks the loader for as many batches as it says, and moves the weights only where it trains; each begins with the same ones."""
    asked = []

    class Counted(Loader):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                asked.append(len(batch.labels))
                yield batch

    recipe = replace(recipe_named("tiny"), batch_size=20)
    with Counted(
        data, batch_size=20, augmentation=recipe.augmentation, memory_format=memory(torch.device("cpu")).memory_format
    ) as loader:
        state = TrainingState(recipe, 4, 0, torch.device("cpu"))
        initial = {name: weight.clone() for name, weight in state.network.state_dict().items()}
        bench = Bench(state, loader, ahead=3)
        for kind in (*KINDS, *KINDS):
            asked.clear()
            turn = bench.turn(kind, 3)
            assert len(asked) == (0 if kind == "cached_batch" else 3 + 3)
            assert turn.images == (60 if kind == "cached_batch" else sum(asked[-3:]))
            assert turn.steps == 3 and 0 < turn.seconds and 0 <= turn.wait_seconds <= turn.seconds
            weights = state.network.state_dict()
            moved = any(not torch.equal(weights[name], initial[name]) for name in initial)
            assert moved == any(velocity.any() for _, _, velocity in state.optimizer.slots()) == (kind != "loader")


def made_up(device: str, training: list[float], cached: list[float], loader: list[float]) -> dict[str, Any]:
    """Rounds of 10 steps of 10 images, at some images/s; a quarter of the time waiting for data, where there are any."""
    waiting = [(training, 0.25), (cached, 0.0), (loader, 0.25)]
    turns = [[Timing(100, 10, 100 / rate, share * 100 / rate) for rate in rates] for rates, share in waiting]
    return figures(dict(zip(KINDS, turns, strict=True)), device)


def test_the_figures() -> None:
    found = made_up("cpu", [90, 60, 110], [100, 120, 150], [300, 300, 450])
    assert found["images_per_second"] == pytest.approx({"training": 90, "cached_batch": 120, "loader": 300})
    assert found["rounds_images_per_second"]["cached_batch"] == pytest.approx([100, 120, 150])
    assert found["rounds_overlap"] == pytest.approx([0.9, 0.5, 11 / 15]) and found["overlap"] == pytest.approx(11 / 15)
    assert found["serial_images_per_second"] == pytest.approx(600 / 7)  # 1/120 s + 1/300 s an image
    assert found["serial_overlap"] == pytest.approx(5 / 7)
    assert (found["data_wait_ms"], found["step_ms"]) == pytest.approx((0.25 * 1000 / 9, 0.75 * 1000 / 9))


@pytest.mark.parametrize(
    ("device", "training", "cached", "loader", "words"),
    [
        ("cuda", 985, 1000, 3000, "The step is the bottleneck, loading is hidden behind it: alone the step takes"),
        ("cuda", 480, 1000, 500, "The loader is the bottleneck: alone the step takes 1,000 images/s and the loader"),
        ("cuda", 800, 1000, 3000, "Loader and step are in one another's way"),
        ("cpu", 750, 1000, 3000, "The step is the bottleneck: alone the step takes 1,000 images/s and the loader"),
        ("cpu", 750, 3000, 1000, "The loader is the bottleneck: "),
    ],
)
def test_the_sentence(device: str, training: float, cached: float, loader: float, words: str) -> None:
    assert made_up(device, [training], [cached], [loader])["bottleneck"].startswith(words)


def test_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes nothing, neither here nor in the data set."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    words = ["bench", "overlap", "--data", str(data), "--recipe", "tiny", "--batch-size", "16", "--steps", "2"]
    result = CliRunner().invoke(cli, [*words, "--rounds", "2", "--device", "cpu", "--threads", "1", "--json"])
    assert result.exit_code == 0, result.output
    *table, last = result.stdout.splitlines()
    found = json.loads(last)
    assert found["recipe"] == "tiny" and found["batch_size"] == 16 and found["gpu_memory_bytes"] is None
    assert found["steps"] == dict.fromkeys(KINDS, 2) and found["rounds"] == 2
    assert all(len(found["rounds_images_per_second"][kind]) == 2 for kind in KINDS)
    assert found["bottleneck"] in table
    assert any(line.startswith("On a CPU loader and step share the cores") for line in table)
    assert not list(tmp_path.iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in data.rglob("*")}


def test_ctrl_c_leaves_at_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> Timing:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "turn", interrupted)
    words = ["bench", "overlap", "--data", str(data), "--recipe", "tiny", "--device", "cpu", "--steps", "1"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.endswith("Interrupted: nothing was measured, and nothing was written.\n")


@pytest.mark.parametrize("name", ["steps", "rounds"])
def test_no_turns_are_refused(data: Path, name: str) -> None:
    arguments: dict[str, Any] = {name: 0}
    with pytest.raises(AlexprepError, match=f"{name} is 0"):
        measure(options(data), **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_its_memory_is_told(data: Path) -> None:
    found = measure(options(data, device="cuda", batch_size=16), steps=4, rounds=2)
    memory = found["gpu_memory_bytes"]
    assert 0 < memory["torch_peak"] < torch.cuda.get_device_properties(0).total_memory and memory["all"] >= 0
    assert 0 < found["overlap"] and found["images_per_second"]["cached_batch"] > 0
