"""Layers that torch lacks or does slowly: response normalisations, the paper's dropout, overhanging filters, initial weights.

Shapes: N images, C maps, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.networks.local import LocallyConnected2d
from alexprep.train.networks.response import Maps, Pixels, normalised


class LocalResponseNorm(nn.Module):
    """b = a / (k + alpha · sum of a² over the `size` nearest maps)^beta, the sum undivided: section 3.3, whose numbers are the defaults.

    The same function as `torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2)`, whose alpha is divided by the window, as it is in the 2012
    code; on a CPU this one is 9 times faster with its gradient (0.1 s instead of 0.9 s for AlexNet's first layer at batch 128).

    >>> maps = torch.tensor([0.0, 100.0, 0.0, 0.0, 0.0]).reshape(1, 5, 1, 1)
    >>> [round(value, 3) for value in LocalResponseNorm()(maps).flatten().tolist()]
    [0.0, 43.869, 0.0, 0.0, 0.0]
    """

    def __init__(
        self, towers: int = 1, *, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
    ) -> None:
        """Maps of different towers are no neighbours: with two GPUs, each normalised its own half (2012 code).

        Raises:
            AlexprepError: the window is not odd, or a number is out of its range.
        """
        super().__init__()
        _check_norm(size, k, alpha, beta)
        self.towers, self.size, self.k, self.alpha, self.beta = towers, size, k, alpha, beta

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> the same shape, dtype and memory format; C is divisible by the number of towers."""
        return normalised(images, Maps(self.size // 2, self.towers), self.k, self.alpha, self.beta)

    def extra_repr(self) -> str:
        """The numbers, for print(network)."""
        return f"towers={self.towers}, size={self.size}, k={self.k}, alpha={self.alpha}, beta={self.beta}"


class SpatialResponseNorm(nn.Module):
    """b = a / (k + alpha · sum of a² over the size x size nearest pixels of the same map)^beta; pixels beyond the edge count nothing.

    The defaults are those of "cnorm2" in the 2012 code (layers-145.cfg, layer-params-145.cfg): scale 0.001 divided by 25, power 0.75,
    and a k of 1, which this kind of layer has there whatever its parameters say. The paper does not mention it.

    >>> SpatialResponseNorm(3, alpha=3.75)(torch.ones(1, 1, 2, 2)).flatten().tolist()  # (1 + 3.75 · 4)^-0.75
    [0.125, 0.125, 0.125, 0.125]
    """

    mixes_maps = False  # towers need not know of it

    def __init__(self, size: int = 5, *, k: float = 1.0, alpha: float = 0.001 / 25, beta: float = 0.75) -> None:
        """See the class.

        Raises:
            AlexprepError: the window is not odd, or a number is out of its range.
        """
        super().__init__()
        _check_norm(size, k, alpha, beta)
        self.size, self.k, self.alpha, self.beta = size, k, alpha, beta

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> the same shape, dtype and memory format."""
        return normalised(images, Pixels(self.size // 2), self.k, self.alpha, self.beta)

    def extra_repr(self) -> str:
        """The numbers, for print(network)."""
        return f"size={self.size}, k={self.k}, alpha={self.alpha}, beta={self.beta}"


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
    network: nn.Module,
    seed: int,
    deviations: Mapping[str, float],
    biases: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Draws every weight from N(0, deviation²) and sets every bias to a constant, in place.

    Args:
        network: its convolutions, linear and locally connected layers are drawn in order of definition.
        seed: of a generator of its own: the same seed gives the same weights, whatever was drawn before.
        deviations: standard deviation by layer name.
        biases: what a layer's biases start at, by layer name; 0 for the others.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, LocallyConnected2d)):
                layer.weight.normal_(0.0, deviations[name], generator=generator)
                if layer.bias is not None:
                    layer.bias.fill_(biases.get(name, 0.0))


def _check_norm(size: int, k: float, alpha: float, beta: float) -> None:
    if size < 1 or size % 2 == 0:
        raise AlexprepError(f"a response norm's window is {size}: it must be odd, so that it has a middle")
    if not (k > 0 and alpha >= 0 and beta >= 0):
        raise AlexprepError(f"a response norm needs k above 0, alpha and beta of at least 0, not {k}, {alpha}, {beta}")
