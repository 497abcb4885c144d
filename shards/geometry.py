"""Which pixels of a source make the square, and which way up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.resample import Axis, Resize

# EXIF orientation → (transpose first, flip rows, flip columns) that make the picture upright (EXIF 2.32, section 4.6.4).
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """The height and width after the shorter side has become `size`: the longer one rounded half up.

    >>> resized(375, 500, 256), resized(2, 5, 1)
    ((256, 341), (1, 3))
    """
    short = min(height, width)
    return tuple((2 * side * size + short) // (2 * short) for side in (height, width))  # type: ignore[return-value]


def to_square(height: int, width: int, size: int, filter_name: str) -> Resize:
    """ "Shorter side to `size`, centre crop `size` x `size`" for a source of height x width.

    The crop starts at floor((side - size) / 2), as the original's make-data.
    """
    vertical, horizontal = (
        Axis(source, target, (target - size) // 2, size)
        for source, target in zip((height, width), resized(height, width, size), strict=True)
    )
    return Resize(vertical, horizontal, filter_name)


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turns uint8 (H, W, 3) pixels stored with an EXIF `orientation` upright."""
    transpose, rows, columns = _UPRIGHT[orientation]
    pixels = pixels.transpose(1, 0, 2) if transpose else pixels
    pixels = pixels[::-1] if rows else pixels
    return pixels[:, ::-1] if columns else pixels
