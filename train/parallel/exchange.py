"""Modules that a rank's part of a network has and the whole network has not: gather, take, and dropout as the whole network draws it.

Dimension 0 is the rows (images) of a batch, dimension 1 the maps or units of a layer; each may be split over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.distributed.world import World
from alexprep.train.parallel.collectives import gathered, scattered_sum


class Rows:
    """How the rows of the present batch are split: set before each step, read by the modules."""

    def __init__(self, ranks: int) -> None:
        """No rows yet."""
        self.sizes = [0] * ranks


class Gather(nn.Module):
    """This rank's part of a layer's values -> the values of all ranks, on every rank.

    The gradient of what a rank reads is only its share, so the shares are added up on the way back and each rank gets its part of the
    sum. Where every rank goes on to compute the same (`replicated`: the loss), each has the whole gradient and takes its part.
    """

    def __init__(
        self, layer: str, dim: int, sizes: Sequence[int] | Rows, world: World, *, replicated: bool = False
    ) -> None:
        """Before the layer of this name, along `dim`, where the ranks have `sizes`."""
        super().__init__()
        self.layer, self.dim, self.world, self.replicated = layer, dim, world, replicated
        self._sizes = sizes

    @property
    def sizes(self) -> list[int]:
        """Of every rank's part, now."""
        return self._sizes.sizes if isinstance(self._sizes, Rows) else list(self._sizes)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(…, part, …) -> (…, whole, …), in the memory format that came in."""
        sizes = self.sizes
        if values.shape[self.dim] != sizes[self.world.rank]:
            raise AlexprepError(
                f"before {self.layer}: {values.shape[self.dim]} rows where {sizes[self.world.rank]} were announced: "
                "take batches from Parallel.batches"
            )
        kind = values.device.type
        if values.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            values = values.to(torch.get_autocast_dtype(kind))  # as the layer that reads them would do
        joined: torch.Tensor = _Gather.apply(values, self, sizes)  # type: ignore[no-untyped-call]
        if values.ndim == 4 and not values.is_contiguous():
            joined = joined.contiguous(memory_format=torch.channels_last)
        return joined

    def extra_repr(self) -> str:
        """For print(network)."""
        return f"before={self.layer}, dim={self.dim}, replicated={self.replicated}"


class Take(nn.Module):
    """All maps -> this rank's: of a layer that every rank computes whole, or of the input."""

    def __init__(self, sizes: Sequence[int], world: World) -> None:
        """Where the ranks have `sizes` maps."""
        super().__init__()
        self.first, self.count = sum(sizes[: world.rank]), sizes[world.rank]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(N, C, …) -> (N, part of C, …)."""
        return values.narrow(1, self.first, self.count)


class WholeDraw(nn.Module):
    """A dropout layer that draws for the whole batch and all units, as one device does, and uses this rank's part.

    With the default generators of all ranks in the same state, masks are those of one device, and the generators stay in step. A rank
    draws R times what it needs: for AlexNet at batch 128 a million numbers a step in all.
    """

    def __init__(self, layer: nn.Module, rows: Rows | None, sizes: Sequence[int] | None, world: World) -> None:
        """For a layer that multiplies by random numbers.

        Args:
            layer: the whole network's.
            rows: how the batch is split; None where each rank has all of it.
            sizes: how the maps are split, None likewise.
            world: the ranks.
        """
        super().__init__()
        self.layer, self.rows, self.sizes, self.rank = layer, rows, sizes, world.rank

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Any float tensor (N, C, …) -> the same shape."""
        if not self.training:
            result: torch.Tensor = self.layer(values)
            return result
        shape = list(values.shape)
        places = []
        for dim, sizes in ((0, None if self.rows is None else self.rows.sizes), (1, self.sizes)):
            if sizes is not None:
                each = shape[dim] // sizes[self.rank] if sizes[self.rank] else 1  # after Flatten a map is many units
                places.append((dim, each * sum(sizes[: self.rank]), shape[dim]))
                shape[dim] = each * sum(sizes)
        ones = torch.ones(shape, dtype=values.dtype, device=values.device)
        if values.ndim == 4 and not values.is_contiguous():  # numbers are drawn in the order of memory
            ones = ones.contiguous(memory_format=torch.channels_last)
        mask = self.layer(ones)
        for place in places:
            mask = mask.narrow(*place)
        masked: torch.Tensor = values * mask
        return masked


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, place: Gather, sizes: list[int]) -> torch.Tensor:
        ctx.place, ctx.sizes = place, sizes
        return gathered(place.world, values, place.dim, sizes, (place.layer, "forward"))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        place, sizes, world = ctx.place, ctx.sizes, ctx.place.world
        if place.replicated:
            first = sum(sizes[: world.rank])
            return gradients[0].narrow(place.dim, first, sizes[world.rank]), None, None
        return scattered_sum(world, gradients[0], place.dim, sizes, (place.layer, "backward")), None, None
