"""How well loading hides behind training: steps with data, steps on one batch, and the loader alone, in turns on one network."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from alexprep.pipeline.device import free_bytes
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.loader_settings import this_machine
from alexprep.shards.errors import AlexprepError
from alexprep.train.config import TrainConfig
from alexprep.train.data import OpenLoader
from alexprep.train.fed import open_split
from alexprep.train.job import prepare, run_versions
from alexprep.train.precision import float32_kernels
from alexprep.train.runtime import keep_freed_memory
from alexprep.train.training_state import TrainingState
from alexprep.train.watching.turns import KINDS, Bench, Kind, Turn

GOAL = 0.98  # of the overlap on a GPU: docs/performance.md
TURN_SECONDS, LEAST_STEPS = 2.0, 5  # a turn, unless its steps are given


@dataclass(frozen=True)
class Overlap:
    """What `measure` found.

    Attributes:
        about: JSON values: recipe, batch_size, precision, device, machine, data, steps and rounds.
        turns: of each kind, one a round.
        gpu_memory_bytes: "torch_peak", allocated by torch, and "all", what the GPU has less free than before, with DALI's pools; None
            on a CPU.
    """

    about: dict[str, Any]
    turns: dict[Kind, list[Turn]]
    gpu_memory_bytes: dict[str, int] | None

    def rate(self, kind: Kind) -> float:
        """Images/s, the median of the rounds."""
        return statistics.median(turn.rate for turn in self.turns[kind])

    def spread(self, kind: Kind) -> tuple[float, float]:
        """Images/s of the slowest and of the fastest round."""
        rates = [turn.rate for turn in self.turns[kind]]
        return min(rates), max(rates)

    @property
    def ratios(self) -> list[float]:
        """Of each round: images/s with data over images/s on one batch."""
        pairs = zip(self.turns["training"], self.turns["cached_batch"], strict=True)
        return [fed.rate / cached.rate for fed, cached in pairs]

    @property
    def overlap(self) -> float:
        """Their median: 1 where loading is hidden altogether."""
        return statistics.median(self.ratios)

    @property
    def serial_rate(self) -> float:
        """Images/s if every batch were first loaded and then trained on, with all that the machine has."""
        return 1 / (1 / self.rate("cached_batch") + 1 / self.rate("loader"))

    def milliseconds(self) -> tuple[float, float]:
        """Of a step with data: waiting for them, and the rest; medians of the rounds."""
        turns = self.turns["training"]
        wait = statistics.median(turn.wait_seconds / turn.steps for turn in turns)
        rest = statistics.median((turn.seconds - turn.wait_seconds) / turn.steps for turn in turns)
        return 1000 * wait, 1000 * rest

    @property
    def on_cpu(self) -> bool:
        """Whether loader and step share the processor."""
        return torch.device(self.about["device"]).type == "cpu"

    @property
    def differing(self) -> float:
        """How far the rounds of one kind lie apart at most, as a share of its rate."""
        return max((fastest - slowest) / self.rate(kind) for kind in KINDS for slowest, fastest in [self.spread(kind)])

    def bottleneck(self) -> str:
        """Which of both holds the other up, in a sentence."""
        step, loader = self.rate("cached_batch"), self.rate("loader")
        alone = f"alone the step takes {step:,.0f} images/s and the loader gives {loader:,.0f}"
        if self.on_cpu:
            slower = "step" if step < loader else "loader"
            return f"The {slower} is the bottleneck: {alone}, each with all cores."
        if self.overlap >= GOAL:
            return f"The step is the bottleneck, loading is hidden behind it: {alone}."
        if loader < step:
            return f"The loader is the bottleneck: {alone}."
        return f"Loader and step are in one another's way, on the host's cores or on the GPU: {alone}."

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        wait, rest = self.milliseconds()
        return {
            **self.about,
            "images_per_second": {kind: self.rate(kind) for kind in KINDS},
            "rounds_images_per_second": {kind: [turn.rate for turn in self.turns[kind]] for kind in KINDS},
            "overlap": self.overlap,
            "rounds_overlap": self.ratios,
            "serial_images_per_second": self.serial_rate,
            "serial_overlap": self.serial_rate / self.rate("cached_batch"),
            "data_wait_ms": wait,
            "step_ms": rest,
            "gpu_memory_bytes": self.gpu_memory_bytes,
            "bottleneck": self.bottleneck(),
            "versions": run_versions(),
        }


def measure(
    config: TrainConfig,
    *,
    steps: int | None = None,
    rounds: int = 3,
    open_loader: OpenLoader | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Overlap:
    """Takes turns, in one process and on one network; nothing is written.

    Every turn begins with the same weights, and with steps that do not count, in which what the turn before has left (a full queue, work
    that the loader still has) is used up. On a GPU only the ends of turns wait for its queue.

    Args:
        config: as for a training in this process.
        steps: a turn; by default as many as take about `TURN_SECONDS`, and at least `LEAST_STEPS`.
        rounds: of three turns each; every other one runs backwards.
        open_loader: opens the training split, see `alexprep.train.trainer.train`.
        say: is told what is measured now.

    Raises:
        AlexprepError: a number is out of its range, there is no such data, recipe or device, or the data does not suit the recipe.
    """
    for name, value in (("steps", steps), ("rounds", rounds), ("ranks", config.ranks)):
        if value is not None and value < 1:
            raise AlexprepError(f"{name} is {value}: it must be at least 1")
    job = prepare(config, rehearsal=True)
    open_loader = open_loader or functools.partial(Loader, tuning=job.tuning)
    if job.device.type == "cpu":
        keep_freed_memory()
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    free = free_bytes(job.device)
    with (
        float32_kernels(job.computing.precision),
        contextlib.closing(open_split(job, open_loader, "train", (0, 1))) as loader,
    ):
        state = TrainingState(job.recipe, job.facts.classes, job.seed, job.device, computing=job.computing)
        for note in job.notes:
            say(note)
        say(
            f"warming up: {job.recipe.name} on {job.device}, batches of {job.recipe.batch_size} of {loader.samples:,} images"
        )
        bench = Bench(state, loader, ahead=job.tuning.prefetch + 1)
        counts = {
            kind: steps or max(LEAST_STEPS, math.ceil(TURN_SECONDS / seconds))
            for kind, seconds in bench.warm_up().items()
        }
        turns: dict[Kind, list[Turn]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: training with data, on one batch, the loader alone")
            for kind in reversed(KINDS) if number % 2 else KINDS:
                turns[kind].append(bench.turn(kind, counts[kind]))
        about = {
            "recipe": job.recipe.name,
            "batch_size": job.recipe.batch_size,
            "precision": job.computing.precision,
            "device": str(job.device),
            "machine": str(this_machine(str(job.device))),
            "loader": job.tuning.words(str(job.device)),
            "data": str(job.data),
            "samples": loader.samples,
            "steps": counts,
            "rounds": rounds,
        }
        return Overlap(about, turns, _gpu_memory(job.device, free))


def _gpu_memory(device: torch.device, free_before: int | None) -> dict[str, int] | None:
    free = free_bytes(device)
    if free is None or free_before is None:
        return None
    return {"torch_peak": torch.cuda.max_memory_allocated(device), "all": max(0, free_before - free)}
