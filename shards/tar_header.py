"""Blocks of a tar, and the header of a member as far as it can be read by itself."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple
from zlib import adler32

BLOCK = 512  # bytes: a header is one, and data are filled up to whole ones
_HEADER = struct.Struct("100s 24x 12s 12x 8s c 100x 8s 80x 155s 12x")  # name, size, checksum, type, magic, prefix
_LOW_BYTES = bytes(range(128))
_octal = re.compile(rb" *([0-7]+)[ \0]*").fullmatch


def padded(size: int) -> int:
    """The bytes that data of `size` take in a tar.

    >>> padded(0), padded(1), padded(512)
    (0, 512, 512)
    """
    return -(-size // BLOCK) * BLOCK


class Header(NamedTuple):
    """The fields that matter, as stored."""

    name: bytes
    size: bytes
    flag: bytes
    magic: bytes
    prefix: bytes


def read_header_block(block: bytes) -> Header | None:
    """The header in a block; None where its checksum is wrong."""
    name, size, checksum, flag, magic, prefix = _HEADER.unpack(block)
    # The lower half of Adler-32, begun at 0, is the sum of up to 257 bytes: far faster than sum(block).
    total = (adler32(block[:256], 0) & 0xFFFF) + (adler32(block[256:], 0) & 0xFFFF)
    total += 8 * ord(" ") - (adler32(checksum, 0) & 0xFFFF)  # the checksum itself counts as spaces
    digits = _octal(checksum)
    excess = total - int(digits[1], 8) if digits else -1
    if excess and excess != 256 * len(block.translate(None, _LOW_BYTES)):  # old tars summed signed bytes
        return None
    return Header(name, size, flag, magic, prefix)


def number_of_bytes(field: bytes) -> int | None:
    """A size in octal digits, or as GNU's signed big-endian number behind a set bit; None for neither and below 0."""
    digits = _octal(field)
    if digits:
        return int(digits[1], 8)
    return int.from_bytes(field, "big") - 2**95 if field[0] & 0xC0 == 0x80 else None
