"""Several nets as one: the weighted mean of their probabilities, and weights that a labelled split chooses.

The search is the one of the 2012 code's avg-valid script: one coefficient a net, all at 0.5 in the beginning; each in turn tries
0, 0.05, … 1 and keeps what has the lowest top-5 error; again, until nothing falls. Ours breaks equal errors by the cross-entropy,
and shares places among ties as everywhere (that script gives them to the lowest label). Where the predictions come from, and what is
reported of them, is not decided here: see `predictions` and `evaluation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.train.metrics import NO_LABELS, TOP
from alexprep.train.predictions import GrowingArray, Predicted

GRID = 20  # a coefficient is a number of twentieths
START = 10
_NOISE = 1e-12  # what rounding may do to an error or a loss

Weights = Literal["equal", "search"] | Sequence[float]


def parse_weights(text: str) -> Weights:
    """Reads what `--weights` says: "equal", "search", or numbers.

    >>> parse_weights("2,1,1")
    [2.0, 1.0, 1.0]
    """
    if text in ("equal", "search"):
        return text  # type: ignore[return-value]
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise AlexprepError(f"--weights {text} is neither equal, search, nor numbers like 2,1,1") from None


def shares(weights: Sequence[float], nets: int) -> list[float]:
    """Divides weights by their sum.

    >>> shares([2, 1, 1], 3)
    [0.5, 0.25, 0.25]
    """
    given = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != nets:
        raise AlexprepError(f"--weights {given} are {len(weights)} numbers for {nets} nets: give one a net")
    if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise AlexprepError(f"--weights {given}: they must be 0 or more, not all 0, and not beyond all bounds")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def mixture(logs: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The logarithm of the mean of K nets' probabilities: float64 logarithms (N, K, classes) -> (N, classes). K weights, with sum 1."""
    if logs.shape[1] == 1:
        return logs[:, 0]
    return torch.logsumexp(logs + torch.tensor(weights, dtype=logs.dtype, device=logs.device).log()[:, None], dim=1)


class WeightSearch:
    """Finds weights; keeps all that decides top-5 error and cross-entropy for every possible weighting, and nothing else.

    A class that every net puts above the label, or every net below it, is there whatever the weights. Only the others are kept, and only
    of images where they matter: for trained nets a few in a hundred of all probabilities. In the worst case (untrained nets) it is all
    of them, as float32.
    """

    def __init__(self) -> None:
        """No image yet."""
        self._certain = self._images = 0
        self._label_logs = GrowingArray(np.float64)  # (N, K)
        self._above = GrowingArray(np.int64)  # (I,): of contested images, the classes above the label in any case
        self._own = GrowingArray(np.float32)  # (I, K): the label's probability over the largest one of the image
        self._owners = GrowingArray(np.int64)  # (M,): of each undecided class, the contested image
        self._others = GrowingArray(np.float32)  # (M, K): its probability, likewise

    def add(self, predicted: Predicted) -> None:
        """Takes in a batch; images without a label do not count."""
        known = predicted.labels >= 0
        logs, labels = predicted.logs[known], predicted.labels[known]
        own = logs.gather(2, labels[:, None, None].expand(-1, logs.shape[1], 1))  # (N, K, 1)
        above, below = (logs > own).all(dim=1), (logs < own).all(dim=1)
        undecided = ~(above | below)
        undecided.scatter_(1, labels[:, None], False)
        sure = above.sum(dim=1)
        most = sure + undecided.sum(dim=1)
        contested = (sure < TOP) & (most >= TOP)
        self._certain += int((most < TOP).sum())
        self._images += len(labels)
        self._label_logs.add(own[:, :, 0])

        images, classes = undecided[contested].nonzero(as_tuple=True)
        rivals = logs[contested][images, :, classes]  # (M, K)
        mine = own[contested][:, :, 0]  # (I, K)
        largest = mine.amax(dim=1).scatter_reduce(0, images, rivals.amax(dim=1), "amax")
        self._owners.add(images + len(self._above))
        self._above.add(sure[contested])
        self._own.add((mine - largest[:, None]).exp())
        self._others.add((rivals - largest[images, None]).exp())

    def best_weights(self) -> list[float]:
        """Weights with sum 1 whose top-5 error no change of one coefficient lowers."""
        if not self._images:
            raise AlexprepError(NO_LABELS)
        coefficients = [START] * self._label_logs.array.shape[1]
        best = self.error(coefficients), self.loss(coefficients)
        improved = True
        while improved:
            improved = False
            for net in range(len(coefficients)):
                for tried in range(GRID + 1):
                    trial = [*coefficients[:net], tried, *coefficients[net + 1 :]]
                    if tried == coefficients[net] or not any(trial):
                        continue
                    error = self.error(trial)
                    if error > best[0] + _NOISE:
                        continue
                    loss = self.loss(trial)
                    if error < best[0] - _NOISE or loss < best[1] - _NOISE:
                        coefficients, best, improved = trial, (error, loss), True
        return shares(coefficients, len(coefficients))

    def error(self, coefficients: Sequence[float]) -> float:
        """The top-5 error, 0 to 1."""
        own, others = (_weighted(values.array, coefficients) for values in (self._own, self._others))
        owners = self._owners.array
        higher = np.bincount(owners, others > own[owners], minlength=len(own))
        tied = np.bincount(owners, others == own[owners], minlength=len(own))
        credit = np.clip((TOP - self._above.array - higher) / (1 + tied), 0, 1)
        return 1 - (self._certain + math.fsum(credit.tolist())) / self._images

    def loss(self, coefficients: Sequence[float]) -> float:
        """The mean cross-entropy, nats, likewise."""
        logs = self._label_logs.array
        with np.errstate(divide="ignore"):
            weighted = logs + np.log(shares(coefficients, len(coefficients)))
        largest = weighted.max(axis=1, keepdims=True)
        return float(-(np.log(np.exp(weighted - largest).sum(axis=1)) + largest[:, 0]).mean())


def _weighted(values: NDArray[np.float32], coefficients: Sequence[float]) -> NDArray[np.float64]:
    """The sum over nets, added in the same order for every entry, so that what ties in each net ties in the sum."""
    total = np.zeros(len(values))
    for row, coefficient in zip(values.T, coefficients, strict=True):
        if coefficient:
            total += row.astype(np.float64) * coefficient
    return total
