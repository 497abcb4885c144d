"""Measures how `Loader` is best run on this machine: the settings that `alexprep.pipeline.search` tries, on real images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexprep.pipeline.augmentation import Augmentation, augmentation_named
from alexprep.pipeline.dataset import Dataset, open_dataset
from alexprep.pipeline.device import free_bytes, wait_for
from alexprep.pipeline.loader import Batch, Loader
from alexprep.pipeline.loader_settings import Machine, Tuning, this_machine
from alexprep.pipeline.plan import BLOCK_SHARDS
from alexprep.pipeline.sampler import block_order, epoch_order, shuffle_quality
from alexprep.pipeline.search import Found, Say, dimensions, search
from alexprep.shards.dataset_format import STATISTICS
from alexprep.shards.errors import AlexprepError
from alexprep.shards.versions import versions

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
            layout="channels_last" if self._on_cpu else "NCHW",  # as in training
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
