"""Several nets as one: the weighted mean of their probabilities, and weights that a labelled split chooses.

The search is the one of the 2012 code's avg-valid script: one coefficient a net, all at 0.5 in the beginning; each in turn tries
0, 0.05, … 1 and keeps what has the lowest top-5 error; again, until nothing falls. Ours breaks equal errors by the cross-entropy,
and shares places among ties as everywhere (that script gives them to the lowest label).
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.train.metrics import NO_LABELS, TOP, Pace, figures, means
from alexprep.train.precision import Precision, float32_kernels
from alexprep.train.predictions import Columns, EvaluationViews, Kept, Net, Predicted, open_readers, predictions

# -------------------- Several nets as one: the weighted mean of their probabilities, and weights that a labelled split chooses.


GRID = 20  # a coefficient is a number of twentieths
START = 10
_NOISE = 1e-12  # what rounding may do to an error or a loss

Weights = Literal["equal", "search"] | Sequence[float]


def parse_weights(text: str) -> Weights:
    """What `--weights` says: "equal", "search", or numbers.

    Raises:
        AlexprepError: it is none of these.

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
    """Weights divided by their sum.

    Raises:
        AlexprepError: there is not one for each net, one is negative or not finite, or all are 0.

    >>> shares([2, 1, 1], 3)
    [0.5, 0.25, 0.25]
    """
    given = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != nets:
        raise AlexprepError(f"--weights {given} are {len(weights)} numbers for {nets} nets: give one a net")
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        raise AlexprepError(f"--weights {given}: they must be 0 or more, and not all 0")
    # Scaled, or the sum of large ones is infinite; a power of two rounds nothing.
    _, exponent = math.frexp(max(weights))
    parts = [math.ldexp(weight, -exponent) for weight in weights]
    total = math.fsum(parts)
    return [part / total for part in parts]


def mixture(logs: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The logarithm of the weighted mean of probabilities.

    Args:
        logs: float64 (N, K, classes), logarithms of probabilities.
        weights: K, with sum 1.

    Returns:
        float64 (N, classes).
    """
    if logs.shape[1] == 1:
        return logs[:, 0]
    return torch.logsumexp(logs + torch.tensor(weights, dtype=logs.dtype, device=logs.device).log()[:, None], dim=1)


class Contest:
    """All that decides top-5 error and cross-entropy for every possible weighting, and nothing else.

    A class that every net puts above the label, or every net below it, is there whatever the weights. Only the others are kept, and only
    of images where they matter: for trained nets a few in a hundred of all probabilities. In the worst case (untrained nets) it is all
    of them, as float32.
    """

    def __init__(self) -> None:
        """No image yet."""
        self._settled = self._images = 0
        self._label_logs = Columns(np.float64)  # (K, N)
        self._above = Columns(
            np.int64
        )  # (I,): of each contested image, the classes that are above the label in any case
        self._own = Columns(np.float32)  # (K, I): the label's probability over the largest one of the image
        self._owners = Columns(np.int64)  # (M,): of each undecided class, the contested image
        self._others = Columns(np.float32)  # (K, M): its probability, likewise

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
        self._settled += int((most < TOP).sum())
        self._images += len(labels)
        self._label_logs.add(own[:, :, 0].T.cpu().numpy())

        images, classes = undecided[contested].nonzero(as_tuple=True)
        rivals = logs[contested][images, :, classes]  # (M, K)
        mine = own[contested][:, :, 0]  # (I, K)
        largest = mine.amax(dim=1).scatter_reduce(0, images, rivals.amax(dim=1), "amax")
        self._owners.add(images.cpu().numpy() + len(self._above))
        self._above.add(sure[contested].cpu().numpy())
        self._own.add((mine - largest[:, None]).exp().T.cpu().numpy())
        self._others.add((rivals - largest[images, None]).exp().T.cpu().numpy())

    def search(self) -> list[float]:
        """Weights with sum 1 whose top-5 error no change of one coefficient lowers.

        Raises:
            AlexprepError: no image has a label.
        """
        if not self._images:
            raise AlexprepError(NO_LABELS)
        coefficients = [START] * len(self._label_logs.array)
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
        return 1 - (self._settled + math.fsum(credit.tolist())) / self._images

    def loss(self, coefficients: Sequence[float]) -> float:
        """The mean cross-entropy, nats, likewise."""
        logs = self._label_logs.array
        with np.errstate(divide="ignore"):
            weighted = logs + np.log(shares(coefficients, len(coefficients)))[:, None]
        largest = weighted.max(axis=0)
        return float(-(np.log(np.exp(weighted - largest).sum(axis=0)) + largest).mean())


def _weighted(values: NDArray[np.float32], coefficients: Sequence[float]) -> NDArray[np.float64]:
    """The sum over nets, added in the same order for every entry, so that what ties in each net ties in the sum."""
    total = np.zeros(values.shape[1])
    for row, coefficient in zip(values, coefficients, strict=True):
        if coefficient:
            total += row.astype(np.float64) * coefficient
    return total


# -------------------- What an evaluation knows of every image: its figures and the five best classes. Errors, classes and confusions follow from it.


class ClassError(NamedTuple):
    """A class and its errors, percent; None where it has no image."""

    label: int
    name: str
    images: int
    top1_error: float | None
    top5_error: float | None


class Confusion(NamedTuple):
    """How often images of one class have another one as their best guess."""

    true: str
    guessed: str
    times: int
    images: int  # of the true class


class Scores:
    """Figures of each image, batch by batch, kept on the CPU: 40 bytes an image, 60 with guesses."""

    def __init__(self, guesses: bool = False) -> None:
        """No image yet; with `guesses`, the best classes are kept as well."""
        self._guesses = guesses
        self._figures = Columns(np.float64)  # (3, N), see `figures`
        self._labels = Columns(np.int64)
        self._rows = Columns(np.int64)
        self._best = Columns(np.int32)  # (5, N)

    def add(self, logs: torch.Tensor, predicted: Predicted) -> None:
        """Takes in a batch: `logs`, float64 (N, classes), of the images of `predicted`."""
        self._figures.add(figures(logs, predicted.labels).cpu().numpy())
        self._labels.add(predicted.labels.cpu().numpy())
        self._rows.add(predicted.rows.numpy())
        if self._guesses:
            self._best.add(_best(logs).T.cpu().numpy())

    @property
    def images(self) -> int:
        """Images seen, with or without a label."""
        return len(self._labels)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,); -1 where unknown."""
        return self._labels.array

    @property
    def rows(self) -> NDArray[np.int64]:
        """(N,): rows of the split's index."""
        return self._rows.array

    @property
    def best(self) -> NDArray[np.int32]:
        """(N, 5), or fewer where there are fewer classes: the best classes, best first; among equals the lower label first."""
        return self._best.array.T

    def summary(self) -> dict[str, float | None]:
        """top1_error, top5_error (percent), loss (nats), and top1_standard_error, top5_standard_error (points: of the mean over such images).

        All None where no image has a label.
        """
        columns = torch.from_numpy(self._figures.array)
        known = columns[:, ~columns[0].isnan()]
        count = known.shape[1]
        if not count:
            names = ("top1_error", "top5_error", "loss", "top1_standard_error", "top5_standard_error")
            return dict.fromkeys(names)
        found = means(columns)
        spread = known.std(dim=1, correction=0) / math.sqrt(count)
        return {
            "top1_error": found["top1_error"],
            "top5_error": found["top5_error"],
            "loss": found["loss"],
            "top1_standard_error": 100 * float(spread[1]),
            "top5_standard_error": 100 * float(spread[2]),
        }

    def by_class(self, names: list[str]) -> list[ClassError]:
        """Every class, by label, with the errors of its images."""
        labels = self.labels
        known = labels >= 0
        columns = self._figures.array[:, known]
        counts = np.bincount(labels[known], minlength=len(names))
        credits = [np.bincount(labels[known], columns[row], minlength=len(names)) for row in (1, 2)]
        table = []
        for label, (name, images) in enumerate(zip(names, counts.tolist(), strict=True)):
            errors = [100 * (1 - float(total[label]) / images) if images else None for total in credits]
            table.append(ClassError(label, name, images, *errors))
        return table

    def confusions(self, names: list[str], most: int = 10) -> list[Confusion]:
        """The pairs of classes that are taken for one another most often: the best guess instead of the true class."""
        labels, guesses = self.labels, self.best[:, 0].astype(np.int64)
        wrong = (labels >= 0) & (guesses != labels)
        pairs, times = np.unique(labels[wrong] * len(names) + guesses[wrong], return_counts=True)
        order = np.argsort(-times, kind="stable")[:most]
        counts = np.bincount(labels[labels >= 0], minlength=len(names))
        return [
            Confusion(names[true], names[guess], int(n), int(counts[true]))
            for true, guess, n in zip(*np.divmod(pairs[order], len(names)), times[order], strict=True)
        ]


def _best(logs: torch.Tensor) -> torch.Tensor:
    """The best classes of each image, at most five, int64; of equal ones the lower label first, which `topk` alone does not promise."""
    count = min(TOP, logs.shape[1])
    values, classes = logs.topk(count, dim=1)
    ties = (values[:, 1:] == values[:, :-1]).any(dim=1)
    ties |= torch.count_nonzero(logs >= values[:, -1:], dim=1) > count
    classes[ties] = logs[ties].argsort(dim=1, descending=True, stable=True)[:, :count]
    return classes


def ranked(table: list[ClassError]) -> list[ClassError]:
    """The classes that have images, lowest top-1 error first, then lowest top-5 error, then label."""

    def key(row: ClassError) -> tuple[Any, ...]:
        return row.top1_error, row.top5_error, row.label

    return sorted((row for row in table if row.images), key=key)


def class_csv(table: list[ClassError]) -> bytes:
    """The table as CSV with a header: label, class, images, top1_error, top5_error (percent, empty where there is no image).

    Raises:
        AlexprepError: no image has a label.
    """
    if not any(row.images for row in table):
        raise AlexprepError("none of the images has a label, so there are no errors by class: leave --classes out")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "class", "images", "top1_error", "top5_error"])
    for row in table:
        errors = ["" if error is None else f"{error:.4f}" for error in row[3:]]
        writer.writerow([row.label, row.name, row.images, *errors])
    return text.getvalue().encode()


# -------------------- Nets going through splits together: each by itself, and all as one.


Progress = Callable[[int, int], None]
OpenSplit = Callable[..., Any]  # as `alexprep.pipeline.loader.Loader`


@dataclass(frozen=True)
class Passes:
    """How nets are shown a data set's images; of their outputs only the batch at hand is in memory.

    Attributes:
        nets: at least one.
        statistics: a net: the data set whose mean it is shown images without; None for the evaluated one's.
        data: the evaluated one.
        views: of each image.
        batch_size: crops at a time.
        threads: of each loader, for decoding; None for what the loader takes.
        device: of the nets.
        precision: that they compute in.
        open_loader: opens a split.
        progress: called with images done and images in all of a pass.
        pace: of all passes.
    """

    nets: Sequence[Net]
    statistics: Sequence[Path | None]
    data: Path
    views: EvaluationViews
    batch_size: int
    threads: int | None
    device: torch.device
    precision: Precision
    open_loader: OpenSplit
    progress: Progress | None
    pace: Pace = field(default_factory=Pace)

    def scores(
        self, split: str, fixed: list[float] | None, weights_from: str
    ) -> tuple[Scores, list[Scores], list[float]]:
        """Goes through a split.

        Args:
            split: of the images that count.
            fixed: a net's weight; None to search for the best ones.
            weights_from: the split to search on; where it is `split`, one pass does for both.

        Returns:
            Scores of all nets as one, with the best guesses; scores of each; the weights.

        Raises:
            AlexprepError: there is no image.
        """
        contest, whole = Contest(), Scores(guesses=True)
        single = [Scores() for _ in self.nets]
        with contextlib.closing(Kept()) as kept:

            def measure(predicted: Predicted) -> None:
                for number, scores in enumerate(single):
                    scores.add(predicted.logs[:, number], predicted)
                if fixed is None:
                    kept.add(predicted)
                    contest.add(predicted)
                else:
                    whole.add(mixture(predicted.logs, fixed), predicted)

            if fixed is None and weights_from != split:
                self._through(weights_from, contest.add)
                fixed = contest.search()
            self._through(split, measure)
            if not single[0].images:
                raise AlexprepError("there is no image to evaluate on: name another --split")
            if fixed is None:
                fixed = contest.search()
                for predicted in kept:
                    whole.add(mixture(predicted.logs, fixed), predicted)
        return whole, single, fixed

    def _through(self, split: str, take: Callable[[Predicted], None]) -> None:
        with (
            torch.inference_mode(),
            float32_kernels(self.precision),
            open_readers(
                self.nets,
                self.data,
                split,
                self.views,
                self.batch_size,
                self.threads,
                self.device,
                self.statistics,
                self.open_loader,
            ) as readers,
        ):
            for predicted in predictions(self.nets, readers, self.precision, self.pace, self.progress):
                take(predicted)
