"""Resizes images: two products with banded weight matrices, exact in integers, so that every machine makes the same pixels.

Each filter is a matrix of weights per axis, rounded to integers: 15 fractional bits down the columns, an intermediate of
2 fractional bits, 12 fractional bits along the rows. Every product and partial sum is then an integer below
2**24 and so exact in float32: the pixels do not depend on the BLAS, on the order of summation, on the machine, or on
whether a CPU or a GPU multiplies. Rounding the weights moves a pixel by less than a quarter of a grey level.

Which part of an image is kept, and how large it becomes, is decided in `alexprep.shards.image_codec.Target`; the same products on a GPU are in
`alexprep.shards.image_codec_cuda`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FILTERS = ("area", "bilinear", "bicubic", "lanczos")

COLUMN_BITS = 15  # fractional bits of the weights that mix rows of pixels
MIDDLE_BITS = 2  # fractional bits kept between the two products
ROW_BITS = 12  # fractional bits of the weights that mix columns
# The absolute weights of an output sum to less than 1.6 (lanczos), so 255 * 1.6 * 2**15 and 255 * 1.6**2 * 2**14 < 2**24.

# Outputs of one product: wide enough for BLAS, narrow enough to skip the zeros (measured); 8 bytes turn as one.
_BLOCK = 8
# Products of one numpy call (measured): their inputs lie a whole number of pixels apart.
_DOWN_GROUP, _ALONG_GROUP = 4, 8
_CACHED = 640  # pixels: matrices for more are not kept; the 512 that are have 21 MB for ImageNet, 65 MB at the most
_KEPT = 2**22  # floats: larger working memory is given back after each image


@dataclass(frozen=True)
class Axis:
    """What one axis of a resize reads: outputs [offset, offset + count) of `source` pixels resized to `target` pixels."""

    source: int
    target: int
    offset: int
    count: int


@dataclass(frozen=True)
class Resize:
    """A resize of interleaved RGB, ready to be applied to the region that it reads; halves go to even."""

    vertical: Axis
    horizontal: Axis
    name: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what comes out, pixels."""
        return self.vertical.count, self.horizontal.count

    @property
    def only_cuts(self) -> bool:
        """Whether what comes out are pixels of the source as they are."""
        return all(axis.source == axis.target for axis in (self.vertical, self.horizontal))

    @property
    def region(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right): the half-open box of source pixels that must be decoded."""
        if self.only_cuts:
            top, left = self.vertical.offset, self.horizontal.offset
            return top, left, top + self.vertical.count, left + self.horizontal.count
        down, along = self._bands()
        return down.low, along.low, down.high, along.high

    def _bands(self) -> tuple[Band, Band]:
        most = max(axis.count * axis.source / axis.target for axis in (self.vertical, self.horizontal))
        cut = _band if most <= _CACHED else _band.__wrapped__
        down = cut(self.vertical, self.name, COLUMN_BITS, 2.0**MIDDLE_BITS, 1, _DOWN_GROUP)
        return down, cut(self.horizontal, self.name, ROW_BITS, 2.0**-MIDDLE_BITS, 3, _ALONG_GROUP)

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """From the box `region` of the source, C-contiguous uint8 (rows, columns, 3), to (vertical.count, horizontal.count, 3)."""
        if self.only_cuts:
            return pixels
        (down, along), count = self._bands(), self.vertical.count
        blocks = _rows(_columns(pixels.reshape(len(pixels), -1), down, along), count, along)
        np.rint(blocks, out=blocks)
        if not (down.positive and along.positive):
            np.clip(blocks, 0, 255, out=blocks)
        narrow = _floats("narrow", blocks.size // 4).view(np.uint8).reshape(blocks.shape)
        np.copyto(narrow, blocks, casting="unsafe")
        eights = narrow.view(np.uint64)[:, :count, 0].T  # a block's 8 outputs of a row move as one number
        rows = np.ascontiguousarray(eights).view(np.uint8)[:, : self.horizontal.count * 3]
        return np.ascontiguousarray(rows).reshape(count, self.horizontal.count, 3)


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
    """The weights of every output of an axis, before they are rounded: int64 (count,) and float64 (taps, count).

    The first are ascending, the first source pixel that output i reads (may be negative); the second its weights, columns summing
    to 1. Pixels outside the source count as the nearest inside for "area" when enlarging (as OpenCV), and have weight 0 otherwise.
    """
    step = axis.source / axis.target  # source pixels an output pixel
    i = np.arange(axis.offset, axis.offset + axis.count + 1, dtype=np.float64)
    if name == "area" and step >= 1:
        # The share of each source pixel that output i's interval [i * step, (i + 1) * step) covers.
        i *= step
        start = np.floor(i[:-1])
        j = start + np.arange(math.ceil(step) + 1.0)[:, None]
        w = np.minimum(j + 1, i[1:])
        w -= np.maximum(j, i[:-1])
        np.maximum(w, 0.0, out=w)
    else:
        radius, kernel = _KERNELS["enlarging" if name == "area" else name]
        spread = max(step, 1.0)  # antialias: the kernel widens with the shrink
        centre = (i[:-1] + 0.5) * step
        start = np.floor(centre - radius * spread)
        j = start + np.arange(math.ceil(2 * radius * spread) + 1.0)[:, None]
        w = kernel((j + 0.5 - centre) / spread)
    if not (name == "area" and step < 1) and (j[0, 0] < 0 or j[-1, -1] >= axis.source):
        w[(j < 0) | (j >= axis.source)] = 0.0
    w /= np.ascontiguousarray(w.T).sum(axis=1)  # in the order of summation that the pixels have had from the first
    return start.astype(np.int64), w


def rounded_weights(w: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """Weights as multiples of 2**-bits that sum to exactly 1 in each column: the rounded running sums' differences."""
    sums: NDArray[np.float64] = np.rint(w.cumsum(axis=0) * 2.0**bits)
    sums[1:] -= sums[:-1].copy()
    return sums * 2.0**-bits


@dataclass(frozen=True)
class Band:
    """An axis' matrix, cut into dense blocks of 8 outputs along its diagonal, and these into groups of equal distance.

    An output and an input are one channel of a pixel: `channels` neighbours of each make a pixel.
    """

    low: int  # the first source pixel that the axis reads
    high: int  # one behind the last
    starts: list[int]  # by group, the first input of its first block, counted from `low`; may lie before it
    stride: int  # from one block's first input to the next one's in a group, inputs
    before: int  # how many inputs blocks reach out before `low`, where their weights are 0
    after: int  # the same behind `high`
    positive: bool  # whether no weight is negative, so that no output is out of range
    matrices: NDArray[np.float32]  # (groups, blocks, 8 outputs, inputs), multiples of a power of two


@functools.lru_cache(maxsize=512)
def _band(axis: Axis, name: str, bits: int, scale: float, channels: int, group: int) -> Band:
    """Cuts an axis' matrix at 2**-bits resolution and multiplies it by `scale`."""
    group = 1 if axis.source > 8 * axis.target else group  # one block's inputs of a large source fill the cache
    first, exact = weights(axis, name)
    inputs = first + np.arange(len(exact))[:, None]  # the source pixel behind each weight
    if first[0] < 0 or inputs[-1, -1] >= axis.source:
        np.clip(inputs, 0, axis.source - 1, out=inputs)
    read = inputs[exact != 0]
    low, high = int(read.min()), int(read.max()) + 1
    fixed, inputs = rounded_weights(exact, bits), (inputs - low) * channels
    # Each block's first and last input, relative to the group's; blocks that only fill up the last group change neither.
    count, ahead = axis.count * channels, np.arange(group) * (stride := round(_BLOCK * axis.source / axis.target))
    groups = -(-count // (_BLOCK * group))
    pixel, channel = np.divmod(outputs := np.arange(groups * group * _BLOCK), channels)
    np.minimum(pixel, axis.count - 1, out=pixel)
    begin = (inputs[0][pixel] + channel).reshape(groups, group, _BLOCK).min(axis=2) - ahead
    end = (inputs[-1][pixel] + channel).reshape(groups, group, _BLOCK).max(axis=2) - ahead + 1
    real = -(-count // _BLOCK) - (groups - 1) * group
    begin[-1, real:], end[-1, real:] = begin[-1, 0], end[-1, 0]
    starts = begin.min(axis=1)
    columns = int((end - starts[:, None]).max())
    # Where in the matrices each channel (first axis) of each weight goes.
    places = outputs * columns + channel - (starts[:, None] + ahead).repeat(_BLOCK)
    places = places[:count].reshape(-1, channels).T[:, None] + inputs
    values = np.repeat(fixed[None] * scale, channels, axis=0)
    matrices = np.bincount(places.ravel(), values.ravel(), len(outputs) * columns).astype(np.float32)
    after = int(starts.max()) + (group - 1) * stride + columns - (high - low) * channels
    matrices = matrices.reshape(groups, group, _BLOCK, columns)
    before, positive = -int(starts.min()), bool(fixed.min() >= 0)
    return Band(low, high, starts.tolist(), stride, max(0, before), max(0, after), positive, matrices)


_memory, _NOTHING = threading.local(), np.zeros(0, np.float32)


def _floats(use: str, size: int) -> NDArray[np.float32]:
    """Working memory, (size,), of arbitrary but finite content: fresh pages for each image would cost a third of its time."""
    held: NDArray[np.float32] = getattr(_memory, use, _NOTHING)
    if len(held) < size:
        held = np.zeros(size, np.float32)
        if size <= _KEPT:
            setattr(_memory, use, held)
    return held[:size]


def _columns(source: NDArray[np.uint8], down: Band, along: Band) -> NDArray[np.float32]:
    """The intermediate, (rows, before + columns * 3 + after): a few rows at a time, which stay in the cache."""
    width = source.shape[1]
    groups, group, rows, taps = down.matrices.shape
    span = (group - 1) * down.stride + taps
    inputs = _floats("inputs", span * width).reshape(span, width)
    windows = np.ndarray((group, taps, width), np.float32, inputs, 0, (4 * down.stride * width, 4 * width, 4))
    padded = along.before + width + along.after
    middle = _floats("middle", groups * group * rows * padded).reshape(groups, group, rows, padded)
    inner = middle[..., along.before : along.before + width]
    for matrices, start, part, whole in zip(down.matrices, down.starts, inner, middle, strict=True):
        begin, end = max(start, 0), min(start + span, len(source))
        inputs[begin - start : end - start] = source[begin:end]
        np.matmul(matrices, windows, out=part)
        np.rint(whole, out=whole)
    return middle.reshape(-1, padded)


def _rows(middle: NDArray[np.float32], count: int, along: Band) -> NDArray[np.float32]:
    """The result before rounding, (blocks, count | 1, 8): an odd number of rows, so that columns of it do not share cache sets."""
    (groups, group, rows, taps), padded = along.matrices.shape, middle.shape[1]
    blocks = _floats("blocks", groups * group * (count | 1) * rows).reshape(groups, group, count | 1, rows)
    for matrices, start, part in zip(along.matrices, along.starts, blocks[:, :, :count], strict=True):
        place = 4 * (along.before + start)
        windows = np.ndarray((group, count, taps), np.float32, middle, place, (4 * along.stride, 4 * padded, 4))
        np.matmul(windows, matrices.transpose(0, 2, 1), out=part)
    return blocks.reshape(groups * group, count | 1, rows)
