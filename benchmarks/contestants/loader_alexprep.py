"""alexprep's Loader, in the variants of benchmarks/loader.py."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from contestants.serve import BATCH, SIDE, serve

from alexprep.pipeline import Augmentation, Loader

_PAPER = Augmentation(crop=SIDE)
_CHANNEL = Augmentation(crop=SIDE, mean="channel", noise="none")
_NOTHING = Augmentation(crop=SIDE, mean="none", noise="none")
_RESIZED = Augmentation(crop=SIDE, scale=(0.08, 1.0), mean="imagenet", std="imagenet", noise="none")
_LAST: dict[str, Any] = {"memory_format": "channels_last"}
_PAPER_WORK = "crop decoded, mirror, mean image at the crop's window, one colour shift an image"
VARIANTS: dict[str, tuple[str, Augmentation, dict[str, Any], str]] = {  # data set, augmentation, form, work
    "full": ("jpg", _PAPER, _LAST, f"{_PAPER_WORK}; float32"),
    "full-nchw": ("jpg", _PAPER, {"memory_format": "NCHW"}, f"{_PAPER_WORK}; float32, channels first in memory"),
    "half": ("jpg", _PAPER, _LAST | {"dtype": "float16"}, f"{_PAPER_WORK}; float16"),
    "channel": ("jpg", _CHANNEL, _LAST, "crop decoded, mirror, channel means; float32"),
    "resized": ("jpg", _RESIZED, _LAST, "window of 8 to 100 % decoded, resized, mirror, means, deviations; float32"),
    "uint8": ("jpg", _NOTHING, _LAST | {"dtype": "uint8"}, "crop decoded, mirror; uint8"),
    "raw": ("raw", _CHANNEL, _LAST, "stored pixels: crop, mirror, channel means; float32"),
}


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns with one variant."""
    data, augmentation, form, work = VARIANTS[variant]
    loader = Loader(
        Path(folder) / data,
        batch_size=BATCH,
        augmentation=augmentation,
        device=device,
        threads=int(threads),
        **form,
    )
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    order = "a true permutation of each epoch"
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    serve(lambda: next(batches).images, f"{work}; {order}", ("torch", "nvidia-dali-cuda120", "numpy"), finish)


if __name__ == "__main__":
    main(*sys.argv[1:])
