"""Modules that are imported where they are first used: what only names networks and rules, such as the recipes, is read without torch's seconds."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """A module by its name, imported when something in it is first asked for. Type checkers are told of the real one, in `if TYPE_CHECKING`.

    >>> LazyModule("fractions").Fraction(1, 2)
    Fraction(1, 2)
    """

    def __getattr__(self, name: str) -> Any:
        """What the module has by that name."""
        return getattr(importlib.import_module(self.__name__), name)
