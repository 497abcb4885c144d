"""Errors against plain numpy on the same logits, the 2012 code's rule for ties, and the means and times of an epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.metrics import Means, RunningTotals, StepTimer, top_k_credit, validate
from alexprep.train.precision import Precision


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


class Table(nn.Module):
    """Looks its logits up: the first pixel of an image is the row. In training mode it gives nonsense."""

    def __init__(self, logits: NDArray[np.float64]) -> None:
        super().__init__()
        self.logits = torch.from_numpy(logits).float()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.ndim == 4
        return self.logits[images[:, 0, 0, 0].long()] * (float("nan") if self.training else 1.0)


def batches(labels: NDArray[np.int64], size: int, views: int | None = None) -> list[Batch]:
    """Images whose first pixel is their row, or sample · views + view."""
    images = torch.zeros(len(labels), views or 1, 3, 2, 2)
    images[:, :, 0, 0, 0] = torch.arange(images.shape[0] * images.shape[1]).reshape(len(labels), -1)
    if views is None:
        images = images[:, 0]
    numbers = torch.from_numpy(labels)
    return [Batch(images[i : i + size], numbers[i : i + size]) for i in range(0, len(labels), size)]


def reference_credit(scores: NDArray[np.float64], label: int, k: int) -> float:
    """Sorts, then shares the places that are left among those that tie with the label."""
    own = scores[label]
    before = sum(score > own for score in scores)
    tied = sum(score == own for score in scores)
    return 0.0 if before >= k else min(1.0, (k - before) / tied)


def test_credit_shares_places_among_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, size=(500, 9)).astype(np.float64)
    labels = rng.integers(0, 9, size=500)
    ks = (1, 2, 5, 9, 12)
    wanted = [[reference_credit(row, label, k) for row, label in zip(scores, labels, strict=True)] for k in ks]
    found = top_k_credit(torch.from_numpy(scores), torch.from_numpy(labels), ks)
    np.testing.assert_allclose(found, wanted, rtol=1e-15)


def test_an_all_equal_network_is_as_good_as_chance() -> None:
    result = validate(Table(np.zeros((1000, 1000))), batches(np.arange(1000), 64))
    assert result["top1_error"] == pytest.approx(99.9, abs=1e-9)
    assert result["top5_error"] == pytest.approx(99.5, abs=1e-9)
    assert result["loss"] == pytest.approx(np.log(1000))


@pytest.mark.parametrize(("views", "count"), [(None, 301), (10, 57)])
def test_errors_equal_numpy_and_views_average_the_softmax(views: int | None, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=4, size=(count, views or 1, 8)).astype(np.float32)
    labels = rng.integers(0, 8, size=count)
    mean = softmax(logits.astype(np.float64), axis=-1).mean(axis=1)
    order = np.argsort(-mean, axis=1)
    network = Table(logits.reshape(-1, 8).astype(np.float64))
    result = validate(network, batches(labels, 50, views))
    assert result["samples"] == count
    assert result["top1_error"] == pytest.approx(100 * np.mean(order[:, 0] != labels))
    assert result["top5_error"] == pytest.approx(100 * np.mean(~(order[:, :5] == labels[:, None]).any(axis=1)))
    assert result["loss"] == pytest.approx(-np.log(mean[np.arange(count), labels]).mean(), rel=1e-12)
    assert network.training  # as it came in
    # The other reading of "averaging" would give another answer where there are several views.
    assert (logits.mean(axis=1).argmax(axis=1) != order[:, 0]).any() == (views is not None)


def test_result_does_not_depend_on_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = Table(rng.integers(-30, 30, size=(400, 9)) / 7)
    labels = rng.integers(0, 9, size=400)
    results = [validate(network, batches(labels, size)) for size in (1, 3, 64, 399, 400)]
    assert all(result == results[0] for result in results)


def test_tiny_probabilities_do_not_overflow() -> None:
    logits = np.array([[0.0, -2000.0], [0.0, -2000.0]])
    assert validate(Table(logits), batches(np.array([1, 1]), 2))["loss"] == 2000.0


def test_divergence_and_emptiness_are_told() -> None:
    told: dict[Precision, str] = {"fp32": "a lower --lr", "fp16": "try --precision bf16"}
    for precision, advice in told.items():
        with pytest.raises(AlexprepError, match=f"NaN or infinity.*{advice}"):
            validate(Table(np.array([[1.0, np.nan]])), batches(np.array([0]), 1), precision)
    with pytest.raises(AlexprepError, match="no image to evaluate"):
        validate(Table(np.zeros((1, 2))), [])
    with pytest.raises(AlexprepError, match="none of the images has a label"):
        validate(Table(np.zeros((2, 2))), batches(np.array([-1, -1]), 2))


def test_means_of_what_was_added() -> None:
    totals = RunningTotals(torch.device("cpu"))
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 2.0]])
    totals.add(torch.tensor(3.0), logits, torch.tensor([0, 0, 2]))  # one of three wrong
    earlier = totals.totals.clone()
    totals.add(torch.tensor(1.0), logits[:1], torch.tensor([1]))  # wrong
    assert totals.since(earlier) == Means(1.0, 100.0, 0.0)
    assert totals.since(torch.zeros(4)) == Means(2.5, 50.0, 0.0)


def test_the_timer_tells_waiting_from_working() -> None:
    timer = StepTimer()
    timer.count(10, 1.0, 3.0)
    earlier = replace(timer)
    for _ in range(4):
        timer.count(8, 0.25, 0.75)
    assert timer.since(earlier) == {"images_per_second": 8.0, "data_wait_ms": 250.0, "step_ms": 750.0}
    assert timer.since(StepTimer())["images_per_second"] == 42 / 8
