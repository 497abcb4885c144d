"""What a recipe is: everything that decides a training's result but the data and the seed, as one frozen value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import nn

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.train.lr_schedule import Schedule, ScheduleState, describe
from alexprep.train.parameters import is_bias

MOST_EPOCHS = 100_000
_WHOLE = ("epochs", "batch_size")


class NetworkFactory(Protocol):
    """Makes a network with its initial weights: a function, or an object with switches and a `describe` that tells them."""

    def __call__(self, classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
        """A network from (N, 3, crop, crop) to (N, classes)."""


@dataclass(frozen=True)
class Recipe:
    """One way of training.

    Args:
        name: as on the command line.
        network: makes the network; a `NetworkFactory`. In a recipe file any form will do that `alexprep.train.own.network.arguments` knows.
        augmentation: crop side, mirror, mean, noise.
        stored_sizes: sides of stored images, pixels, that the recipe is meant for: from, to.
        schedule: of the learning rates, and perhaps of the end.
        epochs: at most.
        batch_size: images a step.
        lr: learning rate of the first epoch; the schedule may have layers begin at another.
        momentum: of the update rule.
        decay: weight decay of the layers that `layer_decay` does not name.
        layer_decay: weight decay by layer name.
        bias_decay: of the biases.
        bias_lr_factor: the biases' rate over the weights'.
        width: scales the network's kernels.

    Raises:
        AlexprepError: a number is out of its range; the message names it.
    """

    name: str
    network: Callable[..., nn.Module]
    augmentation: Augmentation
    stored_sizes: tuple[int, int]
    schedule: Schedule
    epochs: int
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    decay: float = 0.0005
    layer_decay: Mapping[str, float] = field(default_factory=dict)
    bias_decay: float = 0.0
    bias_lr_factor: float = 1.0
    width: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        bounds = {
            "epochs": (1, MOST_EPOCHS),
            "batch_size": (1, 1_000_000),
            "lr": (0, 100),
            "momentum": (0, 0.9999),
            "decay": (0, 1),
            "bias_decay": (0, 1),
            "bias_lr_factor": (0, 100),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            kind, words = (int, "a whole number") if name in _WHOLE else (int | float, "a number")
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise AlexprepError(
                    f"{name} is {value!r} in recipe {self.name}: it must be {words} within {low} to {high}"
                )
        low_size, high_size = self.stored_sizes
        if not self.crop <= low_size <= high_size:
            raise AlexprepError(f"recipe {self.name} cuts {self.crop} pixels out of stored sizes {self.stored_sizes}")

    @property
    def crop(self) -> int:
        """Side of the square that the network sees, pixels."""
        if self.augmentation.crop is None:
            raise AlexprepError(f"recipe {self.name} has no crop: a network needs images of one size")
        return self.augmentation.crop

    def make_network(self, classes: int, seed: int) -> nn.Module:
        """The network with its initial weights, on the CPU."""
        return self.network(classes, self.crop, seed=seed, width=self.width)

    def rates(self, parameters: Iterable[str], epoch: int, state: ScheduleState) -> dict[str, float]:
        """The learning rate of every parameter.

        Args:
            parameters: their names; those called `bias` in their layer are biases, all others weights.
            epoch: whole epochs done.
            state: of the schedule after them.
        """
        bases = {name: self.lr * (self.bias_lr_factor if is_bias(name) else 1) for name in parameters}
        return {name: self.schedule.rate(base, name, epoch, state) for name, base in bases.items()}

    def describe(self) -> dict[str, Any]:
        """Every field as JSON values: what a resumed run must have in common with the first part."""
        return {
            "name": self.name,
            "network": _describe_network(self.network),
            "width": self.width,
            "augmentation": json.loads(json.dumps(asdict(self.augmentation))),
            "schedule": describe(self.schedule),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "momentum": self.momentum,
            "decay": self.decay,
            "layer_decay": dict(self.layer_decay),
            "bias_decay": self.bias_decay,
            "bias_lr_factor": self.bias_lr_factor,
        }

    def check_size(self, stored: int) -> None:
        """Makes sure that images stored with side `stored` suit this recipe.

        Raises:
            AlexprepError: they do not; the message names a recipe that suits them, or the `--size` to shard with.
        """
        from alexprep.train.recipes.registry import RECIPES  # here, since the registry's recipes need this module

        low, high = self.stored_sizes
        if low <= stored <= high:
            return
        suitable = [
            name for name, make in RECIPES.items() if make().stored_sizes[0] <= stored <= make().stored_sizes[1]
        ]
        other = f"train with --recipe {suitable[0]}, or " if suitable else ""
        wanted = f"{low}" if low == high else f"{low} to {high}"
        raise AlexprepError(
            f"the stored images have a side of {stored} pixels, recipe {self.name} is for {wanted}: {other}shard again with --size {low}"
        )


def _describe_network(network: Callable[..., nn.Module]) -> Any:
    describe = getattr(network, "describe", None)
    return getattr(network, "__name__", type(network).__name__) if describe is None else describe()
