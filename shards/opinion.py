"""What is known about an image without nvImageCodec: whether a JPEG is whole, its EXIF orientation, and a second opinion.

nvImageCodec refuses a few odd files that Pillow reads, and does not say why it refuses the others.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Bounds that keep a worker within 1 GiB (measured: benchmarks/memory.py), checked before anything is allocated. The largest
# photo of ILSVRC 2012 has 61 million pixels.
MAX_PIXELS = 80_000_000
MAX_SIDE = 65_535  # JPEG's own
_MAX_CMYK_PIXELS = 60_000_000  # progressive, these take 12 bytes a pixel
_MAX_BYTES = 850 * 2**20  # of what Pillow needs for a whole image
_STORED = {"1": 1, "L": 1, "P": 1, "RGB": 4}  # bytes a pixel in Pillow, by mode; other modes are counted as 8
# A progressive JPEG may have thousands of scans, each of which visits every block: a few kilobytes, minutes of work. Encoders
# write about ten; nvImageCodec's first decoder stops at 256, the ones it then asks do not.
MAX_SCANS = 256
_START_OF_SCAN, _PROGRESSIVE = 0xDA, 0xC2
# What the second opinion may open. A short list keeps rarely used parsers away from hostile files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Refused:
    """An image that is left out, and why; width and height are 0 where the header could not be read."""

    reason: str
    width: int = 0
    height: int = 0


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


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation, 1-8; 1 (upright) where there is none or it cannot be read."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (a broken EXIF block must not cost the image)
        return 1
    return orientation if orientation in range(1, 9) else 1


def second_opinion(data: bytes) -> NDArray[np.uint8] | Refused:
    """The whole image by Pillow, which reads some files that nvImageCodec refuses, and says why it refuses others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                refusal = too_large(height, width) or _too_heavy(len(data), height, width, image.mode)
                if refusal:
                    return refusal
                if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
                    grey = np.asarray(image, dtype=np.float64) * (255 / 65535)
                    return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, axis=2)
                if image.mode in ("I", "F"):
                    return Refused(f"pixel type {image.mode} has no stated range", width, height)
                return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        return Refused(f"not an image of a known type (first bytes {data[:8].hex(' ')})")
    except Image.DecompressionBombError:
        return Refused(f"more pixels than the limit of {MAX_PIXELS:,}")
    except MemoryError:
        raise  # says nothing of the file: the caller knows the bound
    except Exception as error:  # noqa: BLE001  (Pillow raises many kinds for what a file holds)
        return Refused(f"cannot be decoded: {error}".splitlines()[0])


def too_large(height: int, width: int, channels: int = 3) -> Refused | None:
    """The refusal of an image that is beyond the bounds; None for one that is not."""
    limit = MAX_PIXELS if channels <= 3 else _MAX_CMYK_PIXELS
    if height * width > limit:
        return Refused(f"{width}x{height} pixels are more than the limit of {limit:,}", width, height)
    if max(height, width) > MAX_SIDE:
        return Refused(f"a side of {max(height, width):,} pixels is more than the limit of {MAX_SIDE:,}", width, height)
    return None


def _too_heavy(size: int, height: int, width: int, mode: str) -> Refused | None:
    """The refusal of an image for which Pillow would need too much memory.

    At worst it holds the file twice, the pixels as they are, those in RGB, and the array twice.
    """
    per_pixel = 24 if mode.startswith("I;16") else _STORED.get(mode, 8) + (0 if mode == "RGB" else 4) + 6
    needed = 2 * size + height * width * per_pixel
    if needed <= _MAX_BYTES:
        return None
    words = f"needs about {needed / 2**20:,.0f} MiB to decode, more than the limit of {_MAX_BYTES / 2**20:,.0f}"
    return Refused(words, width, height)
