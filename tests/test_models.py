"""Networks and layers against the paper's numbers and against independent float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.alexnet import alexnet
from alexprep.train.layers import LocalResponseNorm, Overhang, PaperDropout
from alexprep.train.small_networks import cifar10_quick_net, tiny_net

FULL = alexnet(1000)  # made once: 61 million random numbers


def shapes(network: nn.Sequential, images: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The output shape of every layer, without the batch."""
    found = {}
    with torch.no_grad():
        for name, layer in network.named_children():
            images = layer(images)
            found[name] = tuple(images.shape[1:])
    return found


def test_alexnet_has_the_papers_shapes_and_parameters() -> None:
    found = shapes(FULL.eval(), torch.zeros(1, 3, 224, 224))
    wanted = {
        "conv1": (96, 55, 55),
        "pool1": (96, 27, 27),
        "conv2": (256, 27, 27),
        "pool2": (256, 13, 13),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
        "pool5": (256, 6, 6),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (1000,),
    }
    assert {name: found[name] for name in wanted} == wanted
    kernels = {name: tuple(layer.weight.shape) for name, layer in FULL.named_children() if isinstance(layer, nn.Conv2d)}
    assert kernels == {  # section 3.5: "48", "192" inputs where a kernel sees only its own tower
        "conv1": (96, 3, 11, 11),
        "conv2": (256, 48, 5, 5),
        "conv3": (384, 256, 3, 3),
        "conv4": (384, 192, 3, 3),
        "conv5": (256, 192, 3, 3),
    }
    assert sum(parameter.numel() for parameter in FULL.parameters()) == 60_965_224
    order = list(dict(FULL.named_children()))
    assert order[1:5] == ["conv1", "relu1", "norm1", "pool1"]
    assert order[5:9] == ["conv2", "relu2", "norm2", "pool2"]


def test_alexnet_starts_as_section_5_says() -> None:
    for name, parameter in FULL.named_parameters():
        layer, _, kind = name.partition(".")
        if kind == "bias":
            wanted = 1.0 if layer in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
            assert (parameter == wanted).all(), name
        else:
            # Five standard errors of a mean and of a deviation.
            error = 5 * 0.01 / parameter.numel() ** 0.5
            assert abs(parameter.mean().item()) < error, name
            assert abs(parameter.std().item() - 0.01) < error, name
            assert parameter.abs().max() > 0.03, name  # not a uniform distribution of this deviation


@pytest.mark.parametrize("make", [alexnet, cifar10_quick_net, tiny_net])
def test_weights_depend_on_the_seed_alone(make: Callable[..., nn.Module]) -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in make(5, 80, seed=seed, width=0.125).parameters()])

    first = weights(3)
    torch.rand(7)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_towers_meet_only_at_conv3_and_above() -> None:
    network = alexnet(3, 67, width=0.125)

    def reach(layer: str) -> list[bool]:
        """Whether the first half of a layer's maps has a gradient in each half of conv1's kernels."""
        network.zero_grad()
        values = torch.ones(1, 3, 67, 67)
        for name, child in network.named_children():
            values = child(values)
            if name == layer:
                break
        values[:, : values.shape[1] // 2].sum().backward()  # type: ignore[no-untyped-call]
        gradient = network.get_parameter("conv1.weight").grad
        assert gradient is not None
        return [bool(half.abs().sum() > 0) for half in gradient.chunk(2)]

    assert reach("norm1") == [True, False]
    assert reach("conv2") == [True, False]
    assert reach("conv3") == [True, True]


def test_the_last_filter_hangs_over_the_right_and_bottom_edge() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 224, 224))
    kernel = rng.normal(size=(3, 11, 11))
    padded = np.zeros((3, 227, 227))
    padded[:, :224, :224] = pixels
    corner = {
        (y, x): float((padded[:, 4 * y : 4 * y + 11, 4 * x : 4 * x + 11] * kernel).sum())
        for y in (0, 54)
        for x in (0, 54)
    }
    layers = nn.Sequential(Overhang(224, kernel=11, stride=4), nn.Conv2d(3, 1, 11, stride=4, bias=False)).double()
    with torch.no_grad():
        layers[1].weight.copy_(torch.from_numpy(kernel)[None])  # type: ignore[operator]
        out = layers(torch.from_numpy(pixels)[None])[0, 0]
    assert out.shape == (55, 55)
    for (y, x), value in corner.items():
        assert out[y, x].item() == pytest.approx(value, rel=1e-12)


def reference_norm(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Section 3.3 written out, one map at a time."""
    b = np.empty_like(a)
    maps = a.shape[1]
    for i in range(maps):
        total = np.zeros_like(a[:, 0])
        for j in range(max(0, i - 2), min(maps - 1, i + 2) + 1):
            total += a[:, j] ** 2
        b[:, i] = a[:, i] / (2 + 1e-4 * total) ** 0.75
    return b


def test_response_norm_keeps_towers_apart() -> None:
    values = torch.randn(3, 14, 2, 2) * 100
    halves = [LocalResponseNorm()(half) for half in values.chunk(2, dim=1)]
    assert torch.equal(LocalResponseNorm(towers=2)(values), torch.cat(halves, dim=1))


@pytest.mark.parametrize("maps", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_response_norm_is_the_papers_formula(maps: int, memory: torch.memory_format) -> None:
    a = np.random.default_rng(maps).normal(scale=200, size=(6, maps, 5, 3))  # 6 images: a whole chunk and a part of one
    values = torch.from_numpy(a).float().to(memory_format=memory)
    out = LocalResponseNorm()(values)
    assert out.is_contiguous(memory_format=memory)
    np.testing.assert_allclose(out.numpy(), reference_norm(a), rtol=2e-6)


def test_response_norm_has_the_formulas_gradient() -> None:
    torch.manual_seed(1)
    values = (torch.randn(6, 7, 2, 3, dtype=torch.float64) * 100).requires_grad_()
    for towers in (1, 7):
        assert torch.autograd.gradcheck(LocalResponseNorm(towers), (values,), eps=1e-4, atol=1e-7)
    both: list[torch.Tensor] = []
    for layer in (LocalResponseNorm(), nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)):
        values.grad = None
        layer(values).square().sum().backward()
        assert values.grad is not None
        both.append(values.grad.clone())
    torch.testing.assert_close(both[0], both[1], rtol=1e-9, atol=1e-9)


def test_dropout_scales_as_the_paper_does() -> None:
    torch.manual_seed(0)
    values = torch.full((1000, 100), 3.0, requires_grad=True)
    layer = PaperDropout()
    out = layer(values)
    assert set(out.unique().tolist()) == {0.0, 3.0}
    kept = (out != 0).double().mean().item()
    assert abs(kept - 0.5) < 5 * 0.5 / 100_000**0.5
    out.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, (out != 0).float())  # what was dropped takes no part in back-propagation
    layer.eval()
    assert torch.equal(layer(values), values * 0.5)


def test_quick_net_pools_to_16_8_4() -> None:
    found = shapes(cifar10_quick_net(10), torch.zeros(1, 3, 32, 32))
    assert [found[name] for name in ("pool1", "pool2", "pool3", "fc4", "fc5")] == [
        (32, 16, 16),
        (32, 8, 8),
        (64, 4, 4),
        (64,),
        (10,),
    ]
    average = cifar10_quick_net(10).get_submodule("pool2")(torch.ones(1, 1, 16, 16))
    assert torch.equal(average, torch.ones(1, 1, 8, 8))  # windows over the edge are divided by what they cover


@pytest.mark.parametrize("crop", [56, 57, 64, 16])
def test_tiny_net_takes_any_crop(crop: int) -> None:
    assert tiny_net(7, crop)(torch.zeros(2, 3, crop, crop)).shape == (2, 7)


@pytest.mark.parametrize("crop", [67, 100, 224, 227])
def test_alexnet_takes_any_crop_from_67(crop: int) -> None:
    assert alexnet(3, crop, width=0.0625)(torch.zeros(2, 3, crop, crop)).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "crop", "width", "message"),
    [
        (alexnet, 66, 1.0, "at least 67 pixels, not 66"),
        (alexnet, 224, 0.01, "width 0.01"),
        (tiny_net, 15, 1.0, "at least 16 pixels, not 15"),
        (cifar10_quick_net, 32, 17.0, "width 17.0"),
    ],
)
def test_senseless_sizes_are_refused(make: Callable[..., nn.Module], crop: int, width: float, message: str) -> None:
    with pytest.raises(AlexprepError, match=message):
        make(10, crop, width=width)
