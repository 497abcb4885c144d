"""Decodes JPEGs with libjpeg-turbo, and tells what is missing or damaged in them.

libjpeg goes on where a file is damaged, fills up with grey, and warns; `simplejpeg` shows the first warning and hides all others. So a
file that it warns of is decoded once more from a copy of nothing but what the picture needs, whose first warning is the picture's own.
Which JPEGs come here is decided in `alexprep.shards.image_header`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from alexprep.shards.image_header import END_OF_IMAGE, HUFFMAN, PROGRESSIVE, START_OF_SCAN, Frame, Refused, next_marker

# What a picture is made of (ITU-T T.81, table B.1): tables, frames, restart interval, scans, and what tells its colours (JFIF, Adobe).
_NEEDED = {0xDB, 0xC4, 0xDD, START_OF_SCAN, 0xE0, 0xEE, *HUFFMAN}
_MOST_PARTS = 10_000
_COEFFICIENTS = 64
_SCALES = (4, 3, 2, 1)  # eighths
_SMALLEST = (1, 1)  # height and width that are enough: an eighth of a picture's
# Of bytes that a scan has left over when its picture is complete. Encoders leave a few, and up to 7 more go unnoticed; where data were
# lost or added in the middle, 3 in 100 leave so few (measured: 929 damaged photos).
_HARMLESS = 8
COMPARED = 20_000_000  # pixels of which two whole pictures are held to find what is missing
NOISE = bytes(range(0xFE, 0x60, -1)) * 8  # behind a scan's data: where it changes the picture, data were missing
_scan_end = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]").search
_left_over = re.compile(r"(\d+) extraneous bytes before marker 0xd9").search


class Picture(NamedTuple):
    """A decoded JPEG. `sound` says that libjpeg has nothing to say against its bytes; `damage` what of the picture is not right."""

    pixels: NDArray[np.uint8]  # (H, W, 3), RGB
    sound: bool
    damage: str | None


class OddSamplingError(ValueError):
    """Says that a JPEG's chroma is subsampled in a way that simplejpeg does not take."""


def decode(data: bytes, frame: Frame, room: NDArray[np.uint8] | None = None) -> Picture | Refused:
    """The picture of a JPEG with this `frame`, whole, though perhaps damaged; refused where libjpeg gives none.

    `room` is memory for the pixels, used where it is enough: pages that are there already save a twelfth of the time.
    Raises OddSamplingError, and MemoryError where libjpeg says so.
    """
    damage = _missing_scans(data, frame) if frame.scans else None
    try:
        return Picture(_pixels(data, frame, room=room), damage is None, damage)
    except ValueError as error:
        _known(error)
    needed = picture_alone(data, frame)
    try:
        return Picture(_pixels(needed, frame), False, damage)
    except ValueError as error:
        words = _known(error)
    try:
        pixels = _pixels(needed, frame, strict=False)
    except ValueError as error:
        _known(error)
        return Refused(f"damaged JPEG: {_plain(str(error))}", frame.width, frame.height)
    return Picture(pixels, False, _damage(words, needed, frame, pixels) or damage)


def decode_scaled(
    data: bytes, frame: Frame, least: tuple[int, int], room: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.uint8], float] | None:
    """The pixels of a sound JPEG, uint8 (H, W, 3), RGB, and the scale, a half or less, at which they have at least this height and width.

    Scaled by leaving out the high frequencies of each block; of a side of 99 pixels, 50 stand for 49.5. None where libjpeg warns. For `room`
    and errors see `decode`.
    """
    try:
        pixels = _pixels(data, frame, room=room, least=least)
    except ValueError as error:
        _known(error)
        return None
    if frame.scans and _missing_scans(data, frame):
        return None
    for eighths in _SCALES:
        if pixels.shape[:2] == (-(-frame.height * eighths // 8), -(-frame.width * eighths // 8)):
            return pixels, eighths / 8
    return None


def is_sound(data: bytes, frame: Frame) -> bool:
    """Whether libjpeg reads all of a JPEG without a warning: as `Picture.sound`, for half the work of decoding."""
    try:
        _pixels(data, frame, least=_SMALLEST)
    except ValueError:
        return False
    return not (frame.scans and _missing_scans(data, frame))


def picture_alone(data: bytes, frame: Frame, noise: bytes = b"") -> bytes:
    """A copy of a JPEG that has what its picture needs and an end marker, without what libjpeg warns of but could do without.

    Gone are comments and metadata, bytes between segments, whatever follows the picture; set right are fields that have no effect.
    `noise`, if any, is put behind the data of each scan, in place of what may be the fill of a file whose end never came.
    """
    parts, at = [b"\xff\xd8"], 2
    for _ in range(_MOST_PARTS):
        found = next_marker(data, at)
        if found is None or found[1][0] == END_OF_IMAGE:
            break
        marker, start = found[1][0], found.start()
        if marker == 0x01 or 0xD0 <= marker <= 0xD7 or (marker == 0xD8 and len(parts) < 3):
            at = start + 2
            continue
        at = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == 0xD8 or at < start + 4 or at > len(data):  # another picture, or no segment
            break
        if marker in _NEEDED:
            parts.append(_set_right(marker, data[start:at], frame))
        if marker == START_OF_SCAN:
            end = _scan_end(data, at)
            stop = len(data) if end is None else end.start()
            # An ff at the end is no data: it fills, or has lost the byte that it stands before, and would make a marker of the next one.
            scan = data[at:stop].rstrip(b"\xff")
            parts.append(scan[: len(scan) - _fill(scan)] + noise if noise else scan)
            at = stop
    return b"".join((*parts, b"\xff\xd9"))


def _fill(scan: bytes) -> int:
    """How many equal bytes a scan's data end with, beyond those that an encoder may have written."""
    return max(0, len(scan) - len(scan.rstrip(scan[-1:])) - _HARMLESS) if scan else 0


def _set_right(marker: int, segment: bytes, frame: Frame) -> bytes:
    """A segment with the values that libjpeg takes for those that it warns of."""
    if marker == START_OF_SCAN and frame.marker != PROGRESSIVE:
        return segment[:-3] + b"\0\x3f\0"
    if marker == 0xE0:
        return segment[:9] + b"\1\1" + segment[11:] if segment[4:9] == b"JFIF\0" else b""
    if marker == 0xEE:
        if segment[4:9] != b"Adobe" or len(segment) < 16:
            return b""
        usual = 1 if frame.channels == 3 else 2  # YCbCr, YCCK
        return segment if segment[15] in (0, usual) else segment[:15] + bytes([usual]) + segment[16:]
    return segment


def _pixels(
    data: bytes,
    frame: Frame,
    strict: bool = True,
    least: tuple[int, int] | None = None,
    room: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """RGB as libjpeg decodes it; ValueError with its words where it warns (if `strict`) or fails.

    With `least`, height and width, of the smallest size that has these, a half at most: an eighth, a quarter, three eighths or a half.
    """
    form, size = ("cmyk", 4) if frame.channels == 4 else ("rgb", 3)
    # Of the size that was found to be within bounds: what libjpeg took for more would be an error.
    needed = frame.height * frame.width * size
    if room is None or needed > len(room):
        room = None if least else np.empty(needed, np.uint8) if strict else np.zeros(needed, np.uint8)
    buffer = None if room is None else room[:needed]
    # Of a damaged image what libjpeg leaves out is black, whatever was in memory before.
    scaled = {"min_height": least[0], "min_width": least[1], "min_factor": 2} if least else {}
    pixels = simplejpeg.decode_jpeg(data, form, strict=strict, buffer=buffer, **scaled)
    return pixels if form == "rgb" else _from_inverted_cmyk(pixels)


def _from_inverted_cmyk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of CMYK as JPEGs have it: 255 for no ink, which all readers also take files without Adobe's marker for."""
    rgb = np.empty((*pixels.shape[:2], 3), np.uint8)
    for at in range(0, len(pixels), 64):  # rows, to hold little more than the result
        inks = pixels[at : at + 64].astype(np.uint16)
        rgb[at : at + 64] = inks[..., :3] * inks[..., 3:] // 255
    return rgb


def _known(error: ValueError) -> str:
    """The words of an error; one that tells of simplejpeg or of the machine rather than of the file is raised as what it is."""
    words = str(error)
    if "subsampling level" in words:
        raise OddSamplingError(words) from error
    if "nsufficient memory" in words:
        raise MemoryError(words) from error
    return words


def _plain(words: str) -> str:
    return words.removeprefix("Corrupt JPEG data: ").removeprefix("Warning: ")


def _damage(words: str, data: bytes, frame: Frame, pixels: NDArray[np.uint8]) -> str | None:
    """What libjpeg's first warning means for the picture; None where it is whole all the same. `data` is a `picture_alone`."""
    if "premature end of data segment" in words:
        return _what_is_missing(data, frame, pixels)
    left = _left_over(words)
    if left is None:
        return f"damaged JPEG: {_plain(words)}"
    count = int(left[1])
    padding = len(set(data[-2 - count : -2])) == 1
    if frame.scans or (count > _HARMLESS and not padding):
        return f"damaged JPEG: {count:,} bytes of picture data are left over"
    # Zeros behind a cut, as a download leaves them that had its room beforehand, may be codes enough to end the picture.
    return _what_is_missing(data, frame, pixels, cut=False) if _fill(data[:-2]) else None


def _what_is_missing(data: bytes, frame: Frame, pixels: NDArray[np.uint8], cut: bool = True) -> str | None:
    """Which rows lack data, by what other data behind its scans would change; None where they would change nothing.

    A large picture is compared at an eighth of its size. If that shows nothing, it is whole unless libjpeg says that it is `cut`.
    """
    scale = 1
    if frame.height * frame.width > COMPARED:
        pixels, scale = _pixels(data, frame, strict=False, least=_SMALLEST), 8
    first = frame.height
    for noise in (NOISE, NOISE[::-1]):
        try:
            other = _pixels(
                picture_alone(data, frame, noise), frame, strict=False, least=_SMALLEST if scale > 1 else None
            )
        except ValueError:
            continue
        rows = np.flatnonzero((other != pixels).any(axis=(1, 2)))
        first = min(first, int(rows[0]) * scale if len(rows) else frame.height)
    if first < frame.height:
        rows_said = f"{first:,} of {frame.height:,}"
        progressive = frame.marker == PROGRESSIVE
        return f"truncated: blurred from row {rows_said} on" if progressive else f"truncated after {rows_said} rows"
    return "truncated: data are missing in one of its scans" if cut and scale > 1 else None


def _missing_scans(data: bytes, frame: Frame) -> str | None:
    """What a JPEG of many scans lacks that none of them brings: channels, or coefficients to the last bit (ITU-T T.81, annex G)."""
    known: dict[int, list[bool]] = {}
    at = 2
    for _ in range(_MOST_PARTS):
        found = next_marker(data, at)
        if found is None or found[1][0] == END_OF_IMAGE:
            break
        marker, start = found[1][0], found.start()
        at = start + 2
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            continue
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
        if at > len(data):
            break
        if marker == START_OF_SCAN:
            names, low, high, bits = data[start + 5 : at - 3 : 2], *data[at - 3 : at]
            end = _scan_end(data, at)
            at = len(data) if end is None else end.start()
            if frame.marker != PROGRESSIVE:
                low, high, bits = 0, _COEFFICIENTS - 1, 0
            if bits & 15 == 0:
                for name in names:
                    done = known.setdefault(name, [False] * _COEFFICIENTS)
                    done[low : high + 1] = [True] * len(done[low : high + 1])
    lacking = frame.channels - sum(map(all, known.values()))
    return (
        f"truncated: scans are missing, {lacking} of {frame.channels} channels are not complete"
        if lacking > 0
        else None
    )
