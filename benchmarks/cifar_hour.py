"""The paper's two CIFAR-10 nets, 13 % and 11 %, in at most an hour on two cores instead of their 520 epochs: recipes for `alexprep train`.

alexprep train --data DATA --recipe benchmarks/cifar_hour.py:thirteen --precision bf16
alexprep eval thirteen --recipe benchmarks/cifar_hour.py:thirteen --views ten
"""

from __future__ import annotations

from dataclasses import replace

from alexprep.train.recipes.recipe import Recipe
from alexprep.train.recipes.registry import recipe_named
from alexprep.train.recipes.schedule import Steps


def thirteen() -> Recipe:
    """Without normalisation."""
    return replace(recipe_named("cifar10-13pct"), name="thirteen", lr=0.002, schedule=Steps(after=(72, 84)), epochs=90)


def eleven() -> Recipe:
    """With it."""
    return replace(recipe_named("cifar10-11pct"), name="eleven", lr=0.002, schedule=Steps(after=(37, 42)), epochs=45)
