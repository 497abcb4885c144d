"""The random numbers of a sample: a pure function of (seed, epoch, sample), so that they do not depend on who computes them.

The generator is Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter-based,
so the draws of any set of samples cost the same, and evaluated here for a whole batch at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox 4x32-10.

    Args:
        counter: uint64 (4, N), each entry below 2**32.
        key: two integers below 2**32.

    Returns:
        uint64 (4, N), uniform on [0, 2**32).

    >>> [hex(word) for word in philox(np.zeros((4, 1), np.uint64), (0, 0))[:, 0].tolist()]  # Random123's known answer
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = counter
    for turn in range(_ROUNDS):
        k0, k1 = (np.uint64((key[i] + turn * _WEYL[i]) & 0xFFFFFFFF) for i in range(2))
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (right >> _SHIFT) ^ b ^ k0, right & _LOW, (left >> _SHIFT) ^ d ^ k1, left & _LOW
    return np.stack([a, b, c, d])


@dataclass(frozen=True)
class Draws:
    """What is drawn for N samples.

    Attributes:
        offsets_N2: int64 (N, 2), the crop's top row and left column, pixels, each in [0, slack].
        mirror_N: bool (N,), whether the crop is reflected left to right.
        alpha_N3: float64 (N, 3), standard normal, one for each principal axis.
    """

    offsets_N2: NDArray[np.int64]
    mirror_N: NDArray[np.bool_]
    alpha_N3: NDArray[np.float64]


def draw(seed: int, epoch: int, rows_N: NDArray[np.int64], slack: int) -> Draws:
    """Draws for the samples `rows_N` of an epoch.

    Args:
        seed: of the run, 0 to 2**63 - 1.
        epoch: 0 to 2**32 - 1.
        rows_N: int64 (N,), the samples' rows.
        slack: how far the crop can move: image side - crop side, pixels. 256 - 224 = 32 gives the 33 x 33 positions of
            the 2012 code (section 4.1 of the paper says "2048 x", for 32 x 32 x 2).

    Returns:
        The draws, in the order of `rows_N`. Corners and mirrors are exact on any machine; the normals depend on the
        platform's log and cos in their last bit.
    """
    rows = np.asarray(rows_N).astype(np.uint64)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    counter = np.stack([rows & _LOW, rows >> _SHIFT, np.full_like(rows, epoch), np.zeros_like(rows)])
    geometry = philox(counter, key)
    counter[3] = 1
    noise = philox(counter, key)
    # Multiply and shift: position p of n has probability within n / 2**32 of 1 / n.
    offsets = ((geometry[:2] * np.uint64(slack + 1)) >> _SHIFT).astype(np.int64)
    mirror = (geometry[2] >> np.uint64(31)).astype(bool)
    # Box and Muller: two uniforms make two normals; the halves keep them off 0, where the logarithm has none.
    uniform = (noise.astype(np.float64) + 0.5) / 2**32
    radius = np.sqrt(-2.0 * np.log(uniform[:2]))
    angle = 2.0 * np.pi * uniform[2:]
    alpha = np.stack([radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]), radius[1] * np.cos(angle[1])])
    return Draws(offsets.T, mirror, alpha.T)


def centred(count: int, slack: int) -> Draws:
    """No chance at all: the centre crop, not mirrored, without noise; for evaluation."""
    return Draws(np.full((count, 2), slack // 2), np.zeros(count, bool), np.zeros((count, 3)))
