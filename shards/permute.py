"""Permutations that are a pure function of a few integers, on any machine and with any numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_words(key: tuple[int, ...], count: int, start: int = 0) -> NDArray[np.uint64]:
    """Uniform 64-bit words [start, start + count) of the stream named by `key`.

    The generator is Philox 4x64-10 (Salmon et al., SC 2011), counter-based: word n costs the same wherever n is. Only its raw
    output is used, which numpy guarantees never to change; distributions built on it by numpy are not guaranteed.

    Args:
        key: any number of non-negative integers; hashed to the 128-bit Philox key by numpy's `SeedSequence`.
        count: how many words.
        start: the first word's position in the stream.

    >>> whole = random_words((1, 2), 10)
    >>> bool((whole[7:] == random_words((1, 2), 3, start=7)).all())
    True
    """
    philox = np.random.Philox(np.random.SeedSequence(key))
    philox.advance(start // 4)  # one step of the counter makes four words
    return philox.random_raw(count + start % 4)[start % 4 :]


def permutation(key: tuple[int, ...], count: int) -> NDArray[np.int64]:
    """A uniform permutation of range(count), int64 (count,): the order of `count` random words (ties by position).

    >>> permutation((0,), 5).tolist() == permutation((0,), 5).tolist()
    True
    >>> sorted(permutation((3, 1), 100).tolist()) == list(range(100))
    True
    """
    return np.argsort(random_words(key, count), kind="stable")
