"""Makes the views that a network is shown in an evaluation of encoded images that are at hand, and lie in no shard.

The graph is the one that a `Loader` runs, so an image gives the same views whichever of the two makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.pipeline.augmentation import Augmentation, centred
from alexprep.pipeline.dali_graph import Graph, Views
from alexprep.pipeline.dali_ops import MemoryFormat
from alexprep.pipeline.dataset import Dataset
from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import PipelineRunner, Step
from alexprep.pipeline.loader_settings import Tuning
from alexprep.shards.dataset_format import INDEX_DTYPE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import header_size, read_raw
from alexprep.shards.rgb_statistics import Statistics
from alexprep.shards.sample_reader import TarSamples


class _AtHand(TarSamples):
    """The images of the batch that is being made, in place of those of shards."""

    def __init__(self) -> None:
        super().__init__({}, np.empty(0, INDEX_DTYPE))
        self.images: Sequence[bytes] = ()

    def read(self, rows_N: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [np.frombuffer(self.images[row], np.uint8) for row in rows_N.tolist()]

    def where(self, row: int) -> str:
        return f"image {row} of the batch"


def too_small(augmentation: Augmentation, height: int, width: int) -> str | None:
    """Why no view can be cut of an image of this height and width; None where one can be."""
    if augmentation.view is None or augmentation.scale is not None:
        return None
    rows, columns = augmentation.view
    more = 2 * augmentation.pad
    fits = rows <= height + more and columns <= width + more
    return None if fits else f"{width} x {height} pixels are too few for a crop of {columns} x {rows}"


class ViewMaker:
    """Makes batches of evaluation views, of images that all have one form, encoded or raw.

    To be closed, or used as a context manager.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        views: Views,
        *,
        size: tuple[int, int] | None,
        raw: bool,
        batch_size: int,
        statistics: Statistics | None = None,
        device: str | torch.device = "cpu",
        memory_format: MemoryFormat = "NCHW",
        tuning: Tuning | None = None,
    ) -> None:
        """Builds the DALI pipeline; for the arguments see `Loader`.

        `size` is the height and width that all images have, pixels, or None where each has its own, which its header tells; `raw` says
        whether images are raw members.

        Raises AlexprepError where these images cannot be augmented so, or DALI cannot build its pipeline.
        """
        tuning, where = tuning or Tuning(), choose_device(device)
        self._samples = _AtHand()
        self._size, self._raw = size, raw
        self._sizes_N2 = np.full((batch_size, 2), size or (0, 0), np.int32)
        dataset = Dataset(self._samples, self._sizes_N2, size, raw, "", [], (), None)
        chosen = statistics if augmentation.needs_statistics else None
        if chosen is None and augmentation.needs_statistics:
            raise AlexprepError("this augmentation needs the statistics of a dataset: give those of the training")
        known = batch_size if size is not None else 0
        dataset._replace(sizes_N2=self._sizes_N2[:known]).check(augmentation, chosen)
        self._graph = Graph(
            augmentation,
            chosen,
            views,
            raw=raw,
            size=size,
            batch_size=batch_size,
            threads=tuning.dali_threads,
            device=where.type,
            device_id=torch.cuda.current_device() if where.type == "cuda" and where.index is None else where.index,
            decode=tuning.decode_on(where.type),
            hw_decoder_load=tuning.hw_decoder_load,
            dtype="float32",
            memory_format=memory_format,
        )
        self._runner = PipelineRunner(dataset, self._graph, "error")

    def __call__(self, encoded: Sequence[bytes]) -> torch.Tensor:
        """The views of at least one image and at most `batch_size`: (N, 3, H, W), or (N, views, 3, H, W), as `Batch.images` is.

        Raises AlexprepError for an image that cannot be decoded, or is too small.
        """
        self._samples.images = encoded
        if self._size is None:
            sizes = [self._size_of(number, data) for number, data in enumerate(encoded)]
            if self._graph.augmentation.view is None and len(set(sizes)) > 1:
                raise AlexprepError("whole images of several sizes make no batch: choose a crop")
            self._sizes_N2[: len(encoded)] = sizes
        rows = np.arange(len(encoded), dtype=np.int64)
        self._runner.feed(Step(0, 0, rows, centred(self._graph.augmentation, self._sizes_N2[rows])))
        return self._runner.take()[1]

    def _size_of(self, number: int, data: bytes) -> tuple[int, int]:
        """Height and width by an image's header."""
        if self._raw:
            pixels = read_raw(data)
            size = None if pixels is None else pixels.shape[:2]
        else:
            size = header_size(np.frombuffer(data, np.uint8))
        if size is None:
            raise AlexprepError(f"{self._samples.where(number)} cannot be decoded: leave it out")
        if words := too_small(self._graph.augmentation, *size):
            raise AlexprepError(f"{self._samples.where(number)}: {words}")
        return size

    def close(self) -> None:
        """Frees the pipeline's threads and memory; views that were made stay valid."""
        self._runner.close()

    def __enter__(self) -> ViewMaker:
        """The maker itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()
