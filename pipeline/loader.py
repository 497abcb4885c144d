"""Batches for torch, epoch after epoch: which rows come when, and the state that a resume needs."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.pipeline.augment import Augmentation
from alexprep.pipeline.engine import Engine, Views
from alexprep.pipeline.graph import Dtype, Layout
from alexprep.pipeline.order import epoch_order, rank_part, steps_per_epoch
from alexprep.shards import stats
from alexprep.shards.engines import cores
from alexprep.shards.errors import AlexprepError
from alexprep.shards.read import Samples

# Steps that DALI works on ahead of the one being consumed.
_PREFETCH = 2


class Batch(NamedTuple):
    """A rank's part of one step.

    Attributes:
        images: on the loader's device, (N, 3, H, W) or (N, H, W, 3); with views "ten" (N, 10, …). float32 or float16, grey levels.
        labels: int64 (N,), on the loader's device.
        indices: int64 (N,), rows of the split's index, on the CPU.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class Loader:
    """Yields the batches of a split, epoch after epoch.

    Step s of an epoch is the slice [s * batch_size, (s + 1) * batch_size) of the epoch's order, and a rank takes its part of
    the slice; so the samples and their augmentation are the same on any number of ranks, threads and devices. The whole state
    is {seed, epoch, step}. `for batch in loader` yields the rest of the current epoch; the next such loop, the next epoch.

    A batch's tensors are the caller's: nothing writes to them later.

    Attributes:
        samples: samples in the split.
        digest: identity of the data set, hex sha256.
        classes: class names by label.
        epoch: of the next batch to be delivered.
        step: of the next batch to be delivered, within its epoch.
    """

    def __init__(
        self,
        data: str | Path,
        split: str = "train",
        *,
        batch_size: int,
        augmentation: Augmentation | None = None,
        views: Views = "random",
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: Dtype = "float32",
        layout: Layout = "NCHW",
        threads: int | None = None,
    ) -> None:
        """Opens a split; the DALI pipeline is built when the first batch is asked for.

        Args:
            data: a finished data set.
            split: "train", "val" or "test".
            batch_size: samples a step over all ranks.
            augmentation: what is done to the images; None for the paper's.
            views: "random" draws crop, mirror and noise; "centre" gives the centre crop, "ten" the paper's ten test views,
                both without chance.
            shuffle: a new global permutation each epoch, or ascending rows.
            seed: of orders and draws.
            rank: of this process, in [0, world_size).
            world_size: how many processes share each step.
            device: "cpu", or "cuda" with or without an index; decoding happens there as well.
            dtype: "float32" or "float16".
            layout: "NCHW" or "NHWC".
            threads: of DALI; None for one a core.

        Raises:
            AlexprepError: no such data, no statistics of it, or an argument out of its bounds.
        """
        augmentation = augmentation or Augmentation()
        for name, value, low, high in (
            ("batch_size", batch_size, 1, 2**31),
            ("world_size", world_size, 1, 2**31),
            ("rank", rank, 0, world_size - 1),
            ("seed", seed, 0, 2**63 - 1),
            ("threads", 1 if threads is None else threads, 1, 4096),
        ):
            if not low <= value <= high:
                raise AlexprepError(f"{name} {value} is not in [{low}, {high}]")
        for name, choice, choices in (
            ("views", views, get_args(Views)),
            ("dtype", dtype, get_args(Dtype)),
            ("layout", layout, get_args(Layout)),
        ):
            if choice not in choices:
                raise AlexprepError(f"{name} {choice!r} is not one of {', '.join(choices)}")
        images = Samples(Path(data), split)
        size = images.dataset["image"]["size"]
        if augmentation.crop > size:
            raise AlexprepError(
                f"a crop of {augmentation.crop} pixels does not fit the {size}-pixel images of {data}: "
                f"choose a crop up to {size}, or shard again with --size {augmentation.crop} or more"
            )
        self.samples: int = len(images)
        self.digest: str = images.dataset["digest"]
        self.classes: list[str] = images.dataset["classes"]
        self._labels = images.labels
        self._batch_size, self._views, self._shuffle, self._seed = batch_size, views, shuffle, seed
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        self._make_engine = functools.partial(
            Engine,
            images,
            stats.read(Path(data), self.digest) if augmentation.needs_statistics else None,
            augmentation,
            views,
            seed,
            self._device,
            dtype,
            layout,
            -(-batch_size // world_size),
            threads or cores(),
        )
        self._engine: Engine | None = None
        self.epoch = 0
        self.step = 0
        # Steps handed to the engine and not yet delivered, in order: (epoch, step, rows).
        self._ahead: deque[tuple[int, int, NDArray[np.int64]]] = deque()
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self._closed = False

    def __len__(self) -> int:
        """Steps an epoch, the same on all ranks; the last one may be smaller."""
        return steps_per_epoch(self.samples, self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present step to the end of the epoch."""
        if self._closed:
            raise AlexprepError("this Loader is closed: make a new one")
        epoch = self.epoch
        while self.epoch == epoch:
            engine = self._fill()
            _, step, rows = self._ahead.popleft()
            labels = torch.from_numpy(self._labels[rows]).to(self._device)
            try:
                batch = Batch(engine.take(rows), labels, torch.from_numpy(rows.copy()))
            except AlexprepError:
                self.close()
                raise
            self.epoch, self.step = (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)
            self._fill()
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from: {"seed", "epoch", "step"}, all that a resume needs, on any number of ranks."""
        return {"seed": self._seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a state that `state_dict` gave.

        Raises:
            AlexprepError: the state is of another seed or lies outside an epoch.
        """
        if state["seed"] != self._seed:
            raise AlexprepError(
                f"the state has seed {state['seed']}, this Loader {self._seed}: make it with the state's seed"
            )
        if state["epoch"] < 0 or not 0 <= state["step"] < len(self):
            raise AlexprepError(f"epoch {state['epoch']}, step {state['step']} is not in an epoch of {len(self)} steps")
        while self._ahead and self._engine:  # what DALI already works on is not wanted any more
            self._engine.take(self._ahead.popleft()[2])
        self.epoch, self.step = state["epoch"], state["step"]

    def close(self) -> None:
        """Frees the pipeline's threads and memory; delivered batches stay valid. Closing twice is fine."""
        self._closed = True
        self._ahead.clear()
        self._engine = None

    def __enter__(self) -> Loader:
        """The loader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the loader."""
        self.close()

    def rows(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The rows that this rank gets in one step: int64 (N,)."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self._seed, epoch, self.samples, self._shuffle))
        first = step * self._batch_size
        first, last = rank_part(first, min(first + self._batch_size, self.samples), self._rank, self._world_size)
        return self._order[1][first:last]

    def _fill(self) -> Engine:
        """Starts steps until enough are under way. Training runs on into the next epoch, evaluation ends with its own."""
        engine = self._engine = self._engine or self._make_engine()
        while len(self._ahead) <= _PREFETCH:
            epoch, step = (self._ahead[-1][0], self._ahead[-1][1] + 1) if self._ahead else (self.epoch, self.step)
            if step == len(self):
                if self._views != "random":
                    break
                epoch, step = epoch + 1, 0
            rows = self.rows(epoch, step)
            engine.start(epoch, rows)
            self._ahead.append((epoch, step, rows))
        return engine
