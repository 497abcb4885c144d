"""The DALI pipelines: orders and draws as data, four deeds in numpy and in DALI, and a `Loader` for torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexprep.pipeline.augment import Augmentation
    from alexprep.pipeline.loader import Batch, Loader

__all__ = ["Augmentation", "Batch", "Loader"]

_HOMES = {"Augmentation": "augment", "Batch": "loader", "Loader": "loader"}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for: DALI and torch take seconds to import, the numpy parts do not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
