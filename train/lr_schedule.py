"""Learning rates over a training: a schedule says the rate of every parameter in every epoch, and may look at the validation error.

A schedule is a frozen dataclass with the two methods of `Schedule`. To add one, write one class here, nothing else: its fields are what a run
remembers of it (`describe`), `ScheduleState` is what a checkpoint does. A recipe (`alexprep.train.recipes`) chooses a schedule; the optimizer
(`alexprep.train.optimizer`) knows none.

Rates are those of whole epochs, unless a schedule is `per_step`. Epochs count from 0: "after 25 epochs" is from epoch 25 on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

from alexprep.shards.errors import AlexprepError


@dataclass(frozen=True)
class ScheduleState:
    """Where a schedule stands; `asdict` and `ScheduleState(**d)` are its way to JSON and back."""

    drops: int = 0  # how often the rate has fallen
    best_error: float | None = None  # percent; the error that Plateau last took for progress
    epochs_without_progress: int = 0  # since the last drop
    finished: bool = False  # the schedule sees no use in further epochs
    stop_best: float | None = None  # percent; the error that EarlyStop last took for progress
    stop_waited: int = 0  # epochs since then


class Schedule(Protocol):
    """What a training asks of a schedule."""

    @property
    def per_step(self) -> bool:
        """Whether the rate moves within an epoch; one of the user's own that does not say is asked once an epoch."""
        return False

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """The rate of one parameter in one epoch, or in one step.

        Args:
            base: of the recipe: its rate, for biases times its factor.
            parameter: its name; one called `bias` in its layer is a bias, all others are weights.
            epoch: whole epochs done; of a schedule `per_step` with the part of the present epoch that is done before the step.
            state: after the whole ones.
        """

    def after_epoch(self, state: ScheduleState, epochs: int, error: float) -> ScheduleState:
        """The state after `epochs` whole epochs, the last of which ended with `error` percent; as before where nobody asks for errors."""
        return state


@dataclass(frozen=True)
class Steps(Schedule):
    """The rate falls after fixed numbers of epochs, whatever the error.

    Attributes:
        after: these numbers, rising.
        divisor: what the rate is divided by.

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

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        return base / self.divisor**state.drops

    def after_epoch(self, state: ScheduleState, epochs: int, error: float) -> ScheduleState:
        """See `Schedule`."""
        return replace(state, drops=sum(epoch <= epochs for epoch in self.after))


@dataclass(frozen=True)
class Plateau(Schedule):
    """The paper's heuristic (section 5): divide by 10 when the validation error stops improving, three times, then stop.

    The paper's authors judged by eye. Here an epoch is progress when its error is at least `margin` points below the lowest so far;
    `patience` epochs without progress are a plateau. One more plateau after the last drop ends the training.

    Attributes:
        patience: epochs.
        margin: points; slow progress counts, down to a quarter of the standard error on 50,000 images.
        drops: how often the rate falls.
        divisor: what the rate is divided by.
    """

    patience: int = 5
    margin: float = 0.05
    drops: int = 3
    divisor: float = 10.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if self.patience < 1 or self.drops < 0 or not self.margin >= 0:
            raise AlexprepError(f"{self} needs patience of at least 1, drops and margin of at least 0")
        _check_divisor(self.divisor)

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        return base / self.divisor**state.drops

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


@dataclass(frozen=True)
class DExp(Schedule):
    """cuda-convnet's discretised exponential: equal times at rates that fall by equal factors, `factor` in all.

    In `steps` equal parts of `epochs` epochs the rate is base · factor^(-part / (steps - 1)), parts counted from 0. A part that ends within
    an epoch changes the rate after it. The defaults are those of layer-params-imagenet-1gpu.cfg and its command line.

    Attributes:
        epochs: that the fall is planned for; later epochs keep the last rate.
        factor: of the first rate over the last.
        steps: parts.
        bias_factor: likewise, of biases.
        bias_steps: likewise, of biases.

    >>> [round(DExp().rate(0.01, "conv1.weight", epoch, ScheduleState()), 6) for epoch in (0, 22, 23, 45, 68, 200)]
    [0.01, 0.01, 0.001587, 0.000252, 4e-05, 4e-05]
    >>> [round(DExp().rate(0.02, "conv1.bias", epoch, ScheduleState()), 6) for epoch in (0, 44, 45, 89)]
    [0.02, 0.02, 0.002, 0.002]
    """

    epochs: int = 90
    factor: float = 250.0
    steps: int = 4
    bias_factor: float = 10.0
    bias_steps: int = 2

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if self.epochs < 1 or self.steps < 2 or self.bias_steps < 2:
            raise AlexprepError(f"{self} needs at least 1 epoch and 2 steps")
        _check_divisor(self.factor)
        _check_divisor(self.bias_factor)

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        factor, steps = (self.bias_factor, self.bias_steps) if is_bias(parameter) else (self.factor, self.steps)
        part = min(int(epoch * steps // self.epochs), steps - 1)
        return base * math.pow(factor, -part / (steps - 1))


@dataclass(frozen=True)
class ByHand(Schedule):
    """Rates set by name, as the 2012 code's were: rows of (epochs done, pattern of parameter names, factor on the recipe's rate).

    Attributes:
        rows: in the order of their epochs.

    Of the rows whose time has come and whose pattern matches, the last one holds; before any, the factor is 1. A factor of 0 freezes: neither
    weight nor velocity moves.

    >>> frozen_late = ByHand(((25, "*.weight", 0.1), (72, "conv1.*", 0.0)))
    >>> [frozen_late.rate(0.01, "conv1.weight", epoch, ScheduleState()) for epoch in (24, 25, 72)]
    [0.01, 0.001, 0.0]
    """

    rows: tuple[tuple[int, str, float], ...]

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        epochs = [epoch for epoch, _, _ in self.rows]
        if epochs != sorted(epochs) or any(epoch < 0 for epoch in epochs):
            raise AlexprepError(f"rows of rates must be in order of their epochs, from 0; they are for {epochs}")
        if wrong := [row for row in self.rows if not 0 <= row[2] < math.inf]:
            raise AlexprepError(f"the rate cannot be multiplied by {wrong[0][2]}: give a number of at least 0")

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        holding = [factor for begin, pattern, factor in self.rows if begin <= epoch and _matches(parameter, pattern)]
        return base * (holding[-1] if holding else 1.0)


@dataclass(frozen=True)
class Linear(Schedule):
    """The rate falls in a straight line, step by step, from its beginning to `final` of it.

    Attributes:
        epochs: that the fall is planned for, later ones keep the last rate; None: those of the run as it begins.
        final: share of the first rate.

    >>> [Linear(epochs=4).rate(0.2, "fc8.weight", epoch, ScheduleState()) for epoch in (0, 1, 3.5, 9)]
    [0.2, 0.15000000000000002, 0.025, 0.0]
    """

    epochs: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        _check_fall(self, self.epochs, self.final)

    @property
    def per_step(self) -> bool:
        """It moves within an epoch."""
        return True

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        return base * _between(1.0, self.final, _share(epoch, self.epochs))


@dataclass(frozen=True)
class Cosine(Schedule):
    """The rate falls along half a cosine, step by step, from its beginning to `final` of it (Loshchilov and Hutter 2017, one cycle).

    Attributes:
        epochs: as of `Linear`.
        final: share of the first rate.

    >>> [round(Cosine(epochs=4).rate(0.2, "fc8.weight", epoch, ScheduleState()), 4) for epoch in (0, 2, 4, 9)]
    [0.2, 0.1, 0.0, 0.0]
    """

    epochs: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        _check_fall(self, self.epochs, self.final)

    @property
    def per_step(self) -> bool:
        """It moves within an epoch."""
        return True

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        return base * _between(1.0, self.final, _half_cosine(_share(epoch, self.epochs)))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """The rate rises to the recipe's along half a cosine, then falls along another (Smith and Topin 2017), as torch's OneCycleLR does.

    The momentum stays as it is.

    Attributes:
        epochs: as of `Linear`.
        rise: share of them until the highest rate.
        start: of the highest rate, in the first step.
        final: of the highest rate, after the last.

    >>> [round(OneCycle(epochs=10).rate(0.2, "fc8.weight", epoch, ScheduleState()), 4) for epoch in (0, 1.5, 3, 6.5, 10)]
    [0.008, 0.104, 0.2, 0.1, 0.0]
    """

    epochs: int | None = None
    rise: float = 0.3
    start: float = 0.04
    final: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        _check_fall(self, self.epochs, self.final)
        if not (0 < self.rise < 1 and 0 < self.start <= 1):
            raise AlexprepError(f"{self} needs a rise between 0 and 1 and a start above 0, at most 1")

    @property
    def per_step(self) -> bool:
        """It moves within an epoch."""
        return True

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        share = _share(epoch, self.epochs)
        if share < self.rise:
            return base * _between(self.start, 1.0, _half_cosine(share / self.rise))
        return base * _between(1.0, self.final, _half_cosine((share - self.rise) / (1 - self.rise)))


@dataclass(frozen=True)
class WarmUp(Schedule):
    """Another schedule, whose rates in the first `epochs` epochs are multiplied by what rises in a straight line from `start` to 1.

    What the schedule says comes when it would without: warm-up takes nothing of its time (Goyal et al. 2017, section 2.2).

    Attributes:
        schedule: the other one.
        epochs: in which the rate rises.
        start: of the schedule's rate, in the first step.

    >>> warm = WarmUp(Steps(after=(8,)), epochs=2, start=0.1)
    >>> [round(warm.rate(0.2, "fc8.weight", epoch, ScheduleState()), 4) for epoch in (0, 1, 1.5, 2, 7)]
    [0.02, 0.11, 0.155, 0.2, 0.2]
    """

    schedule: Schedule
    epochs: float
    start: float = 0.01

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if not (0 < self.epochs < math.inf and 0 < self.start <= 1):
            raise AlexprepError(f"{self} needs more than 0 epochs, and a start above 0, at most 1")

    @property
    def per_step(self) -> bool:
        """It moves within an epoch."""
        return True

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        return rate_at(self.schedule, base, parameter, epoch, state) * _between(
            self.start, 1.0, min(epoch / self.epochs, 1)
        )

    def after_epoch(self, state: ScheduleState, epochs: int, error: float) -> ScheduleState:
        """See `Schedule`."""
        return self.schedule.after_epoch(state, epochs, error)


@dataclass(frozen=True)
class EarlyStop(Schedule):
    """Another schedule, and an end after `patience` epochs of which none was more than `margin` points below the lowest before.

    Attributes:
        schedule: the other one.
        patience: epochs.
        margin: points.

    >>> stopping, state = EarlyStop(Steps(after=()), patience=2), ScheduleState()
    >>> for epochs, error in enumerate((50.0, 40.0, 45.0, 40.0), start=1):
    ...     state = stopping.after_epoch(state, epochs, error)
    >>> state.finished
    True
    """

    schedule: Schedule
    patience: int = 10
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if self.patience < 1 or not self.margin >= 0:
            raise AlexprepError(f"{self} needs patience of at least 1 and a margin of at least 0")

    @property
    def per_step(self) -> bool:
        """Whether the other one is."""
        return is_per_step(self.schedule)

    def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
        """See `Schedule`."""
        return rate_at(self.schedule, base, parameter, epoch, state)

    def after_epoch(self, state: ScheduleState, epochs: int, error: float) -> ScheduleState:
        """See `Schedule`."""
        state = self.schedule.after_epoch(state, epochs, error)
        if state.stop_best is None or error < state.stop_best - self.margin:
            return replace(state, stop_best=error, stop_waited=0)
        waited = state.stop_waited + 1
        return replace(state, stop_waited=waited, finished=state.finished or waited >= self.patience)


AROUND_ANOTHER = (EarlyStop, WarmUp)  # schedules that have another as their field `schedule`
PLANNED = (Linear, Cosine, OneCycle)  # those that may leave their `epochs` open
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Steps, Plateau, DExp, ByHand, *PLANNED, *AROUND_ANOTHER)
}


def is_per_step(schedule: Schedule) -> bool:
    """Whether a schedule moves within an epoch; one of the user's own need not say."""
    return getattr(schedule, "per_step", False)


def looks_at_errors(schedule: Schedule) -> bool:
    """Whether it matters to a schedule with what error an epoch ends.

    >>> [looks_at_errors(schedule) for schedule in (Plateau(), WarmUp(EarlyStop(Linear(), 2), 1.0), WarmUp(Linear(), 1.0))]
    [True, True, False]
    """
    begin = ScheduleState()
    return schedule.after_epoch(begin, 1, 0.0) != schedule.after_epoch(begin, 1, 100.0)


def rate_at(schedule: Schedule, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
    """The rate of a parameter after `epoch` epochs, of which a schedule that is not `per_step` is told the whole ones."""
    return schedule.rate(base, parameter, epoch if is_per_step(schedule) else math.floor(epoch), state)


def planned(schedule: Schedule, epochs: int) -> Schedule:
    """A schedule with the length of the run where it left its own open.

    >>> planned(EarlyStop(Linear()), 16)
    EarlyStop(schedule=Linear(epochs=16, final=0.0), patience=10, margin=0.0)
    """
    if isinstance(schedule, AROUND_ANOTHER):
        return replace(schedule, schedule=planned(schedule.schedule, epochs))
    if isinstance(schedule, PLANNED) and schedule.epochs is None:
        return replace(schedule, epochs=epochs)
    return schedule


def planned_epochs(described: Mapping[str, Any]) -> int | None:
    """The length that a schedule of which `describe` told was planned for; None where it has none that may be left open.

    >>> planned_epochs(describe(EarlyStop(Linear(epochs=16)))), planned_epochs(describe(DExp()))
    (16, None)
    """
    while "schedule" in described:
        described = described["schedule"]
    return described.get("epochs") if described.get("kind") in {kind.__name__ for kind in PLANNED} else None


def recorded_schedule(described: Mapping[str, Any]) -> Schedule | None:
    """The schedule that `describe` told of, after its way through JSON; None where it is none of ours.

    What it says beyond the fields that are known here is passed over: whoever compares descriptions finds it.

    >>> recorded_schedule({"kind": "EarlyStop", "schedule": {"kind": "Steps", "after": [8]}, "patience": 2})
    EarlyStop(schedule=Steps(after=(8,), divisor=10.0), patience=2, margin=0.0)
    """
    kind = KINDS.get(described.get("kind", ""))
    if kind is None:
        return None
    values = {each.name: described[each.name] for each in fields(kind) if each.name in described}
    values = {name: _tuples(value) for name, value in values.items()}
    if kind in AROUND_ANOTHER:
        values["schedule"] = recorded_schedule(values["schedule"])
        if values["schedule"] is None:
            return None
    made: Schedule = kind(**values)
    return made


def around(schedule: Schedule, warmup: float | None, early_stop: int | None) -> Schedule:
    """A schedule with warm-up of so many epochs in front of it, and an end after so many without progress, where they are asked for.

    With `early_stop` 0 it has no such end, also where it came with one.

    >>> around(Steps(after=(8,)), None, 3)
    EarlyStop(schedule=Steps(after=(8,), divisor=10.0), patience=3, margin=0.0)
    """
    if early_stop == 0 and isinstance(schedule, EarlyStop):
        schedule = schedule.schedule
    warm = WarmUp(schedule, warmup) if warmup else schedule
    return EarlyStop(warm, early_stop) if early_stop else warm


def within(schedule: Schedule, warmup: float | None, early_stop: int | None) -> Schedule:
    """The schedule that `around` was called with, to this effect."""
    if early_stop and isinstance(schedule, EarlyStop):
        schedule = schedule.schedule
    return schedule.schedule if warmup and isinstance(schedule, WarmUp) else schedule


def ends(schedule: Schedule, state: ScheduleState) -> bool:
    """Whether a schedule sees no use in further epochs: where it is another than the one that ended the training, it may see some.

    >>> ends(EarlyStop(Steps(after=()), patience=5), ScheduleState(finished=True, stop_waited=2))
    False
    """
    if isinstance(schedule, AROUND_ANOTHER):
        stops = isinstance(schedule, EarlyStop) and state.stop_waited >= schedule.patience
        return stops or ends(schedule.schedule, state)
    if isinstance(schedule, Plateau):
        return state.drops >= schedule.drops and state.epochs_without_progress >= schedule.patience
    return state.finished and type(schedule) not in KINDS.values()  # one of the user's own may have said so


def why_ended(schedule: Schedule, state: ScheduleState) -> str:
    """A sentence on a schedule that ended the training.

    >>> why_ended(EarlyStop(Steps(after=()), patience=5), ScheduleState(finished=True, stop_waited=5))
    'no error lower than the best for 5 epochs, the end by --early-stop 5; --resume --early-stop 0 goes on'
    """
    if isinstance(schedule, EarlyStop) and state.stop_waited >= schedule.patience:
        return (
            f"no error lower than the best for {state.stop_waited} epochs, the end by --early-stop {schedule.patience}; "
            "--resume --early-stop 0 goes on"
        )
    return "the schedule sees no use in further epochs"


def describe(schedule: Schedule) -> dict[str, Any]:
    """A schedule's kind and numbers, part of a run's identity.

    >>> describe(EarlyStop(Steps(after=(8,)), patience=2))
    {'kind': 'EarlyStop', 'schedule': {'kind': 'Steps', 'after': (8,), 'divisor': 10.0}, 'patience': 2, 'margin': 0.0}
    """
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}  # type: ignore[arg-type]
    told = {name: describe(value) if hasattr(value, "after_epoch") else value for name, value in values.items()}
    return {"kind": type(schedule).__name__} | told


def without_unmatched(schedule: Schedule, parameters: list[str]) -> tuple[Schedule, list[str]]:
    """A schedule without its patterns that match no parameter (mistakes in writing, most likely), and these patterns."""
    if isinstance(schedule, AROUND_ANOTHER):
        inner, unmatched = without_unmatched(schedule.schedule, parameters)
        return replace(schedule, schedule=inner), unmatched
    if not isinstance(schedule, ByHand):
        return schedule, []
    patterns = dict.fromkeys(pattern for _, pattern, _ in schedule.rows)
    unmatched = [pattern for pattern in patterns if not any(_matches(name, pattern) for name in parameters)]
    return ByHand(tuple(row for row in schedule.rows if row[1] not in unmatched)), unmatched


def is_bias(parameter: str) -> bool:
    """Whether a parameter is its layer's `bias`. All others count as weights, whatever they are called.

    >>> is_bias("features.3.bias"), is_bias("bias"), is_bias("attention.in_proj_bias")
    (True, True, False)
    """
    return parameter.rpartition(".")[2] == "bias"


def _matches(parameter: str, pattern: str) -> bool:
    """A pattern may name a parameter as it is called, or as the weight or bias of its layer: LAYER.weight, LAYER.bias."""
    role = f"{parameter.rpartition('.')[0]}.{'bias' if is_bias(parameter) else 'weight'}"
    return fnmatchcase(parameter, pattern) or fnmatchcase(role, pattern)


def _share(epoch: float, epochs: int | None) -> float:
    """How much of a planned length is done, at most 1."""
    if epochs is None:
        raise AlexprepError("the schedule's number of epochs is open: `planned` gives it that of a run")
    return min(epoch / epochs, 1.0)


def _between(first: float, last: float, share: float) -> float:
    return first + (last - first) * share


def _half_cosine(share: float) -> float:
    """From 0 to 1, slowly at both ends."""
    return (1 - math.cos(math.pi * share)) / 2


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check_fall(schedule: Schedule, epochs: int | None, final: float) -> None:
    if (epochs is not None and epochs < 1) or not 0 <= final <= 1:
        raise AlexprepError(f"{schedule} needs at least 1 epoch and a final share from 0 to 1")


def _check_divisor(divisor: float) -> None:
    if not 1 < divisor < math.inf:
        raise AlexprepError(f"the rate cannot be divided by {divisor}: give a number above 1")


SCHEDULES: dict[str, Schedule] = {  # by the names that options have
    "constant": Steps(after=()),
    "linear": Linear(),
    "cosine": Cosine(),
    "one-cycle": OneCycle(),
    "plateau": Plateau(),
    "dexp": DExp(),
}
