"""The order of an epoch, and a rank's part of a step: pure functions, so that nothing needs to be stored or sent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.permute import permutation

# Tells this use of the seed from others (the shuffle before sharding has no such word in its key).
_ORDER = 0x6F72_6465


def epoch_order(seed: int, epoch: int, samples: int, shuffle: bool = True) -> NDArray[np.int64]:
    """The rows of an epoch in the order in which they are seen.

    Args:
        seed: of the run, at least 0.
        epoch: from 0.
        samples: how many rows there are.
        shuffle: a uniform permutation of all rows, another one each epoch; otherwise ascending.

    Returns:
        int64 (samples,), each row once.

    >>> sorted(epoch_order(0, 3, 10).tolist()) == list(range(10))
    True
    """
    if not shuffle:
        return np.arange(samples)
    return permutation((seed, epoch, _ORDER), samples)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Steps of an epoch; the last one is smaller where `batch_size` does not divide `samples`.

    >>> steps_per_epoch(10, 4)
    3
    """
    return -(-samples // batch_size)


def rank_part(first: int, last: int, rank: int, world_size: int) -> tuple[int, int]:
    """The part of the half-open range [first, last) that a rank takes: contiguous, sizes differing by one at most.

    Ranks in order give back the range, whatever `world_size` is.

    >>> [rank_part(0, 7, rank, 3) for rank in range(3)]
    [(0, 2), (2, 4), (4, 7)]
    """
    count = last - first
    return first + rank * count // world_size, first + (rank + 1) * count // world_size
