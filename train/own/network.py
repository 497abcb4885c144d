"""Networks and recipes of the user's own: functions in any form that a stranger would write, made to fit."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train import user_code
from alexprep.train.own.tryout import check_network, dry_run, shape_of_images
from alexprep.train.recipes.recipe import Recipe

MODEL, RECIPE = "--model", "--recipe"
CLASSES = ("classes", "num_classes", "n_classes")  # names under which factories take the number of classes
BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
FORMS = "a factory is called as make(classes) or make(classes, crop), and gets seed and width where it has them"


@dataclass(frozen=True)
class OwnNetwork:
    """A user's factory as a `NetworkFactory`: called in the form that it has, and its network tried before anyone relies on it.

    Attributes:
        factory: a function or class; see `arguments` for its forms.
        title: MODULE:NAME.
        said: how it was named, for messages.
        folder: of the user's code; None for an installed library.
        adapt: whether the recipe was made for another network, so that what it says of single layers may be of no effect.
    """

    factory: Callable[..., Any]
    title: str
    said: str
    folder: Path | None = None
    adapt: bool = False

    def __call__(self, classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
        """The network, with initial weights that depend on the seed alone; torch's random numbers go on as if it had not been made.

        Raises:
            AlexprepError: the factory cannot be called so or fails, or what it returns is no network from (N, 3, crop, crop) to finite
                logits (N, classes).
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            with self.blamed():
                positional, named = arguments(self.factory, classes, crop, seed, width)
                network = self.factory(*positional, **named)
                check_network(network)
            with self.blamed(f", shown images {shape_of_images(crop)}"):
                dry_run(network, classes, crop)
        return network  # type: ignore[no-any-return]

    def describe(self) -> dict[str, Any]:
        """What a resumed run must have in common: the factory's name, and what it tells of itself."""
        own = getattr(self.factory, "describe", None)
        return {"factory": self.title} | ({} if own is None or inspect.isclass(self.factory) else {"options": own()})

    @contextlib.contextmanager
    def blamed(self, when: str = "", only: bool = False) -> Iterator[None]:
        """See `alexprep.train.user_code.blamed`."""
        with user_code.blamed(f"{self.said}{when}", self.folder, only):
            yield


def own_network(reference: str) -> OwnNetwork:
    """The factory that `--model` names: FILE.py:FUNCTION or MODULE:FUNCTION.

    Raises:
        AlexprepError: there is none.
    """
    found = user_code.load(reference, MODEL, "make")
    if not callable(found.value) or isinstance(found.value, nn.Module):
        raise AlexprepError(
            f"{MODEL} {reference}: {found.title} is a {type(found.value).__name__}, not a function: {FORMS}"
        )
    return OwnNetwork(found.value, found.title, f"{MODEL} {reference}", found.folder, adapt=True)


def own_recipe(reference: str) -> Recipe:
    """The recipe that a user's function returns: FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION.

    Raises:
        AlexprepError: there is no such function, or it returns no `Recipe` that a run can begin with.
    """
    found = user_code.load(reference, RECIPE, "recipe")
    said = f"{RECIPE} {reference}"
    with user_code.blamed(said, found.folder):
        recipe = found.value() if callable(found.value) else found.value
    if not isinstance(recipe, Recipe):
        raise AlexprepError(
            f"{said}: {found.title} gives a {type(recipe).__name__}, not an alexprep.train.recipes.recipe.Recipe"
        )
    factory = recipe.network
    if not callable(factory) or isinstance(factory, nn.Module):
        raise AlexprepError(f"{said}: its network is a {type(factory).__name__}, not a function: {FORMS}")
    if not _is_alexpreps(factory):
        name = getattr(factory, "__qualname__", type(factory).__name__)
        recipe = replace(
            recipe,
            network=OwnNetwork(factory, f"{found.title.partition(':')[0]}:{name}", f"{said}: {name}", found.folder),
        )
    try:
        json.dumps(recipe.describe(), allow_nan=False)
    except (TypeError, ValueError, AttributeError) as error:
        raise AlexprepError(
            f"{said}: what a run has to remember of the recipe cannot be written as JSON ({error}): use plain numbers and texts, and a "
            "frozen dataclass for a schedule of your own"
        ) from error
    return recipe


def arguments(
    factory: Callable[..., Any], classes: int, crop: int, seed: int, width: float
) -> tuple[list[Any], dict[str, Any]]:
    """What to call a factory with: positional and named arguments.

    Parameters called classes (num_classes, n_classes), crop and seed get what their names say, wherever they stand; width only where it
    has no default or the recipe scales its network. Where none is called so, the first other parameter gets the number of classes, and the
    next one, if it has no default, the crop. All others keep their defaults.

    Raises:
        AlexprepError: a parameter would be left without a value, or the recipe scales its network and the factory cannot.

    >>> arguments(lambda n: None, 10, 32, 0, 1.0), arguments(lambda n, side, depth=5: None, 10, 32, 0, 1.0)
    (([], {'n': 10}), ([], {'n': 10, 'side': 32}))
    >>> arguments(lambda *, num_classes=1000, seed: None, 10, 32, 7, 1.0)
    ([], {'num_classes': 10, 'seed': 7})
    """
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        raise AlexprepError(f"its parameters cannot be read: {FORMS}") from None
    known: dict[str, Any] = {**dict.fromkeys(CLASSES, classes), "crop": crop, "seed": seed, "width": width}
    names = {parameter.name for parameter in parameters}
    if width != 1 and "width" not in names:
        raise AlexprepError(f"the recipe scales its network by {width}, and the factory has no parameter called width")
    free = [parameter for parameter in parameters if parameter.kind in BY_POSITION and parameter.name not in known]
    values = {parameter.name: known[parameter.name] for parameter in parameters if parameter.name in known}
    if free and not names & set(CLASSES):
        values[free.pop(0).name] = classes
    if free and "crop" not in names and free[0].default is Parameter.empty:
        values[free[0].name] = crop
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in parameters:
        default = parameter.default
        if parameter.kind is Parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is Parameter.VAR_KEYWORD:
            if not values:
                named["num_classes"] = classes  # as torchvision's factories take it
        elif parameter.name not in values and default is Parameter.empty:
            raise AlexprepError(f"it has a parameter {parameter.name!r} without a default, which nobody fills: {FORMS}")
        elif parameter.kind is Parameter.POSITIONAL_ONLY:
            positional.append(values.get(parameter.name, default))
        elif parameter.name in values and not (
            parameter.name == "width" and width == 1 and default is not Parameter.empty
        ):
            named[parameter.name] = values[parameter.name]
    return positional, named


def _is_alexpreps(factory: Any) -> bool:
    """Whether alexprep's own code defines it, which has the full form and tells all of itself."""
    module: str = getattr(factory, "__module__", None) or ""
    return module.partition(".")[0] == "alexprep"
