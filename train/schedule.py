"""When the learning rate falls: a schedule looks at the validation error after every epoch. All of it is plain values.

The rate of an epoch is the recipe's rate divided by `divisor` to the power of `ScheduleState.drops`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from alexprep.shards.errors import AlexprepError


@dataclass(frozen=True)
class ScheduleState:
    """Where a schedule stands; `asdict` and `ScheduleState(**d)` are its way to JSON and back."""

    drops: int = 0  # how often the rate has fallen
    best_error: float | None = None  # percent; the lowest seen
    epochs_without_progress: int = 0
    finished: bool = False  # the schedule sees no use in further epochs


class Schedule(Protocol):
    """What the loop asks of a schedule."""

    @property
    def divisor(self) -> float:
        """What each drop divides the rate by."""

    def after_epoch(self, state: ScheduleState, epochs: int, error: float) -> ScheduleState:
        """The state after `epochs` whole epochs, the last of which ended with `error` percent."""


@dataclass(frozen=True)
class Steps:
    """The rate falls after fixed numbers of epochs, whatever the error.

    >>> Steps(after=(8, 9)).after_epoch(ScheduleState(), 8, 30.0).drops
    1
    """

    after: tuple[int, ...]
    divisor: float = 10.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if list(self.after) != sorted(set(self.after)) or any(epoch < 1 for epoch in self.after):
            raise AlexprepError(f"the rate cannot fall after epochs {self.after}: give rising numbers from 1")
        _check_divisor(self.divisor)

    def after_epoch(self, state: ScheduleState, epochs: int, error: float) -> ScheduleState:
        """See `Schedule`."""
        return replace(
            state, drops=sum(epoch <= epochs for epoch in self.after), best_error=_lower(state.best_error, error)
        )


@dataclass(frozen=True)
class Plateau:
    """The paper's heuristic (section 5): divide by 10 when the validation error stops improving, three times, then stop.

    The paper's authors judged by eye. Here an epoch is progress when its error is at least `margin` points below the lowest so far;
    `patience` epochs without progress are a plateau. One more plateau after the last drop ends the training.
    """

    patience: int = 5
    margin: float = 0.05  # points; about one standard error on 50,000 validation images is 0.2
    drops: int = 3
    divisor: float = 10.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if self.patience < 1 or self.drops < 0 or not self.margin >= 0:
            raise AlexprepError(f"{self} needs patience of at least 1, drops and margin of at least 0")
        _check_divisor(self.divisor)

    def after_epoch(self, state: ScheduleState, epochs: int, error: float) -> ScheduleState:
        """See `Schedule`."""
        if state.best_error is None or error <= state.best_error - self.margin:
            return replace(state, best_error=error, epochs_without_progress=0)
        waited = state.epochs_without_progress + 1
        if waited < self.patience:
            return replace(state, epochs_without_progress=waited)
        if state.drops < self.drops:
            return replace(state, drops=state.drops + 1, epochs_without_progress=0)
        return replace(state, epochs_without_progress=waited, finished=True)


def describe(schedule: Schedule) -> dict[str, Any]:
    """A schedule's kind and numbers as JSON values, part of a run's identity.

    >>> describe(Steps(after=(8,)))
    {'kind': 'Steps', 'after': [8], 'divisor': 10.0}
    """
    fields: dict[str, Any] = asdict(schedule)  # type: ignore[call-overload]
    return {"kind": type(schedule).__name__} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def _check_divisor(divisor: float) -> None:
    if not 1 < divisor < math.inf:
        raise AlexprepError(f"the rate cannot be divided by {divisor}: give a number above 1")


def _lower(best: float | None, error: float) -> float:
    return error if best is None else min(best, error)
