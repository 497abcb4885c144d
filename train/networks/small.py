"""Two networks for small images: cuda-convnet's fast CIFAR-10 net, and one that learns toy sets in seconds."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.models.layers import LocalResponseNorm, Scale, initialise

# cuda-convnet's example-layers/layers-80sec.cfg; the first layer is tiny because its input is on the 0-255 scale.
QUICK_DEVIATIONS = {"conv1": 1e-4, "conv2": 1e-2, "conv3": 1e-2, "fc4": 0.1, "fc5": 0.1}
PIXEL_DEVIATION = 64.0  # about that of a photograph on the 0-255 scale, mean subtracted


def cifar10_quick_net(classes: int, crop: int = 32, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
    """The "26 %" net that came with cuda-convnet: three 5x5 convolutions, one max and two average pools, two linear layers.

    Pools are 3 wide at stride 2 and rounded up, as there: 32 -> 16 -> 8 -> 4.

    Args:
        classes: outputs of the last layer.
        crop: side of the input, pixels.
        seed: of the initial weights.
        width: scales the kernels of every layer but the last.

    Returns:
        A network from float32 (N, 3, crop, crop), mean subtracted, on the 0-255 scale, to logits (N, classes).

    Raises:
        AlexprepError: crop or width is too small.

    >>> sum(parameter.numel() for parameter in cifar10_quick_net(10).parameters())
    145578
    """
    c1, c2, c3, f4 = kernel_counts((32, 32, 64, 64), width, crop, smallest=8)
    side = pooled_up(pooled_up(pooled_up(crop)))
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
    network = nn.Sequential(OrderedDict(layers))
    initialise(network, seed, QUICK_DEVIATIONS)
    return network


def tiny_net(classes: int, crop: int = 56, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
    """AlexNet's building blocks in small: a strided and a grouped convolution, response norm, overlapping pools.

    Args:
        classes: outputs of the last layer.
        crop: side of the input, pixels.
        seed: of the initial weights.
        width: scales the kernels of every layer but the last.

    Returns:
        A network from float32 (N, 3, crop, crop), mean subtracted, on the 0-255 scale, to logits (N, classes).

    Raises:
        AlexprepError: crop or width is too small.
    """
    c1, c2, c3, f4 = kernel_counts((32, 64, 64, 128), width, crop, smallest=16)
    side = pooled_up(pooled_up(pooled_up((crop - 1) // 2 + 1)))
    layers: list[tuple[str, nn.Module]] = [
        ("scale", Scale(1 / PIXEL_DEVIATION)),
        ("conv1", nn.Conv2d(3, c1, 5, stride=2, padding=2)),
        ("relu1", nn.ReLU(inplace=True)),
        ("norm1", LocalResponseNorm()),
        ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
        ("conv2", nn.Conv2d(c1, c2, 3, padding=1, groups=2)),
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
    network = nn.Sequential(OrderedDict(layers))
    # With these few layers and inputs near 1, sqrt(2 / inputs) keeps the size of activations through every ReLU.
    fans = {"conv1": 3 * 25, "conv2": c1 // 2 * 9, "conv3": c2 * 9, "fc4": c3 * side * side, "fc5": f4}
    initialise(network, seed, {name: (2 / fan) ** 0.5 for name, fan in fans.items()})
    return network


def kernel_counts(counts: tuple[int, ...], width: float, crop: int, smallest: int) -> list[int]:
    """Kernel counts scaled by `width`, even so that they split into two towers."""
    if crop < smallest:
        raise AlexprepError(f"this network needs crops of at least {smallest} pixels, not {crop}")
    if not 1 / 16 <= width <= 16:
        raise AlexprepError(f"width {width} of this network is not within 1/16 to 16")
    return [2 * max(1, round(count / 2 * width)) for count in counts]


def pooled_up(side: int) -> int:
    """The side of a map after pooling 3 wide at stride 2, rounded up."""
    return -(-(side - 3) // 2) + 1
