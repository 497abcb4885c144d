"""Residual blocks with batch normalisation, and a recipe for them: alexprep train --recipe residual.py"""

from dataclasses import replace

import torch
from torch import nn

from alexprep.train import Recipe, Steps
from alexprep.train import recipe as recipe_named  # the one below has its name


class Block(nn.Module):
    """Two convolutions beside a way past them."""

    def __init__(self, maps: int) -> None:
        """As many maps go out as come in."""
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(maps, maps, 3, padding=1, bias=False), nn.BatchNorm2d(maps)
        self.conv2, self.norm2 = nn.Conv2d(maps, maps, 3, padding=1, bias=False), nn.BatchNorm2d(maps)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, maps, H, W) -> the same shape."""
        inner = torch.relu(self.norm1(self.conv1(images)))
        return torch.relu(images + self.norm2(self.conv2(inner)))


def make(classes: int, crop: int, *, seed: int, width: float) -> nn.Module:
    """The longest form of a factory; torch's generator is already seeded with `seed`."""
    maps = round(32 * width)
    stem = [nn.Conv2d(3, maps, 3, stride=2 if crop > 32 else 1, padding=1, bias=False), nn.BatchNorm2d(maps), nn.ReLU()]
    return nn.Sequential(
        *(*stem, Block(maps), nn.MaxPool2d(2), Block(maps)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(maps, classes)),
    )


def recipe() -> Recipe:
    """The recipe "tiny" with this network, and with rates that suit it."""
    return replace(
        recipe_named("tiny"), name="residual", network=make, lr=0.05, epochs=10, schedule=Steps(after=(6, 9))
    )
