"""One DALI pipeline at work: rows of a split in, tensors out, in the order in which the rows were handed in."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.pipeline import graph
from alexprep.pipeline.augment import Augmentation, colour_shifts
from alexprep.pipeline.draws import centred, draw
from alexprep.shards.codec import Codec, Target
from alexprep.shards.errors import AlexprepError
from alexprep.shards.read import Samples
from alexprep.shards.stats import Statistics

Views = Literal["random", "centre", "ten"]

_RAW_HEADER_BYTES = 128  # of a .npy member, see docs/formats.md


class Engine:
    """Decodes and augments batches ahead of their use."""

    def __init__(
        self,
        samples: Samples,
        statistics: Statistics | None,
        augmentation: Augmentation,
        views: Views,
        seed: int,
        device: torch.device,
        dtype: graph.Dtype,
        layout: graph.Layout,
        batch_size: int,
        threads: int,
    ) -> None:
        """Builds the pipeline for batches of at most `batch_size`; see `Loader` for the rest."""
        self._samples, self._statistics, self._augmentation = samples, statistics, augmentation
        self._views, self._seed, self._device = views, seed, device
        self._dtype, self._layout = dtype, layout
        image = samples.dataset["image"]
        self._size, self._format = int(image["size"]), str(image["format"])
        index = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
        settings = graph.Settings(self._size, self._format, batch_size, threads, device.type, index, dtype, layout)
        make = graph.ten_view_pipeline if views == "ten" else graph.single_view_pipeline
        self._pipeline = make(augmentation, statistics, settings)

    def start(self, epoch: int, rows: NDArray[np.int64]) -> None:
        """Hands a batch to DALI and returns at once. An empty batch, which DALI does not know, stays here."""
        if not len(rows):
            return
        encoded = [self._samples.encoded(row) for row in rows.tolist()]
        if self._format == "raw":
            encoded = [pixels[_RAW_HEADER_BYTES:].reshape(self._size, self._size, 3) for pixels in encoded]
        self._pipeline.feed_input("encoded", encoded)
        if self._views != "ten":
            for name, values in self._inputs(epoch, rows).items():
                self._pipeline.feed_input(name, values)
        self._pipeline.schedule_run()

    def take(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """The images of the batch that was started first and not taken yet, which must be that of `rows`.

        Raises:
            AlexprepError: an image could not be decoded. DALI cannot go on after that.
        """
        if not len(rows):
            side = self._augmentation.crop
            shape = (3, side, side) if self._layout == "NCHW" else (side, side, 3)
            views = (10,) if self._views == "ten" else ()
            return torch.empty((0, *views, *shape), dtype=getattr(torch, self._dtype), device=self._device)
        # On a GPU the result is bound to torch's stream: its memory is freed in that stream's order, so never under a
        # kernel that still reads it.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (images,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise AlexprepError(f"DALI could not make a batch: {self._culprit(rows) or error}") from error
        return torch.utils.dlpack.from_dlpack(images.as_tensor())

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
        inputs: dict[str, NDArray[Any]] = {
            "x": np.ascontiguousarray(position[:, 1]),
            "y": np.ascontiguousarray(position[:, 0]),
            "mirror": mirror.astype(np.int32),
            "shift": shift.astype(np.float32),
        }
        if self._augmentation.mean == "crop":
            inputs["anchor"] = graph.mean_anchor(draws.offsets_N2, mirror, self._size, side)
        return inputs

    def _culprit(self, rows: NDArray[np.int64]) -> str | None:
        """Names the first sample of a failed batch that cannot be decoded."""
        codec = Codec(Target())
        for row in rows.tolist():
            if self._format != "raw" and codec.decode(self._samples.encoded(row).tobytes()) is None:
                return f"{self._samples.where(row)} holds an image that cannot be decoded; run `alexprep shard` again"
        return None
