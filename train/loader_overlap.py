"""Measures how well loading hides behind training: steps with data, the same steps on one batch, and the loader alone.

They take turns in one process, on one network and one loader. What is not measured here: the loader against others, and a step in its
parts (`benchmarks/`, `--trace`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch

from alexprep.pipeline.device import free_bytes, wait_for
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.loader_settings import this_machine
from alexprep.shards.errors import AlexprepError
from alexprep.train.config import TrainConfig, prepare, run_versions
from alexprep.train.data import BatchSource, OpenLoader
from alexprep.train.precision import float32_kernels
from alexprep.train.signals_and_memory import keep_freed_memory
from alexprep.train.trainer import open_split
from alexprep.train.training_state import TrainingState, take_step

Kind = Literal["training", "cached_batch", "loader"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FIRST_STEPS = 3  # memory is allocated and kernels are chosen in them
GOAL = 0.98  # of the overlap on a GPU: docs/performance.md
TURN_SECONDS, LEAST_STEPS = 2.0, 5  # a turn, unless its steps are given


def measure(
    config: TrainConfig,
    *,
    steps: int | None = None,
    rounds: int = 3,
    open_loader: OpenLoader | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Lets the three kinds take turns, in one process and on one network; nothing is written.

    Every turn begins with the same weights, and with steps that do not count, in which what the turn before has left (a full queue, work
    that the loader still has) is used up. On a GPU only the ends of turns wait for its queue.

    Args:
        config: as for a training in this process.
        steps: a turn; by default as many as take about `TURN_SECONDS`, and at least `LEAST_STEPS`.
        rounds: of three turns each; every other one runs backwards.
        open_loader: opens the training split, see `alexprep.train.trainer.train`.
        say: is told what is measured now.

    Returns:
        JSON values: recipe, batch_size, precision, device, machine, loader, data, samples, steps (by kind) and rounds; what `figures` makes
        of the turns; gpu_memory_bytes: "torch_peak", allocated by torch, and "all", what the GPU has less free than before, with
        DALI's pools; None on a CPU.

    Raises:
        AlexprepError: a number is out of its range, there is no such data, recipe or device, or the data does not suit the recipe.
    """
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value is not None and value < 1:
            raise AlexprepError(f"{name} is {value}: it must be at least 1")
    job = prepare(config, dry_run=True)
    open_loader = open_loader or functools.partial(Loader, tuning=job.tuning)
    if job.device.type == "cpu":
        keep_freed_memory()
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    free_before = free_bytes(job.device)
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
        timings: dict[Kind, list[Timing]] = {kind: [] for kind in KINDS}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: training with data, on one batch, the loader alone")
            for kind in reversed(KINDS) if number % 2 else KINDS:
                timings[kind].append(bench.turn(kind, counts[kind]))
        about = {
            "recipe": job.recipe.name,
            "batch_size": job.recipe.batch_size,
            "precision": job.computing.precision,
            "device": str(job.device),
            "machine": this_machine(str(job.device)),
            "loader": job.tuning.words(str(job.device)),
            "data": str(job.data),
            "samples": loader.samples,
            "steps": counts,
            "rounds": rounds,
        }
        memory = None
        if free_before is not None and (free := free_bytes(job.device)) is not None:
            torch_peak = torch.cuda.max_memory_allocated(job.device)
            memory = {"torch_peak": torch_peak, "all": max(0, free_before - free)}
        return about | figures(timings, str(job.device)) | {"gpu_memory_bytes": memory, "versions": run_versions()}


class Timing(NamedTuple):
    """How long some steps of one kind took: seconds in all, and seconds of these waiting for data."""

    images: int
    steps: int
    seconds: float
    wait_seconds: float


def figures(timings: Mapping[Kind, Sequence[Timing]], device: str) -> dict[str, Any]:
    """What follows from the turns of each kind, one a round, as JSON values.

    images_per_second by kind, the median of rounds_images_per_second. overlap, the median of rounds_overlap: images/s with data over
    images/s on one batch, 1 where loading is hidden altogether. serial_images_per_second, if every batch were first loaded and then
    trained on, with all that the machine has, and serial_overlap likewise. Of a step with data, data_wait_ms and, for the rest, step_ms,
    medians of the rounds. bottleneck, a sentence.
    """
    rounds = {kind: [timing.images / timing.seconds for timing in timings[kind]] for kind in KINDS}
    rates = {kind: statistics.median(rounds[kind]) for kind in KINDS}
    step, loader = rates["cached_batch"], rates["loader"]
    overlaps = [training / cached for training, cached in zip(rounds["training"], rounds["cached_batch"], strict=True)]
    overlap = statistics.median(overlaps)
    serial = 1 / (1 / step + 1 / loader)
    waits = [timing.wait_seconds / timing.steps for timing in timings["training"]]
    rests = [(timing.seconds - timing.wait_seconds) / timing.steps for timing in timings["training"]]
    return {
        "images_per_second": rates,
        "rounds_images_per_second": rounds,
        "overlap": overlap,
        "rounds_overlap": overlaps,
        "serial_images_per_second": serial,
        "serial_overlap": serial / step,
        "data_wait_ms": 1000 * statistics.median(waits),
        "step_ms": 1000 * statistics.median(rests),
        "bottleneck": _bottleneck(step, loader, overlap, on_cpu=torch.device(device).type == "cpu"),
    }


def _bottleneck(step: float, loader: float, overlap: float, *, on_cpu: bool) -> str:
    """Which of both holds the other up, by their images/s alone and by the overlap."""
    alone = f"alone the step takes {step:,.0f} images/s and the loader gives {loader:,.0f}"
    if on_cpu:  # both share the processor
        return f"The {'step' if step < loader else 'loader'} is the bottleneck: {alone}, each with all cores."
    if overlap >= GOAL:
        return f"The step is the bottleneck, loading is hidden behind it: {alone}."
    if loader < step:
        return f"The loader is the bottleneck: {alone}."
    return f"Loader and step are in one another's way, on the host's cores or on the GPU: {alone}."


class Bench:
    """Times steps of each kind, on one network and one loader."""

    def __init__(self, state: TrainingState, loader: BatchSource, ahead: int) -> None:
        """Takes the first batch; every turn begins with the state's present weights.

        `ahead` is how many batches the loader of the training split has ready or works on at most.
        """
        state.epoch_steps = len(loader)
        self._state, self._ahead = state, ahead
        self._batches = state.parallel.batches(itertools.chain.from_iterable(itertools.repeat(loader)))
        self._cached = next(self._batches)
        self._kept = [*state.network.state_dict().values(), *(tensor for _, _, tensor in state.optimizer.slots())]
        self._initial = [tensor.clone() for tensor in self._kept]
        self._queue_seconds = 0.0  # that the loader needs at most for what it was asked ahead

    def warm_up(self) -> dict[Kind, float]:
        """Takes the first steps of each kind, which do not count; returns about how many seconds one takes."""
        self._timed("loader", self._ahead)
        loader = self._timed("loader", self._ahead).seconds / self._ahead
        self._queue_seconds = self._ahead * loader
        self._timed("training", _FIRST_STEPS)
        time.sleep(self._queue_seconds)
        step = self._timed("cached_batch", _FIRST_STEPS).seconds / _FIRST_STEPS
        return {"training": max(step, loader), "cached_batch": step, "loader": loader}

    def turn(self, kind: Kind, steps: int) -> Timing:
        """Times some steps, after others that do not count, from the initial weights on."""
        with torch.no_grad():
            for tensor, value in zip(self._kept, self._initial, strict=True):
                tensor.copy_(value)
        if kind == "cached_batch":
            time.sleep(self._queue_seconds)
            self._timed(kind, 1)
        else:
            self._timed(kind, self._ahead)
        return self._timed(kind, steps)

    def _timed(self, kind: Kind, steps: int) -> Timing:
        device = self._state.device
        images, wait_seconds = 0, 0.0
        wait_for(device)
        start = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            batch = self._cached if kind == "cached_batch" else next(self._batches)
            wait_seconds += time.perf_counter() - before
            images += len(batch.labels)
            if kind != "loader":
                loss, logits = take_step(self._state, *batch)  # as the training loop does, but for what it logs
                self._state.sums.add(loss, logits, batch.labels)
        wait_for(device)
        return Timing(images, steps, time.perf_counter() - start, wait_seconds)
