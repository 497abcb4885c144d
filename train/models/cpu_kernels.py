"""Response normalisation across maps and its gradient on a CPU, in one pass each instead of a dozen: in C, where it was compiled on installation.

The definition, which has the same bits, is in `alexprep.train.models.layers`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.shards.resample import c_function, installed

_SHARED = 1 << 20  # values from which on torch's number of threads share the work: some 5 ms
_INEXACT = ctypes.c_float
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class Kernels(NamedTuple):
    """Both functions of a compiled response_norm.c, of rows of `maps` neighbouring values."""

    norm: Callable[..., None]
    gradient: Callable[..., None]

    def normalise(
        self,
        images: torch.Tensor,
        towers: int,
        reach: int,
        k: float,
        alpha: float,
        result: torch.Tensor,
        scale: torch.Tensor,
    ) -> None:
        """Writes what comes out into `result`, and what values were divided by, to the power of 4/3, into `scale`.

        All are of one shape, and such as `fitting` says.
        """

        def part(rows: int, maps: int, room: int, given: int, *made: int) -> None:
            self.norm(given, rows, maps, reach, k, alpha, room, *made)

        _over_rows(part, images.shape[1] // towers, reach, images, result, scale)

    def differentiate(
        self,
        images: torch.Tensor,
        normalised: torch.Tensor,
        scale: torch.Tensor,
        gradient: torch.Tensor,
        towers: int,
        reach: int,
        factor: float,
        result: torch.Tensor,
    ) -> None:
        """Writes the gradient by `images` into `result`; `factor` is 2 · alpha · beta."""

        def part(rows: int, maps: int, room: int, *places: int) -> None:
            *given, made = places
            self.gradient(*given, rows, maps, reach, factor, room, made)

        _over_rows(part, images.shape[1] // towers, reach, images, normalised, scale, gradient, result)


def fitting(images: torch.Tensor, towers: int) -> Kernels | None:
    """The kernels for images that are float32 on the CPU, the maps of a place side by side, (N, C, H, W) channels last, alike for all towers.

    None for others.
    """
    here = images.device.type == "cpu" and images.dtype == torch.float32 and images.shape[1] % towers == 0
    return kernels() if here and images.is_contiguous(memory_format=torch.channels_last) else None


def _over_rows(part: Callable[..., None], maps: int, reach: int, *tensors: torch.Tensor) -> None:
    """Calls part(rows, maps, room, *addresses) for all rows, in several threads where there are many."""
    rows = tensors[0].numel() // maps
    threads = torch.get_num_threads() if rows * maps >= _SHARED else 1
    each = -(-rows // threads)
    starts = [tensor.data_ptr() for tensor in tensors]

    def work(first: int) -> None:
        room = np.empty(2 * (maps + reach), np.float32)
        places = (start + first * maps * room.itemsize for start in starts)
        part(min(each, rows - first), maps, room.ctypes.data, *places)

    if threads == 1:
        work(0)
        return
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the lock
        list(pool.map(work, range(0, rows, each)))


@functools.lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """response_norm.c, where it was compiled when alexprep was installed and does what numpy does; None otherwise."""
    return installed(__file__, "response_norm", loaded)


def loaded(library: Path) -> Kernels | None:
    """The functions of a compiled response_norm.c, if they are there, and give what numpy gives of a few values."""
    numbers = _NUMBER, _NUMBER, _NUMBER
    norm = c_function(library, "alexprep_response_norm", _POINTER, *numbers, _INEXACT, _INEXACT, *[_POINTER] * 3)
    gradient = c_function(
        library, "alexprep_response_norm_gradient", *[_POINTER] * 4, *numbers, _INEXACT, _POINTER, _POINTER
    )
    if norm is None or gradient is None:
        return None
    found, reach = Kernels(norm, gradient), 2
    values = np.sin(np.arange(2 * 38, dtype=np.float32) ** 2).reshape(2, 38) * np.float32(60)
    expected = in_numpy(values, values[::-1], reach, 2.0, 1e-4, 1.5e-4)
    a, given, *made = (
        torch.from_numpy(each.copy())[:, :, None, None] for each in (values, values[::-1], values, values, values)
    )
    b, s, result = made
    found.normalise(a, 1, reach, 2.0, 1e-4, b, s)
    found.differentiate(a, b, s, given, 1, reach, 1.5e-4, result)
    same = all(np.array_equal(one[:, :, 0, 0], other) for one, other in zip(made, expected, strict=True))
    return found if same else None


def in_numpy(
    values_NC: NDArray[np.float32],
    gradient_NC: NDArray[np.float32],
    reach: int,
    k: float,
    alpha: float,
    factor: float,
) -> list[NDArray[np.float32]]:
    """What response_norm.c makes of rows of one tower's maps, to the last bit: the normalised values, their scale, and the gradient."""
    a, one = values_NC, np.float32(1)
    s = _with_neighbours(a * a, reach) * np.float32(alpha) + np.float32(k)
    root = one / np.sqrt(s)
    power = np.sqrt(root) * root
    b = power * a
    crossed = _with_neighbours(gradient_NC * b / s, reach)
    return [b, s, power * gradient_NC - crossed * a * np.float32(factor)]


def _with_neighbours(values_NC: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    total = values_NC.copy()
    for distance in range(1, min(reach, values_NC.shape[1] - 1) + 1):
        total[:, distance:] += values_NC[:, :-distance]
        total[:, :-distance] += values_NC[:, distance:]
    return total
