"""Says which samples come when: the order of an epoch, its steps, and a rank's part of each.

All of it follows from a few numbers (seed, epoch, step), so nothing needs to be stored or sent. What is done to the samples is
drawn in `alexprep.pipeline.augmentation`.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError, one_of, whole_number
from alexprep.shards.plan import permutation

Order = Literal["shuffle", "blocks", "streams", "sequential"]
BLOCK_SHARDS = 16  # that are mixed at a time, unless told otherwise
STREAMS = 8  # likewise: as many as a host has GPUs
_UNEVEN = 4  # a cut between streams moves to the nearest end of a shard that is no further than the mean stream divided by this
_WORTH_A_THREAD = 2**15  # samples, whose order takes some milliseconds

# Tell these uses of the seed from others (the shuffle before sharding has no such word in its key).
_ORDER, _BLOCKS = 0x6F72_6465, 0x626C_6F63


class Epoch(NamedTuple):
    """The rows of an epoch in the order in which they are seen, int64 (samples,), and the stream that each is from, uint16 (samples,).

    Within a step the streams follow one another.
    """

    row_N: NDArray[np.int64]
    stream_N: NDArray[np.uint16]


@dataclass
class StepPlan:
    """The steps of all epochs, for a `Loader` with these arguments.

    Step s of an epoch is the slice [s * batch_size, (s + 1) * batch_size) of the epoch's order, and a rank takes its part of it: contiguous,
    of as many streams as other ranks. Where there is but one stream, that is as many rows, or one more.
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
    streams: int = STREAMS  # of the order "streams"

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, low, high in (
            ("batch_size", 1, 2**31 - 1),
            ("block_shards", 1, 2**31 - 1),
            ("streams", 1, 2**16 - 1),
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
        self.streams = self.streams if self.order == "streams" else 1
        self._kept: dict[int, Epoch] = {}
        self._coming: tuple[int, Future[Epoch]] | None = None  # the next epoch, and its order
        self._process = os.getpid()

    def __len__(self) -> int:
        """Steps an epoch, the same on all ranks; the last one may be smaller."""
        return (len(self.shards_N) + (0 if self.drop_last else self.batch_size - 1)) // self.batch_size

    def open_shards(self, steps: int) -> int:
        """How many shards `steps` steps in a row are read from, where these are not all: whole blocks, or a few shards in turn."""
        shards = -(-steps * self.batch_size * (int(self.shards_N[-1]) + 1) // max(1, len(self.shards_N)))
        if self.order not in ("blocks", "streams"):
            return shards + 2
        block, own = _block(self.block_shards, self.streams), -(-shards // self.streams)
        read = -(-(self.rank + 1) * self.streams // self.world_size) - self.rank * self.streams // self.world_size
        return read * (block * (-(-own // block) + 1) + 1)

    @property
    def largest_part(self) -> int:
        """No rank gets more samples in one step."""
        even = self.together * -(-self.batch_size // (self.together * self.world_size))
        if self.streams == 1:
            return even
        # No stream is longer than the mean by more than two of `_UNEVEN` parts. Of each a step may have two rows, or a pair, more than its share.
        longer = -(-self.batch_size * (_UNEVEN + 2) // (_UNEVEN * self.world_size))
        return min(self.batch_size, longer + 5 * -(-self.streams // self.world_size) + 6)

    def part(self, epoch: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows that this rank gets in one step, and their places in the epoch's order: int64 (N,) each."""
        rows, streams = self._epoch(epoch)
        start = step * self.batch_size
        streams = streams[start : start + self.batch_size]
        first, last = (start + self._begin(streams, rank) for rank in (self.rank, self.rank + 1))
        if 2 * step >= len(self):
            self._make_ahead(epoch + 1)
        return rows[first:last], np.arange(first, last)

    def _begin(self, stream_B: NDArray[np.uint16], rank: int) -> int:
        """Where the part of a rank begins in a step of rows from these streams; of a stream that ranks share, in the same place of it."""
        stream, share = divmod(rank * self.streams, self.world_size)
        first, last = (-(-int(at) // self.together) for at in np.searchsorted(stream_B, (stream, stream + 1)))
        return min(self.together * (first + (last - first) * share // self.world_size), len(stream_B))

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """The epoch and step that follow."""
        return (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)

    def _epoch(self, epoch: int) -> Epoch:
        """The epoch's order. The two asked for last are kept: one is read while the next begins to be fetched."""
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

    def _made(self, epoch: int) -> Epoch:
        if self.order == "streams":
            return stream_order(self.seed, epoch, self.shards_N, self.batch_size, self.streams, self.block_shards)
        if self.order == "blocks":
            rows = block_order(self.seed, epoch, self.shards_N, self.block_shards)
        elif self.order == "shuffle":
            rows = epoch_order(self.seed, epoch, len(self.shards_N))
        else:
            rows = np.arange(len(self.shards_N))
        return Epoch(rows, np.zeros(len(rows), np.uint16))


def rank_part(first: int, last: int, rank: int, world_size: int) -> tuple[int, int]:
    """The part of the half-open range [first, last) that a rank takes: contiguous, sizes differing by one at most.

    Ranks in order give back the range, whatever `world_size` is.

    >>> [rank_part(0, 7, rank, 3) for rank in range(3)]
    [(0, 2), (2, 4), (4, 7)]
    """
    start, end = (first + which * (last - first) // world_size for which in (rank, rank + 1))
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
    return np.concatenate(_streams(seed, epoch, shards_N, 1, block_shards))


def stream_order(
    seed: int,
    epoch: int,
    shards_N: NDArray[np.integer],
    batch_size: int,
    streams: int = STREAMS,
    block_shards: int = BLOCK_SHARDS,
) -> Epoch:
    """An order whose ranks read different shards, so that each shard is read once an epoch by all of them together.

    The permuted shards are cut into `streams` of about as many rows, and each stream is mixed as `block_order` mixes all: `block_shards` over all
    streams, at least one in each. A step takes so much of each stream that all end together: of one whose length is the mean,
    batch_size / streams rows. A step's rows are ordered by their streams, and a rank takes the rows of its own; where `batch_size` is even, rows
    come in pairs of a stream, but for the last of streams whose length is odd.

    Cuts lie between shards, unless a stream would be longer or shorter by more than a quarter of the mean at that end; such a shard is in two
    streams. Where there are twice as many shards as streams, all of one size, there is none. With one stream this is `block_order`.

    >>> rows, streams = stream_order(0, 0, np.repeat([0, 1, 2, 3], 4), 8, streams=2, block_shards=2)
    >>> streams.tolist()
    [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    >>> len({row // 4 for row in rows[streams == 0].tolist()})
    2
    """
    parts = _streams(seed, epoch, shards_N, streams, block_shards)
    stream_N = np.repeat(np.arange(streams, dtype=np.uint16), [len(part) for part in parts])
    together = 2 - batch_size % 2
    # How far its stream is read when a row comes, 0 to 1: by this the streams are merged. Of a pair, when its middle does; of a single row, 1.
    read = [(np.arange(len(part)) // together * together + together / 2) / len(part) for part in parts]
    merged = np.argsort(np.concatenate(read), kind="stable")
    steps = np.arange(len(merged)) // batch_size
    merged = merged[np.lexsort((stream_N[merged], steps))]
    return Epoch(np.concatenate(parts)[merged], stream_N[merged])


def _block(block_shards: int, streams: int) -> int:
    """How many shards of one stream are mixed at a time."""
    return max(1, block_shards // streams)


def _streams(
    seed: int, epoch: int, shards_N: NDArray[np.integer], streams: int, block_shards: int
) -> list[NDArray[np.int64]]:
    """The rows of each stream in the order in which they are seen."""
    starts = np.flatnonzero(np.diff(shards_N, prepend=-1))
    ends = np.append(starts[1:], len(shards_N))
    shuffled = shard_order(seed, epoch, len(starts))
    rows = np.concatenate([np.arange(starts[shard], ends[shard]) for shard in shuffled])
    bounds = np.append(0, np.cumsum((ends - starts)[shuffled]))  # of the shards, in `rows`
    cuts = np.arange(streams + 1) * len(rows) // streams
    after = bounds[np.searchsorted(bounds, cuts)]
    before = bounds[np.searchsorted(bounds, cuts, side="right") - 1]
    nearest = np.where(cuts - before < after - cuts, before, after)
    cuts = np.where(_UNEVEN * streams * np.abs(nearest - cuts) <= len(rows), nearest, cuts)
    found, together = [], _block(block_shards, streams)
    # Counted from 1: numpy's keys end in zeros that do not count, and 0 would repeat the shards' own permutation.
    numbers = itertools.count(1)
    for stream, (first, last) in enumerate(itertools.pairwise(cuts.tolist())):
        inside = bounds[(bounds > first) & (bounds < last)]
        pieces = [part for part in np.split(rows[first:last], inside - first) if len(part)]
        if stream % 2:  # so that two streams read a shard of both at the same time, at their ends or beginnings
            pieces.reverse()
        blocks = [rows[:0]]
        for at in range(0, len(pieces), together):
            members = np.concatenate(pieces[at : at + together])
            blocks.append(members[permutation((seed, epoch, _BLOCKS, next(numbers)), len(members))])
        found.append(np.concatenate(blocks))
    return found


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
