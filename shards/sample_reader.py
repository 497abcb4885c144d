"""Reads the encoded images of finished shards at random: of our data sets, and of other people's tars by their index.

Decoding and the order of an epoch are the business of `alexprep.pipeline`; indexing other people's tars that of `webdataset_index`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import read_dataset, read_index, shard_name, split_record
from alexprep.shards.errors import AlexprepError
from alexprep.shards.mapped_file import MappedFile, expect
from alexprep.shards.metadata import EXTENSION, MetadataError, parsed
from alexprep.shards.sources.wds import split_name
from alexprep.shards.storage import as_text, is_local
from alexprep.shards.tar_format import BLOCK, number_of_bytes, padded, read_header_block

_MOST_MAPPED = 16_384  # shards; a process may have 65,530 mappings, as Linux has it
_FETCHES = 4  # remote shards on their way at the same time


class TarSamples:
    """Samples that lie in tars, each read by the number of its row in an index.

    Local shards are mapped into memory: reading costs no copy, no open file and no shared file position, so forked processes may read at
    the same time. A shard that is gone or has become shorter when samples are asked for is an error; see `mapped_file` for what remains.
    Not to be shared by threads.

    Attributes:
        index: (samples,) records of `dataset_format.INDEX_DTYPE`, ascending by shard and offset.
        labels: int64 (samples,).
        remote: whether a shard lies elsewhere than in a local folder.
        keep_shards: how many remote shards are held in memory; local ones are read in place.
    """

    def __init__(self, paths: Mapping[int, Path], index: NDArray[np.void]) -> None:
        """`paths` has the tar of each shard number. Nothing is opened yet."""
        self.index = index
        self.labels: NDArray[np.int64] = index["label"].astype(np.int64)
        self.keep_shards = 1
        self._paths = paths
        self.remote = any(not is_local(path) for path in paths.values())
        self._mapped: dict[int, MappedFile] = {}
        self._fetched: OrderedDict[int, Future[NDArray[np.uint8]]] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.index)

    @functools.cached_property
    def common_size(self) -> tuple[int, int] | None:
        """Height and width of the images where all have the same, pixels; None where they differ or there are none."""
        if not len(self.index):
            return None
        sides = [self.index[name] for name in ("height", "width")]
        same = all((side == side[0]).all() for side in sides)
        return (int(sides[0][0]), int(sides[1][0])) if same else None

    def sizes_N2(self) -> NDArray[np.int32]:
        """Heights and widths of the images, int32 (N, 2), pixels; without memory of their own where all are the same."""
        if self.common_size is not None:
            return np.broadcast_to(np.array(self.common_size, np.int32), (len(self.index), 2))
        return np.stack([self.index["height"], self.index["width"]], axis=1).astype(np.int32)

    def encoded(self, row: int) -> NDArray[np.uint8]:
        """The encoded image of one sample, see `read`."""
        return self.read(np.array([row]))[0]

    def read(self, rows_N: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """The encoded images of samples, uint8 (bytes,) each, not to be written to; local ones are read when they are looked at.

        Raises AlexprepError where a shard is missing, unreadable or too short.
        """
        records = self.index[rows_N]
        places = [records[name].tolist() for name in ("shard", "offset", "size")]
        now = time.monotonic()
        contents = {shard: self._contents(shard, now) for shard in dict.fromkeys(places[0])}
        images = [contents[shard][offset : offset + size] for shard, offset, size in zip(*places, strict=True)]
        for image, shard, offset, size in zip(images, *places, strict=True):
            if len(image) != size:
                raise AlexprepError(
                    f"{self._paths[shard]} ends inside the sample at byte {offset:,}, which has {size:,} bytes: "
                    "`alexprep verify` tells more"
                )
        return images

    def expect(self, rows_N: NDArray[np.int64]) -> None:
        """Says which rows will be asked for soon, so that a slow disk or a remote store can begin to deliver. Returns at once."""
        records = self.index[rows_N]
        shards = records["shard"].tolist()
        if self.remote:
            for shard in dict.fromkeys(shards):
                self._fetch(shard)
            return
        with contextlib.suppress(OSError):  # whoever reads the samples will say what is wrong
            files = {shard: self._mapping(shard) for shard in dict.fromkeys(shards)}
            offsets, sizes = (records[name].astype(np.int64) for name in ("offset", "size"))
            expect([files[shard] for shard in shards], offsets, sizes)

    def rows_of(self, shard: int) -> range:
        """The rows that lie in one shard; they are contiguous."""
        first, last = np.searchsorted(self.index["shard"], [shard, shard + 1])
        return range(int(first), int(last))

    def key(self, row: int) -> str:
        """The key of a sample, by the header of its image in the tar; AlexprepError where that is damaged."""
        record = self.index[row]
        shard, offset = int(record["shard"]), int(record["offset"])
        name = self._member(shard, offset - BLOCK)[0]
        if not name:
            raise AlexprepError(f"{self.where(row)} has a damaged header: `alexprep verify` tells more")
        return as_text(split_name(name)[0])

    def where(self, row: int) -> str:
        """Names a sample for messages: its shard, its offset, and its member's name where it can be read."""
        record = self.index[row]
        shard, offset = int(record["shard"]), int(record["offset"])
        name = b""
        with contextlib.suppress(AlexprepError):
            name = self._member(shard, offset - BLOCK)[0]
        return f"{self._paths[shard]} at byte {offset:,}{f' ({as_text(name)})' if name else ''}"

    def _member(self, shard: int, at: int) -> tuple[bytes, int]:
        """The name and size of the member whose header is at a byte of a shard; an empty name where there is none."""
        block = self._bytes(shard, at, BLOCK).tobytes()
        header = read_header_block(block) if len(block) == BLOCK and block != bytes(BLOCK) else None
        size = number_of_bytes(header.size) if header else None
        return (header.path(), size) if header and size is not None else (b"", 0)

    def _bytes(self, shard: int, offset: int, size: int) -> NDArray[np.uint8]:
        return self._contents(shard, time.monotonic())[offset : offset + size]

    def _contents(self, shard: int, now: float) -> NDArray[np.uint8]:
        """All of a shard: uint8 (bytes,). `now` is `time.monotonic()`."""
        mapped = self._mapped.get(shard)
        if mapped is not None and now < mapped.sound_until:
            return mapped.contents
        if self.remote:
            try:
                return self._fetch(shard).result()
            except AlexprepError:
                self._fetched.pop(shard, None)  # the next one to ask tries again
                raise
        try:
            if mapped is not None and mapped.shrunk():
                del self._mapped[shard]
            return self._mapping(shard).contents
        except OSError as error:
            raise self._unreadable(shard, error) from None

    def _mapping(self, shard: int) -> MappedFile:
        mapped = self._mapped.get(shard)
        if mapped is None:
            if len(self._mapped) >= _MOST_MAPPED:
                del self._mapped[next(iter(self._mapped))]
            mapped = self._mapped[shard] = MappedFile(os.fspath(self._paths[shard]))
        return mapped

    def _fetch(self, shard: int) -> Future[NDArray[np.uint8]]:
        if self._process != os.getpid():  # threads, and what they were at, stay with the parent of a fork
            self._pool, self._process = None, os.getpid()
            self._fetched.clear()
        future = self._fetched.get(shard)
        if future is None:
            self._pool = self._pool or ThreadPoolExecutor(_FETCHES, "alexprep-fetch")
            future = self._fetched[shard] = self._pool.submit(self._download, shard)
            while len(self._fetched) > self.keep_shards:
                self._fetched.popitem(last=False)
        self._fetched.move_to_end(shard)
        return future

    def _download(self, shard: int) -> NDArray[np.uint8]:
        try:
            return np.frombuffer(self._paths[shard].read_bytes(), np.uint8)
        except (OSError, ValueError) as error:
            raise self._unreadable(shard, error) from None

    def _unreadable(self, shard: int, error: Exception) -> AlexprepError:
        return AlexprepError(f"{self._paths[shard]} cannot be read ({error}): `alexprep verify` tells more")


class Samples(TarSamples):
    """The samples of one split of a data set that `alexprep shard` made, whose dataset.json is the attribute `dataset`."""

    def __init__(self, data: Path, split: str) -> None:
        """Opens the index; shards are opened when they are first read."""
        self.data, self.split = data, split
        self.dataset: dict[str, Any] = read_dataset(data)
        record = split_record(self.dataset, split, data)
        index = read_index(data, split)
        if len(index) != record["samples"]:
            raise AlexprepError(
                f"{data / split} has an index of {len(index):,} samples, dataset.json says {record['samples']:,}: "
                "run the same `alexprep shard` again"
            )
        self._has_metadata = self.dataset["options"].get("metadata") is not None
        numbers = np.unique(index["shard"]).tolist()
        super().__init__({n: data / split / f"{shard_name(split, n)}.tar" for n in numbers}, index)

    def metadata(self, row: int) -> dict[str, Any]:
        """What goes along with a sample, its KEY.json: values by name, as JSON has them; {} where it has none.

        The members of a sample follow its image, so no index is needed. AlexprepError where the shard is damaged.
        """
        if not self._has_metadata:
            return {}
        record, key = self.index[row], self.key(row)
        shard, at = int(record["shard"]), int(record["offset"]) + padded(int(record["size"]))
        while True:
            name, size = self._member(shard, at)
            own, extension = split_name(name)
            if as_text(own) != key:
                return {}
            if extension == EXTENSION:
                break
            at += BLOCK + padded(size)
        try:
            return dict(parsed(self._bytes(shard, at + BLOCK, size).tobytes(), as_text(name)))
        except (MetadataError, ValueError, TypeError) as error:
            raise AlexprepError(f"{self.where(row)}: {error}: `alexprep verify` tells more") from None
