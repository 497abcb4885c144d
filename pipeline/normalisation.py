"""What comes behind DALI's decoding on a CPU, in C: windows are resized, reflected, shifted and divided, and laid out as a network reads them.

DALI does the same where views.c was not compiled, and where more is done to an image than this (`alexprep.pipeline.dali_graph`), in several
passes over floats instead of one. The definition in numpy is in `alexprep.pipeline.augmentation`.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.shards import resample
from alexprep.shards.resample import Axis, Taps

# What is fed to it instead of to DALI: see `alexprep.pipeline.dali_graph.Graph.input_names`.
INPUTS = frozenset({"mirror", "window", "minus", "divisor"})
# `view` in views.c.
_POINTERS = ("pixels", "mean", "minus", "factor")
_VIEW = np.dtype([*((name, np.uint64) for name in _POINTERS), ("stride", np.int64), ("mirrored", np.int64)])
_MIDDLE = 2.0**13  # between the two products of a resize: 255 times this is less than the 2**22 that resize.c rounds
_WEIGHT_BITS = 24  # those of a float
_SIZES = 8192  # of windows, whose weights are kept: some 5 kB each
_SPARE = 4  # buffers that are kept when their batches are gone, which spares fresh pages at each step

Views = Callable[..., None]


class Normaliser:
    """Makes batches of the windows that DALI decoded; to be closed."""

    def __init__(self, view: tuple[int, int], resized: bool, memory_format: str, dtype: str, threads: int) -> None:
        """`view` is the height and width of what comes out; for the rest see `alexprep.pipeline.Loader`."""
        self._size, self._resized, self._dtype = view, resized, np.dtype(dtype)
        self._planar = memory_format == "NCHW"
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._threads = threads
        self._spare: list[Any] = []

    def __call__(
        self, windows: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], inputs: Mapping[str, Any]
    ) -> NDArray[Any]:
        """(N, 3, H, W) for "NCHW", otherwise (N, H, W, 3), of windows, uint8 (rows, columns, 3), in one array or in many, and their `INPUTS`."""
        count, (height, width) = len(windows), self._size
        made = self._array((count, 3, height, width) if self._planar else (count, height, width, 3))
        minus = inputs.get("minus", np.zeros((count, 1, 3 * width), np.float32))
        factor = 1 / inputs["divisor"] if "divisor" in inputs else np.ones_like(minus)
        views = np.zeros(count, _VIEW)
        views["mirrored"] = inputs["mirror"]
        for name, values in (("minus", minus), ("factor", factor)):
            views[name] = values.ctypes.data + values.strides[0] * np.arange(count)
        views["mean"] = [mean.ctypes.data for mean in inputs["window"]] if "window" in inputs else 0
        parts = np.array_split(np.arange(count), min(count, self._threads))
        make = functools.partial(self._make, windows, views, made)
        list(self._pool.map(make, parts) if self._pool else map(make, parts))
        return made

    def close(self) -> None:
        """Ends its threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _make(
        self,
        windows: Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
        views: NDArray[Any],
        made: NDArray[Any],
        part: NDArray[np.int64],
    ) -> None:
        """The views of these numbers, which follow one another."""
        run, resize = compiled_views(), resample.compiled()
        assert run is not None and resize is not None
        height, width = self._size
        room, some = np.empty(5 * width, np.float32), slice(part[0], part[-1] + 1)
        if not self._resized:  # all at once: of small views the calls take longer than the work
            views["pixels"][some], views["stride"][some] = _places(windows[some], (height, width, 3))
            run(views[some], height, width, self._planar, room, made[some])
            return
        for n in part.tolist():
            pixels = windows[n]
            down, along = _taps(pixels.shape[0], height, _MIDDLE), _taps(pixels.shape[1], width, 1 / _MIDDLE)
            resized = resize(down, along, pixels)
            views["pixels"][n], views["stride"][n] = resized.ctypes.data, resized.strides[0]
            run(views[n : n + 1], height, width, self._planar, room, made[n])

    def _array(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """Memory for a batch, of arbitrary content; it comes back here when nothing refers to it any more."""
        size = int(np.prod(shape)) * self._dtype.itemsize
        fit = next((n for n, held in enumerate(self._spare) if len(held) >= size), None)
        # Not of numpy: parts of the array would then refer to the buffer, and not to the array.
        buffer: Any = (ctypes.c_uint8 * size)() if fit is None else self._spare.pop(fit)
        array: NDArray[Any] = np.ndarray(shape, self._dtype, buffer)
        weakref.finalize(array, _give_back, self._spare, buffer).atexit = False
        return array


def _give_back(spare: list[Any], buffer: Any) -> None:
    spare.append(buffer)
    del spare[:-_SPARE]


def _places(images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """Where images of this shape begin in memory, and how many bytes their rows lie apart."""
    if isinstance(images, np.ndarray):
        assert images.shape[1:] == shape and images.strides[2:] == (3, 1)
        return images.ctypes.data + images.strides[0] * np.arange(len(images), dtype=np.uint64), images.strides[1]
    assert all(image.shape == shape and image.strides[1:] == (3, 1) for image in images)
    return [image.__array_interface__["data"][0] for image in images], [image.strides[0] for image in images]


@functools.lru_cache(maxsize=_SIZES)
def _taps(source: int, target: int, scale: float) -> Taps:
    """The triangle filter of `geometry.resize` along an axis."""
    return resample.taps.__wrapped__(Axis(source, target, 0, target), "triangle", _WEIGHT_BITS, scale)


def available() -> bool:
    """Whether this works here: whether there was a compiler when alexprep was installed."""
    return compiled_views() is not None and resample.compiled() is not None


@functools.lru_cache(maxsize=1)
def compiled_views() -> Views | None:
    """views.c, where it was compiled and does what numpy does; None otherwise."""
    return resample.installed(__file__, "views", loaded)


def loaded(library: Path) -> Views | None:
    """The function of a compiled views.c, if it is there, and gives what numpy gives on a few small views."""
    pointer = ctypes.c_void_p
    function = resample.c_function(library, "alexprep_views", pointer, *[ctypes.c_int32] * 5, pointer, pointer)
    if function is None:
        return None

    def run(
        views: NDArray[Any], height: int, width: int, planar: bool, room: NDArray[np.float32], made: NDArray[Any]
    ) -> None:
        numbers = len(views), height, width, planar, made.dtype == np.float16
        function(views.ctypes.data, *numbers, room.ctypes.data, made.ctypes.data)

    for planar in (False, True):
        for dtype in ("float32", "float16"):
            for mirrored in (0, 1):
                for windowed in (False, True):
                    if not _same(run, planar, dtype, mirrored, windowed):
                        return None
    return run


def _same(run: Views, planar: bool, dtype: str, mirrored: int, windowed: bool) -> bool:
    """Whether compiled code makes what `in_numpy` makes, of one view."""
    height, width = 3, 35
    pixels = (np.arange(height * width * 3) ** 2 % 256).astype(np.uint8).reshape(height, width, 3)
    mean = np.sqrt(pixels + np.float32(7)) if windowed else None
    minus, factor = (np.sin(np.arange(3 * width) + start).astype(np.float32) for start in (0, 1))
    expected = in_numpy(pixels, mean, minus, factor, mirrored, planar, dtype)
    made = np.empty_like(expected)
    view = np.zeros(1, _VIEW)
    view["stride"], view["mirrored"], view["mean"] = (
        pixels.strides[0],
        mirrored,
        0 if mean is None else mean.ctypes.data,
    )
    for name, values in zip(_POINTERS, (pixels, mean, minus, factor), strict=True):
        view[name] = 0 if values is None else values.ctypes.data
    run(view, height, width, planar, np.empty(5 * width, np.float32), made)
    return np.array_equal(made, expected)


def in_numpy(
    pixels: NDArray[np.uint8],
    mean: NDArray[np.float32] | None,
    minus: NDArray[np.float32],
    factor: NDArray[np.float32],
    mirrored: int,
    planar: bool,
    dtype: str,
) -> NDArray[Any]:
    """What views.c makes of one view, to the last bit."""
    made = (pixels[:, ::-1] if mirrored else pixels).astype(np.float32)
    made = made if mean is None else made - mean
    made = (made - minus.reshape(1, -1, 3)) * factor.reshape(1, -1, 3)
    return np.ascontiguousarray(made.transpose(2, 0, 1) if planar else made, dtype)
