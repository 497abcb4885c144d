"""What nets from a line of text are made of beside torch's layers: a scaled tanh, LeNet's subsampling, maps that see some of those below."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ScaledTanh(nn.Module):
    """1.7159 · tanh(2x / 3): 1 at 1, -1 at -1, its second derivative largest there (LeCun et al. 1998, appendix A)."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any float tensor -> the same shape."""
        return torch.tanh(values * (2 / 3)) * 1.7159


class Subsampling(nn.Module):
    """The mean of each rectangle, times a learned number of the map's own, plus a learned bias: layers S2 and S4 of LeNet-5."""

    def __init__(self, maps: int, size: tuple[int, int]) -> None:
        """For so many maps and rectangles of height and width; it begins as the plain mean."""
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(maps))
        self.bias = nn.Parameter(torch.zeros(maps))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> (N, C, H / height, W / width)."""
        means = F.avg_pool2d(images, self.size)
        return means * self.weight[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        """The rectangle, for print(network)."""
        return f"{len(self.weight)}, size={self.size}"


class TableConv2d(nn.Conv2d):
    """A convolution whose maps see some of the maps below: weights of the others are 0 and stay so."""

    def __init__(self, table: list[list[int]], maps_in: int, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        """`table` lists of each map which maps below it sees."""
        super().__init__(maps_in, len(table), kernel, stride)
        mask = torch.zeros(len(table), maps_in, 1, 1)
        for number, seen in enumerate(table):
            mask[number, seen] = 1
        self.mask: torch.Tensor
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, C, H, W) -> (N, maps, H', W')."""
        return F.conv2d(images, self.weight * self.mask, self.bias, self.stride)
