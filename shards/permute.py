"""Permutations that are a pure function of a few integers, on any machine and with any numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permutation(key: tuple[int, ...], count: int) -> NDArray[np.int64]:
    """A uniform permutation of range(count): the order of `count` random 64-bit words, ties by position.

    The generator is Philox 4x64-10 (Salmon, Moraes, Dror, Shaw, SC 2011). Only its raw output is used, which numpy guarantees never
    to change; the distributions that numpy builds on it are not guaranteed.

    Args:
        key: any number of non-negative integers; numpy's `SeedSequence` hashes them to the generator's key.
        count: how many.

    Returns:
        int64 (count,).

    >>> permutation((0,), 5).tolist() == permutation((0,), 5).tolist()
    True
    >>> sorted(permutation((3, 1), 100).tolist()) == list(range(100))
    True
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")
