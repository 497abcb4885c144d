"""The DALI pipelines: orders and draws as data, the deeds in numpy and in DALI, and a `Loader` for torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexprep.pipeline.augmentation import PRESETS, Augmentation, Draws, draw
    from alexprep.pipeline.dali_ops import (
        colour_noise,
        decode_crop,
        decode_window,
        mirror,
        resize_square,
        subtract_mean_window,
        to_tensor,
    )
    from alexprep.pipeline.loader import Batch, Loader
    from alexprep.pipeline.loader_settings import Tuning, tuning_for
    from alexprep.pipeline.sampler import block_order, epoch_order, shuffle_quality

__all__ = [
    "PRESETS",
    "Augmentation",
    "Batch",
    "Draws",
    "Loader",
    "Tuning",
    "block_order",
    "colour_noise",
    "decode_crop",
    "decode_window",
    "draw",
    "epoch_order",
    "mirror",
    "resize_square",
    "shuffle_quality",
    "subtract_mean_window",
    "to_tensor",
    "tuning_for",
]

_HOMES = {
    "augmentation": ("PRESETS", "Augmentation", "Draws", "draw"),
    "dali_ops": (
        *("colour_noise", "decode_crop", "decode_window", "mirror", "resize_square", "subtract_mean_window"),
        "to_tensor",
    ),
    "loader": ("Batch", "Loader"),
    "sampler": ("block_order", "epoch_order", "shuffle_quality"),
    "loader_settings": ("Tuning", "tuning_for"),
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for: DALI and torch take seconds to import, the numpy parts do not."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
