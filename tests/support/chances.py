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
