"""Random access to the encoded images of a finished split, without copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.files import is_local
from alexprep.shards.layout import read_dataset, read_index, shard_name, split_record


class Samples:
    """The samples of one split, by row of its index.

    Attributes:
        data: the data set's folder.
        split: the split's name.
        dataset: dataset.json.
        index: (samples,) records of `alexprep.shards.layout.INDEX_DTYPE`, memory-mapped.
        labels: int64 (samples,).
    """

    def __init__(self, data: Path, split: str) -> None:
        """Opens the index; shards are mapped when they are first read.

        Raises:
            AlexprepError: the data set is missing, unfinished, or has no sample in this split.
        """
        self.data, self.split = data, split
        self.dataset: dict[str, Any] = read_dataset(data)
        record = split_record(self.dataset, split, data)
        self.index = read_index(data, split)
        if len(self.index) != record["samples"]:
            raise AlexprepError(
                f"{data / split} has an index of {len(self.index):,} samples, dataset.json says {record['samples']:,}: "
                "run the same `alexprep shard` again"
            )
        self.labels: NDArray[np.int64] = self.index["label"].astype(np.int64)
        self._tars: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.index)

    def encoded(self, row: int) -> NDArray[np.uint8]:
        """The encoded image of one sample: uint8 (bytes,), a view into the mapped shard.

        Raises:
            AlexprepError: the shard is missing or shorter than its index says.
        """
        shard, offset, size, _ = self.index[row].tolist()
        tar = self._tars.get(shard)
        if tar is None:
            tar = self._tars[shard] = self._map(shard)
        encoded = tar[offset : offset + size]
        if len(encoded) != size:
            raise AlexprepError(
                f"{self._path(shard)} ends at byte {len(tar):,}, inside sample {row} of {self.split}: shard again"
            )
        return encoded

    def rows_of(self, shard: int) -> range:
        """The rows that lie in one shard; they are contiguous."""
        first, last = np.searchsorted(self.index["shard"], [shard, shard + 1])
        return range(int(first), int(last))

    def where(self, row: int) -> str:
        """Names a sample for messages: its shard and offset."""
        record = self.index[row]
        return f"{self._path(int(record['shard']))} at byte {int(record['offset']):,}"

    def _path(self, shard: int) -> Path:
        return self.data / self.split / f"{shard_name(self.split, shard)}.tar"

    def _map(self, shard: int) -> NDArray[np.uint8]:
        path = self._path(shard)
        try:
            if not is_local(path):  # one at a time: a shard is read from its first sample to its last
                self._tars.clear()
                return np.frombuffer(path.read_bytes(), np.uint8)
            return np.memmap(self._path(shard), dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise AlexprepError(
                f"{self._path(shard)} cannot be read ({error}): run the same `alexprep shard` again"
            ) from None
