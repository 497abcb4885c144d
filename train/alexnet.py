"""AlexNet as the paper has it, in one process: the two towers of section 3.2 are the two groups of grouped layers.

        kernels     from           output       then
conv1   96 11x11/4  both           55x55x96     ReLU, response norm, pool
conv2   256 5x5     own tower      27x27x256    ReLU, response norm, pool
conv3   384 3x3     both           13x13x384    ReLU
conv4   384 3x3     own tower      13x13x384    ReLU
conv5   256 3x3     own tower      13x13x256    ReLU, pool
fc6     4096        both, 6x6x256               ReLU, dropout
fc7     4096        both                        ReLU, dropout
fc8     classes     both                        (softmax in the loss)
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.layers import LocalResponseNorm, Overhang, PaperDropout, initialise

TOWERS = 2
KERNELS = {"conv1": 96, "conv2": 256, "conv3": 384, "conv4": 384, "conv5": 256, "fc6": 4096, "fc7": 4096}  # section 3.5
DEVIATION = 0.01  # section 5: every layer's weights
ONES = frozenset({"conv2", "conv4", "conv5", "fc6", "fc7"})  # section 5: biases that start at 1
SMALLEST_CROP = 67  # below it nothing is left after the third pool


def alexnet(classes: int, crop: int = 224, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
    """AlexNet with its initial weights.

    Args:
        classes: outputs of fc8.
        crop: side of the input, pixels; 224 in the paper, any side from 67 works.
        seed: of the initial weights.
        width: scales the kernels of every layer but the last; 1 is the paper's network.

    Returns:
        A network from float32 (N, 3, crop, crop), mean subtracted, on the 0-255 scale, to logits (N, classes).

    Raises:
        AlexprepError: crop or width is too small.

    >>> sum(parameter.numel() for parameter in alexnet(1000).parameters())
    60965224
    """
    if crop < SMALLEST_CROP:
        raise AlexprepError(
            f"AlexNet needs crops of at least {SMALLEST_CROP} pixels, not {crop}: train the recipe tiny"
        )
    if not 1 / 16 <= width <= 4:
        raise AlexprepError(f"width {width} of AlexNet is not within 1/16 to 4")
    kernels = {layer: TOWERS * max(1, round(count / TOWERS * width)) for layer, count in KERNELS.items()}
    c1, c2, c3, c4, c5, f6, f7 = kernels.values()
    side = _pooled(_pooled(_pooled(-(-(crop - 11) // 4) + 1)))
    layers: list[tuple[str, nn.Module]] = [
        ("overhang1", Overhang(crop, kernel=11, stride=4)),
        ("conv1", nn.Conv2d(3, c1, 11, stride=4)),
        ("relu1", nn.ReLU(inplace=True)),
        ("norm1", LocalResponseNorm(TOWERS)),
        ("pool1", nn.MaxPool2d(3, 2)),  # section 3.4: overlapping, 3 wide at stride 2
        ("conv2", nn.Conv2d(c1, c2, 5, padding=2, groups=TOWERS)),
        ("relu2", nn.ReLU(inplace=True)),
        ("norm2", LocalResponseNorm(TOWERS)),
        ("pool2", nn.MaxPool2d(3, 2)),
        ("conv3", nn.Conv2d(c2, c3, 3, padding=1)),
        ("relu3", nn.ReLU(inplace=True)),
        ("conv4", nn.Conv2d(c3, c4, 3, padding=1, groups=TOWERS)),
        ("relu4", nn.ReLU(inplace=True)),
        ("conv5", nn.Conv2d(c4, c5, 3, padding=1, groups=TOWERS)),
        ("relu5", nn.ReLU(inplace=True)),
        ("pool5", nn.MaxPool2d(3, 2)),
        ("flatten", nn.Flatten()),
        ("fc6", nn.Linear(c5 * side * side, f6)),
        ("relu6", nn.ReLU(inplace=True)),
        ("drop6", PaperDropout()),
        ("fc7", nn.Linear(f6, f7)),
        ("relu7", nn.ReLU(inplace=True)),
        ("drop7", PaperDropout()),
        ("fc8", nn.Linear(f7, classes)),
    ]
    network = nn.Sequential(OrderedDict(layers))
    initialise(network, seed, dict.fromkeys([*KERNELS, "fc8"], DEVIATION), ONES)
    return network


def _pooled(side: int) -> int:
    """The side of a map after pooling 3 wide at stride 2, without overhang."""
    return (side - 3) // 2 + 1
