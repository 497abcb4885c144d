"""The inputs of a source as columns: 15 million of them fit into a few gigabytes."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from alexprep.shards.sources.base import Input

_CHUNK = 65_536


class SplitListing:
    """The inputs of one split, in the source's order."""

    def __init__(self) -> None:
        """Starts empty."""
        self._classes = array("i")
        self._offsets = array("q")
        self._sizes = array("q")
        self._recent: tuple[list[bytes], list[bytes]] = ([], [])
        self._chunks: tuple[list[pa.Array], list[pa.Array]] = ([], [])

    def __len__(self) -> int:
        """How many inputs."""
        return len(self._classes)

    def add(self, class_code: int, path: bytes, member: bytes, offset: int, size: int) -> None:
        """Appends one input."""
        self._classes.append(class_code)
        self._offsets.append(offset)
        self._sizes.append(size)
        for recent, value in zip(self._recent, (path, member), strict=True):
            recent.append(value)
        if len(self._recent[0]) == _CHUNK:
            self._flush()

    def columns(self, order: NDArray[np.int64]) -> tuple[NDArray[np.int32], dict[str, pa.Array]]:
        """Class codes, int32, and the columns path, member, offset and size, in an `order` of rows."""
        self._flush()
        text = {name: _taken(chunks, order) for name, chunks in zip(("path", "member"), self._chunks, strict=True)}
        numbers = {
            name: np.array(column, np.int64)[order]
            for name, column in (("offset", self._offsets), ("size", self._sizes))
        }
        return np.array(self._classes, np.int32)[order], text | {
            name: pa.array(column) for name, column in numbers.items()
        }

    def _flush(self) -> None:
        for recent, chunks in zip(self._recent, self._chunks, strict=True):
            chunks.append(pa.array(recent, pa.binary()))
            recent.clear()


def _taken(chunks: list[pa.Array], order: NDArray[np.int64]) -> pa.Array:
    # 64-bit offsets: the names of 15 million inputs are near what 32 bits can address.
    whole = pa.concat_arrays([chunk.cast(pa.large_binary()) for chunk in chunks])
    return whole.take(pa.array(order))


def list_inputs(inputs: Iterable[Input]) -> tuple[dict[str, SplitListing], list[str], str]:
    """All inputs by split, the class names by code, and the sha256 of the whole list, hex."""
    listing: dict[str, SplitListing] = {}
    codes: dict[str, int] = {}
    digest = hashlib.sha256()
    for split, class_name, location in inputs:
        if split not in listing:
            listing[split] = SplitListing()
        listing[split].add(codes.setdefault(class_name, len(codes)), *location)
        path, member, offset, size = location
        digest.update(b"%s\0%s\0%s\0%s\0%d\0%d\0" % (split.encode(), class_name.encode(), path, member, offset, size))
    return listing, list(codes), digest.hexdigest()
