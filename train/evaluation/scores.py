"""What an evaluation knows of every image: its figures and the five best classes. Errors, classes and confusions follow from it."""

from __future__ import annotations

import csv
import io
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.train.evaluation.columns import Columns
from alexprep.train.metrics import TOP, figures, means
from alexprep.train.predictions import Predicted


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
