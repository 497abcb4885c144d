"""Networks for small images: the nets for CIFAR-10 of the paper and of its code, a residual one that learns it in minutes, and one that learns toy
data sets in seconds.

Each is called with the number of classes; `crop`, the side of the input in pixels; the `seed` of its initial weights; and `width`, which
scales the kernels of every layer but the last. It is then a network from float32 (N, 3, crop, crop), mean subtracted, on the 0-255 scale,
to logits (N, classes). A crop or width that is too small is refused with AlexprepError. Pools are 3 wide at stride 2 and rounded up, as in
cuda-convnet: 32 -> 16 -> 8 -> 4; those of `cifar10_fast_net` are 2 wide.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from alexprep.shards.errors import one_of, whole_number
from alexprep.train.field_values import BEFORE, Activation
from alexprep.train.lazy_module import LazyModule

if TYPE_CHECKING:
    from torch import nn

    from alexprep.train.models import layers as ours
else:
    nn, ours = LazyModule("torch.nn"), LazyModule("alexprep.train.models.layers")

# Of the initial weights: cuda-convnet's example-layers/layers-80sec.cfg; the first layer is tiny because its input is on the 0-255 scale.
QUICK_DEVIATIONS = {"conv1": 1e-4, "conv2": 1e-2, "conv3": 1e-2, "fc4": 0.1, "fc5": 0.1}
# cuda-convnet's example-layers/layers-conv-local-13pct.cfg, and -11pct.cfg.
DEVIATIONS = {"conv1": 1e-4, "conv2": 1e-2, "local3": 0.04, "local4": 0.04, "fc5": 0.01}
PIXEL_DEVIATION = 64.0  # about that of a photograph on the 0-255 scale, mean subtracted


def cifar10_quick_net(classes: int, crop: int = 32, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
    """The "26 %" net that came with cuda-convnet: three 5x5 convolutions, one max and two average pools, two linear layers.

    >>> sum(parameter.numel() for parameter in cifar10_quick_net(10).parameters())
    145578
    """
    c1, c2, c3, f4 = ours.kernel_counts((32, 32, 64, 64), width, crop, smallest=8)
    side = _pooled_up(_pooled_up(_pooled_up(crop)))
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, c1, 5, padding=2)),
        ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
        ("relu1", nn.ReLU(inplace=True)),  # after the pool, as there: the same result from a quarter of the values
        ("conv2", nn.Conv2d(c1, c2, 5, padding=2)),
        ("relu2", nn.ReLU(inplace=True)),
        ("pool2", nn.AvgPool2d(3, 2, ceil_mode=True)),
        ("conv3", nn.Conv2d(c2, c3, 5, padding=2)),
        ("relu3", nn.ReLU(inplace=True)),
        ("pool3", nn.AvgPool2d(3, 2, ceil_mode=True)),
        ("flatten", nn.Flatten()),
        ("fc4", nn.Linear(c3 * side * side, f4)),
        ("relu4", nn.ReLU(inplace=True)),
        ("fc5", nn.Linear(f4, classes)),
    ]
    return ours.initialised(layers, seed, QUICK_DEVIATIONS)


def cifar10_fast_net(classes: int, crop: int = 28, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
    """A residual net that learns CIFAR-10 in minutes of a CPU: four convolutions with batch normalisation and GELU, one of them with a way past.

    Of the nets of K. Jordan's airbench (arXiv 2404.00498) it has the whitened first layer that is not trained, convolutions that begin as the
    identity, a last pool over all pixels, and small logits. Its first layer halves the resolution, which saves three quarters of the arithmetic.
    The input may be on any scale.

    >>> sum(parameter.numel() for parameter in cifar10_fast_net(10).parameters())
    362720
    """
    c1, c2, c3 = ours.kernel_counts((48, 128, 128), width, crop, smallest=8)
    layers: list[tuple[str, nn.Module]] = [
        ("waves", ours.PatchWaves()),
        ("norm0", nn.BatchNorm2d(ours.PatchWaves.MAPS, affine=False)),
        *_normalised("1", ours.PatchWaves.MAPS, c1),
        ("pool1", nn.MaxPool2d(2)),
        *_normalised("2", c1, c2),
        ("residual3", ours.Residual(OrderedDict(_normalised("3", c2, c2)))),
        ("pool3", nn.MaxPool2d(2)),
        *_normalised("4", c2, c3),
        ("pool4", nn.AdaptiveMaxPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc5", nn.Linear(c3, classes, bias=False)),
        ("scale", ours.Scale(1 / 8)),
    ]
    inputs = {"conv1": 9 * ours.PatchWaves.MAPS, "conv2": 9 * c1, "residual3.conv3": 9 * c2, "conv4": 9 * c2, "fc5": c3}
    network = ours.initialised(layers, seed, {name: (3 * count) ** -0.5 for name, count in inputs.items()})
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            ours.begin_as_identity(layer)
    return network


def tiny_net(classes: int, crop: int = 56, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
    """AlexNet's building blocks in small: a strided and a grouped convolution, response norm, overlapping pools."""
    c1, c2, c3, f4 = ours.kernel_counts((32, 64, 64, 128), width, crop, smallest=16)
    side = _pooled_up(_pooled_up(_pooled_up((crop - 1) // 2 + 1)))
    layers: list[tuple[str, nn.Module]] = [
        ("scale", ours.Scale(1 / PIXEL_DEVIATION)),
        ("conv1", nn.Conv2d(3, c1, 5, stride=2, padding=2)),
        ("relu1", nn.ReLU(inplace=True)),
        ("norm1", ours.LocalResponseNorm()),
        ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
        ("conv2", ours.Conv2d(c1, c2, 3, padding=1, groups=2)),
        ("relu2", nn.ReLU(inplace=True)),
        ("pool2", nn.MaxPool2d(3, 2, ceil_mode=True)),
        ("conv3", nn.Conv2d(c2, c3, 3, padding=1)),
        ("relu3", nn.ReLU(inplace=True)),
        ("pool3", nn.MaxPool2d(3, 2, ceil_mode=True)),
        ("flatten", nn.Flatten()),
        ("fc4", nn.Linear(c3 * side * side, f4)),
        ("relu4", nn.ReLU(inplace=True)),
        ("fc5", nn.Linear(f4, classes)),
    ]
    # With these few layers and inputs near 1, sqrt(2 / inputs) keeps the size of activations through every ReLU. A tenth of it in the last layer has
    # all classes nearly equal at first: without it some seeds begin with a loss of 5 and end at twice the error of others.
    fans = {"conv1": 3 * 25, "conv2": c1 // 2 * 9, "conv3": c2 * 9, "fc4": c3 * side * side, "fc5": f4}
    deviations = {name: (2 / fan) ** 0.5 for name, fan in fans.items()}
    return ours.initialised(layers, seed, deviations | {"fc5": 0.1 * deviations["fc5"]})


@dataclass(frozen=True)
class ConvLocal:
    """A four-layer network of section 3.3 with its switches: two convolutions, two locally connected layers, a linear one.

    Attributes:
        name: as `describe` tells it.
        activation: of all hidden layers: "relu", or "tanh", to which section 3.1 compares it.
        norm: response normalisation over 9 maps after the first pool and before the second.
        local3: kernels of the third layer at each place. cuda-convnet's "13 %" net has no norms and 32, its "11 %" net norms and 64.

    Raises:
        AlexprepError: a switch has no such position.
    """

    name: str
    activation: Activation = "relu"
    norm: bool = False
    local3: int = field(default=32, metadata={BEFORE: lambda told: 64 if told.get("norm") else 32})  # `norm` meant both

    def __post_init__(self) -> None:
        """Refuses positions that a switch does not have, with AlexprepError."""
        one_of("activation", self.activation, get_args(Activation))
        whole_number("local3", self.local3, 1, 65_536)

    def describe(self) -> dict[str, Any]:
        """The switches, part of a run's identity."""
        return asdict(self)

    def __call__(self, classes: int, crop: int = 24, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
        """The network with its initial weights.

        The activation stands after the first pool instead of before it: both rise, so the result is the same, from a quarter of the values.

        >>> sum(weight.numel() for weight in ConvLocal("conv-local-13pct")(10).parameters())
        1116490
        """
        c1, c2, l3, l4 = ours.kernel_counts((64, 64, self.local3, 32), width, crop, smallest=8)
        side = _pooled_up(_pooled_up(crop))
        layers: list[tuple[str, nn.Module]] = [
            ("conv1", nn.Conv2d(3, c1, 5, padding=2)),
            ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
            ("act1", ours.activation_layer(self.activation)),
            *([("norm1", _norm())] if self.norm else []),
            ("conv2", nn.Conv2d(c1, c2, 5, padding=2)),
            ("act2", ours.activation_layer(self.activation)),
            *([("norm2", _norm())] if self.norm else []),
            ("pool2", nn.MaxPool2d(3, 2, ceil_mode=True)),
            ("local3", ours.LocallyConnected2d(c2, l3, side, 3)),
            ("act3", ours.activation_layer(self.activation)),
            ("local4", ours.LocallyConnected2d(l3, l4, side, 3)),
            ("act4", ours.activation_layer(self.activation)),
            ("flatten", nn.Flatten()),
            ("fc5", nn.Linear(l4 * side * side, classes)),
        ]
        return ours.initialised(layers, seed, DEVIATIONS)


conv_local_13pct = ConvLocal("conv-local-13pct")
conv_local_13pct_tanh = ConvLocal("conv-local-13pct-tanh", activation="tanh")
conv_local_11pct = ConvLocal("conv-local-11pct", norm=True, local3=64)


def _normalised(number: str, maps_in: int, maps_out: int) -> list[tuple[str, nn.Module]]:
    """A 3x3 convolution, batch normalisation and GELU."""
    return [
        (f"conv{number}", nn.Conv2d(maps_in, maps_out, 3, padding=1, bias=False)),
        (f"norm{number}", nn.BatchNorm2d(maps_out)),
        (f"act{number}", nn.GELU()),
    ]


def _norm() -> ours.LocalResponseNorm:
    """Type cmrnorm there: size 9, scale 0.001, which its parser divides by the size, pow 0.75, and its k of 1."""
    return ours.LocalResponseNorm(size=9, k=1.0, alpha=0.001 / 9, beta=0.75)


def _pooled_up(side: int) -> int:
    """The side of a map after pooling 3 wide at stride 2, rounded up."""
    return -(-(side - 3) // 2) + 1
