"""What the DataLoaders of benchmarks/modern_recipe.py share: labelled files, mixup of whole batches, and their turns. No alexprep."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants.serve import BATCH, serve
from torch.utils.data import DataLoader, Dataset

EPOCHS = 64  # in one, so that the workers need not start anew while they are timed
ALPHA = 0.2
COLOURS = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
SIMCLR = (0.8, 0.8, 0.8, 0.2)


class Files(Dataset[tuple[torch.Tensor, int]]):
    """Class folders of images, `EPOCHS` times over, each file given to one function."""

    def __init__(self, folder: str, load: Callable[[str], torch.Tensor]) -> None:
        """Lists the files."""
        classes = sorted(path for path in (Path(folder) / "files").iterdir())
        self.samples = [(str(file), label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
        self.load = load

    def __len__(self) -> int:
        """Of all epochs."""
        return EPOCHS * len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """An image as it is loaded, and its label."""
        file, label = self.samples[index % len(self.samples)]
        return self.load(file), label


def mixup(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One weight a batch, each image with the one before it: as torchvision's v2.MixUp does it."""
    weight = float(torch.distributions.Beta(ALPHA, ALPHA).sample(()))
    other = images.roll(1, 0).mul_(1 - weight)
    return other.add_(images.mul(weight)), labels, labels.roll(1, 0)


def take_turns(
    folder: str, load: Callable[[str], torch.Tensor], mixes: bool, work: str, packages: tuple[str, ...]
) -> None:
    """Serves batches of one worker."""
    torch.set_num_threads(1)
    form: dict[str, Any] = {"shuffle": True, "drop_last": True, "num_workers": 1, "prefetch_factor": 1}
    loader = DataLoader(Files(folder, load), BATCH, **form)
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    def step() -> torch.Tensor:
        images, labels = next(batches)
        return mixup(images, labels)[0] if mixes else images

    serve(step, f"{work}; float32", (*packages, "torch"))
