"""The recipes by name, and the one for trying things out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.train.lr_schedule import Steps
from alexprep.train.models.cifar import tiny_net
from alexprep.train.own.network import MODEL, RECIPE, own_network, own_recipe
from alexprep.train.recipes.alexnet import (
    alexnet,
    alexnet_1gpu,
    alexnet_6conv,
    alexnet_6conv_tune,
    alexnet_2012,
    alexnet_owt,
)
from alexprep.train.recipes.cifar import cifar10_11pct, cifar10_13pct, cifar10_quick, cifar10_relu, cifar10_tanh
from alexprep.train.recipes.recipe import Recipe
from alexprep.train.user_code import is_reference, resolved

DEFAULT_RECIPE = "alexnet"


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
    """A recipe from the registry, or one of the user's own: FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION.

    Raises:
        AlexprepError: there is none of this name, or the user's code fails.

    >>> recipe_named("cifar10-quick").batch_size
    128
    """
    if is_reference(name):
        return own_recipe(name)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f", perhaps {near[0]} is meant" if near else ""
        raise AlexprepError(
            f"there is no recipe {name!r}{hint}: choose one of {', '.join(RECIPES)}; or FILE.py:FUNCTION, a recipe of your own"
        )
    return RECIPES[name]()


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """The recipe that options name, with their network, batch size and rate where they are not None.

    >>> recipe_of({"recipe": "tiny", "batch_size": 8, "lr": None}).batch_size
    8
    """
    recipe = recipe_named(options["recipe"] or DEFAULT_RECIPE)
    changes: dict[str, Any] = {name: options[name] for name in ("batch_size", "lr") if options[name] is not None}
    if options.get("model") is not None:
        changes["network"] = own_network(options["model"])
    return replace(recipe, **changes)


def references(recipe: str | None, model: str | None) -> tuple[str | None, str | None]:
    """What a user named as recipe and model, so that it means the same in any folder.

    Raises:
        AlexprepError: a file is named that is not there.
    """
    if recipe is not None and is_reference(recipe):
        recipe = resolved(recipe, RECIPE)
    return recipe, None if model is None else resolved(model, MODEL)


def check_named(began: Mapping[str, Any], recipe: str | None, model: str | None, run: Path) -> None:
    """Makes sure that the user names the code that a run was trained with: what a file on the disk names is never run by itself.

    Args:
        began: the options of the run, from its config.json.
        recipe: as the user names it now, or None.
        model: likewise.
        run: its folder, for the message.

    Raises:
        AlexprepError: the run was trained with code of the user's own, which is not named.
    """
    for option, then, now in ((RECIPE, began["recipe"], recipe), (MODEL, began.get("model"), model)):
        if then is not None and is_reference(then) and now is None:
            raise AlexprepError(
                f"{run} was trained with {option} {then}: add that to the command, or say where the file is now; code is only run "
                "where you name it"
            )
