"""The paper's networks for CIFAR-10: two convolutions, two locally connected layers, a linear one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.models.layers import LocalResponseNorm, initialise
from alexprep.train.networks.local import LocallyConnected2d
from alexprep.train.networks.small import kernel_counts, pooled_up

Activation = Literal["relu", "tanh"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}

# cuda-convnet's example-layers/layers-conv-local-13pct.cfg, and -11pct.cfg. The input is on the 0-255 scale.
DEVIATIONS = {"conv1": 1e-4, "conv2": 1e-2, "local3": 0.04, "local4": 0.04, "fc5": 0.01}


@dataclass(frozen=True)
class ConvLocal:
    """A four-layer network of section 3.3 with its switches; called as a `NetworkFactory`.

    Attributes:
        name: as `describe` tells it.
        activation: of all hidden layers: "relu", or "tanh", to which section 3.1 compares it.
        norm: response normalisation over 9 maps after the first pool and before the second, with a third layer twice as wide:
            cuda-convnet's "11 %" net; without, its "13 %" net.

    Raises:
        AlexprepError: there is no such activation.
    """

    name: str
    activation: Activation = "relu"
    norm: bool = False

    def __post_init__(self) -> None:
        """Refuses other activations, with AlexprepError."""
        if self.activation not in get_args(Activation):
            raise AlexprepError(f"activation {self.activation!r} is not one of {', '.join(get_args(Activation))}")

    def describe(self) -> dict[str, Any]:
        """The switches, as JSON values."""
        return asdict(self)

    def __call__(self, classes: int, crop: int = 24, *, seed: int = 0, width: float = 1.0) -> nn.Sequential:
        """The network with its initial weights.

        Pools are 3 wide at stride 2 and rounded up, as in the code: 24 -> 12 -> 6. The activation stands after the first pool instead
        of before it: both rise, so the result is the same, from a quarter of the values.

        Args:
            classes: outputs of the last layer.
            crop: side of the input, pixels; 24 there.
            seed: of the initial weights.
            width: scales the kernels of every layer but the last.

        Returns:
            A network from float32 (N, 3, crop, crop), mean subtracted, on the 0-255 scale, to logits (N, classes).

        Raises:
            AlexprepError: crop or width is too small.

        >>> sum(weight.numel() for weight in ConvLocal("conv-local-13pct")(10).parameters())
        1116490
        """
        c1, c2, l3, l4 = kernel_counts((64, 64, 64 if self.norm else 32, 32), width, crop, smallest=8)
        side = pooled_up(pooled_up(crop))
        inplace = {"inplace": True} if self.activation == "relu" else {}
        active = ACTIVATIONS[self.activation]
        layers: list[tuple[str, nn.Module]] = [
            ("conv1", nn.Conv2d(3, c1, 5, padding=2)),
            ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
            ("act1", active(**inplace)),
            *([("norm1", _norm())] if self.norm else []),
            ("conv2", nn.Conv2d(c1, c2, 5, padding=2)),
            ("act2", active(**inplace)),
            *([("norm2", _norm())] if self.norm else []),
            ("pool2", nn.MaxPool2d(3, 2, ceil_mode=True)),
            ("local3", LocallyConnected2d(c2, l3, (side, side), 3, padding=1)),
            ("act3", active(**inplace)),
            ("local4", LocallyConnected2d(l3, l4, (side, side), 3, padding=1)),
            ("act4", active(**inplace)),
            ("flatten", nn.Flatten()),
            ("fc5", nn.Linear(l4 * side * side, classes)),
        ]
        network = nn.Sequential(OrderedDict(layers))
        initialise(network, seed, DEVIATIONS)
        return network


def _norm() -> LocalResponseNorm:
    """Type cmrnorm there: size 9, scale 0.001, which its parser divides by the size, pow 0.75, and its k of 1."""
    return LocalResponseNorm(size=9, k=1.0, alpha=0.001 / 9, beta=0.75)


conv_local_13pct = ConvLocal("conv-local-13pct")
conv_local_13pct_tanh = ConvLocal("conv-local-13pct-tanh", activation="tanh")
conv_local_11pct = ConvLocal("conv-local-11pct", norm=True)
