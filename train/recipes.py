"""Recipes: everything that decides a training's result but the data and the seed, as plain functions that return one frozen value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import nn

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.train.alexnet import alexnet as alexnet_network
from alexprep.train.schedule import Plateau, Schedule, Steps, describe
from alexprep.train.small_networks import cifar10_quick_net, tiny_net


class NetworkFactory(Protocol):
    """A function that makes a network with its initial weights."""

    __name__: str

    def __call__(self, classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
        """A network from (N, 3, crop, crop) to (N, classes)."""


@dataclass(frozen=True)
class Recipe:
    """One way of training.

    Args:
        name: as on the command line.
        network: makes the network.
        augmentation: crop side, mirror, mean, noise.
        stored_sizes: sides of stored images, pixels, that the recipe is meant for: from, to.
        schedule: when the rate falls.
        epochs: at most.
        batch_size: images a step.
        lr: learning rate of the first epoch.
        momentum: of the update rule.
        decay: weight decay of the layers that `layer_decay` does not name; biases have none.
        layer_decay: weight decay by layer name.
        bias_lr_factor: the biases' rate over the weights'.
        width: scales the network's kernels.

    Raises:
        AlexprepError: a number is out of its range; the message names it.
    """

    name: str
    network: NetworkFactory
    augmentation: Augmentation
    stored_sizes: tuple[int, int]
    schedule: Schedule
    epochs: int
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    decay: float = 0.0005
    layer_decay: Mapping[str, float] = field(default_factory=dict)
    bias_lr_factor: float = 1.0
    width: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        bounds = {
            "epochs": (1, 100_000),
            "batch_size": (1, 1_000_000),
            "lr": (0, 100),
            "momentum": (0, 0.9999),
            "decay": (0, 1),
            "bias_lr_factor": (0, 100),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise AlexprepError(f"{name} is {value} in recipe {self.name}: it must be within {low} to {high}")
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

    def describe(self) -> dict[str, Any]:
        """Every field as JSON values: what a resumed run must have in common with the first part."""
        return {
            "name": self.name,
            "network": self.network.__name__,
            "width": self.width,
            "augmentation": json.loads(json.dumps(asdict(self.augmentation))),
            "schedule": describe(self.schedule),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "momentum": self.momentum,
            "decay": self.decay,
            "layer_decay": dict(self.layer_decay),
            "bias_lr_factor": self.bias_lr_factor,
        }

    def check_size(self, stored: int) -> None:
        """Makes sure that images stored with side `stored` suit this recipe.

        Raises:
            AlexprepError: they do not; the message names a recipe that suits them, or the `--size` to shard with.
        """
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


def alexnet() -> Recipe:
    """The paper's: section 5 for the numbers, section 4.1 for the augmentation (the 2012 code's variants are in docs/)."""
    return Recipe(
        name="alexnet",
        network=alexnet_network,
        augmentation=Augmentation(crop=224, mirror=True, mean="crop", noise="eigenvalue", noise_sigma=0.1),
        stored_sizes=(256, 256),
        schedule=Plateau(),
        epochs=90,
    )


def cifar10_quick() -> Recipe:
    """cuda-convnet's fast CIFAR-10 net and its decays; mirrors, twice its rate and 15 epochs bring its 26 % error to 22 %.

    The original (layer-params-80sec.cfg) has no augmentation, rate 0.001, divided by 10 after 8 epochs.
    """
    return Recipe(
        name="cifar10-quick",
        network=cifar10_quick_net,
        augmentation=Augmentation(crop=32, mirror=True, mean="crop", noise="none"),
        stored_sizes=(32, 32),
        schedule=Steps(after=(12, 14)),
        epochs=15,
        lr=0.002,
        decay=0.004,
        layer_decay={"fc4": 0.03, "fc5": 0.03},
        bias_lr_factor=2.0,
    )


def tiny() -> Recipe:
    """For trying things out: images of about 64 pixels, a few classes, seconds an epoch on a laptop."""
    return Recipe(
        name="tiny",
        network=tiny_net,
        augmentation=Augmentation(crop=56, mirror=True, mean="crop", noise="eigenvalue", noise_sigma=0.1),
        stored_sizes=(56, 96),
        schedule=Steps(after=(9,)),
        epochs=12,
        batch_size=32,
        lr=0.02,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"alexnet": alexnet, "cifar10-quick": cifar10_quick, "tiny": tiny}


def recipe_named(name: str) -> Recipe:
    """A recipe from the registry.

    Raises:
        AlexprepError: there is none of this name.

    >>> recipe_named("cifar10-quick").batch_size
    128
    """
    if name not in RECIPES:
        raise AlexprepError(f"there is no recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
