"""Weights of several nets and what becomes of their probabilities: against plain numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from alexprep.shards.errors import AlexprepError
from alexprep.train.ensemble import WeightSearch, mixture, parse_weights, shares
from alexprep.train.metrics import image_errors
from alexprep.train.predictions import Predicted

Array = NDArray[np.float64]

pytestmark = pytest.mark.usefixtures("one_thread")


def predicted(p: Array, labels: NDArray[np.int64]) -> Predicted:
    return Predicted(torch.from_numpy(np.log(p)), torch.from_numpy(labels), torch.arange(len(labels)))


def test_mixture_equals_numpy_even_where_probabilities_vanish(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = softmax(rng.normal(scale=3, size=(50, 7, 30)), axis=-1)
    weights = shares(rng.random(7).tolist(), 7)
    found = mixture(torch.from_numpy(np.log(p)), weights).numpy()
    np.testing.assert_allclose(found, np.log(np.tensordot(p, weights, axes=(1, 0))), rtol=1e-12)
    logs = torch.tensor([[[-2000.0, 0.0], [-3000.0, 0.0]]], dtype=torch.float64)
    assert mixture(logs, [0.5, 0.5])[0, 0].item() == pytest.approx(-2000 + np.log(0.5))
    assert mixture(logs, [0.0, 1.0])[0, 0].item() == -3000


def test_what_the_search_keeps_decides_every_weighting(seed: int) -> None:
    """The error that the search computes from undecided classes alone is the error, ties included, for any weights."""
    rng = np.random.default_rng(seed)
    levels = np.array([0.01, 0.02, 0.04, 0.08])  # so few values that many tie
    p = levels[rng.integers(0, 4, size=(300, 3, 12))]
    labels = rng.integers(-1, 12, size=300)
    search = WeightSearch()
    for first in range(0, 300, 64):
        search.add(predicted(p[first : first + 64], labels[first : first + 64]))
    search.best_weights()
    for coefficients in ([1, 0, 0], [10, 10, 10], [20, 5, 1], [0, 3, 7], [1, 2, 4]):
        exact = np.zeros((300, 12))
        for net, coefficient in enumerate(coefficients):  # multiples of 0.01 as integers: ties are exact
            exact += coefficient * np.round(100 * p[:, net])
        columns = image_errors(torch.from_numpy(np.log(exact)), torch.from_numpy(labels)).numpy()[:, labels >= 0]
        assert search.error(coefficients) == pytest.approx(1 - columns[2].mean(), abs=1e-12)
        shared = mixture(torch.from_numpy(np.log(p)), shares(coefficients, 3))
        losses = image_errors(shared, torch.from_numpy(labels)).numpy()[0, labels >= 0]
        assert search.loss(coefficients) == pytest.approx(losses.mean(), rel=1e-12)


def test_the_search_finds_the_known_optimum() -> None:
    """Six classes, the label's rivals all alike: half of the images need a share of net a above 0.6, half one below 0.7."""

    def image(a: float, b: float) -> Array:
        return np.array([[q, *[(1 - q) / 5] * 5] for q in (a, b)])

    p = np.stack([image(0.2, (1 / 6 - 0.6 * 0.2) / 0.4)] * 10 + [image((1 / 6 - 0.3 * 0.2) / 0.7, 0.2)] * 10)
    search = WeightSearch()
    search.add(predicted(p, np.zeros(20, np.int64)))
    found = search.best_weights()
    assert 0.6 < found[0] < 0.7 and sum(found) == pytest.approx(1)
    assert search.error([13, 7]) == 0 and search.error([10, 10]) == search.error([20, 5]) == 0.5


def test_the_search_leaves_a_harmful_net_out() -> None:
    """Equal top-5 errors are told apart by the cross-entropy; here there are four classes, so top-5 never errs."""
    good, bad = [0.7, 0.1, 0.1, 0.1], [0.01, 0.33, 0.33, 0.33]
    search = WeightSearch()
    search.add(predicted(np.array([[good, bad]] * 9), np.zeros(9, np.int64)))
    assert search.best_weights() == [1, 0]
    nothing = WeightSearch()
    nothing.add(predicted(np.array([[good, bad]]), np.array([-1])))
    with pytest.raises(AlexprepError, match="none of the images has a label"):
        nothing.best_weights()


@pytest.mark.parametrize("weights", [[1.0], [1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_make_no_sense(weights: list[float]) -> None:
    with pytest.raises(AlexprepError, match="--weights"):
        shares(weights, 2)
    with pytest.raises(AlexprepError, match="neither equal, search, nor numbers"):
        parse_weights("much")
