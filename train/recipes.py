"""The recipes by name, and those for small images."""

from __future__ import annotations

from collections.abc import Callable

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.train.alexnet_recipes import (
    alexnet,
    alexnet_1gpu,
    alexnet_6conv,
    alexnet_6conv_tune,
    alexnet_2012,
    alexnet_owt,
)
from alexprep.train.recipe import NetworkFactory, Recipe
from alexprep.train.schedule import Steps
from alexprep.train.small_networks import cifar10_quick_net, tiny_net

__all__ = ["RECIPES", "NetworkFactory", "Recipe", "alexnet", "recipe_named"]


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


RECIPES: dict[str, Callable[[], Recipe]] = {
    "alexnet": alexnet,
    "alexnet-2012": alexnet_2012,
    "alexnet-1gpu": alexnet_1gpu,
    "alexnet-6conv": alexnet_6conv,
    "alexnet-6conv-tune": alexnet_6conv_tune,
    "alexnet-owt": alexnet_owt,
    "cifar10-quick": cifar10_quick,
    "tiny": tiny,
}


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
