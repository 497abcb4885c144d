"""Distributions that follow from what the suite proves, seen in many draws: `python -m pytest tests/stress/distributions.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from alexprep.pipeline.augmentation import Augmentation, colour_shifts, draw, noise_stdevs
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.plan import permutation
from alexprep.shards.rgb_statistics import read_statistics


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


def test_alpha_is_standard_normal() -> None:
    count = 100_000
    alpha = draw(Augmentation(), 2, 0, np.arange(count), np.full((count, 2), 224)).alpha_N3
    assert np.abs(alpha.mean(axis=0)).max() < 4 / np.sqrt(count)
    assert np.abs(np.cov(alpha.T) - np.eye(3)).max() < 4 * np.sqrt(2 / count)
    assert np.abs((alpha**3).mean(axis=0)).max() < 4 * np.sqrt(15 / count)
    assert np.abs((alpha**4).mean(axis=0) - 3).max() < 4 * np.sqrt(96 / count)


def test_noise_has_the_stated_covariance(data: Path) -> None:
    """Cov = sigma² V diag(s²) Vᵀ, with s the eigenvalue on the 0-1 scale times 255, or its square root on 0-255."""
    found = read_statistics(data, read_dataset(data)["digest"])
    alpha = draw(Augmentation(), 0, 0, np.arange(200_000), np.full((200_000, 2), 224)).alpha_N3
    noise: Any
    for noise, scale in (("eigenvalue", found.eigenvalues / 255), ("stdev", np.sqrt(found.eigenvalues))):
        augmentation = Augmentation(noise=noise)
        np.testing.assert_allclose(noise_stdevs(found, augmentation), 0.1 * scale)
        shifts = colour_shifts(alpha, found, augmentation)
        expected = found.eigenvectors @ np.diag((0.1 * scale) ** 2) @ found.eigenvectors.T
        np.testing.assert_allclose(np.cov(shifts.T), expected, rtol=0.03, atol=0.02 * np.abs(expected).max())
