"""Distributions that follow from what the suite proves, seen in many draws: `python -m pytest tests/stress/distributions.py`."""

from __future__ import annotations

import math

import numpy as np

from alexprep.pipeline.augmentation import Augmentation, draw
from alexprep.shards.plan import permutation


def test_resized_windows_have_the_stated_distribution() -> None:
    """Where every attempt fits, the share of the area is uniform and the logarithm of the ratio too: Kolmogorov-Smirnov at 99.99 %."""
    count, side = 20_000, 10_000
    augmentation = Augmentation(scale=(0.08, 0.5), mean="none", noise="none")
    windows = draw(augmentation, 0, 0, np.arange(count), np.full((count, 2), side)).windows_N4
    height, width = windows[:, 2], windows[:, 3]
    for value, low, high in (
        (height * width / side**2, 0.08, 0.5),
        (np.log(width / height), math.log(3 / 4), math.log(4 / 3)),
        (windows[:, 0] / (side - height), 0, 1),
        (windows[:, 1] / (side - width), 0, 1),
    ):
        uniform = np.sort((value - low) / (high - low))
        distance = np.abs(uniform - (np.arange(count) + 0.5) / count).max()
        assert distance < 2.23 / np.sqrt(count) + 1e-3


def test_permutations_are_uniform() -> None:
    """Each of the 24 orders of four things is equally likely: chi-squared with 23 degrees, 99.99 % bound."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(permutation((seed,), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 55.0
