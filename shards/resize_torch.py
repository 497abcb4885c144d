"""`alexprep.shards.resample` in torch, on any device: the same pixels."""

from __future__ import annotations

import functools

import numpy as np
import torch

from alexprep.shards import resample
from alexprep.shards.resample import Axis, Resize

_MATRICES = 512  # kept on the device, 0.4 MB each for photos of 500 pixels; sizes repeat within a data set


class Resizer:
    """`alexprep.shards.resample.Resize` in torch, on any device: the same pixels.

    The weights are the same integers, as whole matrices: a GPU multiplies faster than it skips zeros. Zeros do not touch
    the argument of `resample`: each product and each partial sum, in whatever order and fused or not, is an integer
    below 2**24 (times a power of two) and so exact in float32. TF32 would round the weights to 11 bits, hence "ieee".
    """

    def __init__(self, device: torch.device) -> None:
        """Prepares for `device`; float32 products are IEEE's in this process from here on."""
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        # A cache of its own: an evicted matrix is freed in the order of the one stream that reads it.
        self._matrix = functools.lru_cache(maxsize=_MATRICES)(functools.partial(_matrix, device))

    def __call__(self, pixels: torch.Tensor, resize: Resize) -> torch.Tensor:
        """Resizes the region that `resize` reads.

        Args:
            pixels: uint8 (H, W, 3), the whole source.
            resize: what to make of it.

        Returns:
            uint8 (vertical.count, horizontal.count, 3), contiguous.
        """
        top, left, bottom, right = resize.region
        down = self._matrix(resize.vertical, resize.name, resample._COLUMN_BITS, top, bottom)
        along = self._matrix(resize.horizontal, resize.name, resample._ROW_BITS, left, right)
        region = pixels[top:bottom, left:right].permute(2, 0, 1)
        planes = region.to(torch.float32, memory_format=torch.contiguous_format)
        middle = (down @ planes).mul_(2.0**resample._MIDDLE_BITS).round_()  # halves to even, as numpy's rint
        result = (middle @ along.T).mul_(2.0**-resample._MIDDLE_BITS).round_().clamp_(0, 255)
        return result.to(torch.uint8).permute(1, 2, 0).contiguous()


def _matrix(device: torch.device, axis: Axis, name: str, bits: int, low: int, high: int) -> torch.Tensor:
    """float32 (axis.count, high - low): an axis' weights for the source pixels [low, high), multiples of 2**-bits."""
    first, exact = resample.weights(axis, name)
    source = np.clip(first + np.arange(len(exact))[:, None], 0, axis.source - 1)
    fixed = resample._rounded(exact, bits)
    tap, output = np.nonzero(fixed)
    matrix = np.zeros((axis.count, high - low), np.float32)
    np.add.at(matrix, (output, source[tap, output] - low), fixed[tap, output])
    return torch.from_numpy(matrix).to(device)
