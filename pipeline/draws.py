"""The random numbers of a sample: a pure function of (seed, epoch, sample), so that they do not depend on who computes them.

The generator is Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): counter-based,
so the draws of any set of samples cost the same, and evaluated here for a whole batch at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.augmentation import Augmentation

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# Tells the uses of a sample's numbers apart: the counter's last word.
_GEOMETRY, _NOISE, _SHARED, _ATTEMPT = 0, 1, 2, 16
_ATTEMPTS = 10  # at a window that fits; torchvision's number


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
        windows_N4: int64 (N, 4), what is cut out of each image: top row, left column, height, width, pixels.
        mirror_N: bool (N,), whether the crop is reflected left to right.
        alpha_N3: float64 (N, 3), standard normal, one for each principal axis.
    """

    windows_N4: NDArray[np.int64]
    mirror_N: NDArray[np.bool_]
    alpha_N3: NDArray[np.float64]


def draw(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    rows_N: NDArray[np.int64],
    sizes_N2: NDArray[np.integer],
    positions_N: NDArray[np.int64] | None = None,
) -> Draws:
    """Draws for samples of an epoch.

    A crop's corner is uniform over all positions: 33 x 33 for 224 of 256 pixels, as in the 2012 code (section 4.1 of the paper
    says "2048 x", for 32 x 32 x 2).

    Args:
        augmentation: what is drawn, and within which bounds.
        seed: of the run, 0 to 2**63 - 1.
        epoch: 0 to 2**32 - 1.
        rows_N: int64 (N,), the samples' rows.
        sizes_N2: integer (N, 2), their images' heights and widths, pixels, at least the crop's where nothing is resized.
        positions_N: int64 (N,), their places in the epoch's order; needed where draws are shared.

    Returns:
        The draws, in the order of `rows_N`. Corners and mirrors are exact on any machine; normals, and the windows of
        `augmentation.scale`, depend on the platform's log, exp and cos in their last bit.
    """
    keys = rows = np.asarray(rows_N, np.int64)
    if augmentation.share > 1:
        assert positions_N is not None
        keys = np.asarray(positions_N, np.int64) // augmentation.share
    geometry = _words(seed, epoch, keys, _GEOMETRY if augmentation.share == 1 else _SHARED)
    sizes = np.asarray(sizes_N2, np.int64)
    if augmentation.crop is None:
        windows = _whole(sizes)
    elif augmentation.scale is None:
        side = np.full(len(rows), augmentation.crop)
        corners = (_below(geometry[n], sizes[:, n] - side + 1) for n in range(2))
        windows = np.stack([*corners, side, side], axis=1)
    else:
        windows = _resized_windows(augmentation, seed, epoch, keys, sizes)
    mirror = (geometry[2] >> np.uint64(31)).astype(bool) & augmentation.mirror
    return Draws(windows, mirror, _normals(_words(seed, epoch, rows, _NOISE)))


def centred(augmentation: Augmentation, sizes_N2: NDArray[np.integer]) -> Draws:
    """No chance at all: the centre window, not mirrored, without noise; for evaluation. For the arguments see `draw`."""
    sizes = np.asarray(sizes_N2, np.int64)
    sides = evaluation_sides(augmentation, sizes)
    windows = np.concatenate([(sizes - sides) // 2, sides], axis=1)
    return Draws(windows, np.zeros(len(sizes), bool), np.zeros((len(sizes), 3)))


def ten_windows(augmentation: Augmentation, sizes_N2: NDArray[np.integer]) -> NDArray[np.int64]:
    """The windows of the paper's ten test views (section 4.1): the four corners and the centre; each is seen as it is, then all
    five once more reflected. The order is the 2012 code's.

    Returns:
        int64 (N, 5, 4), otherwise as `Draws.windows_N4`.

    >>> ten_windows(Augmentation(crop=224), np.array([[256, 256]]))[0, :, :2].tolist()
    [[0, 0], [0, 32], [16, 16], [32, 0], [32, 32]]
    """
    sizes = np.asarray(sizes_N2, np.int64)
    sides = evaluation_sides(augmentation, sizes)
    slack = sizes - sides
    places = [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]  # in halves of the slack
    corners = [np.stack([slack[:, n] * place[n] // 2 for n in range(2)], axis=1) for place in places]
    return np.stack([np.concatenate([corner, sides], axis=1) for corner in corners], axis=1)


def evaluation_sides(augmentation: Augmentation, sizes_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Height and width of the windows that evaluation cuts: int64 (N, 2)."""
    if augmentation.crop is None:
        return sizes_N2.astype(np.int64)
    if augmentation.scale is None:
        return np.full_like(sizes_N2, augmentation.crop)
    sides = np.rint(sizes_N2.min(axis=1) * augmentation.evaluation_scale).astype(np.int64)
    squares: NDArray[np.int64] = np.maximum(1, np.stack([sides, sides], axis=1))
    return squares


def _words(seed: int, epoch: int, keys_N: NDArray[np.int64], purpose: int) -> NDArray[np.uint64]:
    keys = keys_N.astype(np.uint64)
    counter = np.stack([keys & _LOW, keys >> _SHIFT, np.full_like(keys, epoch), np.full_like(keys, purpose)])
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def _below(words: NDArray[np.uint64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Uniform on [0, bound). Multiply and shift: a value of n has probability within n / 2**32 of 1 / n."""
    scaled: NDArray[np.uint64] = (words * bounds.astype(np.uint64)) >> _SHIFT
    return scaled.astype(np.int64)


def _unit(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform on (0, 1): the halves keep off both ends."""
    return (words.astype(np.float64) + 0.5) / 2**32


def _normals(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Box and Muller: two uniforms make two normals, of which the fourth is not needed."""
    uniform = _unit(words)
    radius = np.sqrt(-2.0 * np.log(uniform[:2]))
    angle = 2.0 * np.pi * uniform[2:]
    return np.stack([radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]), radius[1] * np.cos(angle[1])]).T


def _whole(sizes_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros_like(sizes_N2), sizes_N2], axis=1)


def _resized_windows(
    augmentation: Augmentation, seed: int, epoch: int, keys: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """torchvision's rule: ten attempts at an area and a ratio, at a uniform place; then the largest centred window.

    Samples of the same key have the same attempts, each in the size of its own image.
    """
    assert augmentation.scale is not None
    windows = _centred_windows(sizes, augmentation.ratio)
    low, high = augmentation.scale
    logs = np.log(np.array(augmentation.ratio))
    open_rows = np.arange(len(keys))
    for attempt in range(_ATTEMPTS):
        words = _words(seed, epoch, keys[open_rows], _ATTEMPT + attempt)
        left = sizes[open_rows]
        area = left.prod(axis=1) * (low + (high - low) * _unit(words[0]))
        ratio = np.exp(logs[0] + (logs[1] - logs[0]) * _unit(words[1]))
        height, width = (np.rint(np.sqrt(part)).astype(np.int64) for part in (area / ratio, area * ratio))
        fits = (height > 0) & (height <= left[:, 0]) & (width > 0) & (width <= left[:, 1])
        slack = np.maximum(1, left - np.stack([height, width], axis=1) + 1)
        found = np.stack([_below(words[2], slack[:, 0]), _below(words[3], slack[:, 1]), height, width], axis=1)
        windows[open_rows[fits]] = found[fits]
        open_rows = open_rows[~fits]
    return windows


def _centred_windows(sizes_N2: NDArray[np.int64], ratio: tuple[float, float]) -> NDArray[np.int64]:
    height, width = sizes_N2.T
    tall = np.minimum(height, np.rint(width / ratio[0]).astype(np.int64))
    wide = np.minimum(width, np.rint(height * ratio[1]).astype(np.int64))
    sides = np.maximum(1, np.stack([tall, wide], axis=1))
    return np.concatenate([(sizes_N2 - sides) // 2, sides], axis=1)
