"""The AlexNet family: one class that makes each of its networks, with a switch for everything in which they differ.

A network is whole here, on one device; `alexprep.train.distributed` splits it among ranks, `alexprep.train.recipes` says how it is trained.

        kernels     from           output       then
conv1   96 11x11/4  both           55x55x96     ReLU, response norm, pool
conv2   256 5x5     own tower      27x27x256    ReLU, response norm, pool
conv3   384 3x3     both           13x13x384    ReLU
conv4   384 3x3     own tower      13x13x384    ReLU
conv5   256 3x3     own tower      13x13x256    ReLU, pool
fc6     4096        both, 6x6x256               ReLU, dropout
fc7     4096        both                        ReLU, dropout
fc8     classes     both                        (softmax in the loss)

The two towers of section 3.2 are the two groups of grouped layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from alexprep.shards.errors import AlexprepError, number_within, one_of
from alexprep.train.field_values import Activation
from alexprep.train.lazy_module import LazyModule

if TYPE_CHECKING:
    from torch import nn

    from alexprep.train.models import layers as ours
else:
    nn, ours = LazyModule("torch.nn"), LazyModule("alexprep.train.models.layers")

SMALLEST_CROP = 67  # below it nothing is left after the third pool
BIASES = dict.fromkeys(("conv2", "conv4", "conv5", "conv6", "fc6", "fc7"), 1.0)  # section 5; the others start at 0
DEVIATION = 0.01  # section 5, and in the 2012 code for the layers that `middle_deviation` does not govern
MIDDLE = ("conv3", "conv4", "conv5", "conv6")
Step = Literal["relu", "norm", "spatial", "pool"]  # what may follow a convolution
Removable = Literal["conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]  # conv1 alone takes images, fc8 gives the classes


@dataclass(frozen=True)
class AlexNet:
    """A network of the family; calling it makes one with its initial weights. The defaults are the paper's.

    Attributes:
        name: of the network.
        kernels: of conv1 to conv5, all towers together (section 3.5).
        hidden: neurons of fc6 and fc7.
        towers: 2: conv2, conv4 and conv5 see the maps of their own half only, and so do the norms (section 3.2); 1: one column.
        then1: what follows conv1, in this order: words of "relu", "norm" (across maps), "spatial" (within a map), "pool".
        then2: what follows conv2.
        then5: what follows conv5.
        norm_alpha: of the norms across maps, not divided by their window of 5 (section 3.3).
        norm_k: likewise.
        pool: side of the pools' windows, at stride 2: 3 overlap (section 3.4), 2 do not.
        middle_deviation: of the initial weights of conv3 to conv6.
        last_bias: what fc8's biases start at.
        sixth: whether conv6 follows the last pool: as many kernels as conv5 has, 3 wide, fed by all towers (section 6 mentions it,
            layers-146-2011.cfg defines it).
        without: layers that are left out, of conv2 to conv5, fc6 and fc7, with the ReLU, the norms or the dropout that follow each; pools
            stay. Section 7: without a middle layer the error rises by about 2 points.
        activation: of all hidden layers: "relu" (section 3.1), or "tanh" in its place.
        norm: whether the norms are there; False leaves them out of `then1`, `then2` and `then5` (section 3.3: 1.4 and 1.2 points).
        dropout: whether fc6 and fc7 have it (section 4.2: without, "substantial overfitting").

    Raises:
        AlexprepError: a switch has no such position.

    >>> sum(parameter.numel() for parameter in AlexNet()(1000).parameters())
    60965224
    """

    name: str = "alexnet"
    kernels: tuple[int, int, int, int, int] = (96, 256, 384, 384, 256)
    hidden: tuple[int, int] = (4096, 4096)
    towers: int = 2
    then1: tuple[Step, ...] = ("relu", "norm", "pool")
    then2: tuple[Step, ...] = ("relu", "norm", "pool")
    then5: tuple[Step, ...] = ("relu", "pool")
    norm_alpha: float = 1e-4
    norm_k: float = 2.0
    pool: int = 3
    middle_deviation: float = DEVIATION
    last_bias: float = 0.0
    sixth: bool = False
    without: tuple[Removable, ...] = ()
    activation: Activation = "relu"
    norm: bool = True
    dropout: bool = True

    def __post_init__(self) -> None:
        """Refuses positions that a switch does not have, with AlexprepError."""
        for field in ("then1", "then2", "then5"):
            words = getattr(self, field)
            if "pool" not in words or len(set(words)) != len(words) or not set(words) <= set(get_args(Step)):
                raise AlexprepError(
                    f"{field} is {words}: a pool, and each other of {', '.join(get_args(Step))} at most once"
                )
        if self.towers not in (1, 2) or self.pool not in (2, 3):
            raise AlexprepError(f"AlexNet has 1 or 2 towers and pools 2 or 3 wide, not {self.towers} and {self.pool}")
        for layer in self.without:
            one_of("AlexNet without", layer, get_args(Removable))
        one_of("activation", self.activation, get_args(Activation))
        for name, low, high in (("norm_alpha", 0, 1e3), ("norm_k", 1e-9, 1e9), ("middle_deviation", 0, 1e3)):
            number_within(name, getattr(self, name), low, high)

    def __call__(self, classes: int, crop: int = 224, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
        """The network with its initial weights.

        Args:
            classes: outputs of fc8.
            crop: side of the input, pixels; 224 in the paper, any side from 67 works.
            seed: of the initial weights.
            width: scales the kernels of every layer but the last, to even numbers; 1 is the network itself.

        Returns:
            A network from float32 (N, 3, crop, crop), mean subtracted, on the 0-255 scale, to logits (N, classes).

        Raises:
            AlexprepError: crop or width is too small.
        """
        deviations = defaultdict(lambda: DEVIATION, dict.fromkeys(MIDDLE, self.middle_deviation))
        return ours.initialised(self._layers(classes, crop, width), seed, deviations, BIASES | {"fc8": self.last_bias})

    def describe(self) -> dict[str, Any]:
        """Every switch, part of a run's identity."""
        return asdict(self)

    def _layers(self, classes: int, crop: int, width: float) -> Iterator[tuple[str, nn.Module]]:
        c1, c2, c3, c4, c5, f6, f7 = ours.kernel_counts((*self.kernels, *self.hidden), width, crop, SMALLEST_CROP)
        # The 2012 code rounds the number of filter positions up: 224 pixels under an 11-pixel filter at stride 4 give 55, not 54, since the
        # last one hangs over the right and the bottom edge.
        overhang = -(crop - 11) % 4
        side = (crop + overhang - 11) // 4 + 1
        for _ in range(3):
            side = (side - self.pool) // 2 + 1
        yield "overhang1", nn.ZeroPad2d((0, overhang, 0, overhang))
        yield "conv1", ours.Conv2d(3, c1, 11, stride=4)
        yield from self._then(1, self.then1)
        maps = c1
        layers: tuple[tuple[int, int, int, int, tuple[Step, ...]], ...] = (
            (2, c2, 5, self.towers, self.then2),
            (3, c3, 3, 1, ("relu",)),
            (4, c4, 3, self.towers, ("relu",)),
            (5, c5, 3, self.towers, self.then5),
        )
        for number, kernels, side_of_filter, towers, then in layers:
            there = f"conv{number}" not in self.without
            if there:
                padding = side_of_filter // 2
                yield f"conv{number}", ours.Conv2d(maps, kernels, side_of_filter, padding=padding, groups=towers)
                maps = kernels
            yield from self._then(number, then if there else _pools(then))
        if self.sixth:
            yield "conv6", ours.Conv2d(maps, c5, 3, padding=1)
            # relu6 follows fc6, which keeps its name in every network.
            yield "conv6_relu", ours.activation_layer(self.activation)
            maps = c5
        yield "flatten", nn.Flatten()
        values = maps * side * side
        for number, neurons in ((6, f6), (7, f7)):
            if f"fc{number}" not in self.without:
                yield f"fc{number}", nn.Linear(values, neurons)
                yield f"relu{number}", ours.activation_layer(self.activation)
                if self.dropout:
                    yield f"drop{number}", ours.PaperDropout()
                values = neurons
        yield "fc8", nn.Linear(values, classes)

    def _then(self, number: int, words: tuple[Step, ...]) -> Iterator[tuple[str, nn.Module]]:
        """What follows a convolution, each named by its word and the convolution's number."""
        words = tuple(word for word in words if self.norm or word not in ("norm", "spatial"))
        for before, word in zip(("", *words), words, strict=False):
            layer: nn.Module
            if word == "relu":
                # A norm's gradient needs its output.
                layer = ours.activation_layer(self.activation, inplace=before not in ("norm", "spatial"))
            elif word == "norm":
                layer = ours.LocalResponseNorm(self.towers, k=self.norm_k, alpha=self.norm_alpha)
            elif word == "spatial":
                layer = ours.SpatialResponseNorm()
            else:
                layer = nn.MaxPool2d(self.pool, 2)
            yield f"{word}{number}", layer


def _pools(words: tuple[Step, ...]) -> tuple[Step, ...]:
    """What stays of a layer that is left out."""
    return tuple(word for word in words if word == "pool")


alexnet = AlexNet()

# Net #145 of the released code (layers-145.cfg, layer-params-145.cfg), the one whose error the paper's Table 2 gives as "1 CNN".
alexnet_2012 = AlexNet(
    name="alexnet-2012",
    then1=("norm", "pool", "relu"),
    then2=("relu", "norm", "spatial", "pool"),
    then5=("pool", "relu"),
    norm_alpha=1e-4 / 5,
    middle_deviation=0.03,
)

# Footnote 2 of the paper: one column, but conv5 and the layers above it as wide as in two (layers-145-half.cfg has these numbers).
alexnet_1gpu = AlexNet(name="alexnet-1gpu", kernels=(48, 128, 192, 192, 256), towers=1)

# Net #146: #145 with conv6 (layers-146-2012-2011.cfg).
alexnet_6conv = replace(alexnet_2012, name="alexnet-6conv", sixth=True)

# cuda-convnet2's network for one GPU (layers-imagenet-1gpu.cfg), whose widths torchvision took over.
alexnet_owt = AlexNet(
    name="alexnet-owt",
    kernels=(64, 192, 384, 256, 256),
    towers=1,
    then1=("norm", "pool", "relu"),
    then5=("pool", "relu"),
    norm_alpha=1e-4 / 5,
    middle_deviation=0.03,
    last_bias=-7.0,
)
