"""Reads messages in protobuf's wire format, as TFRecord files and Caffe's LMDB databases hold them, value by value.

The format is that of protobuf.dev, "Encoding": (field << 3 | kind), then a number, 8 bytes, a length and bytes, or 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

VARINT, _FIXED_64, LENGTH, _FIXED_32 = 0, 1, 2, 5  # kinds
_MAX_VARINT_BYTES = 10

Get = Callable[[int, int], bytes]  # (offset, size) → bytes of a record


class WireError(Exception):
    """What is no message in protobuf's wire format."""


def fields(get: Get, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field, kind, begin, end) of each value of a message; WireError where it is none."""
    while at < end:
        key, at = varint(get, at, end)
        number, kind = key >> 3, key & 7
        if kind == LENGTH:
            length, at = varint(get, at, end)
        elif kind == VARINT:
            length = varint(get, at, end)[1] - at
        else:
            length = {_FIXED_64: 8, _FIXED_32: 4}.get(kind, end)
        if not number or at + length > end:
            raise WireError("a field goes beyond its message")
        yield number, kind, at, at + length
        at += length


def varint(get: Get, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends; WireError where it does not."""
    value = 0
    for place, byte in enumerate(get(at, min(_MAX_VARINT_BYTES, end - at))):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise WireError("a number does not end")
