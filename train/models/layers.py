"""Layers that torch lacks or does slowly, for all networks here and for a user's own: response normalisations, the paper's dropout,
locally connected layers, patches as waves, a way past layers; and how a network of layers is made, with its initial weights.

Whole networks are in the modules beside this one. Shapes: N images, C maps, H W pixels.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from alexprep.shards.errors import AlexprepError
from alexprep.train.field_values import Activation
from alexprep.train.models import cpu_kernels, cuda_kernels

# Values a pass of normalisation takes on a CPU: 1 MiB as float32, so that it finds what the pass before left in the cache.
CACHED = 2**18
_IN_KERNELS = (torch.float32, torch.float16, torch.bfloat16)


class LocalResponseNorm(nn.Module):
    """b = a / (k + alpha · sum of a² over the `size` nearest maps)^beta, the sum undivided: section 3.3, whose numbers are the defaults.

    The same function as `torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2)`, whose alpha is divided by the window, as it is in the 2012
    code; on a CPU this one is many times faster with its gradient, see docs/performance.md.

    >>> maps = torch.tensor([0.0, 100.0, 0.0, 0.0, 0.0]).reshape(1, 5, 1, 1)
    >>> [round(value, 3) for value in LocalResponseNorm()(maps).flatten().tolist()]
    [0.0, 43.869, 0.0, 0.0, 0.0]
    """

    def __init__(
        self, towers: int = 1, *, size: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
    ) -> None:
        """Maps of different towers are no neighbours: with two GPUs, each normalised its own half (2012 code).

        AlexprepError where the window is not odd, or a number is out of its range.
        """
        super().__init__()
        _check_norm(size, k, alpha, beta)
        self.towers, self.size, self.k, self.alpha, self.beta = towers, size, k, alpha, beta

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> the same shape, dtype and memory format; C is divisible by the number of towers."""
        return normalised(images, MapWindow(self.size // 2, self.towers), self.k, self.alpha, self.beta)

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
        """AlexprepError where the window is not odd, or a number is out of its range."""
        super().__init__()
        _check_norm(size, k, alpha, beta)
        self.size, self.k, self.alpha, self.beta = size, k, alpha, beta

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> the same shape, dtype and memory format."""
        return normalised(images, PixelWindow(self.size // 2), self.k, self.alpha, self.beta)

    def extra_repr(self) -> str:
        """The numbers, for print(network)."""
        return f"size={self.size}, k={self.k}, alpha={self.alpha}, beta={self.beta}"


class Conv2d(nn.Conv2d):
    """torch's convolution, the same function of the same parameters, which a GPU computes in bf16 and fp16 as suits its tensor cores.

    Where few maps are read at a stride, as from images, the stride x stride pixels of a block become maps of their own, over which it is a
    convolution at stride 1: AlexNet's first takes a fifth of the time so. Of groups, each is a convolution by itself: cuDNN's gradient of
    a grouped one takes up to five times as long as those of its halves. Both were measured on an H200, in channels last.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> (N, kernels, H', W')."""
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else images.dtype
        if not images.is_cuda or half.itemsize > 2:
            return super().forward(images)
        if self.groups > 1:
            return self._group_by_group(images)
        if min(self.stride) > 1 and self.in_channels < 8 and self.padding == (0, 0) and self.dilation == (1, 1):
            return self._over_blocks(images.to(half))
        return super().forward(images)

    def _group_by_group(self, images: torch.Tensor) -> torch.Tensor:
        last = images.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last else torch.contiguous_format
        biases = itertools.repeat(None) if self.bias is None else self.bias.chunk(self.groups)
        options: Any = (self.stride, self.padding, self.dilation)
        made = [
            F.conv2d(some.contiguous(memory_format=form), weight, bias, *options)
            for some, weight, bias in zip(
                images.chunk(self.groups, 1), self.weight.chunk(self.groups), biases, strict=False
            )
        ]
        return torch.cat(made, 1)

    def _over_blocks(self, images: torch.Tensor) -> torch.Tensor:
        """Kernels are filled up with zeros to whole blocks, and so are the images."""
        (down, along), (high, wide) = self.stride, self.kernel_size
        rows, columns = -(-high // down), -(-wide // along)  # of a kernel, in blocks
        count, maps = images.shape[:2]
        block_rows, block_columns = (images.shape[2] - high) // down + rows, (images.shape[3] - wide) // along + columns
        padding = block_columns * along - images.shape[3], block_rows * down - images.shape[2]
        images = F.pad(images, (0, padding[0], 0, padding[1]))
        blocks = images.reshape(count, maps, block_rows, down, block_columns, along).permute(0, 2, 4, 3, 5, 1)
        weight = F.pad(self.weight, (0, columns * along - wide, 0, rows * down - high))
        kernels = weight.view(-1, maps, rows, down, columns, along).permute(0, 3, 5, 1, 2, 4)
        return F.conv2d(blocks.flatten(3).permute(0, 3, 1, 2), kernels.flatten(1, 3), self.bias)


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


class Scale(nn.Module):
    """Multiplies by a constant: `Scale(1 / 64)` makes pixels on the 0-255 scale, their mean subtracted, as small as networks like them."""

    def __init__(self, factor: float) -> None:
        """By `factor`, any number."""
        super().__init__()
        self.factor = factor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any float tensor -> the same shape."""
        return values * self.factor


class LocallyConnected2d(nn.Module):
    """A layer that looks at windows as a convolution does, with weights and biases of its own at every position, as many as there are pixels.

    Of such are the third and fourth layer of the paper's CIFAR-10 nets (section 3.3, footnote 3; type "local" in the 2012 code). A copy
    of all windows and one product a position take a third of the time that `torch.nn.functional.unfold` takes on a CPU.

    Attributes:
        weight: float32 (side, side, kernel_size, kernel_size, in_channels, out_channels): row and column of the output, then row and
            column of the window.
        bias: float32 (out_channels, side, side).

    >>> layer = LocallyConnected2d(8, 6, 12, kernel_size=3)
    >>> tuple(layer(torch.zeros(2, 8, 12, 12)).shape), layer.weight.numel() == 12 * 12 * 3 * 3 * 8 * 6
    ((2, 6, 12, 12), True)
    """

    def __init__(self, in_channels: int, out_channels: int, side: int, kernel_size: int) -> None:
        """For images of `side` pixels and windows of an odd number; weights are drawn as torch draws a convolution's, biases are 0."""
        super().__init__()
        self.side, self.kernel_size = side, kernel_size
        bound = (in_channels * kernel_size**2) ** -0.5
        weight = torch.empty(side, side, kernel_size, kernel_size, in_channels, out_channels)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_channels, side, side))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, in_channels, side, side) -> (N, out_channels, side, side); in memory, the maps of an image lie together."""
        side = self.side
        pixels = F.pad(images, (self.kernel_size // 2,) * 4).permute(2, 3, 0, 1)  # height, width, images, maps
        offsets = [(i, j) for i in range(self.kernel_size) for j in range(self.kernel_size)]
        seen = [pixels[i : i + side, j : j + side] for i, j in offsets]
        windows = torch.cat(seen, dim=3).flatten(0, 1)  # positions, images, values of a window
        products = torch.bmm(windows, self.weight.flatten(2, 4).flatten(0, 1))
        return products.view(side, side, images.shape[0], -1).permute(2, 3, 0, 1) + self.bias


class PatchWaves(nn.Module):
    """Takes the patches of an image apart into waves: the cosine transform of 4x4 pixels every second pixel, of three colours. Nothing is learned.

    Photographs' patches have nearly uncorrelated values in this basis (Ahmed, Natarajan and Rao 1974), so that batch normalisation after it
    whitens them: what eigenvectors of a dataset's patches do in other fast nets, without a look at the data. Colours are the sum of red, green
    and blue, red less blue, and green less both, which are within 4 degrees of the principal axes of ImageNet and of CIFAR-10. Brightness has all 16 waves;
    each colour has the 4 slowest, since JPEGs store colours at half the resolution.

    >>> PatchWaves()(torch.ones(1, 3, 8, 8))[0, :2, 1, 1].tolist()  # 48 pixels of 1, in a basis of length 1; and the fastest wave
    [6.928205966949463, 0.0]
    """

    SIDE, STRIDE, SLOW = 4, 2, 2  # pixels; waves a colour has in each direction
    COLOURS = ((1, 1, 1), (1, 0, -1), (1, -2, 1))
    MAPS = SIDE**2 + 2 * SLOW**2

    def __init__(self) -> None:
        """The basis is no parameter, and no part of a checkpoint."""
        super().__init__()
        places = torch.arange(self.SIDE, dtype=torch.float64)
        waves = torch.cos(torch.pi / self.SIDE * (places + 0.5) * places[:, None])
        waves, colours = F.normalize(waves, dim=1), F.normalize(torch.tensor(self.COLOURS, dtype=torch.float64), dim=1)
        counts = (self.SIDE, self.SLOW, self.SLOW)
        planes = [
            torch.einsum("c,ai,bj->abcij", colour, waves[:count], waves[:count]).flatten(0, 1)
            for colour, count in zip(colours, counts, strict=True)
        ]
        self.kernels: torch.Tensor
        self.register_buffer("kernels", torch.cat(planes).float(), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, 3, H, W) -> (N, 24, H / 2, W / 2), rounded down; beyond the edges pixels are 0."""
        return F.conv2d(images, self.kernels, stride=self.STRIDE, padding=1)


class Residual(nn.Sequential):
    """Layers, and a way past them: gives the sum of what goes in and what they make of it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Any float tensor whose shape the layers keep -> the same shape."""
        changed = images
        for layer in self:
            changed = layer(changed)
        return images + changed


def activation_layer(name: Activation, inplace: bool = True) -> nn.Module:
    """The layer of a name; a ReLU may change its input in place where no gradient needs that."""
    return nn.ReLU(inplace=inplace) if name == "relu" else nn.Tanh()


def kernel_counts(counts: Iterable[int], width: float, crop: int, smallest: int) -> list[int]:
    """A network's kernel counts scaled by `width`, even so that they split into two towers; AlexprepError where its crop is too small."""
    if crop < smallest:
        raise AlexprepError(f"this network needs crops of at least {smallest} pixels, not {crop}")
    if not 1 / 16 <= width <= 16:
        raise AlexprepError(f"width {width} of this network is not within 1/16 to 16")
    return [2 * max(1, round(count / 2 * width)) for count in counts]


def initialised(
    layers: Iterable[tuple[str, nn.Module]],
    seed: int,
    deviations: Mapping[str, float],
    biases: Mapping[str, float] | None = None,
) -> nn.Sequential:
    """A network of named layers, every weight drawn from N(0, deviation²), every bias a constant.

    Args:
        layers: names and layers, in order; convolutions, linear and locally connected layers are drawn.
        seed: of a generator of its own: the same seed gives the same weights, whatever was drawn before.
        deviations: standard deviation by layer name.
        biases: what a layer's biases start at, by layer name; 0 for the others.
    """
    network = nn.Sequential(OrderedDict(layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, LocallyConnected2d)):
                layer.weight.normal_(0.0, deviations[name], generator=generator)
                if layer.bias is not None:
                    layer.bias.fill_((biases or {}).get(name, 0.0))
    return network


def begin_as_identity(convolution: nn.Conv2d) -> None:
    """Has the first kernels of a convolution hand on its maps unchanged, as many as there are of both; the others stay as they were drawn.

    What goes in comes out from the first step on, however deep a network is (K. Jordan, arXiv 2404.00498, section 3.2). These kernels are as
    long as drawn ones are on average, so that the rate turns all of them alike.
    """
    weight = convolution.weight
    with torch.no_grad():
        length = float(weight.flatten(1).norm(dim=1).mean())
        kernels = min(weight.shape[:2])
        weight[:kernels] = length * nn.init.dirac_(torch.empty_like(weight[:kernels]))


# The arithmetic of response normalisation: b = a · s^-beta with s = k + alpha · (sum of a² over a window), and its gradient.


@dataclass(frozen=True)
class MapWindow:
    """What a value is normalised by: its map and `reach` neighbours on either side; maps beyond the ends of a tower count nothing.

    Neighbours are mutual, so the same sum over them carries gradients back.
    """

    reach: int
    towers: int = 1

    def sum_into(self, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes the sum over each value's neighbours, itself among them, into `out`, and returns it."""
        out.copy_(values)
        for given, summed in zip(values.chunk(self.towers, dim=1), out.chunk(self.towers, dim=1), strict=True):
            _add_neighbours(given, summed, 1, self.reach)
        return out

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The same as a new tensor, by operations that a compiler can join with those around them."""
        images, maps, *side = values.shape
        maps //= self.towers
        padded = F.pad(values.reshape(images, self.towers, maps, *side), (0, 0, 0, 0, self.reach, self.reach))
        total = padded.narrow(2, 0, maps)
        for first in range(1, 2 * self.reach + 1):
            total = total + padded.narrow(2, first, maps)
        return total.flatten(1, 2)


@dataclass(frozen=True)
class PixelWindow:
    """Likewise: a pixel and those up to `reach` away in both directions, of the same map; pixels beyond the edge count nothing."""

    reach: int

    def sum_into(self, values: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """See `MapWindow`."""
        if values.device.type != "cpu":
            return out.copy_(self.sum(values))
        rows = _add_neighbours(values, values.clone(), 3, self.reach)
        return _add_neighbours(rows, out.copy_(rows), 2, self.reach)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """See `MapWindow`; one kernel, which on a CPU takes four times as long as `sum_into`."""
        side = 2 * self.reach + 1
        if torch.compiler.is_exporting():  # ONNX has no other divisor, and its exporter would leave this one out
            return F.avg_pool2d(values, side, 1, self.reach) * side**2
        return F.avg_pool2d(values, side, 1, self.reach, divisor_override=1)


def normalised(
    images: torch.Tensor, window: MapWindow | PixelWindow, k: float, alpha: float, beta: float
) -> torch.Tensor:
    """Float (N, C, H, W) -> the same shape, dtype and memory format; so is the gradient."""
    if torch.compiler.is_compiling():  # which makes one pass of all this by itself, and its gradient
        values = images.to(_wide(images.dtype))
        scale = window.sum(values * values) * alpha + k
        root = scale.rsqrt()
        return (values * (root * root.sqrt() if beta == 0.75 else scale.pow(-beta))).to(images.dtype)
    result: torch.Tensor
    if images.is_cuda and isinstance(window, MapWindow) and images.dtype in _IN_KERNELS and cuda_kernels.HERE:
        result = cuda_kernels.ResponseNorm.apply(images, window.reach, window.towers, k, alpha, beta)  # type: ignore[no-untyped-call]
    else:
        result = _ResponseNorm.apply(images, window, k, alpha, beta)  # type: ignore[no-untyped-call]
    return result


class _ResponseNorm(torch.autograd.Function):
    """Forward and gradient: compiled, or with some elementary passes each a few images at a time; one intermediate is saved."""

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, window: MapWindow | PixelWindow, k: float, alpha: float, beta: float
    ) -> torch.Tensor:
        normalised, scale = torch.empty_like(images), torch.empty_like(images, dtype=_wide(images.dtype))
        ctx.window, ctx.alpha, ctx.beta, ctx.compiled = window, alpha, beta, None
        if isinstance(window, MapWindow) and beta == 0.75:
            ctx.compiled = cpu_kernels.fitting(images, window.towers)
        if ctx.compiled is not None:
            ctx.compiled.normalise(images, ctx.window.towers, ctx.window.reach, k, alpha, normalised, scale)
        else:
            for given, out, s in _chunks(images, normalised, scale):
                a = given.to(s.dtype)
                b = out if out.dtype == s.dtype else torch.empty_like(s)
                window.sum_into(a * a, s).mul_(alpha).add_(k)
                _inverse_power(s, beta, b).mul_(a)
                if b is not out:
                    out.copy_(b)
        ctx.save_for_backward(images, normalised, scale)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = 2 * ctx.alpha * ctx.beta
        if ctx.compiled is not None:  # of saved tensors, too, other hooks of torch's may have changed the strides
            each = [one.contiguous(memory_format=torch.channels_last) for one in (*ctx.saved_tensors, gradients[0])]
            result = torch.empty_like(each[0])
            ctx.compiled.differentiate(*each, ctx.window.towers, ctx.window.reach, factor, result)
            return result, None, None, None, None
        images, normalised, scale = ctx.saved_tensors
        result = torch.empty_like(images)
        for s, *others, out in _chunks(scale, images, normalised, gradients[0], result):
            a, b, gradient = (other.to(s.dtype) for other in others)
            # d/da_j: g_j · s_j^-beta - 2 · alpha · beta · a_j · sum over the window of g_i · b_i / s_i
            g = out if out.dtype == s.dtype else torch.empty_like(s)
            _inverse_power(s, ctx.beta, g).mul_(gradient)
            crossed = torch.empty_like(a)
            ctx.window.sum_into((gradient * b).div_(s), crossed).mul_(a).mul_(factor)
            g.sub_(crossed)
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
    if scale.device.type != "cpu":
        return torch.sqrt(root, out=out).mul_(root)
    np.sqrt(root.numpy(), out=out.numpy())  # correctly rounded, which torch's is not on every processor
    return out.mul_(root)


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


def _check_norm(size: int, k: float, alpha: float, beta: float) -> None:
    if size < 1 or size % 2 == 0:
        raise AlexprepError(f"a response norm's window is {size}: it must be odd, so that it has a middle")
    if not (k > 0 and alpha >= 0 and beta >= 0):
        raise AlexprepError(f"a response norm needs k above 0, alpha and beta of at least 0, not {k}, {alpha}, {beta}")
