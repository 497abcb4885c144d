"""timm's transforms in the variants of benchmarks/modern_recipe.py; they are over Pillow images."""

from __future__ import annotations

import sys
from typing import Any

import torch
from contestants.modern_files import COLOURS, SIMCLR, take_turns
from contestants.modern_torchvision import named, prepare_torchvision
from contestants.serve import SIDE
from PIL import Image


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns; `variant` is RECIPE-timm."""
    prepare_torchvision()
    from timm.data import create_transform

    recipe = variant.partition("-")[0]
    recipes: dict[str, dict[str, Any]] = {
        "plain": {"color_jitter": None},
        # By default each operation has a chance of one half, and strengths end at 10: two are done, at 3 of 10 for the paper's 9 of 30.
        "rand": {"color_jitter": None, "auto_augment": "rand-m3-n2-p1"},
        "jitter": {"color_jitter": COLOURS},
        "simclr": {"color_jitter": SIMCLR, "color_jitter_prob": 0.8, "grayscale_prob": 0.2, "gaussian_blur_prob": 0.5},
    }
    transform = create_transform(SIDE, is_training=True, interpolation="bilinear", **recipes[recipe])

    def load(file: str) -> torch.Tensor:
        with Image.open(file) as image:
            made: torch.Tensor = transform(image.convert("RGB"))
        return made

    mixes = recipe in ("rand", "jitter")
    take_turns(folder, load, mixes, named(transform) + ", mixup of a batch" * mixes, ("timm", "torchvision", "pillow"))


if __name__ == "__main__":
    main(*sys.argv[1:])
