"""Batches for torch: the order and the draws of a run, the bytes from the shards, one DALI pipeline."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.pipeline import graph
from alexprep.pipeline.augment import Augmentation, colour_shifts
from alexprep.pipeline.draws import centred, draw
from alexprep.pipeline.order import epoch_order, rank_part, steps_per_epoch
from alexprep.shards import stats
from alexprep.shards.codec import Codec, Target
from alexprep.shards.engines import cores
from alexprep.shards.errors import AlexprepError
from alexprep.shards.read import Samples

Views = Literal["random", "centre", "ten"]

# Steps that DALI works on ahead of the one being consumed.
_PREFETCH = 2
_RAW_HEADER_BYTES = 128  # of a .npy member, see docs/formats.md


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
        dtype: graph.Dtype = "float32",
        layout: graph.Layout = "NCHW",
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
        self._augmentation = augmentation or Augmentation()
        if batch_size < 1:
            raise AlexprepError(f"batch_size {batch_size} is less than 1")
        if not 0 <= rank < world_size:
            raise AlexprepError(f"rank {rank} is not in [0, {world_size})")
        if views not in ("random", "centre", "ten"):
            raise AlexprepError(f"views {views!r} is not one of random, centre, ten")
        if dtype not in ("float32", "float16"):
            raise AlexprepError(f"dtype {dtype!r} is not float32 or float16")
        if layout not in ("NCHW", "NHWC"):
            raise AlexprepError(f"layout {layout!r} is not NCHW or NHWC")
        if not 0 <= seed < 2**63:
            raise AlexprepError(f"seed {seed} is not in [0, 2**63)")
        self._images = Samples(Path(data), split)
        image = self._images.dataset["image"]
        self._size, self._format = int(image["size"]), str(image["format"])
        if self._augmentation.crop > self._size:
            raise AlexprepError(
                f"a crop of {self._augmentation.crop} pixels does not fit the {self._size}-pixel images of {data}: "
                f"choose a crop up to {self._size}, or shard again with --size {self._augmentation.crop} or more"
            )
        self.samples: int = len(self._images)
        self.digest: str = self._images.dataset["digest"]
        self.classes: list[str] = self._images.dataset["classes"]
        self._statistics = stats.read(Path(data), self.digest) if self._augmentation.needs_statistics else None
        self._batch_size, self._views, self._shuffle, self._seed = batch_size, views, shuffle, seed
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        self._dtype: graph.Dtype = dtype
        self._layout: graph.Layout = layout
        self._threads = threads or int(os.environ.get("ALEXPREP_THREADS", 0)) or cores()
        self.epoch = 0
        self.step = 0
        self._pipeline: Any = None
        # Steps handed to DALI and not yet delivered, in order: (epoch, step, rows). Rows may be none: then DALI has no part in it.
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
            self._fill()
            _, step, rows = self._ahead.popleft()
            batch = self._deliver(rows)
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
            raise AlexprepError(f"the state has seed {state['seed']}, this Loader {self._seed}: make it with the state's seed")
        if state["epoch"] < 0 or not 0 <= state["step"] < len(self):
            raise AlexprepError(f"epoch {state['epoch']}, step {state['step']} is not in an epoch of {len(self)} steps")
        for _, _, rows in self._ahead:  # what DALI already works on is not wanted any more
            if len(rows):
                self._pipeline.outputs()
        self._ahead.clear()
        self.epoch, self.step = state["epoch"], state["step"]

    def close(self) -> None:
        """Frees the pipeline's threads and memory; delivered batches stay valid. Closing twice is fine."""
        self._closed = True
        self._ahead.clear()
        self._pipeline = None

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

    def _fill(self) -> None:
        """Hands steps to DALI until enough are under way. Training runs on into the next epoch, evaluation ends with its own."""
        while len(self._ahead) <= _PREFETCH:
            epoch, step = (self._ahead[-1][0], self._ahead[-1][1] + 1) if self._ahead else (self.epoch, self.step)
            if step == len(self):
                if self._views != "random":
                    return
                epoch, step = epoch + 1, 0
            rows = self.rows(epoch, step)
            if len(rows):
                self._feed(epoch, rows)
            self._ahead.append((epoch, step, rows))

    def _feed(self, epoch: int, rows: NDArray[np.int64]) -> None:
        pipeline = self._pipeline = self._pipeline or self._build()
        encoded = [self._images.encoded(row) for row in rows.tolist()]
        if self._format == "raw":
            encoded = [pixels[_RAW_HEADER_BYTES:].reshape(self._size, self._size, 3) for pixels in encoded]
        pipeline.feed_input("encoded", encoded)
        if self._views != "ten":
            for name, values in self._inputs(epoch, rows).items():
                pipeline.feed_input(name, values)
        pipeline.schedule_run()

    def _inputs(self, epoch: int, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What the graph needs beside the bytes, drawn for these rows."""
        side = self._augmentation.crop
        slack = self._size - side
        draws = draw(self._seed, epoch, rows, slack) if self._views == "random" else centred(len(rows), slack)
        mirror = draws.mirror_N & self._augmentation.mirror
        shift = np.zeros((len(rows), 3))
        if self._statistics is not None:
            shift += colour_shifts(draws.alpha_N3, self._statistics, self._augmentation)
            if self._augmentation.mean == "channel":
                shift -= self._statistics.channel_means
        position = draws.offsets_N2.astype(np.float32) / max(1, slack)
        inputs = {
            "x": np.ascontiguousarray(position[:, 1]),
            "y": np.ascontiguousarray(position[:, 0]),
            "mirror": mirror.astype(np.int32),
            "shift": shift.astype(np.float32),
        }
        if self._augmentation.mean == "crop":
            inputs["anchor"] = graph.mean_anchor(draws.offsets_N2, mirror, self._size, side)
        return inputs

    def _deliver(self, rows: NDArray[np.int64]) -> Batch:
        labels = torch.from_numpy(self._images.labels[rows]).to(self._device)
        return Batch(self._outputs(rows), labels, torch.from_numpy(rows.copy()))

    def _outputs(self, rows: NDArray[np.int64]) -> torch.Tensor:
        if not len(rows):
            side = self._augmentation.crop
            shape = (3, side, side) if self._layout == "NCHW" else (side, side, 3)
            views = (10,) if self._views == "ten" else ()
            return torch.empty((0, *views, *shape), dtype=getattr(torch, self._dtype), device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (images,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            self.close()
            raise AlexprepError(f"DALI could not make a batch: {self._culprit(rows) or error}") from error
        return torch.from_dlpack(images.as_tensor())

    def _culprit(self, rows: NDArray[np.int64]) -> str | None:
        """Names the first sample of a failed batch that cannot be decoded."""
        codec = Codec(Target())
        for row in rows.tolist():
            if self._format != "raw" and codec.decode(self._images.encoded(row).tobytes()) is None:
                return f"{self._images.where(row)} holds an image that cannot be decoded; run `alexprep shard` again"
        return None

    def _build(self) -> Any:
        index = None
        if self._device.type == "cuda":
            index = torch.cuda.current_device() if self._device.index is None else self._device.index
        common: dict[str, Any] = {
            "image_format": self._format,
            "batch_size": -(-self._batch_size // self._world_size),
            "threads": self._threads,
            "device": self._device.type,
            "device_id": index,
            "dtype": self._dtype,
            "layout": self._layout,
        }
        if self._views == "ten":
            return graph.ten_view_pipeline(self._augmentation, self._statistics, size=self._size, **common)
        return graph.single_view_pipeline(self._augmentation, self._statistics, **common)
