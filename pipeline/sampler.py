"""Says which samples come when: the order of an epoch, its steps, and a rank's part of each.

All of it follows from a few numbers (seed, epoch, step), so nothing needs to be stored or sent. What is done to the samples is
drawn in `alexprep.pipeline.augmentation`.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError, one_of, whole_number
from alexprep.shards.plan import permutation

Order = Literal["shuffle", "blocks", "sequential"]
BLOCK_SHARDS = 16  # of a block, unless told otherwise
_WORTH_A_THREAD = 2**15  # samples, whose order takes some milliseconds

# Tell these uses of the seed from others (the shuffle before sharding has no such word in its key).
_ORDER, _BLOCKS = 0x6F72_6465, 0x626C_6F63


@dataclass
class StepPlan:
    """The steps of all epochs, for a `Loader` with these arguments.

    Step s of an epoch is the slice [s * batch_size, (s + 1) * batch_size) of the epoch's order, and a rank takes its part of it.
    """

    shards_N: NDArray[np.integer]  # the shard in which each row lies, ascending
    batch_size: int
    order: Order
    block_shards: int
    seed: int
    rank: int
    world_size: int
    drop_last: bool = False  # whether an epoch's last step is left out where it is smaller
    together: int = 1  # neighbours of a step that come to one rank: 2 where pairs are mixed

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
        one_of("order", self.order, get_args(Order))
        if self.batch_size % self.together:
            raise AlexprepError(f"batch_size {self.batch_size} is odd, and mixing takes pairs of a step: make it even")
        if not len(self):
            raise AlexprepError(
                f"with drop_last, {len(self.shards_N)} samples make no step of batch_size {self.batch_size}: make it smaller"
            )
        self._kept: dict[int, NDArray[np.int64]] = {}
        self._coming: tuple[int, Future[NDArray[np.int64]]] | None = None  # the next epoch, and its order
        self._process = os.getpid()

    def __len__(self) -> int:
        """Steps an epoch, the same on all ranks; the last one may be smaller."""
        return (len(self.shards_N) + (0 if self.drop_last else self.batch_size - 1)) // self.batch_size

    def open_shards(self, steps: int) -> int:
        """How many shards `steps` steps in a row are read from, where these are not all: whole blocks, or a few shards in turn."""
        shards = -(-steps * self.batch_size * (int(self.shards_N[-1]) + 1) // max(1, len(self.shards_N)))
        if self.order != "blocks":
            return shards + 2
        return self.block_shards * (-(-shards // self.block_shards) + 1) + 1

    @property
    def largest_part(self) -> int:
        """The most samples that a rank gets in one step."""
        return self.together * -(-self.batch_size // (self.together * self.world_size))

    def part(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows that this rank gets in one step, and their places in the epoch's order: int64 (N,) each."""
        first = step * self.batch_size
        last = min(first + self.batch_size, len(self.shards_N))
        first, last = rank_part(first, last, self.rank, self.world_size, self.together)
        order = self._epoch(epoch)
        if 2 * step >= len(self):
            self._make_ahead(epoch + 1)
        return order[first:last], np.arange(first, last)

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """The epoch and step that follow."""
        return (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's order: int64 (samples,). The two asked for last are kept: one is read while the next begins to be fetched."""
        if epoch not in self._kept:
            ahead = self._coming if self._process == os.getpid() else None  # a thread does not survive a fork
            made = ahead[1].result() if ahead is not None and ahead[0] == epoch else self._made(epoch)
            self._kept, self._coming = dict([*self._kept.items(), (epoch, made)][-2:]), None
        return self._kept[epoch]

    def _make_ahead(self, epoch: int) -> None:
        """Has an epoch's order made in a thread, for which a step would have to wait: a third of a second for ImageNet."""
        if (
            self._coming is None
            and epoch not in self._kept
            and self.order != "sequential"
            and len(self.shards_N) >= _WORTH_A_THREAD
        ):
            thread = ThreadPoolExecutor(1, "alexprep-order")
            self._coming, self._process = (epoch, thread.submit(self._made, epoch)), os.getpid()
            thread.shutdown(wait=False)

    def _made(self, epoch: int) -> NDArray[np.int64]:
        if self.order == "shuffle":
            return epoch_order(self.seed, epoch, len(self.shards_N))
        if self.order == "blocks":
            return block_order(self.seed, epoch, self.shards_N, self.block_shards)
        return np.arange(len(self.shards_N))


def rank_part(first: int, last: int, rank: int, world_size: int, together: int = 1) -> tuple[int, int]:
    """The part of the half-open range [first, last) that a rank takes: contiguous, sizes differing by one at most.

    Ranks in order give back the range, whatever `world_size` is. So many neighbours, counted from `first`, stay `together`; sizes then differ by
    as many.

    >>> [rank_part(0, 7, rank, 3) for rank in range(3)]
    [(0, 2), (2, 4), (4, 7)]
    >>> [rank_part(0, 9, rank, 2, together=2) for rank in range(2)]
    [(0, 4), (4, 9)]
    """
    count = -(-(last - first) // together)
    bounds = (together * (which * count // world_size) for which in (rank, rank + 1))
    start, end = (min(first + bound, last) for bound in bounds)
    return start, end


def epoch_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The rows of an epoch in the order in which they are seen: int64 (samples,), a uniform permutation, another one each epoch.

    >>> sorted(epoch_order(0, 3, 10).tolist()) == list(range(10))
    True
    """
    return permutation((seed, epoch, _ORDER), samples)


def shard_order(seed: int, epoch: int, shards: int) -> NDArray[np.int64]:
    """The shards of an epoch in the order in which they are read: int64 (shards,), another permutation each epoch."""
    return permutation((seed, epoch, _BLOCKS), shards)


def block_order(seed: int, epoch: int, shards_N: NDArray[np.integer], block_shards: int) -> NDArray[np.int64]:
    """An order that reads few shards at a time, for disks and stores where reading here and there is slow.

    The shards are permuted and dealt out in blocks of `block_shards`; the rows of a block are permuted as one. So at most
    `block_shards` shards are being read (two blocks' while one gives way to the next), and a row can meet those of its block.
    `shards_N`, (samples,), is the shard in which each row lies, ascending. Gives int64 (samples,), each row once.

    >>> order = block_order(0, 0, np.array([0, 0, 1, 1, 2, 2]), 1)
    >>> [sorted(pair) in ([0, 1], [2, 3], [4, 5]) for pair in order.reshape(3, 2).tolist()]
    [True, True, True]
    """
    starts = np.flatnonzero(np.diff(shards_N, prepend=-1))
    ends = np.append(starts[1:], len(shards_N))
    shuffled = shard_order(seed, epoch, len(starts))
    blocks = []
    # Counted from 1: numpy's keys end in zeros that do not count, and 0 would repeat the shards' own permutation.
    for block, first in enumerate(range(0, len(starts), block_shards)):
        members = shuffled[first : first + block_shards]
        rows = np.concatenate([np.arange(starts[shard], ends[shard]) for shard in members])
        blocks.append(rows[permutation((seed, epoch, _BLOCKS, 1 + block), len(rows))])
    return np.concatenate(blocks)


def shuffle_quality(order: NDArray[np.int64]) -> float:
    """How far an order mixes what lies together on disk: 0 for rows as stored, near 1 for a uniform permutation.

    The entropy of the distances between neighbours, as MosaicML Streaming's simulator measures shuffles, here on a circle
    (distance modulo the number of rows, which a uniform permutation makes uniform) and in classes of distance, 256 or one for
    each 32 rows, divided by the bits of a uniform distribution over them. It is taken both ways: how far apart those lay that are
    seen one after the other, and how far apart those are seen that lay side by side (blocks of shards from all over the set do
    well in the first and badly in the second); and for the next to the sixteenth neighbour (streams that are dealt out in turn do
    well in the next). The lowest of all counts. `order` is (N,), N at least 2; rows that are left out or come twice do no harm.

    >>> shuffle_quality(np.arange(10_000))
    0.0
    >>> shuffle_quality(np.random.default_rng(0).permutation(100_000)) > 0.999
    True
    """
    places = np.argsort(order, kind="stable")
    lags = range(1, min(17, len(order)))
    return min(_distance_entropy(sequence, lag) for sequence in (order, places) for lag in lags)


def _distance_entropy(places: NDArray[np.int64], lag: int) -> float:
    classes = max(2, min(256, len(places) // 32))
    span = int(places.max()) + 1
    distances = (places[lag:] - places[:-lag]) % span
    counts = np.bincount(distances * classes // span, minlength=classes)
    shares = counts[counts > 0] / counts.sum()
    return float(abs((shares * np.log2(shares)).sum()) / np.log2(classes))
