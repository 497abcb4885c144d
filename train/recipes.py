"""The recipes by name, and the one for trying things out."""

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
from alexprep.train.cifar_recipes import cifar10_11pct, cifar10_13pct, cifar10_quick, cifar10_relu, cifar10_tanh
from alexprep.train.recipe import NetworkFactory, Recipe
from alexprep.train.schedule import Steps
from alexprep.train.small_networks import tiny_net

__all__ = ["RECIPES", "NetworkFactory", "Recipe", "alexnet", "recipe_named"]


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
    "cifar10-13pct": cifar10_13pct,
    "cifar10-11pct": cifar10_11pct,
    "cifar10-relu": cifar10_relu,
    "cifar10-tanh": cifar10_tanh,
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
