"""Pools, DropConnect, losses, max-norm and L1 against numpy, one value at a time; as switches; and exact resuming where they draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.distributed.tensor_parallel import Scheme, SharedDraws, part_of
from alexprep.train.distributed.world import World
from alexprep.train.field_values import Loss, Pool
from alexprep.train.losses import image_losses
from alexprep.train.models.layers import LocallyConnected2d
from alexprep.train.models.pools_and_dropconnect import (
    DropConnect,
    L2Pool2d,
    StochasticPool2d,
    pool_layer,
    pooled_up,
)
from alexprep.train.models.small import SmallNet
from alexprep.train.optimizer import shorten_kernels
from alexprep.train.recipes import RECIPES
from alexprep.train.trainer import train
from tests.made_up import MadeUpLoader, write_data
from tests.training_ranks import small_config

CPU = torch.device("cpu")
GEOMETRIES = [(3, 2), (2, 2), (3, 1), (3, 3), (5, 4)]  # size and stride of windows


def maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def windows(images: NDArray[Any], size: int, stride: int) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    """The place of each window in the output, and its pixels as far as there are any."""
    for n, c in np.ndindex(*images.shape[:2]):
        rows, columns = (math.ceil((side - size) / stride) + 1 for side in images.shape[2:])
        for i, j in np.ndindex(rows, columns):
            yield (n, c, i, j), images[n, c, i * stride : i * stride + size, j * stride : j * stride + size]


def reference(kind: Pool, pixels: NDArray[Any]) -> float:
    """One value, as the definitions say."""
    positive = np.maximum(pixels, 0)
    total = positive.sum()
    weighted = (positive / total * positive).sum() if total > 0 else 0.0
    kinds = {"max": pixels.max(), "average": pixels.mean(), "l2": math.sqrt((pixels**2).sum()), "stochastic": weighted}
    return float(kinds[kind])


@pytest.mark.parametrize("kind", ["max", "average", "l2", "stochastic"])
def test_pools_are_their_definitions(kind: Pool) -> None:
    for (size, stride), (height, width) in itertools.product(GEOMETRIES, [(7, 10), (5, 6)]):
        images = maps(size, 2, 3, height, width)
        images[1, 2] = -1.0  # a map without positive values
        found = pool_layer(kind, size, stride).eval()(images)
        assert found.shape[2:] == (pooled_up(height, size, stride), pooled_up(width, size, stride))
        for place, pixels in windows(images.numpy(), size, stride):
            assert found[place].item() == pytest.approx(reference(kind, pixels), abs=1e-12), (size, stride, place)


def test_pools_of_float16_do_not_overflow_in_their_squares() -> None:
    large, zeros = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16), torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    for pool, wanted in ((L2Pool2d(2, 2), 600.0), (StochasticPool2d(2, 2).eval(), 300.0)):
        assert (pool(large).item(), pool(zeros).item(), pool(large).dtype) == (wanted, 0.0, torch.float16)


def test_pools_have_the_gradients_of_their_values() -> None:
    images = maps(1, 1, 2, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(L2Pool2d(3, 2), (images,))
    assert torch.autograd.gradcheck(StochasticPool2d(3, 2).eval(), (images,))
    draws = torch.rand(1, 2, 2, 3, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda each: StochasticPool2d(3, 2).with_draws(each, draws), (images,))
    nothing = torch.zeros(1, 1, 4, 4, requires_grad=True)
    for pool in (L2Pool2d(2, 2), StochasticPool2d(2, 2)):
        pool(nothing).sum().backward()
        assert nothing.grad is not None and torch.isfinite(nothing.grad).all()


def test_stochastic_pooling_takes_the_value_that_numpy_takes() -> None:
    """The first whose cumulative probability exceeds the draw; also for draws next to 1 and for windows over the edge."""
    pool = StochasticPool2d(3, 2)
    images = maps(3, 2, 3, 8, 7).float()
    draws = torch.rand(pool.drawn([2, 3, 8, 7], images).shape, generator=torch.Generator().manual_seed(4))
    draws[0, 0] = 1 - 2**-24  # the highest that torch draws
    draws[0, 1] = 0.0
    found = pool.with_draws(images, draws)
    for place, pixels in windows(images.numpy(), 3, 2):
        values = np.maximum(pixels, 0).ravel()
        share = values.cumsum(dtype=np.float64) / max(values.sum(dtype=np.float64), 1e-300)
        wanted = values[np.argmax(share > float(draws[place]))] if values.any() else 0.0
        assert found[place].item() == wanted or abs(share - float(draws[place])).min() < 1e-6, place
        assert found[place].item() > 0 or not values.any()


def test_stochastic_pooling_draws_in_proportion() -> None:
    pool, images = (
        StochasticPool2d(2, 2),
        torch.tensor([1.0, 2.0, 0.0, 5.0]).reshape(1, 1, 2, 2).repeat(40_000, 1, 1, 1),
    )
    torch.manual_seed(5)
    found = pool(images).flatten()
    for value in (1.0, 2.0, 5.0):
        share = value / 8
        error = 5 * math.sqrt(share * (1 - share) / len(found))
        assert abs((found == value).double().mean().item() - share) < error
    assert not (found == 0).any()


def test_dropconnect_is_numpy_with_its_masks() -> None:
    torch.manual_seed(6)
    layer = DropConnect(7, 5, keep=0.25).double()
    values = maps(7, 4, 7)
    weight, bias = (each.detach().numpy() for each in (layer.weight, layer.bias))
    masks = layer.drawn([4, 7], values)
    assert masks.shape == (4, 5, 7) and masks.dtype == torch.bool
    found = layer.with_draws(values, masks)
    for n in range(4):
        wanted = (weight * masks[n].numpy()) @ values[n].numpy() + bias
        assert np.allclose(found[n].detach().numpy(), wanted, rtol=0, atol=1e-12)
    shared = layer.with_draws(values, masks[:1]).detach().numpy()
    assert np.allclose(shared, values.numpy() @ (weight * masks[0].numpy()).T + bias, rtol=0, atol=1e-12)
    assert np.allclose(
        layer.eval()(values).detach().numpy(), 0.25 * values.numpy() @ weight.T + bias, rtol=0, atol=1e-12
    )
    many = layer.drawn([20_000, 7], values).double().mean().item()
    assert abs(many - 0.25) < 5 * math.sqrt(0.25 * 0.75 / (20_000 * 35))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "euclidean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_their_formulas(kind: Loss, smoothing: float) -> None:
    output, labels = 3 * maps(8, 6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    target = np.eye(4)[labels.numpy()] * (1 - smoothing) + smoothing / 4
    x = output.numpy()
    sigmoid = 1 / (1 + np.exp(-x))
    wanted = {
        "softmax": -(target * (x - np.log(np.exp(x).sum(axis=1, keepdims=True)))).sum(axis=1),
        "sigmoid": -(target * np.log(sigmoid) + (1 - target) * np.log(1 - sigmoid)).sum(axis=1),
        "euclidean": 0.5 * ((x - target) ** 2).sum(axis=1),
    }[kind]
    assert np.allclose(image_losses(kind, output, labels, smoothing).numpy(), wanted, rtol=1e-12)


def test_max_norm_shortens_the_weights_into_each_unit() -> None:
    torch.manual_seed(9)
    local = LocallyConnected2d(2, 3, 4, 3)
    network = nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.Linear(5, 4), local, nn.GroupNorm(1, 6))
    before = {name: weight.detach().clone().numpy() for name, weight in network.named_parameters()}
    shorten_kernels(network, 0.5)
    for name, weight in network.named_parameters():
        was = before[name]
        if name.endswith("bias") or name.startswith("3"):
            assert np.array_equal(weight.detach().numpy(), was)
            continue
        inputs = (2, 3, 4) if name.startswith("2") else tuple(range(1, was.ndim))
        lengths = np.sqrt((was.astype(np.float64) ** 2).sum(axis=inputs, keepdims=True))
        assert (lengths > 0.5).any(), name
        assert np.allclose(weight.detach().numpy(), was * np.minimum(1, 0.5 / lengths), rtol=1e-6), name


@pytest.mark.parametrize("optimizer", ["paper", "sgd"])
def test_elastic_net_is_its_formula(optimizer: str) -> None:
    """Two steps of v <- momentum · v - rate · (gradient + decay · w + l1 · sign(w)), biases without either."""
    recipe = replace(RECIPES["small-net"], l1=0.03, decay=0.2, lr=0.1, optimizer=optimizer)
    layer = nn.Linear(3, 2).double()
    rule = recipe.make_optimizer(layer)
    weight, bias = (each.detach().numpy().copy() for each in (layer.weight, layer.bias))
    velocity, bias_velocity = np.zeros_like(weight), np.zeros_like(bias)
    for step in range(2):
        gradient, bias_gradient = maps(step, 2, 3).numpy(), maps(step + 9, 2).numpy()
        layer.weight.grad, layer.bias.grad = torch.tensor(gradient), torch.tensor(bias_gradient)
        rule.step()
        velocity = 0.9 * velocity - 0.1 * (gradient + 0.2 * weight + 0.03 * np.sign(weight))
        bias_velocity = 0.9 * bias_velocity - 0.1 * bias_gradient
        weight, bias = weight + velocity, bias + bias_velocity
    assert np.allclose(layer.weight.detach().numpy(), weight, rtol=0, atol=1e-14)
    assert np.allclose(layer.bias.detach().numpy(), bias, rtol=0, atol=1e-14)


DRAWING = ("network.pool=stochastic", "network.dropout=weights", "loss=sigmoid", "l1=1e-4", "max_norm=2")


def test_a_run_that_was_broken_off_ends_with_the_same_bits(tmp_path: Path) -> None:
    """With every layer that draws random numbers, and every switch of this page."""
    data = write_data(tmp_path / "data", Little)
    options = {"recipe": "small-net", "settings": (*DRAWING, "width=0.0625"), "batch_size": 4, "data": data}
    whole = small_train(**options, name="whole", steps=4)
    small_train(**options, name="cut", steps=2)
    assert small_train(**options, name="cut", steps=4, resume=True) == whole
    assert small_train(**{**options, "settings": ("width=0.0625",)}, name="plain", steps=4) != whole


@pytest.mark.parametrize("sizes", [[2, 3], [0, 5]])
def test_ranks_draw_what_one_device_draws(sizes: list[int]) -> None:
    values = maps(10, 5, 4, 6, 6).float()
    for layer, given in ((StochasticPool2d(3, 2), values), (DropConnect(8, 3), values.flatten(1)[:, :8])):
        torch.manual_seed(11)
        whole = layer(given)
        for rank in range(2):
            torch.manual_seed(11)
            layer.shared = SharedDraws(sizes, None, World(rank, 2, CPU))
            own = torch.split(given, sizes)[rank]
            assert torch.equal(layer(own), torch.split(whole, sizes)[rank])
    torch.manual_seed(11)
    pool = StochasticPool2d(3, 2)
    whole = pool(values)
    torch.manual_seed(11)
    pool.shared = SharedDraws(None, [1, 3], World(1, 2, CPU))
    assert torch.equal(pool(values[:, 1:]), whole[:, 1:])


def test_schemes_share_the_draws_or_say_why_not() -> None:
    world = World(0, 2, CPU)
    pooled, both = SmallNet(pool="stochastic"), SmallNet(pool="stochastic", dropout="weights")
    cases: list[tuple[SmallNet, Scheme]] = [(pooled, "towers"), (pooled, "hybrid"), (both, "ddp")]
    for design, scheme in cases:
        part = part_of(design(4, 16, width=0.0625), scheme, world).network
        drawing = [layer for layer in part.modules() if isinstance(layer, StochasticPool2d | DropConnect)]
        assert drawing and all(layer.shared is not None for layer in drawing)
    with pytest.raises(AlexprepError, match="cannot split fc3, whose masks are drawn for all of its weights: use ddp"):
        part_of(SmallNet(dropout="weights")(4, 16, width=0.0625), "towers", world)


def test_positions_that_a_switch_does_not_have() -> None:
    for wrong in ({"pool": "median"}, {"pool_size": 4}, {"dropout": "all"}, {"activation": "gelu"}):
        with pytest.raises(AlexprepError, match=next(iter(wrong))):
            replace(SmallNet(), **wrong)
    for wrong_recipe in ({"loss": "hinge"}, {"l1": -1.0}, {"max_norm": 0.0}):
        with pytest.raises(AlexprepError, match=next(iter(wrong_recipe))):
            replace(RECIPES["small-net"], **wrong_recipe)
    with pytest.raises(AlexprepError, match="stride 4"):
        pool_layer("l2", 3, 4)


class Little(MadeUpLoader):
    side, training, others = 28, 16, 8


def small_train(**options: Any) -> str:
    """The digest of the weights with which such a run ends."""
    digest: str = train(small_config(**options), Little)["weights_sha256"]
    return digest
