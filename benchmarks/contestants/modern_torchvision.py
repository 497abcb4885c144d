"""torchvision's v2 transforms over Pillow images, in the variants of benchmarks/modern_recipe.py."""

from __future__ import annotations

import sys

import torch
from contestants.modern_files import take_turns
from contestants.serve import SIDE
from PIL import Image

# Beside a torch for CPUs its compiled operators do not load, of which transforms need none; it wants to know of these two.
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _OPERATORS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns."""
    from torchvision.transforms import v2

    jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    added = {
        "plain": [],
        "rand": [v2.RandAugment()],
        "jitter": [v2.ColorJitter(0.4, 0.4, 0.4, 0.1)],
        "simclr": [jitter, v2.RandomGrayscale(0.2), v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5)],
    }[variant]
    transform = v2.Compose(
        [
            *(v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip(), *added),
            *(v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def load(file: str) -> torch.Tensor:
        with Image.open(file) as image:
            made: torch.Tensor = transform(image.convert("RGB"))
        return made

    names = ", ".join(type(each).__name__ for each in transform.transforms)
    mixes = variant in ("rand", "jitter")
    take_turns(folder, load, mixes, names + ", MixUp of a batch" * mixes, ("torchvision", "pillow"))


if __name__ == "__main__":
    main(*sys.argv[1:])
