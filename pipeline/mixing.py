"""Mixup and CutMix: two neighbours of a step are mixed, or change rectangles, and share their labels by the same weights.

Partners are the samples 2j and 2j + 1 of a step, so ranks whose parts are cut at even places decode no picture of one another.
`alexprep.pipeline.dali_graph` does the same in DALI, last of all. What a loss makes of the weights is in docs/pipelines.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.random_numbers import MIXING, below, unit, words_of
from alexprep.shards.errors import AlexprepError, number_within


@dataclass(frozen=True)
class Mixing:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of the pairs of a step.

    A pair's weight λ is drawn from Beta(alpha, alpha). Mixup: λ of one image and 1 - λ of the other, and the other way round. CutMix: a
    rectangle of 1 - λ of the area at a uniform place, cut off at the edges, is exchanged; λ is what is left of the area.

    Attributes:
        mixup: alpha of mixup; 0.2 in the paper for ImageNet; 0 for no mixup.
        cutmix: alpha of CutMix; 1 in the paper; 0 for no CutMix.
        cutmix_share: of the mixed pairs, where both are on, that get CutMix.
        share: of the pairs that are mixed at all.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_share: float = 0.5
    share: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name in ("mixup", "cutmix"):
            number_within(f"mixing: {name}", getattr(self, name), 0, 1000)
        for name in ("cutmix_share", "share"):
            number_within(f"mixing: {name}", getattr(self, name), 0, 1)
        if not self.mixup and not self.cutmix:
            raise AlexprepError("mixing: mixup and cutmix are both 0: give one of them its alpha, or leave mixing out")


def draw_mixing(
    mixing: Mixing, seed: int, epoch: int, positions_N: NDArray[np.int64], height: int, width: int
) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
    """How pairs are mixed: a pure function of (seed, epoch, place of the pair in the epoch's order).

    Gives, one entry a sample: "pair" int64 (N,), a number that partners have in common; "weight" (N,), of the sample's own image and label;
    "exchanged" int64 (N, 4), the rectangle that is the partner's: top, left, height, width, all 0 for mixup.
    """
    from scipy.special import betaincinv  # a fifth of a second

    pairs = positions_N // 2
    first, more = (words_of(seed, epoch, pairs, MIXING + n) for n in range(2))
    mixed = unit(first[0]) < mixing.share
    share = mixing.cutmix_share if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0)
    cut = unit(first[1]) < share
    alpha = np.where(cut, mixing.cutmix or 1.0, mixing.mixup or 1.0)
    weight = np.clip(betaincinv(alpha, alpha, unit(first[2])), 0.0, 1.0)
    sizes = np.array([height, width])
    half = (0.5 * np.sqrt(1 - weight)[:, None] * sizes).astype(np.int64)
    centre = np.stack([below(more[n], int(sizes[n])) for n in range(2)], axis=1)
    start, end = np.maximum(centre - half, 0), np.minimum(centre + half, sizes)
    boxes = np.where((cut & mixed)[:, None], np.concatenate([start, end - start], axis=1), 0)
    weight = np.where(cut, 1 - (end - start).prod(axis=1) / sizes.prod(), weight)
    return {"pair": pairs, "weight": np.where(mixed, weight, 1.0), "exchanged": boxes}


def partners(pair_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in a batch each sample's partner is, (N,): its neighbour of the same pair, itself where that is missing.

    >>> partners(np.array([3, 3, 4, 5, 5])).tolist()
    [1, 0, 2, 4, 3]
    """
    places = np.arange(len(pair_N))
    places[:-1] += pair_N[:-1] == pair_N[1:]
    places[1:] -= pair_N[1:] == pair_N[:-1]
    return places


def shares(weight: float, exchanged_4: NDArray[np.int64], height: int, width: int) -> tuple[NDArray[np.float64], ...]:
    """The share of the partner in each row (height,) and in each column (width,): at a pixel it is the product of both."""
    top, left, tall, wide = exchanged_4.tolist()
    if not tall or not wide:
        return np.full(height, 1 - weight), np.ones(width)
    rows, columns = np.zeros(height), np.zeros(width)
    rows[top : top + tall] = columns[left : left + wide] = 1
    return rows, columns


def mixed(
    own_HWC: NDArray[np.float64], partner_HWC: NDArray[np.float64], weight: float, exchanged_4: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mixes an image with its partner, both finished: the definition."""
    rows, columns = shares(weight, exchanged_4, *own_HWC.shape[:2])
    share = (rows[:, None] * columns)[..., None]
    return own_HWC + (partner_HWC - own_HWC) * share
