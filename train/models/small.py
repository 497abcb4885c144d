"""A small network with a switch for each idea that docs/ablations.md measures, for pictures of about 28 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from alexprep.shards.errors import one_of, whole_number
from alexprep.train.field_values import Activation, Pool
from alexprep.train.lazy_module import LazyModule

if TYPE_CHECKING:
    from torch import nn

    from alexprep.train.models import layers as ours
    from alexprep.train.models import pools_and_dropconnect as pools
else:
    nn, ours, pools = map(
        LazyModule, ("torch.nn", "alexprep.train.models.layers", "alexprep.train.models.pools_and_dropconnect")
    )

PIXELS = 1 / 64  # about one over the deviation of a photograph's pixels
Dropped = Literal["none", "units", "weights"]


@dataclass(frozen=True)
class SmallNet:
    """Two convolutions, each with a pool, and two linear layers, with switches; called, it makes the network with its initial weights.

    Attributes:
        activation: of all hidden layers: "relu" or "tanh".
        norm: whether response normalisation over 5 maps follows both activations (section 3.3 of the paper).
        pool: "max", "average", "l2" (the root of the sum of squares) or "stochastic" (arXiv 1301.3557).
        pool_size: side of the pools' windows, at stride 2: 3 overlap (section 3.4), 2 do not.
        dropout: what the hidden linear layer forgets in training, with probability 0.5: "none", its "units" (dropout, section 4.2), or its
            "weights" (DropConnect).

    Raises:
        AlexprepError: a switch has no such position.

    >>> sum(weight.numel() for weight in SmallNet()(10, 28).parameters())
    355818
    """

    activation: Activation = "relu"
    norm: bool = False
    pool: Pool = "max"
    pool_size: int = 3
    dropout: Dropped = "none"

    def __post_init__(self) -> None:
        """Refuses positions that a switch does not have, with AlexprepError."""
        one_of("activation", self.activation, get_args(Activation))
        one_of("pool", self.pool, get_args(Pool))
        one_of("dropout", self.dropout, get_args(Dropped))
        whole_number("pool_size", self.pool_size, 2, 3)

    def describe(self) -> dict[str, Any]:
        """The switches, part of a run's identity."""
        return {"name": "small-net", **asdict(self)}

    def __call__(
        self, classes: int, crop: int = 28, *, seed: int = 0, width: float = 1.0, in_channels: int = 3
    ) -> nn.Sequential:
        """The network from float32 (N, in_channels, crop, crop), mean subtracted, on the 0-255 scale, to logits (N, classes).

        Args:
            classes: outputs of the last layer.
            crop: side of the input, pixels, at least 8.
            seed: of the initial weights, which are normal with deviation sqrt(2 / inputs) (He et al. 2015).
            width: scales the kernels of every layer but the last.
            in_channels: of the input.

        Raises:
            AlexprepError: crop or width is too small.
        """
        c1, c2, f3 = ours.kernel_counts((32, 64, 96), width, crop, smallest=8)
        side = pools.pooled_up(pools.pooled_up(crop, self.pool_size, 2), self.pool_size, 2)
        values = c2 * side * side
        linear = pools.DropConnect if self.dropout == "weights" else nn.Linear
        layers: list[tuple[str, nn.Module]] = [
            ("scale", ours.Scale(PIXELS)),
            ("conv1", nn.Conv2d(in_channels, c1, 5, padding=2)),
            *self._then(1),
            ("conv2", nn.Conv2d(c1, c2, 5, padding=2)),
            *self._then(2),
            ("flatten", nn.Flatten()),
            ("fc3", linear(values, f3)),
            ("act3", ours.activation_layer(self.activation)),
            *([("drop3", ours.PaperDropout())] if self.dropout == "units" else []),
            ("fc4", nn.Linear(f3, classes)),
        ]
        fans = {"conv1": in_channels * 25, "conv2": c1 * 25, "fc3": values, "fc4": f3}
        return ours.initialised(layers, seed, {name: (2 / fan) ** 0.5 for name, fan in fans.items()})

    def _then(self, number: int) -> Iterator[tuple[str, nn.Module]]:
        """What follows a convolution."""
        # A pool's or a norm's gradient may need its input as it came.
        yield f"act{number}", ours.activation_layer(self.activation)
        if self.norm:
            yield f"norm{number}", ours.LocalResponseNorm()
        yield f"pool{number}", pools.pool_layer(self.pool, self.pool_size, 2)


small_net = SmallNet()
