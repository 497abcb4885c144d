"""What the bytes of an encoded image tell before anything is decoded: its size, whether it is whole, whether it is within bounds.

A file that cannot be used is a `Refused` with its reason, not an exception. Decoding, and what needs a decoder's library,
is in `alexprep.shards.image_codec`; this module imports none.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

# Bounds that keep a worker within 1 GiB (measured: benchmarks/memory.py), checked before anything is allocated. The largest
# photo of ILSVRC 2012 has 61 million pixels.
MAX_PIXELS = 80_000_000
_MAX_SIDE = 65_535  # JPEG's own
_MAX_CMYK_PIXELS = 60_000_000  # progressive, these take 12 bytes a pixel
# A progressive JPEG may have thousands of scans, each of which visits every block: a few kilobytes, minutes of work. Encoders
# write about ten; nvImageCodec's first decoder stops at 256, the ones it then asks do not.
MAX_SCANS = 256
_START_OF_SCAN, _PROGRESSIVE = 0xDA, 0xC2

_HEAD_BYTES = 2048  # holds the header of any type but of a JPEG with EXIF, a thumbnail or a profile before it
# Camera and editor files have up to about 300 segments before the frame; a file of nothing else has millions.
_MOST_SEGMENTS = 1000
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type
_FRAMES = {0xC0: "", 0xC1: "", 0xC2: "", 0xC9: "", 0xC3: "lossless", 0xCB: "lossless"}
_FRAMES |= dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCA, 0xCD, 0xCE, 0xCF), "hierarchical or arithmetic progressive")
_pnm = re.compile(rb"P([1-6])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s").match
_CUT = "ends within its header"
Read = Callable[[int, int], bytes]  # (offset, size) → those bytes; fewer only where the image ends


@dataclass(frozen=True)
class Refused:
    """An image that is left out, and why; width and height are 0 where the header could not be read."""

    reason: str
    width: int = 0
    height: int = 0


def general_reason(reason: str) -> str:
    """A reason without its particulars, so that like ones are counted together."""
    return re.sub(r"\d[\d,]*", "N", reason.split(" (first bytes ")[0])


class Header(NamedTuple):
    """Height and width of the stored pixels (EXIF orientation not applied), and the number of channels."""

    height: int
    width: int
    channels: int


def read_header(read: Read, offset: int, size: int) -> Header | Refused:
    """The header of the encoded image of `size` bytes at `offset` of what `read(offset, size)` reads.

    It is refused where our decoders would have none of it, as far as a header tells: accepted are JPEG (Huffman, or arithmetic and
    sequential; 8 bits), PNG, WebP, BMP and PNM, whatever the name says, within the bounds of `too_large`.
    """
    head = read(offset, min(size, _HEAD_BYTES))

    def get(at: int, count: int) -> bytes:
        if at + count <= len(head):
            return head[at : at + count]
        return read(offset + at, max(0, min(count, size - at)))

    if not size:
        return Refused("empty file")
    parse = next((parse for magic, parse in _PARSERS.items() if head.startswith(magic)), None)
    if parse is None:
        return Refused(f"not a JPEG, PNG, WebP, BMP or PNM image (first bytes {head[:8].hex(' ')})")
    try:
        found = parse(head, get)
    except (struct.error, IndexError):
        return Refused(_CUT)
    if isinstance(found, Refused):
        return found
    if found.height < 1 or found.width < 1:
        return Refused(f"{found.width}x{found.height} pixels: its header is damaged")
    return too_large(*found) or found


def too_large(height: int, width: int, channels: int = 3) -> Refused | None:
    """The refusal of an image that is beyond the bounds; None for one that is not."""
    limit, side = MAX_PIXELS if channels <= 3 else _MAX_CMYK_PIXELS, max(height, width)
    if height * width > limit:
        return Refused(f"{width}x{height} pixels are more than the limit of {limit:,}", width, height)
    if side > _MAX_SIDE:
        return Refused(f"a side of {side:,} pixels is more than the limit of {_MAX_SIDE:,}", width, height)
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, position) of a JPEG's segments up to its first scan."""
    position = 2
    while data[position : position + 1] == b"\xff" and position + 1 < len(data):
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        yield marker, position
        if marker == _START_OF_SCAN:
            return
        position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))


def has_end(data: bytes) -> bool:
    """Whether a JPEG has an end-of-image marker behind its first scan's start: without one it was cut short.

    The region decoder stops after the last row it needs and so cannot notice a cut below it. An EXIF thumbnail has an
    end marker of its own, hence the walk over the segments.
    """
    if data.endswith(b"\xff\xd9"):
        return True
    # Inside a scan ff is always followed by 00 or a restart marker.
    return any(
        marker == _START_OF_SCAN and data.find(b"\xff\xd9", position) >= 0 for marker, position in _segments(data)
    )


def too_many_scans(data: bytes) -> Refused | None:
    """The refusal of a progressive JPEG with more than `MAX_SCANS`; None for all else."""
    if not any(marker == _PROGRESSIVE for marker, _ in _segments(data)):
        return None  # counting would cost more than a tenth of the decoding
    scans = data.count(b"\xff\xda")
    return Refused(f"{scans:,} scans are more than the limit of {MAX_SCANS}") if scans > MAX_SCANS else None


def _jpeg(_head: bytes, get: Read) -> Header | Refused:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        segment = get(at, 10)
        marker = segment[1]
        if segment[0] != 0xFF:
            return Refused(f"no JPEG marker at byte {at:,}: its header is damaged")
        if marker == 0xFF:  # fill bytes may precede any marker
            at += 1
        elif marker in _FRAMES:
            length, bits, height, width, channels = struct.unpack_from(">HBHHB", segment, 2)
            if _FRAMES[marker] or bits != 8:
                return Refused(f"a JPEG of a kind that is not decoded ({_FRAMES[marker] or f'{bits} bits a channel'})")
            if length != 8 + 3 * channels:
                return Refused(f"a JPEG frame of {length} bytes for {channels} channels: its header is damaged")
            return Header(height, width, channels)
        elif marker == 0xDA or not 0xC4 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
            return Refused(f"JPEG marker {marker:02x} at byte {at:,} before any frame: its header is damaged")
        else:
            (length,) = struct.unpack_from(">H", segment, 2)
            if length < 2:
                return Refused(f"a JPEG segment of {length} bytes at byte {at:,}: its header is damaged")
            at += 2 + length
    return Refused(f"more than {_MOST_SEGMENTS:,} JPEG segments before the picture")


def _png(head: bytes, _get: Read) -> Header | Refused:
    width, height, colour, checksum = struct.unpack_from(">IIxB3xI", head, 16)
    if colour not in _PNG_CHANNELS:
        return Refused(f"PNG colour type {colour}")
    if checksum != zlib.crc32(head[12:29]):
        return Refused("a PNG header whose checksum is wrong")
    return Header(height, width, _PNG_CHANNELS[colour])


def _webp(head: bytes, _get: Read) -> Header | Refused:
    kind = head[12:16]
    if kind == b"VP8X":
        flags, wide, high = head[20], head[24:27], head[27:30]
        if len(high) < 3:
            return Refused(_CUT)
        return Header(int.from_bytes(high, "little") + 1, int.from_bytes(wide, "little") + 1, 4 if flags & 16 else 3)
    if kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", head, 21)
        return Header((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 4 if bits >> 28 & 1 else 3)
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return Header(height & 0x3FFF, width & 0x3FFF, 3)
    return Refused(f"a WebP that begins with {kind!r}: its header is damaged")


def _bmp(head: bytes, _get: Read) -> Header | Refused:
    (length,) = struct.unpack_from("<I", head, 14)
    width, height, _planes, bits = struct.unpack_from("<HHHH" if length == 12 else "<iiHH", head, 18)
    return Header(abs(height), width, 4 if bits == 32 else 3)  # rows from the top have a negative height


def _portable(head: bytes, _get: Read) -> Header | Refused:
    match = _pnm(head)
    if match is None:
        return Refused("a PNM whose header makes no sense")
    kind, width, height = map(int, match.groups())
    return Header(height, width, 3 if kind in (3, 6) else 1)


_PARSERS: dict[bytes, Callable[[bytes, Read], Header | Refused]] = {
    b"\xff\xd8\xff": _jpeg,
    _PNG: _png,
    b"RIFF": _webp,
    b"BM": _bmp,
    **{b"P%d" % kind: _portable for kind in range(1, 7)},
}
