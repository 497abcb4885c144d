"""What is known about an image without nvImageCodec: whether a JPEG is whole, its EXIF orientation, and a second opinion.

nvImageCodec refuses a few odd files that Pillow reads, and does not say why it refuses the others.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Pillow's own bound: 256 MiB of RGB. A header that promises more is refused before anything is allocated for it.
MAX_PIXELS = 89_478_485
# What the second opinion may open. A short list keeps rarely used parsers away from hostile files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Refused:
    """An image that is left out, and why; width and height are 0 where the header could not be read."""

    reason: str
    width: int = 0
    height: int = 0


def has_end(data: bytes) -> bool:
    """Whether a JPEG has an end-of-image marker behind its first scan's start: without one it was cut short.

    The region decoder stops after the last row it needs and so cannot notice a cut below it. An EXIF thumbnail has an
    end marker of its own, hence the walk over the segments.
    """
    if data.endswith(b"\xff\xd9"):
        return True
    position = 2
    while data[position : position + 1] == b"\xff":
        marker = data[position + 1 : position + 2]
        if marker == b"\xff":  # a fill byte
            position += 1
        elif marker == b"\xda":  # start of scan; inside a scan ff is always followed by 00 or a restart marker
            return data.find(b"\xff\xd9", position) >= 0
        else:
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    return False


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
                if height * width > MAX_PIXELS:
                    return too_large(height, width)
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


def too_large(height: int, width: int) -> Refused:
    """The refusal of an image with more than `MAX_PIXELS`."""
    return Refused(f"{width}x{height} pixels are more than the limit of {MAX_PIXELS:,}", width, height)
