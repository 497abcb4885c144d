"""The search of `alexprep tune`: one setting after the other, each value in turns with the others; whatever measures them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from alexprep.pipeline.loader_settings import Tuning
from alexprep.shards.errors import AlexprepError

ROUNDS = 3
_MOST_TURN_SECONDS = 2.0
_LEAST_SPREAD = 0.01  # a smaller difference is none
_CHEAPER_MAY_COST = 0.05  # of the speed, however far the rounds of one value lie apart
BUSY = 0.15  # where they lie further apart than this, something else uses the machine, and they do not show what is as fast

Measure = Callable[[Tuning, int, float], float]  # settings, batch size, seconds that it may take → images/s
Say = Callable[[str], None]


class Dimension(NamedTuple):
    """One setting and the values that are tried; `ordered` values go from cheap to dear, and the cheaper one wins a tie."""

    name: str
    values: dict[str, dict[str, Any]]  # what each is called → the fields of Tuning that change
    ordered: bool = True


@dataclass
class Trial:
    """One value of one setting, and what it gave.

    Attributes:
        dimension: what was compared.
        value: this one's name.
        tuning: all settings.
        batch_size: images a step.
        rates: images/s of each round; 0 where it failed.
    """

    dimension: str
    value: str
    tuning: Tuning
    batch_size: int
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images/s, the median of the rounds."""
        return statistics.median(self.rates) if self.rates else 0.0

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "compared": self.dimension,
            "value": self.value,
            "settings": asdict(self.tuning),
            "batch_size": self.batch_size,
            "images_per_second": round(self.rate, 1),
            "rounds": [round(rate, 1) for rate in self.rates],
        }


@dataclass(frozen=True)
class Found:
    """What a search found: the settings, how fast they and the defaults are (images/s), every trial, and what to say about it."""

    tuning: Tuning
    rate: float
    default_rate: float
    trials: list[Trial]
    notes: list[str]


def dimensions(device: str, cores: int) -> list[Dimension]:
    """What is searched on "cpu" or "cuda", in this order.

    >>> [dimension.name + " " + ", ".join(dimension.values) for dimension in dimensions("cpu", 6)]
    ['threads 1, 2, 4, 6', 'prefetch 1, 2, 4']
    """
    counts = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    threads = Dimension("threads", {f"{count}": {"threads": count} for count in [*counts, cores]})
    prefetch = Dimension("prefetch", {f"{steps}": {"prefetch": steps} for steps in (1, 2, 4)})
    if device == "cpu":
        return [threads, prefetch]
    default = Tuning().hw_decoder_load
    places = {"CPU": {"decode": "cpu", "hw_decoder_load": default}}
    for load in sorted({0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0, default}):
        places[f"GPU, {load:g} on JPEG engines"] = {"decode": "cuda", "hw_decoder_load": load}
    return [Dimension("decode", places, ordered=False), threads, prefetch]


def search(
    measure: Measure,
    searched: Sequence[Dimension],
    batch_sizes: Sequence[int],
    seconds: float,
    start: Tuning,
    clock: Callable[[], float] = time.monotonic,
    say: Say = lambda line: None,
) -> Found:
    """Goes through the dimensions once, at the first batch size; then compares the default and the choice at all batch sizes.

    Each value has its turn in each round, so that a drifting machine hits all alike. Another value is chosen if it is faster than the
    present one by more than the rounds of one value differ, or if it is cheaper and as fast.

    Args:
        measure: gives images/s; it should take as long as it is told, and may take longer.
        searched: the settings.
        batch_sizes: images a step.
        seconds: after which no further turn begins that would not end in time.
        start: the defaults.
        clock: monotonic seconds.
        say: is told what is measured now.

    Raises:
        AlexprepError: the defaults do not work, or `seconds` is too short to compare anything.
    """
    turns = ROUNDS * (sum(len(dimension.values) for dimension in searched) + 2 * len(batch_sizes))
    games = _Turns(measure, seconds, turns, clock)
    say(f"warming up: {start.words('cuda' if start.decode else 'cpu')}")
    first_seconds = games.warm_up(start, batch_sizes[0])
    chosen, trials = start, []
    for dimension in searched:
        tried = [
            Trial(dimension.name, name, replace(chosen, **value), batch_sizes[0])
            for name, value in dimension.values.items()
        ]
        say(f"{dimension.name}: {len(tried)} values in turns")
        games.play(tried)
        trials += tried
        chosen = _settled(tried, chosen, dimension.ordered)
    if not any(trial.rates for trial in trials if trial.tuning == start):
        raise AlexprepError(
            f"--seconds {seconds:g} is too short to compare anything, the first turn took {first_seconds:.1f} s: "
            f"give at least {max(1, first_seconds * turns):.0f}"
        )
    contenders = {"default": start} | ({"chosen": chosen} if chosen != start else {})
    curve = [
        Trial("batch size", f"{size}, {name}", tuning, size)
        for size in batch_sizes
        for name, tuning in contenders.items()
    ]
    games.left = ROUNDS * len(curve)
    say(f"the default and the choice at {len(batch_sizes)} batch sizes" if len(batch_sizes) > 1 else "confirming")
    games.play(curve)
    if _settled(curve[:2], chosen, ordered=False) == start != chosen:
        games.notes.append("side by side the choice is slower than the default, which stays")
        chosen = start
    trials += curve
    spread = _spread(trials)
    if spread > BUSY:
        games.notes.append(
            f"rounds of the same settings differ by {100 * spread:.0f} %: try again when the machine is less busy"
        )
    if games.cut:
        games.notes.append(
            f"{seconds:g} s were over before {games.cut} of {games.cut + games.done} turns: --seconds "
            f"{seconds * (games.cut + games.done) / max(1, games.done):.0f} or more compares everything"
        )

    def latest(tuning: Tuning) -> float:
        same = [trial.rate for trial in trials if (trial.tuning, trial.batch_size) == (tuning, batch_sizes[0])]
        return next((rate for rate in reversed(same) if rate), 0.0)

    if not latest(start):
        raise AlexprepError(
            f"the default settings do not work: {games.notes[0] if games.notes else 'no turn ended well'}"
        )
    return Found(chosen, latest(chosen), latest(start), trials, games.notes)


class _Turns:
    """Hands out the time that is left in equal parts to the turns that are left."""

    def __init__(self, measure: Measure, seconds: float, turns: int, clock: Callable[[], float]) -> None:
        self._measure, self._clock, self._deadline = measure, clock, clock() + seconds
        self.left, self.done, self.cut = turns, 0, 0
        self._over: list[float] = []  # seconds that each turn took beyond what it was given: the last step, and closing
        self.notes: list[str] = []

    def warm_up(self, tuning: Tuning, batch_size: int) -> float:
        """A turn that does not count: it loads libraries, and images from the disk. Returns the seconds that it took."""
        began = self._clock()
        self._measure(tuning, batch_size, self._share())
        return self._clock() - began

    def play(self, trials: Sequence[Trial]) -> None:
        """All rounds of some trials, as far as the time goes; every other round runs backwards."""
        for number in range(ROUNDS):
            for trial in reversed(trials) if number % 2 else trials:
                if self._deadline - self._clock() < max(self._usual_over(), 1e-3):
                    self.cut += 1
                else:
                    trial.rates.append(self._turn(trial))
                    self.done += 1
                self.left -= 1

    def _turn(self, trial: Trial) -> float:
        share, began = self._share(), self._clock()
        try:
            return self._measure(trial.tuning, trial.batch_size, share)
        except (AlexprepError, RuntimeError) as error:  # out of memory, say
            settings = trial.tuning.words("cuda" if trial.tuning.decode else "cpu")
            words = f"{settings} failed at batches of {trial.batch_size}: {str(error).splitlines()[0]}"
            self.notes += [words] if words not in self.notes else []
            return 0.0
        finally:
            self._over.append(self._clock() - began - share)

    def _share(self) -> float:
        """Seconds for the next turn."""
        each = (self._deadline - self._clock()) / max(1, self.left)
        return max(0.0, min(_MOST_TURN_SECONDS, each - self._usual_over()))

    def _usual_over(self) -> float:
        return max(0.0, statistics.fmean(self._over[-8:])) if self._over else 0.0


def _settled(trials: Sequence[Trial], present: Tuning, ordered: bool) -> Tuning:
    """The settings that win a comparison. What was measured only once does not count."""
    rated = [trial for trial in trials if len(trial.rates) > 1]
    own = next((trial for trial in rated if trial.tuning == present), None)
    most = max((trial.rate for trial in rated), default=0.0)
    if own is None or most == 0:
        return present
    spread = _spread(rated)
    nearly = 1 - min(spread, _CHEAPER_MAY_COST)
    better = [trial for trial in rated if trial.rate > own.rate * (1 + spread)]
    if better and ordered:
        return next(trial.tuning for trial in better if trial.rate >= most * nearly)
    if better:
        return max(better, key=lambda trial: trial.rate).tuning
    if not ordered or spread > BUSY:
        return present
    return next(trial.tuning for trial in rated if trial.rate >= own.rate * nearly)


def _spread(trials: Sequence[Trial]) -> float:
    """How far the rounds of one trial lie apart, as a share of its rate: the median over the trials, or 0.01 if it is less."""
    ranges = [
        (max(trial.rates) - min(trial.rates)) / trial.rate for trial in trials if len(trial.rates) > 1 and trial.rate
    ]
    return max(_LEAST_SPREAD, statistics.median(ranges)) if ranges else _LEAST_SPREAD
