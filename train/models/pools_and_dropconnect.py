"""Pools beside max and average pooling, and a linear layer that forgets weights: L2 and stochastic pooling, DropConnect.

Layers that draw random numbers for each image derive from `Drawing`, so that the ranks of a job can share what one device would draw.
Pools are rounded up, as cuda-convnet's are: a window that hangs over the right or the bottom edge has the pixels that there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import get_args

import torch
import torch.nn.functional as F
from torch import nn

from alexprep.shards.errors import number_within, one_of, whole_number
from alexprep.train.field_values import Pool

DRAWN = 2**24  # random numbers that a call of DropConnect takes at most, 64 MiB: other layers share one mask for a step


class Drawing(nn.Module):
    """A layer whose training draws random numbers of torch's default generator: `forward` is `drawn`, then `with_draws`.

    Attributes:
        shared: what draws in its place where ranks share the batch or the maps.
    """

    shared: Callable[[Drawing, torch.Tensor], torch.Tensor] | None = None

    def drawn(self, shape: list[int], values: torch.Tensor) -> torch.Tensor:
        """Draws for a whole batch of this shape; on the device of `values`. What belongs to an image and a map has its place in both dimensions."""
        raise NotImplementedError

    def with_draws(self, values: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """What the layer makes of values in training, with draws for as many images."""
        raise NotImplementedError

    def evaluated(self, values: torch.Tensor) -> torch.Tensor:
        """What it makes of them in evaluation, where nothing is drawn."""
        raise NotImplementedError

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The layer, in training or in evaluation."""
        if not self.training:
            return self.evaluated(values)
        draws = self.drawn(list(values.shape), values) if self.shared is None else self.shared(self, values)
        return self.with_draws(values, draws)


class L2Pool2d(nn.Module):
    """The square root of the sum of squares in each window: between sum and maximum; its gradient at zeros is 0.

    >>> L2Pool2d(2, 2)(torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])).item()
    5.0
    """

    mixes_maps = False  # towers need not know of it

    def __init__(self, size: int, stride: int) -> None:
        """Windows of `size` x `size` pixels, `stride` pixels apart, at most their size."""
        super().__init__()
        _check(size, stride)
        self.size, self.stride = size, stride

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> (N, C, H', W'), H' = ceil((H - size) / stride) + 1."""
        whole = _filled_up(_at_least_float32(images), self.size, self.stride)
        sums = F.avg_pool2d(whole * whole, self.size, self.stride) * self.size**2
        return sums.clamp(min=torch.finfo(sums.dtype).tiny).sqrt().to(images.dtype)

    def extra_repr(self) -> str:
        """The numbers, for print(network)."""
        return f"size={self.size}, stride={self.stride}"


class StochasticPool2d(Drawing):
    """One value of each window, drawn with a probability in proportion to it; in evaluation their mean under these probabilities.

    Zeiler and Fergus 2013 (arXiv 1301.3557), sections 3 and 3.2. Negative values, which have no probability, count as 0; a window
    without positive ones gives 0.

    >>> pool = StochasticPool2d(2, 2).eval()
    >>> pool(torch.tensor([[[[1.0, 3.0], [0.0, -9.0]]]])).item()  # 1/4 · 1 + 3/4 · 3
    2.5
    """

    def __init__(self, size: int, stride: int) -> None:
        """Windows of `size` x `size` pixels, `stride` pixels apart, at most their size."""
        super().__init__()
        _check(size, stride)
        self.size, self.stride = size, stride

    def drawn(self, shape: list[int], values: torch.Tensor) -> torch.Tensor:
        """One number of [0, 1) for each window: float (N, C, H', W')."""
        sides = [pooled_up(side, self.size, self.stride) for side in shape[2:]]
        return torch.rand([*shape[:2], *sides], device=values.device)

    def with_draws(self, values: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W), draws (N, C, H', W') -> (N, C, H', W'): in each window the first value at which the running sum exceeds draw · sum."""
        whole = _filled_up(values.clamp(min=0), self.size, self.stride)
        windows = list(self._windows(whole))
        with torch.no_grad():
            total, running = (torch.zeros_like(windows[0], dtype=torch.float32) for _ in range(2))
            for each in windows:  # in one order, so that the last running sum is the total to the last bit
                total += each
            # Rounding must not take a draw up to the sum itself, behind the last value that has a probability.
            wanted = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.zeros_like(windows[0])
        for each in windows:
            with torch.no_grad():
                before = running <= wanted
                running += each
                drawn = before & (running > wanted)
            chosen = chosen + each * drawn
        return chosen

    def _windows(self, whole: torch.Tensor) -> Iterator[torch.Tensor]:
        """The pixels of one place in all windows, (N, C, H', W'), for each place."""
        rows, columns = ((side - self.size) // self.stride * self.stride + 1 for side in whole.shape[2:])
        for row, column in itertools.product(range(self.size), repeat=2):
            yield whole[:, :, row : row + rows : self.stride, column : column + columns : self.stride]

    def evaluated(self, values: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> (N, C, H', W'): the sum of squares over the sum, of each window."""
        whole = _filled_up(_at_least_float32(values.clamp(min=0)), self.size, self.stride)
        sums, squares = (F.avg_pool2d(each, self.size, self.stride) for each in (whole, whole * whole))
        return (squares / sums.clamp(min=torch.finfo(sums.dtype).tiny)).to(values.dtype)

    def extra_repr(self) -> str:
        """The numbers, for print(network)."""
        return f"size={self.size}, stride={self.stride}"


class DropConnect(nn.Linear, Drawing):
    """A linear layer that in training keeps each weight with a probability, another choice for each image, and uses all, scaled, in evaluation.

    Wan et al. 2013 ("Regularization of neural networks using DropConnect"). As in the paper's dropout here, nothing is scaled in training, and weights are
    multiplied by `keep` in evaluation, which is the mean of the layer's inputs; Wan et al. draw their sum from a normal distribution
    instead. Biases are kept. Where all weights times all images are more than `DRAWN`, one choice serves all images of a step.

    >>> layer = DropConnect(2, 1, keep=0.25).eval()
    >>> nn.init.ones_(layer.weight).shape, nn.init.zeros_(layer.bias).shape, layer(torch.ones(1, 2)).item()
    (torch.Size([1, 2]), torch.Size([1]), 0.5)
    """

    def __init__(self, in_features: int, out_features: int, keep: float = 0.5) -> None:
        """As `torch.nn.Linear`; `keep` is the probability of a weight, over 0 and at most 1."""
        super().__init__(in_features, out_features)
        number_within("DropConnect's keep", keep, 1e-6, 1)
        self.keep = keep

    def drawn(self, shape: list[int], values: torch.Tensor) -> torch.Tensor:
        """Which weights are kept: bool (N, out_features, in_features), or (1, …) for all of them."""
        images = shape[0] if shape[0] * self.weight.numel() <= DRAWN else 1
        return torch.rand([images, *self.weight.shape], device=values.device) < self.keep

    def with_draws(self, values: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Float (N, in_features) -> (N, out_features)."""
        if len(draws) != len(values):
            return F.linear(values, self.weight * draws[0], self.bias)
        weights = (self.weight * draws).to(values.dtype)
        return torch.bmm(weights, values[:, :, None]).squeeze(2) + self.bias

    def evaluated(self, values: torch.Tensor) -> torch.Tensor:
        """Float (N, in_features) -> (N, out_features)."""
        return F.linear(values, self.weight * self.keep, self.bias)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """As every `Drawing`'s."""
        return Drawing.forward(self, values)

    def extra_repr(self) -> str:
        """The numbers, for print(network)."""
        return f"{super().extra_repr()}, keep={self.keep}"


def pool_layer(kind: Pool, size: int, stride: int) -> nn.Module:
    """The pool of a name, rounded up; AlexprepError where there is none, or where pixels would lie between the windows."""
    one_of("pool", kind, get_args(Pool))
    _check(size, stride)
    if kind == "max":
        return nn.MaxPool2d(size, stride, ceil_mode=True)
    if kind == "average":
        return nn.AvgPool2d(size, stride, ceil_mode=True)
    return L2Pool2d(size, stride) if kind == "l2" else StochasticPool2d(size, stride)


def pooled_up(side: int, size: int, stride: int) -> int:
    """The side of a map after such a pool.

    >>> pooled_up(32, 3, 2)
    16
    """
    return -(-(side - size) // stride) + 1


def _check(size: int, stride: int) -> None:
    whole_number("a pool's size", size, 1, 1024)
    whole_number("a pool's stride", stride, 1, size)


def _filled_up(images: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Images with zeros to the right and below, so that the last windows are whole."""
    height, width = (max(0, (pooled_up(side, size, stride) - 1) * stride + size - side) for side in images.shape[2:])
    return F.pad(images, (0, width, 0, height)) if height or width else images


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """For squares: those of float16 end at 256."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
