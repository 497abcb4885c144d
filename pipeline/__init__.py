"""Loads shards into a training: batches for torch by DALI or plain torch, and the single parts for a pipeline of one's own.

Everything public is importable from here and nowhere deeper. Names are loaded when they are first asked for: DALI and torch take seconds
to import, the numpy parts do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alexprep.pipeline.augmentation import PRESETS, Augmentation, Draws, Hook, augment, draw, noise_stdevs
    from alexprep.pipeline.batch import Batch, MixedBatch
    from alexprep.pipeline.colour import Blur, Jitter
    from alexprep.pipeline.dali_ops import (
        colour_noise,
        decode_crop,
        decode_window,
        mirror,
        resize,
        resize_square,
        subtract_mean_window,
        to_tensor,
    )
    from alexprep.pipeline.dali_reader import label, reader
    from alexprep.pipeline.device import choose_device
    from alexprep.pipeline.geometry import Affine, Elastic, Erasing
    from alexprep.pipeline.loader import Loader
    from alexprep.pipeline.loader_settings import Tuning, tuning_for
    from alexprep.pipeline.mixing import Mixing
    from alexprep.pipeline.policies import RandAugment, TrivialAugment
    from alexprep.pipeline.sampler import block_order, epoch_order, shuffle_quality, stream_order
    from alexprep.pipeline.wds_pipeline import webdataset_pipeline

__all__ = [
    "PRESETS",
    "Affine",
    "Augmentation",
    "Batch",
    "Blur",
    "Draws",
    "Elastic",
    "Erasing",
    "Hook",
    "Jitter",
    "Loader",
    "MixedBatch",
    "Mixing",
    "RandAugment",
    "TrivialAugment",
    "Tuning",
    "augment",
    "block_order",
    "choose_device",
    "colour_noise",
    "decode_crop",
    "decode_window",
    "draw",
    "epoch_order",
    "label",
    "mirror",
    "noise_stdevs",
    "reader",
    "resize",
    "resize_square",
    "shuffle_quality",
    "stream_order",
    "subtract_mean_window",
    "to_tensor",
    "tuning_for",
    "webdataset_pipeline",
]

_HOMES = {
    "augmentation": ("PRESETS", "Augmentation", "Draws", "Hook", "augment", "draw", "noise_stdevs"),
    "batch": ("Batch", "MixedBatch"),
    "colour": ("Blur", "Jitter"),
    "dali_ops": (
        "colour_noise",
        "decode_crop",
        "decode_window",
        "mirror",
        "resize",
        "resize_square",
        "subtract_mean_window",
        "to_tensor",
    ),
    "dali_reader": ("label", "reader"),
    "device": ("choose_device",),
    "geometry": ("Affine", "Elastic", "Erasing"),
    "loader": ("Loader",),
    "loader_settings": ("Tuning", "tuning_for"),
    "mixing": ("Mixing",),
    "policies": ("RandAugment", "TrivialAugment"),
    "sampler": ("block_order", "epoch_order", "shuffle_quality", "stream_order"),
    "wds_pipeline": ("webdataset_pipeline",),
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
