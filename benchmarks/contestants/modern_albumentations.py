"""albumentations over OpenCV images, in the variants of benchmarks/modern_recipe.py; it has no RandAugment."""

from __future__ import annotations

import sys

import torch
from contestants.modern_files import take_turns
from contestants.serve import SIDE


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns."""
    import albumentations as A  # type: ignore[import-not-found]
    import cv2  # type: ignore[import-not-found]
    from albumentations.pytorch import ToTensorV2  # type: ignore[import-not-found]

    cv2.setNumThreads(1)
    recipe = variant.partition("-")[0]
    added = {
        "plain": [],
        "jitter": [A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=1)],
        "simclr": [
            A.ColorJitter((0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2), p=0.8),
            *(A.ToGray(p=0.2), A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5)),
        ],
    }[recipe]
    crop = A.RandomResizedCrop((SIDE, SIDE), interpolation=cv2.INTER_AREA)
    transform = A.Compose([crop, A.HorizontalFlip(), *added, A.Normalize(), ToTensorV2()])

    def load(file: str) -> torch.Tensor:
        image: torch.Tensor = transform(image=cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB))["image"]
        return image

    names = ", ".join(type(each).__name__ for each in transform.transforms)
    mixes = recipe == "jitter"
    take_turns(folder, load, mixes, names + ", mixup of a batch" * mixes, ("albumentations", "opencv-python-headless"))


if __name__ == "__main__":
    main(*sys.argv[1:])
