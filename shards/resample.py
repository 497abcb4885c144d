"""Resizes images: two products with banded weight matrices, exact in integers, so that every machine makes the same pixels.

Each filter is a matrix of weights per axis, rounded to integers: 15 fractional bits down the columns, an intermediate of
2 fractional bits, 12 fractional bits along the rows. Every product and partial sum is then an integer below
2**24 and so exact in float32: the pixels do not depend on the BLAS, on the order of summation, on the machine, or on
whether a CPU or a GPU multiplies. Rounding the weights moves a pixel by less than a quarter of a grey level. So C (resize.c) and numpy give
the same bits: C where it was compiled on installation, numpy where there was no compiler.

Which part of an image is kept, and how large it becomes, is decided in `alexprep.shards.image_codec.Target`; the same products on a GPU are in
`alexprep.shards.image_codec_cuda`.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
    extent: float | None = None  # how many pixels the source stands for, where its last one is only partly of the image

    @property
    def step(self) -> float:
        """Source pixels an output pixel."""
        return (self.source if self.extent is None else self.extent) / self.target


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
        down, along = self._taps
        return down.low, along.low, down.high, along.high

    @functools.cached_property
    def _taps(self) -> tuple[Taps, Taps]:
        most = max(axis.count * axis.source / axis.target for axis in (self.vertical, self.horizontal))
        of = taps if most <= _CACHED else taps.__wrapped__
        down = of(self.vertical, self.name, COLUMN_BITS, 2.0**MIDDLE_BITS)
        return down, of(self.horizontal, self.name, ROW_BITS, 2.0**-MIDDLE_BITS)

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """From the box `region` of the source, uint8 (rows, columns, 3), to (vertical.count, horizontal.count, 3).

        Each row of the box must be contiguous; rows may lie apart, as those of a part of an image do. Where nothing is resized, what
        comes out is the box itself.
        """
        if self.only_cuts:
            return pixels
        function = compiled()
        return function(*self._taps, pixels) if function else self.in_numpy(pixels)

    def in_numpy(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What calling the resize gives, without compiled code."""
        if self.only_cuts:
            return pixels
        down, along = _band(self._taps[0], 1, _DOWN_GROUP), _band(self._taps[1], 3, _ALONG_GROUP)
        count = self.vertical.count
        pixels = np.ascontiguousarray(pixels)
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
    "triangle": (1.0, _triangle),
}


def weights(axis: Axis, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The weights of every output of an axis, before they are rounded: int64 (count,) and float64 (taps, count).

    The first are ascending, the first source pixel that output i reads (may be negative); the second its weights, columns summing
    to 1. Pixels outside the source count as the nearest inside for "area" when enlarging (as OpenCV) and for "triangle", which is
    "bilinear" but for that (as DALI), and have weight 0 otherwise.
    """
    step = axis.step
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
    repeated = name == "triangle" or (name == "area" and step < 1)
    if not repeated and (j[0, 0] < 0 or j[-1, -1] >= axis.source):
        w[(j < 0) | (j >= axis.source)] = 0.0
    w /= np.ascontiguousarray(w.T).sum(axis=1)  # in the order of summation that the pixels have had from the first
    return start.astype(np.int64), w


def rounded_weights(w: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """Weights as multiples of 2**-bits that sum to exactly 1 in each column: the rounded running sums' differences."""
    sums: NDArray[np.float64] = np.rint(w.cumsum(axis=0) * 2.0**bits)
    sums[1:] -= sums[:-1].copy()
    return sums * 2.0**-bits


@dataclass(eq=False)
class Taps:
    """What each output of an axis reads: neighbours, counted from `low`, and their weights, multiples of a power of two."""

    axis: Axis
    low: int  # the first source pixel that any output reads
    high: int  # one behind the last
    start: NDArray[np.int32]  # (outputs,): the first that an output reads
    count: NDArray[np.int32]  # (outputs,): how many
    weights: NDArray[np.float32]  # (outputs, the largest count): 0 where an output reads less
    band: Band | None = None  # the same as matrices, once they were needed


@functools.lru_cache(maxsize=512)
def taps(axis: Axis, name: str, bits: int, scale: float) -> Taps:
    """The weights of an axis at 2**-bits resolution, times `scale`; those of pixels outside the source are their nearest neighbour's."""
    first, exact = weights(axis, name)
    inputs = np.clip(first + np.arange(len(exact))[:, None], 0, axis.source - 1)
    used = exact != 0
    start, stop = np.where(used, inputs, axis.source).min(axis=0), np.where(used, inputs + 1, 0).max(axis=0)
    count = stop - start
    low, most = int(start.min()), int(count.max())
    places = np.arange(axis.count) * most + inputs - start
    fixed = np.bincount(places[used], rounded_weights(exact, bits)[used] * scale, axis.count * most)
    matrix = fixed.reshape(axis.count, most).astype(np.float32)
    return Taps(axis, low, int(stop.max()), (start - low).astype(np.int32), count.astype(np.int32), matrix)


@dataclass(frozen=True)
class Band:
    """An axis' matrix, cut into dense blocks of 8 outputs along its diagonal, and these into groups of equal distance.

    An output and an input are one channel of a pixel: `channels` neighbours of each make a pixel.
    """

    starts: list[int]  # by group, the first input of its first block; may lie before what is read
    stride: int  # from one block's first input to the next one's in a group, inputs
    before: int  # how many inputs blocks reach out before `low`, where their weights are 0
    after: int  # the same behind `high`
    positive: bool  # whether no weight is negative, so that no output is out of range
    matrices: NDArray[np.float32]  # (groups, blocks, 8 outputs, inputs), multiples of a power of two


def _band(taps: Taps, channels: int, group: int) -> Band:
    """Cuts an axis' matrix into blocks, of which `group` form a group."""
    if taps.band is not None:
        return taps.band
    # One block's inputs of a large source fill the cache.
    group = 1 if taps.axis.source > 8 * taps.axis.target else group
    inputs = (taps.start + np.arange(taps.weights.shape[1])[:, None]) * channels
    # Each block's first and last input, relative to the group's; blocks that only fill up the last group change neither.
    count, stride = taps.axis.count * channels, round(_BLOCK * taps.axis.source / taps.axis.target)
    ahead = np.arange(group) * stride
    groups = -(-count // (_BLOCK * group))
    pixel, channel = np.divmod(outputs := np.arange(groups * group * _BLOCK), channels)
    np.minimum(pixel, taps.axis.count - 1, out=pixel)
    begin = (inputs[0][pixel] + channel).reshape(groups, group, _BLOCK).min(axis=2) - ahead
    end = (inputs[-1][pixel] + channel).reshape(groups, group, _BLOCK).max(axis=2) - ahead + 1
    real = -(-count // _BLOCK) - (groups - 1) * group
    begin[-1, real:], end[-1, real:] = begin[-1, 0], end[-1, 0]
    starts = begin.min(axis=1)
    columns = int((end - starts[:, None]).max())
    # Where in the matrices each channel (first axis) of each weight goes.
    places = outputs * columns + channel - (starts[:, None] + ahead).repeat(_BLOCK)
    places = places[:count].reshape(-1, channels).T[:, None] + inputs
    flat = np.zeros(len(outputs) * columns, np.float32)
    flat[places] = taps.weights.T
    after = int(starts.max()) + (group - 1) * stride + columns - (taps.high - taps.low) * channels
    matrices = flat.reshape(groups, group, _BLOCK, columns)
    before, positive = -int(starts.min()), bool(taps.weights.min() >= 0)
    taps.band = Band(starts.tolist(), stride, max(0, before), max(0, after), positive, matrices)
    return taps.band


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


class _CompiledAxis(ctypes.Structure):
    """`axis` in resize.c."""

    _fields_ = (
        ("outputs", ctypes.c_int32),
        ("most", ctypes.c_int32),
        ("start", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, taps: Taps) -> _CompiledAxis:
        return cls(*taps.weights.shape, taps.start.ctypes.data, taps.count.ctypes.data, taps.weights.ctypes.data)


Compiled = Callable[[Taps, Taps, NDArray[np.uint8]], NDArray[np.uint8]]
Code = TypeVar("Code")


@functools.lru_cache(maxsize=1)
def compiled() -> Compiled | None:
    """resize.c, where it was compiled when alexprep was installed and does what numpy does; None otherwise."""
    return installed(__file__, "resize", _loaded)


def installed(module: str, name: str, load: Callable[[Path], Code | None]) -> Code | None:
    """What `load` makes of NAME.c, which was compiled into the folder `compiled` beside the file of a module; None where it was not."""
    return next(filter(None, map(load, (Path(module).parent / "compiled").glob(f"{name}*.so"))), None)


def c_function(library: Path, name: str, *arguments: Any) -> Any:
    """A function of a compiled library, which takes these types and returns nothing; None where it is not there."""
    try:
        function = getattr(ctypes.CDLL(str(library)), name)
    except (OSError, AttributeError):
        return None
    function.restype, function.argtypes = None, arguments
    return function


def _loaded(library: Path) -> Compiled | None:
    """The function of a compiled resize.c, if it is there, and gives what numpy gives on a few small images."""
    pointer, number, axis = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(_CompiledAxis)
    types = pointer, ctypes.c_ssize_t, number, axis, axis, pointer, pointer
    if (function := c_function(library, "alexprep_resize", *types)) is None:
        return None

    def resize(down: Taps, along: Taps, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if pixels.strides[1:] != (3, 1):
            pixels = np.ascontiguousarray(pixels)
        width, result = pixels.shape[1], np.empty((down.axis.count, along.axis.count, 3), np.uint8)
        axes = _CompiledAxis.of(down), _CompiledAxis.of(along)
        room = _floats("compiled", _BLOCK * 3 * (width + along.axis.count))
        function(pixels.ctypes.data, pixels.strides[0], width, *axes, room.ctypes.data, result.ctypes.data)
        return result

    # Extremes overshoot most.
    noise = np.where(np.arange(19 * 23 * 3).reshape(19, 23, 3) ** 2 % 257 > 128, 255, 0).astype(np.uint8)
    for name, size in (("area", 9), ("area", 41), ("lanczos", 9)):
        wanted = Resize(Axis(19, size, 0, size), Axis(23, size, 0, size), name)
        top, left, bottom, right = wanted.region
        box = noise[top:bottom, left:right]
        if not np.array_equal(resize(*wanted._taps, box), wanted.in_numpy(box)):
            return None
    return resize
