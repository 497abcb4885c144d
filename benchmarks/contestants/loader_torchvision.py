"""torchvision's ImageFolder over the same JPEG files, its usual transforms (Pillow), in a torch DataLoader."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from contestants.serve import BATCH, SIDE, serve

EPOCHS = 64  # in one, so that the workers need not start anew while they are timed
WORK = (
    "whole image decoded by Pillow, RandomCrop or RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize (channel means, scale 0-1); "
    "float32, channels first in memory; a true permutation"
)


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns."""
    from torchvision import datasets, transforms

    mean = [value / 255 for value in json.loads((Path(folder) / "facts.json").read_text())["mean"]]
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE) if variant.endswith("resized") else transforms.RandomCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, [1.0, 1.0, 1.0]),
        ]
    )
    images = datasets.ImageFolder(str(Path(folder) / "files"), transform)
    dataset: torch.utils.data.ConcatDataset[tuple[torch.Tensor, int]] = torch.utils.data.ConcatDataset(
        [images] * EPOCHS
    )
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=int(threads), persistent_workers=True
    )
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    serve(lambda: next(batches)[0], WORK, ("torchvision", "pillow", "torch"))


if __name__ == "__main__":
    main(*sys.argv[1:])
