"""The arithmetic of response normalisation: b = a · s^-beta with s = k + alpha · (sum of a² over a window), and its gradient.

Sums, powers and products are float32 at least, also of bfloat16 and float16 images: only what goes in and out is that short.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

# Values a pass on a CPU: 1 MiB as float32, so that a pass finds what the one before it left in the cache.
CACHED = 2**18


class Window(Protocol):
    """What a value is normalised by: its neighbours, itself among them. Neighbours are mutual, so the sum carries gradients back too."""

    def fill(self, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes the sum over each value's window into `out`, and returns it."""

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """The same as a new tensor, by operations that a compiler can join with those around them."""


@dataclass(frozen=True)
class Maps:
    """Each map and `reach` neighbours on either side; maps beyond the ends of a tower count nothing."""

    reach: int
    towers: int = 1

    def fill(self, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """See `Window`."""
        out.copy_(values)
        for given, summed in zip(values.chunk(self.towers, dim=1), out.chunk(self.towers, dim=1), strict=True):
            _add_neighbours(given, summed, 1, self.reach)
        return out

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """See `Window`."""
        images, maps, *side = values.shape
        maps //= self.towers
        padded = F.pad(values.reshape(images, self.towers, maps, *side), (0, 0, 0, 0, self.reach, self.reach))
        total = padded.narrow(2, 0, maps)
        for first in range(1, 2 * self.reach + 1):
            total = total + padded.narrow(2, first, maps)
        return total.flatten(1, 2)


@dataclass(frozen=True)
class Pixels:
    """Each pixel and those up to `reach` away in both directions, of the same map; pixels beyond the edge count nothing."""

    reach: int

    def fill(self, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """See `Window`."""
        if values.device.type != "cpu":
            return out.copy_(self.sums(values))
        rows = _add_neighbours(values, values.clone(), 3, self.reach)
        return _add_neighbours(rows, out.copy_(rows), 2, self.reach)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """See `Window`; one kernel, which on a CPU takes four times as long as `fill`."""
        return F.avg_pool2d(values, 2 * self.reach + 1, 1, self.reach, divisor_override=1)


def normalised(images: torch.Tensor, window: Window, k: float, alpha: float, beta: float) -> torch.Tensor:
    """Float (N, C, H, W) -> the same shape, dtype and memory format; so is the gradient."""
    if torch.compiler.is_compiling():  # which makes one pass of all this by itself, and its gradient
        values = images.to(_wide(images.dtype))
        scale = window.sums(values * values) * alpha + k
        root = scale.rsqrt()
        return (values * (root * root.sqrt() if beta == 0.75 else scale.pow(-beta))).to(images.dtype)
    result: torch.Tensor = _ResponseNorm.apply(images, window, k, alpha, beta)  # type: ignore[no-untyped-call]
    return result


class _ResponseNorm(torch.autograd.Function):
    """Forward and gradient with four elementary passes each and one saved intermediate, a few images at a time."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, window: Window, k: float, alpha: float, beta: float) -> torch.Tensor:
        normalised, scale = torch.empty_like(images), torch.empty_like(images, dtype=_wide(images.dtype))
        for given, out, s in _chunks(images, normalised, scale):
            a = given.to(s.dtype)
            b = out if out.dtype == s.dtype else torch.empty_like(s)
            window.fill(a * a, s).mul_(alpha).add_(k)
            _inverse_power(s, beta, b).mul_(a)
            if b is not out:
                out.copy_(b)
        ctx.save_for_backward(images, normalised, scale)
        ctx.window, ctx.alpha, ctx.beta = window, alpha, beta
        return normalised

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, normalised, scale = ctx.saved_tensors
        result = torch.empty_like(images)
        for s, *others, out in _chunks(scale, images, normalised, gradients[0], result):
            a, b, gradient = (other.to(s.dtype) for other in others)
            # d/da_j: g_j · s_j^-beta - 2 · alpha · beta · a_j · sum over the window of g_i · b_i / s_i
            g = out if out.dtype == s.dtype else torch.empty_like(s)
            _inverse_power(s, ctx.beta, g).mul_(gradient)
            crossed = torch.empty_like(a)
            ctx.window.fill((gradient * b).div_(s), crossed).mul_(a)
            g.add_(crossed, alpha=-2 * ctx.alpha * ctx.beta)
            if g is not out:
                out.copy_(g)
        return result, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def _inverse_power(scale: torch.Tensor, beta: float, out: torch.Tensor) -> torch.Tensor:
    """scale^-beta into `out`; for the paper's 0.75 as s^-1/2 · s^-1/4, without a slow pow."""
    if beta != 0.75:
        return torch.pow(scale, -beta, out=out)
    root = scale.rsqrt()
    return torch.sqrt(root, out=out).mul_(root)


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same few images of every tensor; on a GPU all of them at once, since launches cost more than cache misses."""
    first_one = tensors[0]
    images = len(first_one)
    size = max(1, images if first_one.device.type != "cpu" else images * CACHED // max(1, first_one.numel()))
    for first in range(0, images, size):
        yield tuple(tensor[first : first + size] for tensor in tensors)


def _add_neighbours(given: torch.Tensor, summed: torch.Tensor, dim: int, reach: int) -> torch.Tensor:
    """Adds to `summed` what `given` holds 1 to `reach` places before and after along `dim`."""
    length = given.shape[dim]
    for distance in range(1, min(reach, length - 1) + 1):
        summed.narrow(dim, distance, length - distance).add_(given.narrow(dim, 0, length - distance))
        summed.narrow(dim, 0, length - distance).add_(given.narrow(dim, distance, length - distance))
    return summed
