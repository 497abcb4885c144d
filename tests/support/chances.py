"""Whether what was drawn has the distribution that it should have."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import chdtri  # of scipy.special alone, which is imported in a fraction of scipy.stats' time


def check_as_often(counts: Any, weights: ArrayLike) -> None:
    """Fails where classes, of which each was drawn `counts` times, are not as frequent as `weights` say: chi-squared at 99.99 %."""
    expected = np.sum(counts) * np.array(weights) / np.sum(weights)
    assert ((counts - expected) ** 2 / expected).sum() < chdtri(len(expected) - 1, 1e-4)


def check_alike(one: ArrayLike, other: ArrayLike, bins: ArrayLike) -> None:
    """Fails where two samples of numbers are not of one distribution: chi-squared of their counts in bins, at 99.99 %."""
    counts = np.stack([np.histogram(values, bins)[0] for values in (one, other)])
    assert counts.sum(axis=1).tolist() == [np.size(one), np.size(other)], "values outside of the bins"
    check_tallies(counts)


def check_tallies(counts_2N: Any) -> None:
    """Fails where classes, counted in two samples, are not as frequent in one as in the other: chi-squared at 99.99 %."""
    counts = np.asarray(counts_2N, float)[:, np.sum(counts_2N, axis=0) > 0]
    totals = counts.sum(axis=1, keepdims=True)
    expected = totals * counts.sum(axis=0) / totals.sum()
    assert ((counts - expected) ** 2 / expected).sum() < chdtri(counts.shape[1] - 1, 1e-4), counts
