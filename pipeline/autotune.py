"""Measures how `Loader` is best run on this machine: the settings that `alexprep.pipeline.autotune` tries, on real images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from alexprep.pipeline.augmentation import Augmentation, augmentation_named
from alexprep.pipeline.dataset import Dataset, open_dataset
from alexprep.pipeline.device import free_bytes, wait_for
from alexprep.pipeline.loader import Batch, Loader
from alexprep.pipeline.loader_settings import Machine, Tuning, this_machine
from alexprep.pipeline.sampler import BLOCK_SHARDS, block_order, epoch_order, shuffle_quality
from alexprep.shards.dataset_format import STATISTICS
from alexprep.shards.errors import AlexprepError
from alexprep.shards.versions import versions

# -------------------- The search of `alexprep tune`: one setting after the other, each value in turns with the others; whatever measures them.


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


# -------------------- Measures how `Loader` is best run on this machine: the settings that `alexprep.pipeline.autotune` tries, on real images.


BATCH_SIZES = {
    "cpu": (128,),
    "cuda": (128, 256, 512, 1024),
}  # the first is the recipe's, and the one that is searched at
_LEAST_STEPS = 3  # that are measured in a turn


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        machine: that was measured.
        found: settings, images/s, trials and notes.
        batch_sizes: images a step; the settings were searched at the first.
        augmentation: what was done to the images.
        samples: images in the split.
        memory: bytes in use while the settings ran: "host", resident and not backed by files; "gpu", on a GPU; None where
            the system does not tell.
        shuffle_quality: of the three orders on this data set, 0-1; see `alexprep.pipeline.sampler.shuffle_quality`.
        seconds: that it took.
    """

    machine: Machine
    found: Found
    batch_sizes: list[int]
    augmentation: Augmentation
    samples: int
    memory: dict[str, int | None]
    shuffle_quality: dict[str, float]
    seconds: float

    def entry(self) -> dict[str, Any]:
        """For `save_tuning`."""
        return {
            "settings": asdict(self.found.tuning),
            "images_per_second": round(self.found.rate, 1),
            "default_images_per_second": round(self.found.default_rate, 1),
            "batch_size": self.batch_sizes[0],
            "augmentation": asdict(self.augmentation),
            "memory_bytes": self.memory,
            "shuffle_quality": {order: round(quality, 4) for order, quality in self.shuffle_quality.items()},
            "measured": [trial.describe() for trial in self.found.trials if trial.rates],
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(self.seconds, 1),
            "machine": self.machine._asdict(),
            "versions": versions("alexprep", "torch", "dali"),
        }


def tune(
    data: str | Path,
    device: str = "cpu",
    batch_sizes: Sequence[int] = (),
    augmentation: str | None = None,
    seconds: float = 60.0,
    say: Say = lambda line: None,
) -> Tuned:
    """Measures the training split of a data set, or tars.

    Every turn reads the same images, which by then lie in the system's cache: what is compared is the work, not the disk.

    Args:
        data: as for `Loader`.
        device: "cpu", or "cuda" with or without an index.
        batch_sizes: images a step, see `Tuned`; `BATCH_SIZES` by default.
        augmentation: a preset's name. By default the paper's, with a crop of 7/8 of the images' side (224 of 256), or "resized"
            where there are no statistics.
        seconds: that measuring may take; to index other people's tars for the first time comes on top.
        say: is told what is measured now.

    Raises:
        AlexprepError: there is no such data or augmentation, they do not go together, or `seconds` is too short.
    """
    began = time.monotonic()
    dataset = open_dataset(data, "train", on_bad="skip")
    chosen = _usual_augmentation(dataset) if augmentation is None else augmentation_named(augmentation)
    machine = this_machine(device)
    sizes = list(dict.fromkeys(batch_sizes or BATCH_SIZES[machine.device]))
    if min(sizes) < 1:
        raise AlexprepError(f"batch size {min(sizes)}: it must be at least 1")
    meter = LoaderMeter(data, device, chosen, remote=dataset.samples.remote)
    start = Tuning(threads=machine.cores, decode="cuda" if machine.device == "cuda" else None)
    found = search(meter, dimensions(machine.device, machine.cores), sizes, seconds, start, say=say)
    if sizes[0] > len(dataset.samples):
        found.notes.append(f"there are only {len(dataset.samples):,} images: a step is smaller than {sizes[0]:,}")
    return Tuned(
        machine=machine,
        found=found,
        batch_sizes=sizes,
        augmentation=chosen,
        samples=len(dataset.samples),
        memory=meter.memory.get((found.tuning, sizes[0]), {}),
        shuffle_quality=_shuffle_qualities(dataset),
        seconds=time.monotonic() - began,
    )


@dataclass
class LoaderMeter:
    """Images/s of `Loader`, taken as training takes them.

    Attributes:
        data: as for `Loader`.
        device: likewise.
        augmentation: likewise.
        remote: whether shards lie elsewhere than in a local folder.
        memory: of the settings and batch sizes that were measured, see `Tuned`.
    """

    data: str | Path
    device: str
    augmentation: Augmentation
    remote: bool = False
    memory: dict[tuple[Tuning, int], dict[str, int | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Notes what the GPU has free before anything is measured."""
        self._on_cpu = self.device.startswith("cpu")
        self._free = free_bytes(torch.device(self.device))

    def __call__(self, tuning: Tuning, batch_size: int, seconds: float) -> float:
        """Opens a loader, lets it fill its queue, and measures for what is left of `seconds`, at least a few steps."""
        until = time.monotonic() + seconds
        with Loader(
            self.data,
            "train",
            batch_size=batch_size,
            augmentation=self.augmentation,
            order="blocks" if self.remote else "shuffle",
            device=self.device,
            memory_format="channels_last" if self._on_cpu else "NCHW",  # as in training
            on_bad="skip",
            tuning=tuning,
        ) as loader:
            batches = _endless(loader)
            for _ in range(tuning.prefetch + 2):
                next(batches)
            wait_for(torch.device(self.device))
            start = time.monotonic()
            images = steps = 0
            while steps < _LEAST_STEPS or time.monotonic() < until:
                images += len(next(batches).indices)
                steps += 1
            wait_for(torch.device(self.device))
            elapsed = time.monotonic() - start
            free = free_bytes(torch.device(self.device))
            used = None if free is None or self._free is None else max(0, self._free - free)
            self.memory[tuning, batch_size] = {"host": _host_memory(), "gpu": used}
        return images / elapsed


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def _usual_augmentation(dataset: Dataset) -> Augmentation:
    folder, size = dataset.statistics_of, dataset.size
    if folder is None or size is None or not (folder / STATISTICS).exists():
        return augmentation_named("resized")
    return Augmentation(crop=max(1, size * 7 // 8))


def _shuffle_qualities(dataset: Dataset) -> dict[str, float]:
    """Of each order's first epoch."""
    shards_N = dataset.samples.index["shard"]
    count = len(shards_N)
    if count < 2:
        return {}
    orders = {
        "shuffle": epoch_order(0, 0, count),
        "blocks": block_order(0, 0, shards_N, BLOCK_SHARDS),
        "sequential": np.arange(count),
    }
    return {name: shuffle_quality(order) for name, order in orders.items()}


def _host_memory() -> int | None:
    """Bytes of this process that lie in memory and belong to no file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return 1024 * (kilobytes["VmRSS"] - kilobytes.get("RssFile", 0)) if "VmRSS" in kilobytes else None
