"""Turns of steps with data, of steps on one batch, and of the loader alone, on one network and one loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch

from alexprep.pipeline.device import wait_for
from alexprep.train.data import BatchSource, Examples, LoadedBatch
from alexprep.train.step import take_step
from alexprep.train.training_state import TrainingState

Kind = Literal["training", "cached_batch", "loader"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FIRST_STEPS = 3  # memory is allocated and kernels are chosen in them


class Turn(NamedTuple):
    """Some steps of one kind: their images, seconds in all, and seconds of these waiting for data."""

    images: int
    steps: int
    seconds: float
    wait_seconds: float

    @property
    def rate(self) -> float:
        """Images/s."""
        return self.images / self.seconds


class Bench:
    """One network and one loader, and turns of each kind."""

    def __init__(self, state: TrainingState, loader: BatchSource, ahead: int) -> None:
        """Takes the first batch.

        Args:
            state: before its first step; every turn begins with these weights.
            loader: of the training split.
            ahead: batches that the loader has ready or works on at most.
        """
        self._state, self._ahead = state, ahead
        self._batches = state.parallel.batches(_endless(loader))
        self._cached = next(self._batches)
        self._kept = [*state.network.state_dict().values(), *state.optimizer.velocities()]
        self._initial = [tensor.clone() for tensor in self._kept]
        self._queue_seconds = 0.0  # that the loader needs at most for what it was asked ahead

    def warm_up(self) -> dict[Kind, float]:
        """The first steps of each kind, which do not count; returns about what one takes, seconds."""
        self._timed("loader", self._ahead)
        loader = self._timed("loader", self._ahead).seconds / self._ahead
        self._queue_seconds = self._ahead * loader
        self._timed("training", _FIRST_STEPS)
        time.sleep(self._queue_seconds)
        step = self._timed("cached_batch", _FIRST_STEPS).seconds / _FIRST_STEPS
        return {"training": max(step, loader), "cached_batch": step, "loader": loader}

    def turn(self, kind: Kind, steps: int) -> Turn:
        """The steps of a turn, after some that do not count."""
        with torch.no_grad():
            for tensor, value in zip(self._kept, self._initial, strict=True):
                tensor.copy_(value)
        if kind == "cached_batch":
            time.sleep(self._queue_seconds)
            self._timed(kind, 1)
        else:
            self._timed(kind, self._ahead)
        return self._timed(kind, steps)

    def _timed(self, kind: Kind, steps: int) -> Turn:
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
                self._step(batch)
        wait_for(device)
        return Turn(images, steps, time.perf_counter() - start, wait_seconds)

    def _step(self, batch: Examples) -> None:
        """What the training loop does with a batch; what it logs every so many steps aside."""
        loss, logits = take_step(self._state, *batch)
        self._state.sums.add(loss, logits, batch.labels)


def _endless(loader: BatchSource) -> Iterator[LoadedBatch]:
    while True:
        yield from loader
