"""Sources whose inputs lie in compressed groups, each read as a whole: how a worker keeps the groups that it is at.

A row group of Parquet is such a group. Where the groups of a window lie in memory, each is read about once in a pass: the plan puts
the inputs of a window's groups into neighbouring shards (`plan.grouped_order`), and one worker makes these.
"""

from __future__ import annotations

import io
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from alexprep.shards.errors import AlexprepError
from alexprep.shards.metadata import MetadataError
from alexprep.shards.sources.base import Location, Source
from alexprep.shards.storage import Files, as_text

# Of encoded pictures in the groups of a window: about 2,300 of ImageNet's, in 23 groups of 100 rows. It decides the plan.
WINDOW_BYTES = 256 * 2**20
MAX_GROUP_BYTES = 2**30  # of pictures in one group; Hugging Face writes groups of 100 rows, or of 100 MB


class Sizes(NamedTuple):
    """What a source says of its groups before any is read: inputs and bytes of pictures in all, and the bytes of the largest group."""

    inputs: int
    total_bytes: int
    largest_bytes: int
    metadata_bytes: int = 0  # of what goes along: in all, and of the largest group
    largest_metadata: int = 0


class DamagedGroupError(OSError):
    """A group that can never be read; the message says why. It has no errno, so each of its inputs is rejected for it."""


@dataclass(frozen=True)
class GroupedSource(Source):
    """A source whose locations give the number of the group in the file as the offset, and the row in the group as the size."""

    @abstractmethod
    def measured(self) -> Sizes:
        """The sizes of all groups; AlexprepError where a file is damaged, or a group larger than a worker may read."""

    @abstractmethod
    def read_group(self, path: bytes, number: int) -> pa.ChunkedArray:
        """The pictures of one group, a column of binary; DamagedGroupError, or another OSError where a further try may help."""

    def read_metadata(self, path: bytes, number: int) -> pa.Table:
        """What goes along with the pictures of one group, a column a name; errors as of `read_group`. None where no input refers to any."""
        raise NotImplementedError

    def metadata(self, location: Location, reference: bytes) -> dict[str, Any]:
        """See `Source`: the row's values; all that `reference` says is that there are some."""
        key = (self.files, location.path, location.offset, "metadata")
        group = _groups.get(key, lambda: self.read_metadata(location.path, location.offset), self._kept_bytes())
        if location.size >= len(group):
            raise OSError("the file has fewer rows than it had when it was listed")
        try:
            return dict(group.slice(location.size, 1).to_pylist()[0])
        except (ValueError, pa.ArrowException) as error:
            raise MetadataError(str(error).partition("\n")[0]) from None

    def read(self, location: Location) -> bytes:
        """The encoded bytes of one picture; OSError where its row has none, or its group cannot be read."""
        key = (self.files, location.path, location.offset)
        group = _groups.get(key, lambda: self.read_group(location.path, location.offset), self._kept_bytes())
        if location.size >= len(group):
            raise OSError("the file has fewer rows than it had when it was listed")
        data: bytes | None = group[location.size].as_py()
        if not data:
            raise OSError("the row holds no bytes of a picture")
        return data

    def window_inputs(self) -> int:
        """See `Source`."""
        sizes = self.sizes()
        return max(1, WINDOW_BYTES * sizes.inputs // max(1, sizes.total_bytes))

    def resident_bytes(self) -> int:
        """The groups that are kept, and one that is read, compressed and decompressed."""
        sizes = self.sizes()
        return self._kept_bytes() + 3 * (sizes.largest_bytes + sizes.largest_metadata)

    def sizes(self) -> Sizes:
        """As `measured`, once."""
        known: Sizes | None = self.__dict__.get("_sizes")
        if known is None:
            known = self.measured()
            object.__setattr__(self, "_sizes", known)
        return known

    def begin_listing(self) -> None:
        """Forgets what was kept and measured: files may have changed since."""
        _groups.clear()
        self.__dict__.pop("_sizes", None)

    def _kept_bytes(self) -> int:
        """Enough for a window whose pictures are larger than most, with groups that reach beyond it on both sides."""
        sizes = self.sizes()
        along = sizes.metadata_bytes * self.window_inputs() // max(1, sizes.inputs)
        # What goes along may be several times as large as it is stored, where values repeat.
        spare = min(4 * along, WINDOW_BYTES) if along else 0
        return 2 * (WINDOW_BYTES + along + sizes.largest_bytes + sizes.largest_metadata) + spare


def check_group(size: int, number: int, shown: str) -> None:
    """Raises AlexprepError where the pictures of group `number` take more bytes than a worker may read at once."""
    if size > MAX_GROUP_BYTES:
        raise AlexprepError(
            f"{shown}: row group {number} holds {size:,} bytes of pictures, above the limit of {MAX_GROUP_BYTES:,} that are read at once: "
            "write the file anew in smaller groups, as pyarrow.parquet.write_table(…, row_group_size=100) does"
        )


class _Groups:
    """The groups that this process has read last, up to some bytes. Threads that want the same one wait for one reading."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, Future[Any]] = OrderedDict()

    def get(self, key: Any, read: Callable[[], Any], bound: int) -> Any:
        """The group of a key, kept or read; what is kept comes to at most `bound` bytes beside it."""
        with self._lock:
            future = self._kept.get(key)
            if known := future is not None:
                self._kept.move_to_end(key)
            else:
                future = self._kept[key] = Future()
        assert future is not None
        if known:
            return future.result()
        try:
            group = read()
        except BaseException as error:
            if not isinstance(error, DamagedGroupError):  # which stays as it is; anything else is tried again
                with self._lock:
                    self._kept.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(group)
        with self._lock:
            self._leave_out(key, bound - group.nbytes)
        return group

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._kept.clear()

    def _leave_out(self, newest: Any, bound: int) -> None:
        """Forgets those that were used longest ago, beyond a number of bytes."""
        for key, future in reversed(list(self._kept.items())):
            if key != newest and future.done() and future.exception() is None:
                bound -= future.result().nbytes
                if bound < 0:
                    del self._kept[key]


_groups = _Groups()


class FileView(io.RawIOBase):
    """A file of `Files` as Python's programs want it, for reading at any place; to be closed by the one that opened it."""

    def __init__(self, files: Files, path: bytes) -> None:
        super().__init__()
        self._size, self._place = files.size(path), 0
        if not self._size:  # a pipe too, which would wait for ever
            raise OSError(f"{as_text(path)} is empty or no regular file")
        self._opened = ExitStack()
        self._read_at = self._opened.enter_context(files.reading(path))

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The place of the next read."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the place of the next read."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int | None = -1, /) -> bytes:
        """Some bytes, fewer only at the file's end."""
        left = max(0, self._size - self._place)
        data = self._read_at(self._place, left if size is None or size < 0 else min(size, left))
        self._place += len(data)
        return data

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            self._opened.close()
        super().close()
