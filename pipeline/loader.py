"""Batches for torch, epoch after epoch: which rows come when, and the state that a resume needs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from alexprep.pipeline.augmentation import Augmentation, augmentation_named
from alexprep.pipeline.dali_ops import Dtype, Layout
from alexprep.pipeline.dataset import OnBad, Source, open_dataset, statistics_for
from alexprep.pipeline.device import choose_device, moved
from alexprep.pipeline.engine import Engine, Step
from alexprep.pipeline.feed import Feed, Views
from alexprep.pipeline.loader_settings import Tuning
from alexprep.pipeline.plan import BLOCK_SHARDS, StepPlan
from alexprep.pipeline.sampler import Order
from alexprep.shards.errors import AlexprepError, whole_number
from alexprep.shards.rgb_statistics import Statistics

_READ_AHEAD = 8  # steps whose samples are asked of the disk before they are decoded


class Batch(NamedTuple):
    """A rank's part of one step.

    Attributes:
        images: on the loader's device, (N, 3, H, W) or (N, H, W, 3); with views "ten" (N, 10, …). Grey levels about 0, or what
            the augmentation's `std` makes of them.
        labels: int64 (N,), on the loader's device.
        indices: int64 (N,), rows of the split's index, on the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class Loader:
    """Yields the batches of a split, epoch after epoch.

    Step s of an epoch is the slice [s * batch_size, (s + 1) * batch_size) of the epoch's order, and a rank takes its part of
    the slice; so the samples and their augmentation are the same on any number of ranks, threads and devices. `for batch in
    loader` yields the rest of the current epoch; the next such loop, the next epoch. A batch's tensors are the caller's: nothing
    writes to them later. In a forked process, and unpickled in another, a loader goes on from its state.

    Attributes:
        samples: samples in the split.
        digest: identity of the data, hex sha256.
        classes: class names by label.
        bad: samples of other people's tars that the index has left out, with the reason.
        skipped: samples that could not be decoded and are missing from the batches delivered so far.
        epoch: of the next batch.
        step: of the next batch, within its epoch.
    """

    def __init__(
        self,
        data: Source,
        split: str = "train",
        *,
        batch_size: int,
        augmentation: Augmentation | str = "paper",
        views: Views = "random",
        order: Order = "shuffle",
        block_shards: int = BLOCK_SHARDS,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: Dtype = "float32",
        layout: Layout = "NCHW",
        on_bad: OnBad = "error",
        statistics: Statistics | str | Path | None = None,
        cache: str | Path | None = None,
        threads: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Opens a split; the DALI pipeline is built when the first batch is asked for.

        Args:
            data: a finished data set; or anyone's webdataset: a folder of tars, a tar, a pattern like "train-{000..146}.tar", or
                several of these, which are indexed once.
            split: "train", "val" or "test".
            batch_size: samples a step over all ranks.
            augmentation: what is done to the images, or the name of a preset: "paper", "2012-code", "resized", "none".
            views: "random" draws crop, mirror and noise; "centre" gives the centre crop, "ten" the paper's ten test views,
                both without chance.
            order: "shuffle", a new global permutation each epoch; "blocks", for slow disks and remote stores, permutes the shards
                and then the samples of `block_shards` shards at a time; "sequential", as stored.
            block_shards: see `order`.
            seed: of orders and draws.
            rank: of this process, in [0, world_size).
            world_size: how many processes share each step.
            device: "cpu", or "cuda" with or without an index.
            dtype: "float32", "float16", or, where the augmentation neither subtracts nor divides, "uint8".
            layout: "NCHW", "NHWC", or "channels_last": shaped as the first, in memory as the second, and on a CPU the fastest.
            on_bad: "error" ends with the name of a damaged sample; "skip" leaves it out of its step, and moves no other.
            statistics: of which data set, if not of `data`: its folder, or what `alexprep.shards.rgb_statistics` made.
            cache: where the index of other people's tars is kept; by default beside them or in the user's cache.
            threads: of DALI; None for one a core. Short for `tuning`.
            tuning: how the machine is used; `alexprep tune` finds good settings.

        Raises:
            AlexprepError: no such data, no statistics of it, or an argument out of its bounds.
        """
        arguments = {
            name: value for name, value in locals().items() if name not in ("self", "data", "split", "__class__")
        }
        self._made_by = ((data, split), arguments)
        if not isinstance(augmentation, Augmentation):
            augmentation = augmentation_named(augmentation)
        if threads is not None:
            tuning = replace(tuning or Tuning(), threads=threads)
        self._tuning = tuning or Tuning()
        dataset = open_dataset(data, split, on_bad, cache)
        self._plan = StepPlan(dataset.samples.index["shard"], batch_size, order, block_shards, seed, rank, world_size)
        dataset.samples.keep_shards = self._plan.open_shards(_READ_AHEAD + self._tuning.prefetch + 1)
        if dataset.samples.remote and order == "shuffle":
            raise AlexprepError(f"{data} is remote, where single images are slow to read: use order='blocks'")
        chosen = statistics_for(dataset, statistics) if augmentation.needs_statistics else None
        dataset.check(augmentation, chosen)
        target = choose_device(device or "cpu")
        number = torch.cuda.current_device() if target.type == "cuda" and target.index is None else target.index
        settings = dataset.settings(self._plan.largest_part, target.type, number, dtype, layout, self._tuning)
        self._feed = Feed(augmentation, chosen, views, seed, settings)
        self._on_bad, self._dataset = on_bad, dataset
        self.samples: int = len(dataset.samples)
        self.digest, self.classes, self.bad = dataset.digest, dataset.classes, dataset.bad
        self.skipped = 0
        self.epoch = self.step = 0
        self._engine: Engine | None = None
        self._stream = zlib.crc32(f"{self.digest} {split} {self._plan.order_words}".encode())
        self._upcoming = (0, 0)  # the step that the engine is handed next
        self._loaded = False  # a state, since the last pass began
        self._closed = False

    def __len__(self) -> int:
        """Steps an epoch, the same on all ranks; the last one may be smaller."""
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present step to the end of the epoch.

        An evaluation (views "centre" and "ten") begins anew where the last one was left early, unless its state was loaded.
        """
        if self._feed.views != "random" and self.step and not self._loaded:
            self._abandon()
            self.step = 0
        self._loaded = False
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next()

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from: all that a resume needs, on any number of ranks; a few integers, JSON-serialisable.

        "seed", "epoch" and "step" say where; "batch_size" and "stream", which stands for the data and the order, are there to
        refuse a state that means something else.
        """
        place = {"seed": self._plan.seed, "epoch": self.epoch, "step": self.step}
        return {**place, "batch_size": self._plan.batch_size, "stream": self._stream}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a state that `state_dict` gave.

        Raises:
            AlexprepError: the state is of another seed, batch size, data set or order, or lies outside an epoch.
        """
        own, state = self.state_dict(), state if isinstance(state, Mapping) else {}
        for name in ("seed", "batch_size", "stream"):
            if state.get(name) != own[name]:
                raise AlexprepError(
                    f"the state has {name} {state.get(name)}, this Loader {own[name]}: make it as the one that gave the state "
                    "(the stream stands for the data, the split and the order)"
                )
        epoch = whole_number("epoch", state.get("epoch"), 0, 2**32 - 1)
        step = whole_number(f"in epochs of {len(self)} steps, step", state.get("step"), 0, len(self) - 1)
        self._abandon()  # what DALI already works on is not wanted any more
        self.epoch, self.step = epoch, step
        self._loaded = True

    def close(self) -> None:
        """Frees the pipeline's threads and memory; delivered batches stay valid. Closing twice is fine."""
        self._closed = True
        self._abandon()

    def __enter__(self) -> Loader:
        """The loader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the loader."""
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Loader], tuple[Any, ...]]:
        """Pickled, a loader is its arguments and its state; the copy opens the data anew."""
        return _again, (*self._made_by, self.state_dict())

    def _next(self) -> Batch:
        if self._closed:
            raise AlexprepError("this Loader is closed: make a new one")
        try:
            engine = self._filled()
            step, images = engine.take()
            self._filled()
            labels = moved(torch.from_numpy(self._dataset.samples.labels[step.rows]), images.device)
        except BaseException:
            # Also after Ctrl-C: what is under way no longer fits the state, which still points at this batch.
            self._abandon()
            raise
        self.epoch, self.step = self._plan.after(step.epoch, step.number)
        self.skipped += step.skipped
        return Batch(images, labels, torch.from_numpy(step.rows.copy()))

    def _filled(self) -> Engine:
        """The engine with enough steps under way. Training runs on into the next epoch, evaluation ends with its own."""
        if self._engine is None or not self._engine.usable:
            self._abandon()
            self._engine = Engine(self._dataset.samples, self._dataset.sizes_N2, self._feed, self._on_bad)
            self._upcoming = (self.epoch, self.step)
        while len(self._engine) <= self._tuning.prefetch:
            epoch, number = self._upcoming
            if self._feed.views != "random" and epoch != self.epoch:
                break
            self._engine.start(Step(epoch, number, *self._plan.part(epoch, number)))
            self._upcoming = self._plan.after(epoch, number)
            if number + _READ_AHEAD < len(self):
                self._dataset.samples.expect(self._plan.part(epoch, number + _READ_AHEAD)[0])
        return self._engine

    def _abandon(self) -> None:
        """Leaves the pipeline and what it works on; the next batch is started anew from the state."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


def _again(place: tuple[Source, str], arguments: dict[str, Any], state: dict[str, int]) -> Loader:
    loader = Loader(*place, **arguments)
    loader.load_state_dict(state)
    return loader
