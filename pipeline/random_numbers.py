"""Counter-based random numbers: each is a pure function of (seed, epoch, key, purpose), so nobody needs to remember a generator's state.

What is drawn with them is said where it is defined: windows, mirrors and colour noise in `alexprep.pipeline.augmentation`, the rest in
`alexprep.pipeline.colour`, `geometry`, `policies` and `mixing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of a purpose: uint64 (4, N), uniform on [0, 2**32), for the N samples at hand; of an array of purposes (P,): uint64 (4, N, P).
Words = Callable[[Any], NDArray[np.uint64]]

# Tells the uses of a sample's numbers apart: the counter's last word. Of some uses there are several, which follow the first.
GEOMETRY, NOISE, SHARED, ATTEMPT = 0, 1, 2, 16
JITTER, BLUR, AFFINE, ERASING, MIXING, POLICY, HOOK, ELASTIC = 32, 40, 48, 64, 96, 128, 2**16, 2**20

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox 4x32-10: uint64 (4, …), uniform on [0, 2**32), of a counter of this shape and a key, all below 2**32.

    >>> [hex(word) for word in philox(np.zeros((4, 1), np.uint64), (0, 0))[:, 0].tolist()]  # Random123's known answer
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = counter
    for turn in range(_ROUNDS):
        k0, k1 = (np.uint64((key[i] + turn * _WEYL[i]) & 0xFFFFFFFF) for i in range(2))
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (right >> _SHIFT) ^ b ^ k0, right & _LOW, (left >> _SHIFT) ^ d ^ k1, left & _LOW
    return np.stack([a, b, c, d])


def words_of(seed: int, epoch: int, keys_N: NDArray[np.int64], purpose: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Four random words for each key: uint64 (4, N), uniform on [0, 2**32); of many purposes (P,) at once, uint64 (4, N, P)."""
    keys, purposes = keys_N.astype(np.uint64), np.asarray(purpose, np.uint64)
    keys = keys[:, None] if purposes.ndim else keys
    counter = np.empty((4, len(keys), *purposes.shape), np.uint64)
    counter[0], counter[1], counter[2], counter[3] = keys & _LOW, keys >> _SHIFT, epoch, purposes
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def below(words: NDArray[np.uint64], bounds: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Uniform on [0, bound). Multiply and shift: a value of n has probability within n / 2**32 of 1 / n."""
    scaled: NDArray[np.uint64] = (words * np.asarray(bounds).astype(np.uint64)) >> _SHIFT
    return scaled.astype(np.int64)


def unit(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform on (0, 1): the halves keep off both ends."""
    return (words.astype(np.float64) + 0.5) / 2**32


def between(words: NDArray[np.uint64], low: float, high: float) -> NDArray[np.float64]:
    """Uniform on (low, high)."""
    return low + (high - low) * unit(words)


def normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Box and Muller: two uniforms make two normals, of which the fourth is not needed. Gives (N, 3)."""
    uniform = unit(words)
    radius = np.sqrt(-2.0 * np.log(uniform[:2]))
    angle = 2.0 * np.pi * uniform[2:]
    return np.stack([radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]), radius[1] * np.cos(angle[1])]).T
