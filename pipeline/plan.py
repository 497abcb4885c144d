"""Which rows a rank gets in which step: a pure function of a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.sampler import Order, block_order, epoch_order, rank_part, steps_per_epoch
from alexprep.shards.errors import AlexprepError, whole_number

BLOCK_SHARDS = 16  # of a block, unless told otherwise


@dataclass
class StepPlan:
    """The steps of all epochs.

    Step s of an epoch is the slice [s * batch_size, (s + 1) * batch_size) of the epoch's order, and a rank takes its part of it.

    Attributes:
        shards_N: (samples,), the shard in which each row lies, ascending.
        batch_size: samples a step over all ranks.
        order: see `Loader`.
        block_shards: see `Loader`.
        seed: of the orders.
        rank: in [0, world_size).
        world_size: how many ranks share each step.
    """

    shards_N: NDArray[np.integer]
    batch_size: int
    order: Order
    block_shards: int
    seed: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, low, high in (
            ("batch_size", 1, 2**31 - 1),
            ("block_shards", 1, 2**31 - 1),
            ("world_size", 1, 2**31 - 1),
            ("seed", 0, 2**63 - 1),
        ):
            setattr(self, name, whole_number(name, getattr(self, name), low, high))
        self.rank = whole_number("rank", self.rank, 0, self.world_size - 1)
        if self.order not in get_args(Order):
            raise AlexprepError(f"order {self.order!r} is not one of {', '.join(get_args(Order))}")
        self._kept: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Steps an epoch, the same on all ranks; the last one may be smaller."""
        return steps_per_epoch(len(self.shards_N), self.batch_size)

    @property
    def order_words(self) -> str:
        """What the order depends on beside the seed."""
        return f"blocks of {self.block_shards} shards" if self.order == "blocks" else self.order

    def open_shards(self, steps: int) -> int:
        """How many shards `steps` steps in a row are read from, where these are not all: whole blocks, or a few shards in turn."""
        shards = -(-steps * self.batch_size * (int(self.shards_N[-1]) + 1) // max(1, len(self.shards_N)))
        if self.order != "blocks":
            return shards + 2
        return self.block_shards * (-(-shards // self.block_shards) + 1) + 1

    @property
    def largest_part(self) -> int:
        """The most samples that a rank gets in one step."""
        return -(-self.batch_size // self.world_size)

    def part(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows that this rank gets in one step, and their places in the epoch's order: int64 (N,) each."""
        first = step * self.batch_size
        first, last = rank_part(first, min(first + self.batch_size, len(self.shards_N)), self.rank, self.world_size)
        return self._epoch(epoch)[first:last], np.arange(first, last)

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """The epoch and step that follow."""
        return (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, self._ordered(epoch))
        return self._kept[1]

    def _ordered(self, epoch: int) -> NDArray[np.int64]:
        if self.order == "shuffle":
            return epoch_order(self.seed, epoch, len(self.shards_N))
        if self.order == "blocks":
            return block_order(self.seed, epoch, self.shards_N, self.block_shards)
        return np.arange(len(self.shards_N))
