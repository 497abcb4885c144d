"""AlexNet and its training: networks, the paper's update rule, the loop, checkpoints, evaluation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexprep.train.lr_schedule import ByHand, DExp, EarlyStop, Plateau, Steps
    from alexprep.train.models.layers import Scale
    from alexprep.train.recipes import RECIPES, Recipe, recipe

__all__ = ["RECIPES", "ByHand", "DExp", "EarlyStop", "Plateau", "Recipe", "Scale", "Steps", "recipe"]

_HOMES = {
    "lr_schedule": ("ByHand", "DExp", "EarlyStop", "Plateau", "Steps"),
    "models.layers": ("Scale",),
    "recipes": ("RECIPES", "Recipe", "recipe"),
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
