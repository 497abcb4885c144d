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
from alexprep.shards.image_codec import header_size
from alexprep.shards.rgb_statistics import Statistics
from alexprep.shards.sample_reader import TarSamples


class _AtHand(TarSamples):
    """The images of the batch that is being made, in place of those of shards."""

    def __init__(self) -> None:
        super().__init__({}, np.empty(0, INDEX_DTYPE))
        self.images: Sequence[bytes] = ()

    def encoded(self, row: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.images[row], np.uint8)

    def where(self, row: int) -> str:
        return f"image {row} of the batch"


class ViewMaker:
    """Makes batches of evaluation views, of images that all have one form: squares of `size` pixels, encoded, or raw; or encoded, of any size.

    To be closed, or used as a context manager.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        views: Views,
        *,
        size: int | None,
        raw: bool,
        batch_size: int,
        statistics: Statistics | None = None,
        device: str | torch.device = "cpu",
        memory_format: MemoryFormat = "NCHW",
        tuning: Tuning | None = None,
    ) -> None:
        """Builds the DALI pipeline; for the arguments see `Loader`, `size` and `raw` are those of the stored images, None for several sizes.

        Raises AlexprepError where these images cannot be augmented so, or DALI cannot build its pipeline.
        """
        tuning, where = tuning or Tuning(), choose_device(device)
        self._samples = _AtHand()
        self._size = size
        dataset = Dataset(self._samples, self._sizes([b""] if size else []), size, raw, "", [], (), None)
        chosen = statistics if augmentation.needs_statistics else None
        if chosen is None and augmentation.needs_statistics:
            raise AlexprepError("this augmentation needs the statistics of a dataset: give those of the training")
        dataset.check(augmentation, chosen)
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

        Raises AlexprepError for an image that cannot be decoded.
        """
        self._samples.images = encoded
        sizes_N2 = self._runner.sizes_N2 = self._sizes(encoded)
        rows = np.arange(len(encoded), dtype=np.int64)
        self._runner.feed(Step(0, 0, rows, centred(self._graph.augmentation, sizes_N2)))
        return self._runner.take()[1]

    def _sizes(self, encoded: Sequence[bytes]) -> NDArray[np.int32]:
        """Heights and widths: (N, 2)."""
        if self._size is not None:
            return np.broadcast_to(np.array(self._size, np.int32), (len(encoded), 2))
        found = [header_size(np.frombuffer(each, np.uint8)) for each in encoded]
        if None in found:
            raise AlexprepError(f"image {found.index(None)} of the batch cannot be decoded: its header cannot be read")
        return np.array(found, np.int32).reshape(-1, 2)

    def close(self) -> None:
        """Frees the pipeline's threads and memory; views that were made stay valid."""
        self._runner.close()

    def __enter__(self) -> ViewMaker:
        """The maker itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()
