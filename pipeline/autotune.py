"""Finds the settings with which `Loader` is fastest on this machine, by measuring it: the work behind `alexprep tune`.

What the settings are, and where they are kept, is in `alexprep.pipeline.loader_settings`.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alexprep.pipeline.augmentation import PRESETS, Augmentation, augmentation_named
from alexprep.pipeline.dali_ops import HW_DECODER_LOAD
from alexprep.pipeline.dataset import Dataset, open_dataset
from alexprep.pipeline.device import wait_for
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.loader_settings import Tuning, this_machine
from alexprep.shards.dataset_format import STATISTICS, versions
from alexprep.shards.errors import AlexprepError
from alexprep.shards.worker_pool import cores

ROUNDS = 3
BUSY = 0.15  # where the rounds of one value lie further apart than this, something else uses the machine
_MOST_TURN_SECONDS = 2.0
_LEAST_STEPS = 3  # that are measured in a turn
_LEAST_SPREAD = 0.01  # a smaller difference is none
_CHEAPER_MAY_COST = 0.05  # of the speed, however far the rounds of one value lie apart

Measure = Callable[[Tuning, int, float], float]  # settings, batch size, seconds that it may take → images/s
Say = Callable[[str], None]
# Setting → what each of its values is called → what changes in Tuning.
Dimensions = dict[str, dict[str, dict[str, Any]]]


@dataclass
class Trial:
    """One value of one setting, and the images/s that each round gave; 0 where it failed."""

    compared: str
    value: str
    settings: Tuning
    batch_size: int
    rounds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Images/s, the median of the rounds."""
        return statistics.median(self.rounds) if self.rounds else 0.0


class Found(NamedTuple):
    """What a search found."""

    settings: Tuning
    rate: float  # images/s
    default_rate: float  # of the default settings
    trials: list[Trial]
    notes: list[str]  # what to say about it


def tune(
    data: str | Path,
    device: str = "cpu",
    batch_sizes: Sequence[int] = (),
    augmentation: str | None = None,
    seconds: float = 60.0,
    say: Say = lambda line: None,
) -> tuple[Found, dict[str, Any]]:
    """Measures the training split of a dataset, or tars: the work, not the disk, for every turn reads the same images.

    The settings are searched at the first of `batch_sizes`; by default 128, on a GPU 256, 512 and 1,024 too. The augmentation is by
    default the paper's, with a crop of 7/8 of the images' side (224 of 256), or "resized" where there are no statistics. Indexing
    other people's tars for the first time comes on top of `seconds`. Gives also the machine's entry for `loader_settings.save_tuning`.
    """
    began = time.monotonic()
    dataset = open_dataset(data, "train", on_bad="skip")
    chosen = _usual_augmentation(dataset) if augmentation is None else augmentation_named(augmentation)
    machine, on_cpu = this_machine(device), device.startswith("cpu")
    sizes = list(dict.fromkeys(batch_sizes or ((128,) if on_cpu else (128, 256, 512, 1024))))  # first the recipe's

    def measure(settings: Tuning, batch_size: int, seconds: float) -> float:
        """As training loads, once the queue is full: for what is left of `seconds`, or a few steps."""
        until = time.monotonic() + seconds
        with Loader(
            data,
            batch_size=batch_size,
            augmentation=chosen,
            order="streams" if dataset.samples.remote else "shuffle",
            device=device,
            memory_format="channels_last" if on_cpu else "NCHW",
            on_bad="skip",
            tuning=settings,
        ) as loader:
            batches = itertools.chain.from_iterable(itertools.repeat(loader))
            for _ in range(settings.prefetch + 2):
                next(batches)
            wait_for(torch.device(device))
            full = time.monotonic()
            images = steps = 0
            while steps < _LEAST_STEPS or time.monotonic() < until:
                images += len(next(batches).indices)
                steps += 1
            wait_for(torch.device(device))
            return images / (time.monotonic() - full)

    start = Tuning(threads=cores(), decode=None if on_cpu else "cuda")
    found = search(measure, dimensions("cpu" if on_cpu else "cuda", cores()), sizes, seconds, start, say=say)
    if sizes[0] > len(dataset.samples):
        found.notes.append(f"there are only {len(dataset.samples):,} images: a step is smaller than {sizes[0]:,}")
    return found, {
        "settings": asdict(found.settings),
        "images_per_second": round(found.rate, 1),
        "default_images_per_second": round(found.default_rate, 1),
        "batch_size": sizes[0],
        "augmentation": asdict(chosen),
        "samples": len(dataset.samples),
        "measured": [{**asdict(one), "images_per_second": round(one.rate, 1)} for one in found.trials if one.rounds],
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine,
        "versions": versions("alexprep", "torch", "dali"),
    }


def dimensions(device: str, most_threads: int) -> Dimensions:
    """What is searched on "cpu" or "cuda", in this order; but for the place of decoding, from cheap to dear.

    >>> {name: list(values) for name, values in dimensions("cpu", 6).items()}
    {'threads': ['1', '2', '4', '6'], 'prefetch': ['1', '2', '4']}
    """
    counts = [2**power for power in range(most_threads.bit_length()) if 2**power < most_threads]
    searched: Dimensions = {
        "threads": {f"{count}": {"threads": count} for count in [*counts, most_threads]},
        "prefetch": {f"{steps}": {"prefetch": steps} for steps in (1, 2, 4)},
    }
    if device == "cpu":
        return searched
    on_gpu = {
        f"GPU, {load:g} on JPEG engines": {"decode": "cuda", "hw_decoder_load": load}
        for load in (0.0, 0.25, 0.5, HW_DECODER_LOAD, 0.8, 0.9, 1.0)
    }
    return {"decode": {"CPU": {"decode": "cpu", "hw_decoder_load": HW_DECODER_LOAD}, **on_gpu}, **searched}


def search(
    measure: Measure,
    searched: Dimensions,
    batch_sizes: Sequence[int],
    seconds: float,
    start: Tuning,
    clock: Callable[[], float] = time.monotonic,
    say: Say = lambda line: None,
) -> Found:
    """Goes through the dimensions once, at the first batch size; then compares the default and the choice at all batch sizes.

    The values of a setting are measured in turns, so that a drifting machine hits all alike. Another value is chosen if it is
    faster than the present one by more than the rounds of one value differ, or if it is cheaper and as fast. `start` are the
    defaults. After `seconds` by `clock` no further turn begins; `measure` may take longer than it is told.
    """
    began, notes, trials, chosen = clock(), list[str](), list[Trial](), start
    planned = left = ROUNDS * (sum(map(len, searched.values())) + 2 * len(batch_sizes))

    def share() -> float:
        return min(_MOST_TURN_SECONDS, (began + seconds - clock()) / max(1, left))

    def compare(tried: list[Trial]) -> None:
        """All rounds, as far as the time goes; every other round runs backwards."""
        nonlocal left
        trials.extend(tried)
        for number in range(ROUNDS):
            for trial in reversed(tried) if number % 2 else tried:
                if (turn := share()) > 1e-4:
                    trial.rounds.append(_rate(measure, trial, turn, notes))
                left -= 1

    say(f"warming up: {start.words('cuda' if start.decode else 'cpu')}")
    measure(start, batch_sizes[0], share())  # does not count: it loads libraries, and images from the disk
    first = clock() - began
    for setting, values in searched.items():
        say(f"{setting}: {len(values)} values in turns")
        tried = [Trial(setting, name, replace(chosen, **value), batch_sizes[0]) for name, value in values.items()]
        compare(tried)
        chosen = _best(tried, chosen, ordered=setting != "decode")  # of ordered values the cheaper wins a tie
    if not any(trial.rounds for trial in trials if trial.settings == start):
        raise AlexprepError(
            f"--seconds {seconds:g} is too short to compare anything, the first turn took {first:.1f} s: "
            f"give at least {max(1, first * planned):.0f}"
        )
    both = {"default": start} | ({"chosen": chosen} if chosen != start else {})
    curve = [Trial("batch size", f"{size}, {who}", one, size) for size in batch_sizes for who, one in both.items()]
    say(f"the default and the choice at {len(batch_sizes)} batch sizes" if len(batch_sizes) > 1 else "confirming")
    left = ROUNDS * len(curve)
    compare(curve)
    if _best(curve[:2], chosen, ordered=False) == start != chosen:
        notes.append("side by side the choice is slower than the default, which stays")
        chosen = start
    if (spread := 100 * _spread(trials)) > 100 * BUSY:
        notes.append(f"rounds of the same settings differ by {spread:.0f} %: try again when the machine is less busy")
    turns, done = ROUNDS * len(trials), sum(len(trial.rounds) for trial in trials)
    if done < turns:
        over = f"{seconds:g} s were over before {turns - done} of {turns} turns"
        notes.append(f"{over}: --seconds {seconds * turns / done:.0f} or more compares everything")

    def latest(settings: Tuning) -> float:
        same = [trial.rate for trial in trials if (trial.settings, trial.batch_size) == (settings, batch_sizes[0])]
        return next((rate for rate in reversed(same) if rate), 0.0)

    if not latest(start):
        raise AlexprepError(f"the default settings do not work: {notes[0] if notes else 'no turn ended well'}")
    return Found(chosen, latest(chosen), latest(start), trials, notes)


def _rate(measure: Measure, trial: Trial, seconds: float, notes: list[str]) -> float:
    """Images/s of one turn; 0, and a note, where it fails."""
    try:
        return measure(trial.settings, trial.batch_size, seconds)
    except (AlexprepError, RuntimeError) as error:  # out of memory, say
        settings = trial.settings.words("cuda" if trial.settings.decode else "cpu")
        note = f"{settings} failed at batches of {trial.batch_size}: {str(error).splitlines()[0]}"
        notes += [note] if note not in notes else []
        return 0.0


def _best(trials: Sequence[Trial], present: Tuning, ordered: bool) -> Tuning:
    """The settings that win a comparison. What was measured only once does not count."""
    rated = [trial for trial in trials if len(trial.rounds) > 1]
    own = next((trial.rate for trial in rated if trial.settings == present), None)
    most = max((trial.rate for trial in rated), default=0.0)
    if own is None or most == 0:
        return present
    spread = _spread(rated)
    nearly = 1 - min(spread, _CHEAPER_MAY_COST)
    better = [trial for trial in rated if trial.rate > own * (1 + spread)]
    if better and ordered:
        return next(trial.settings for trial in better if trial.rate >= most * nearly)
    if better:
        return max(better, key=lambda trial: trial.rate).settings
    if not ordered or spread > BUSY:  # rounds so far apart do not show what is as fast
        return present
    return next(trial.settings for trial in rated if trial.rate >= own * nearly)


def _spread(trials: Sequence[Trial]) -> float:
    """How far the rounds of one trial lie apart, as a share of its rate: the median over the trials, or 0.01 if it is less."""
    ranges = [(max(one.rounds) - min(one.rounds)) / one.rate for one in trials if len(one.rounds) > 1 and one.rate]
    return max(_LEAST_SPREAD, statistics.median(ranges)) if ranges else _LEAST_SPREAD


def _usual_augmentation(dataset: Dataset) -> Augmentation:
    if dataset.folder is None or dataset.size is None or not (dataset.folder / STATISTICS).exists():
        return PRESETS["resized"]
    height, width = (max(1, side * 7 // 8) for side in dataset.size)
    return Augmentation(crop=height if height == width else (height, width))
