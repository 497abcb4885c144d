"""Resize as two products with banded weight matrices, exact in integers.

Each filter is a matrix of weights per axis, rounded to integers: 15 fractional bits down the columns, an intermediate of
2 fractional bits, 12 fractional bits along the rows. Every product and partial sum is then an integer below
2**24 and so exact in float32: the pixels do not depend on the BLAS, on the order of summation, on the machine, or on
whether a CPU or a GPU multiplies. Rounding the weights moves a pixel by less than a quarter of a grey level.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FILTERS = ("area", "bilinear", "bicubic", "lanczos")

_COLUMN_BITS = 15  # fractional bits of the weights that mix rows of pixels
_MIDDLE_BITS = 2  # fractional bits kept between the two products
_ROW_BITS = 12  # fractional bits of the weights that mix columns
# The absolute weights of an output sum to less than 1.6 (lanczos), so 255 * 1.6 * 2**15 and 255 * 1.6**2 * 2**14 < 2**24.
_BLOCK = 8  # outputs computed by one product: wide enough for BLAS, narrow enough to skip the zeros (measured)


@dataclass(frozen=True)
class Axis:
    """What one axis of a resize reads: outputs [offset, offset + count) of `source` pixels resized to `target` pixels."""

    source: int
    target: int
    offset: int
    count: int


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(x: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """Keys' cubic convolution: -0.5 is the third-order one (Pillow, torch with antialias), -0.75 is OpenCV's."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


_KERNELS: dict[str, tuple[float, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, functools.partial(_cubic, a=-0.5)),
    "lanczos": (3.0, _lanczos),
    "enlarging": (2.0, functools.partial(_cubic, a=-0.75)),
}


def weights(axis: Axis, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The weights of every output of an axis, before they are rounded.

    Returns:
        `first`, int64 of shape (count,): the first source pixel that output i reads (may be negative), and
        `w`, float64 of shape (count, taps): its weights, rows summing to 1; pixels outside the source count as the nearest
        inside for "area" when enlarging (as OpenCV), and have weight 0 otherwise.
    """
    step = axis.source / axis.target  # source pixels an output pixel
    i = np.arange(axis.offset, axis.offset + axis.count, dtype=np.float64)
    if name == "area" and step >= 1:
        # The share of each source pixel that output i's interval [i * step, (i + 1) * step) covers.
        begin, end = i * step, (i + 1) * step
        first = np.floor(begin).astype(np.int64)
        j = first[:, None] + np.arange(math.ceil(step) + 1)
        w = np.clip(np.minimum(j + 1, end[:, None]) - np.maximum(j, begin[:, None]), 0.0, None)
    else:
        radius, kernel = _KERNELS["enlarging" if name == "area" else name]
        spread = max(step, 1.0)  # antialias: the kernel widens with the shrink
        centre = (i + 0.5) * step
        first = np.floor(centre - radius * spread).astype(np.int64)
        j = first[:, None] + np.arange(math.ceil(2 * radius * spread) + 1)
        w = kernel((j + 0.5 - centre[:, None]) / spread)
    if not (name == "area" and step < 1):
        w = np.where((j >= 0) & (j < axis.source), w, 0.0)
    return first, w / w.sum(axis=1, keepdims=True)


def _rounded(w: NDArray[np.float64], bits: int) -> NDArray[np.int64]:
    """Weights as integers that sum to exactly 2**bits in each row: the rounded running sums' differences."""
    sums: NDArray[np.int64] = np.rint(w.cumsum(axis=1) * 2**bits).astype(np.int64)
    return np.diff(sums, axis=1, prepend=0)


Blocks = tuple[tuple[int, int, NDArray[np.float32]], ...]


@dataclass(frozen=True)
class Band:
    """An axis' matrix, cut into dense blocks along its diagonal.

    Attributes:
        low: the first source pixel that the axis reads.
        high: one past the last one.
        outputs: int (blocks,), the first output of each block.
        inputs: int (blocks,), the first input of each block, counted from `low`.
        matrices: float32 (blocks, rows per block * channels, columns per block * channels), multiples of a power of two.
    """

    low: int
    high: int
    outputs: list[int]
    inputs: list[int]
    matrices: NDArray[np.float32]


@functools.lru_cache(maxsize=512)
def _band(axis: Axis, name: str, bits: int, channels: int) -> Band:
    """Cuts an axis' matrix at 2**-bits resolution; each weight is widened to a channels x channels identity."""
    first, exact = weights(axis, name)
    fixed = _rounded(exact, bits)
    j = np.clip(first[:, None] + np.arange(exact.shape[1]), 0, axis.source - 1)  # the source pixel behind each weight
    used = exact != 0
    begin, end = np.where(used, j, axis.source).min(axis=1), np.where(used, j, -1).max(axis=1) + 1
    low, high = int(begin.min()), int(end.max())
    rows = min(_BLOCK, axis.count)
    starts = np.minimum(np.arange(0, axis.count, rows), axis.count - rows)  # the last block may overlap its neighbour
    members = starts[:, None] + np.arange(rows)
    columns = int((end[members].max(axis=1) - begin[members].min(axis=1)).max())
    inputs = np.minimum(begin[members].min(axis=1), high - columns)
    matrix = np.zeros((len(starts), rows, columns), np.float32)
    b, r, t = np.nonzero(used[members])
    np.add.at(matrix, (b, r, j[members][b, r, t] - inputs[b]), fixed[members][b, r, t])
    matrix *= np.float32(2.0**-bits)
    wide = np.zeros((len(starts), rows, channels, columns, channels), np.float32)
    for channel in range(channels):
        wide[:, :, channel, :, channel] = matrix
    matrices = wide.reshape(len(starts), rows * channels, columns * channels)
    return Band(low, high, starts.tolist(), (inputs - low).tolist(), matrices)


@dataclass(frozen=True)
class Resize:
    """A resize of interleaved RGB, ready to be applied to the region that it reads.

    >>> resize = Resize(Axis(2, 1, 0, 1), Axis(2, 1, 0, 1), "area")
    >>> resize.region
    (0, 0, 2, 2)
    >>> resize(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).ravel().tolist()  # means 4.5, 5.5, 6.5: halves to even
    [4, 6, 6]
    """

    vertical: Axis
    horizontal: Axis
    name: str

    @property
    def region(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right): the half-open box of source pixels that must be decoded."""
        down = _band(self.vertical, self.name, _COLUMN_BITS, 1)
        along = _band(self.horizontal, self.name, _ROW_BITS, 3)
        return down.low, along.low, down.high, along.high

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resizes.

        Args:
            pixels: uint8, the box `region` of the source, (rows, columns, 3), C-contiguous.

        Returns:
            uint8 (vertical.count, horizontal.count, 3).
        """
        down = _band(self.vertical, self.name, _COLUMN_BITS, 1)
        along = _band(self.horizontal, self.name, _ROW_BITS, 3)
        source = pixels.reshape(len(pixels), -1)
        height, width = down.matrices.shape[1], along.matrices.shape[1]
        middle = np.empty((self.vertical.count, source.shape[1]), np.float32)
        for output, start, matrix in zip(down.outputs, down.inputs, down.matrices, strict=True):
            inputs = source[start : start + matrix.shape[1]].astype(np.float32)  # here, while it is in the cache
            np.matmul(matrix, inputs, out=middle[output : output + height])
        middle *= 2**_MIDDLE_BITS
        np.rint(middle, out=middle)
        result = np.empty((self.vertical.count, self.horizontal.count * 3), np.float32)
        for output, start, matrix in zip(along.outputs, along.inputs, along.matrices, strict=True):
            inputs = middle[:, start * 3 : start * 3 + matrix.shape[1]]
            np.matmul(inputs, matrix.T, out=result[:, output * 3 : output * 3 + width])
        result *= 2.0**-_MIDDLE_BITS
        np.rint(result, out=result)
        np.clip(result, 0, 255, out=result)
        return result.astype(np.uint8).reshape(self.vertical.count, self.horizontal.count, 3)
