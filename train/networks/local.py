"""Locally connected layers: convolutions whose kernels are others at every position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from alexprep.shards.errors import whole_number

MOST = 2**15  # pixels; keeps every number here far from overflow


class LocallyConnected2d(nn.Module):
    """A layer that looks at windows as a convolution does, with weights and biases of its own at every position.

    Of such are the third and fourth layer of the paper's CIFAR-10 nets (section 3.3, footnote 3; type "local" in the 2012 code). A copy
    of all windows and one product a position take a third of the time that `torch.nn.functional.unfold` takes on a CPU.

    Attributes:
        weight: float32 (rows, columns, kernel_size, kernel_size, in_channels, out_channels): row and column of the output, then row and
            column of the window.
        bias: float32 (out_channels, rows, columns).

    >>> layer = LocallyConnected2d(8, 6, (12, 10), kernel_size=3, padding=1)
    >>> tuple(layer(torch.zeros(2, 8, 12, 10)).shape), layer.weight.numel() == 12 * 10 * 3 * 3 * 8 * 6
    ((2, 6, 12, 10), True)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: tuple[int, int],
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        """Weights are drawn as torch draws a convolution's: uniformly within ± 1 / sqrt(values in a window). Biases are 0.

        Args:
            in_channels: maps of the input.
            out_channels: maps of the output.
            input_size: height and width of the input, pixels.
            kernel_size: side of a window, pixels.
            stride: from a window to the next, pixels.
            padding: zeros on every side of the input, pixels.

        Raises:
            AlexprepError: a number is out of its range, or the window is larger than the padded input.
        """
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("stride", stride)):
            whole_number(name, value, 1, MOST)
        whole_number("padding", padding, 0, MOST)
        for name, value in zip(("height", "width"), input_size, strict=True):
            whole_number(name, value, 1, MOST)
        whole_number("kernel_size", kernel_size, 1, min(input_size) + 2 * padding)
        self.in_channels, self.out_channels, self.input_size = in_channels, out_channels, input_size
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        rows, columns = ((side + 2 * padding - kernel_size) // stride + 1 for side in input_size)
        bound = (in_channels * kernel_size**2) ** -0.5
        weight = torch.empty(rows, columns, kernel_size, kernel_size, in_channels, out_channels)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_channels, rows, columns))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Float (N, in_channels, height, width) -> (N, out_channels, rows, columns); in memory, the maps of an image lie together."""
        rows, columns = self.weight.shape[:2]
        down, right = (rows - 1) * self.stride + 1, (columns - 1) * self.stride + 1
        pixels = F.pad(images, (self.padding,) * 4).permute(2, 3, 0, 1)  # height, width, images, maps
        offsets = [(i, j) for i in range(self.kernel_size) for j in range(self.kernel_size)]
        seen = [pixels[i : i + down : self.stride, j : j + right : self.stride] for i, j in offsets]
        windows = torch.cat(seen, dim=3).flatten(0, 1)  # positions, images, values of a window
        products = torch.bmm(windows, self.weight.flatten(2, 4).flatten(0, 1))
        return products.view(rows, columns, len(images), self.out_channels).permute(2, 3, 0, 1) + self.bias

    def extra_repr(self) -> str:
        """The numbers, for print(network)."""
        first = f"{self.in_channels}, {self.out_channels}, {self.input_size}, kernel_size={self.kernel_size}"
        return f"{first}, stride={self.stride}, padding={self.padding}"
