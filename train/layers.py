"""Layers that torch lacks or does slowly: the paper's response normalisation, dropout, overhanging filters, initial weights.

Shapes: N images, C maps, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LRN_SIZE, LRN_K, LRN_ALPHA = 5, 2.0, 1e-4  # section 3.3; beta = 0.75 is built into the arithmetic below
LRN_BETA = 0.75
CACHE_CHUNK = 4  # images a pass on the CPU: 4 x 96 x 55 x 55 floats stay in the cache, 2.5 times faster than one pass


class LocalResponseNorm(nn.Module):
    """b = a / (2 + 1e-4 · sum of a² over the five nearest maps)^0.75, sum undivided: section 3.3.

    The same function as `torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2)`, whose alpha is divided by the window; on a CPU this one is
    9 times faster with its gradient (0.1 s instead of 0.9 s for AlexNet's first layer at batch 128).

    >>> maps = torch.tensor([0.0, 100.0, 0.0, 0.0, 0.0]).reshape(1, 5, 1, 1)
    >>> [round(value, 3) for value in LocalResponseNorm()(maps).flatten().tolist()]
    [0.0, 43.869, 0.0, 0.0, 0.0]
    """

    def __init__(self, towers: int = 1) -> None:
        """Maps of different towers are no neighbours: with two GPUs, each normalised its own half (2012 code)."""
        super().__init__()
        self.towers = towers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> the same shape, dtype and memory format; C is divisible by the number of towers."""
        normalised: torch.Tensor = _ResponseNorm.apply(images, self.towers)  # type: ignore[no-untyped-call]
        return normalised


class PaperDropout(nn.Module):
    """Dropout as the paper scales it (section 4.2): a 0/1 mask in training, outputs times 0.5 in evaluation.

    torch's own is the inverse (times 2 in training, nothing in evaluation), which doubles the gradients below it.
    """

    KEEP = 0.5  # section 4.2

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any float tensor -> the same shape. The mask comes from torch's default generator."""
        if not self.training:
            return values * self.KEEP
        return values * torch.empty_like(values).bernoulli_(self.KEEP)


class Overhang(nn.Module):
    """Zeros on the right and the bottom, so that the last filter of a strided convolution hangs over the edge.

    The 2012 code rounds the number of filter positions up: 224 pixels under an 11-pixel filter at stride 4 give 55, not 54.

    >>> Overhang(224, kernel=11, stride=4).pad
    3
    """

    def __init__(self, side: int, *, kernel: int, stride: int) -> None:
        """For inputs of `side` pixels under a filter of `kernel` pixels."""
        super().__init__()
        self.pad = -(side - kernel) % stride

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H + pad, W + pad)."""
        return F.pad(images, (0, self.pad, 0, self.pad))


class Scale(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        """By `factor`."""
        super().__init__()
        self.factor = factor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any float tensor -> the same shape."""
        return values * self.factor


def initialise(
    network: nn.Module, seed: int, deviations: Mapping[str, float], ones: frozenset[str] = frozenset()
) -> None:
    """Draws every weight from N(0, deviation²) and sets every bias to 1 (layers in `ones`) or 0, in place.

    Args:
        network: its convolutions and linear layers are drawn in order of definition.
        seed: of a generator of its own: the same seed gives the same weights, whatever was drawn before.
        deviations: standard deviation by layer name.
        ones: names of the layers whose biases start at 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
                layer.weight.normal_(0.0, deviations[name], generator=generator)
                layer.bias.fill_(1.0 if name in ones else 0.0)


class _ResponseNorm(torch.autograd.Function):
    """Forward and gradient with four elementary passes each and one saved intermediate, a few images at a time."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, towers: int) -> torch.Tensor:
        normalised, scale = torch.empty_like(images), torch.empty_like(images)
        for a, b, s in _chunks(images, normalised, scale):
            _window_sum(a * a, s, towers).mul_(LRN_ALPHA).add_(LRN_K)
            root = s.rsqrt()
            torch.sqrt(root, out=b).mul_(root).mul_(a)  # s^-1/2 · s^-1/4 = s^-0.75, without a slow pow
        ctx.save_for_backward(images, normalised, scale)
        ctx.towers = towers
        return normalised

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        images, normalised, scale = ctx.saved_tensors
        result = torch.empty_like(images)
        for a, b, s, gradient, out in _chunks(images, normalised, scale, gradients[0], result):
            # d/da_j: g_j · s_j^-0.75 - 2 · alpha · beta · a_j · sum over the window of g_i · b_i / s_i
            root = s.rsqrt()
            torch.sqrt(root, out=out).mul_(root).mul_(gradient)
            crossed = torch.empty_like(a)
            _window_sum((gradient * b).div_(s), crossed, ctx.towers).mul_(a)
            out.add_(crossed, alpha=-2 * LRN_ALPHA * LRN_BETA)
        return result, None


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same few images of every tensor; on a GPU all of them at once, since launches cost more than cache misses."""
    size = CACHE_CHUNK if tensors[0].device.type == "cpu" else max(1, len(tensors[0]))
    for first in range(0, len(tensors[0]), size):
        yield tuple(tensor[first : first + size] for tensor in tensors)


def _window_sum(values: torch.Tensor, out: torch.Tensor, towers: int) -> torch.Tensor:
    """Sum over each map and its neighbours on either side, into `out`; maps beyond the ends of a tower count nothing."""
    out.copy_(values)
    for given, summed in zip(values.chunk(towers, dim=1), out.chunk(towers, dim=1), strict=True):
        for distance in range(1, LRN_SIZE // 2 + 1):
            summed[:, distance:] += given[:, :-distance]
            summed[:, :-distance] += given[:, distance:]
    return out
