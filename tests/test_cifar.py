"""The paper's CIFAR-10 nets: locally connected layers against float64 loops, shapes and counts against the published files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.models.cifar import ConvLocal, conv_local_11pct, conv_local_13pct, conv_local_13pct_tanh
from alexprep.train.models.layers import LocallyConnected2d, LocalResponseNorm
from alexprep.train.recipes import recipe_named

# in_channels, out_channels, (height, width), kernel_size, stride, padding
SIZES = [(3, 5, (7, 4), 3, 1, 1), (1, 2, (5, 9), 2, 2, 0), (4, 1, (6, 6), 5, 3, 2), (2, 3, (1, 3), 1, 1, 0)]


def made(size: tuple[Any, ...]) -> LocallyConnected2d:
    inputs, outputs, sides, kernel, stride, padding = size
    layer = LocallyConnected2d(inputs, outputs, sides, kernel, stride=stride, padding=padding)
    torch.manual_seed(3)
    with torch.no_grad():
        layer.bias.normal_()
    return layer


def by_hand(layer: LocallyConnected2d, images: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over a window of each value times the weight that this position has for it."""
    weight, bias = (parameter.detach().double().numpy() for parameter in (layer.weight, layer.bias))
    edge = (layer.padding, layer.padding)
    padded = np.pad(images, ((0, 0), (0, 0), edge, edge))
    out = np.empty((len(images), layer.out_channels, *weight.shape[:2]))
    for n, o, y, x in np.ndindex(out.shape):
        total = bias[o, y, x]
        for i, j, c in np.ndindex(layer.kernel_size, layer.kernel_size, layer.in_channels):
            total += weight[y, x, i, j, c, o] * padded[n, c, y * layer.stride + i, x * layer.stride + j]
        out[n, o, y, x] = total
    return out


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
def test_locally_connected_is_its_formula(size: tuple[Any, ...], memory: torch.memory_format) -> None:
    layer = made(size)
    images = torch.randn(3, size[0], *size[2], generator=torch.Generator().manual_seed(4))
    wanted = by_hand(layer, images.double().numpy())
    found = layer(images.contiguous(memory_format=memory))
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES[1:])
def test_locally_connected_has_its_formulas_gradient(size: tuple[Any, ...]) -> None:
    layer = made(size).double()
    images = torch.randn(2, size[0], *size[2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (images,))
    assert torch.autograd.gradcheck(
        lambda weight, bias: torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (images.detach(),)),
        (layer.weight, layer.bias),
    )


@pytest.mark.parametrize("size", SIZES)
def test_with_the_same_weights_everywhere_it_is_a_convolution(size: tuple[Any, ...]) -> None:
    layer = made(size)
    inputs, outputs, sides, kernel, stride, padding = size
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding)
    with torch.no_grad():
        layer.weight.copy_(convolution.weight.permute(2, 3, 1, 0).expand_as(layer.weight))
        layer.bias.copy_(convolution.bias[:, None, None].expand_as(layer.bias))  # type: ignore[index]
    images = torch.randn(2, inputs, *sides)
    torch.testing.assert_close(layer(images), convolution(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2, (5, 4), 5), r"kernel_size 5 is not in \[1, 4\]"),
        ((0, 2, (5, 4), 3), "in_channels 0"),
        ((1, 2, (5, 0), 1), "width 0"),
        ((1, 2.5, (5, 5), 1), "out_channels 2.5"),
    ],
)
def test_senseless_sizes_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(AlexprepError, match=message):
        LocallyConnected2d(*arguments)


@pytest.mark.parametrize("network", [conv_local_13pct, conv_local_13pct_tanh, conv_local_11pct])
def test_nets_are_the_published_ones(network: ConvLocal) -> None:
    """From facts about layers-conv-local-13pct.cfg and -11pct.cfg."""
    third = 64 if network is conv_local_11pct else 32
    layers = dict(network(10).named_children())
    images = torch.randn(2, 3, 24, 24) * 60
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        images = layer(images)
        found[name] = tuple(images.shape[1:])
    wanted: dict[str, tuple[int, ...]] = {
        "conv1": (64, 24, 24),
        "pool1": (64, 12, 12),
        "conv2": (64, 12, 12),
        "pool2": (64, 6, 6),
    }
    wanted |= {"local3": (third, 6, 6), "local4": (32, 6, 6), "flatten": (1152,), "fc5": (10,)}
    assert {name: found[name] for name in wanted} == wanted
    counted = 64 * (3 * 25 + 1) + 64 * (64 * 25 + 1)
    counted += 36 * third * (64 * 9 + 1) + 36 * 32 * (third * 9 + 1) + 10 * (1152 + 1)
    assert sum(weight.numel() for layer in layers.values() for weight in layer.parameters()) == counted
    norms = [layer for layer in layers.values() if isinstance(layer, LocalResponseNorm)]
    numbers = [(norm.size, norm.k, round(norm.alpha * 9, 12), norm.beta) for norm in norms]
    assert numbers == ([(9, 1.0, 0.001, 0.75)] * 2 if network is conv_local_11pct else [])
    if norms:
        names = list(layers)
        assert names.index("pool1") < names.index("norm1") < names.index("conv2")
        assert names.index("conv2") < names.index("norm2") < names.index("pool2")


def test_initial_weights_and_biases() -> None:
    deviations = {"conv1": 1e-4, "conv2": 0.01, "local3": 0.04, "local4": 0.04, "fc5": 0.01}
    for name, parameter in conv_local_13pct(10, seed=5).named_parameters():
        layer, _, kind = name.partition(".")
        if kind == "bias":
            assert not parameter.any(), name
        else:
            error = 5 * deviations[layer] / parameter.numel() ** 0.5
            assert abs(parameter.mean().item()) < error, name
            assert abs(parameter.std().item() - deviations[layer]) < error, name


def test_only_the_activation_differs() -> None:
    relu, tanh = conv_local_13pct(10, 32, seed=1), conv_local_13pct_tanh(10, 32, seed=1)
    for (name, ours), (_, theirs) in zip(relu.named_parameters(), tanh.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    kinds = [[type(layer) for layer in network if not isinstance(layer, nn.ReLU | nn.Tanh)] for network in (relu, tanh)]
    assert kinds[0] == kinds[1]
    assert [type(layer) for layer in tanh if isinstance(layer, nn.ReLU | nn.Tanh)] == [nn.Tanh] * 4
    with pytest.raises(AlexprepError, match="activation 'gelu'"):
        ConvLocal("other", activation="gelu")  # type: ignore[arg-type]


@pytest.mark.parametrize("network", [conv_local_13pct_tanh, conv_local_11pct])
def test_they_learn(network: ConvLocal) -> None:
    """Gradients reach every parameter, and a step along them lowers the loss."""
    net = network(3, 9, seed=0, width=0.25)
    with torch.no_grad():
        net.get_submodule("conv1").weight.mul_(20)  # type: ignore[operator]
        net.get_submodule("conv2").weight.mul_(10)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, 9, 9, generator=generator) * 60, torch.tensor([0, 1, 2, 0, 1, 2])
    loss = nn.functional.cross_entropy(net(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.any(), name
            parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=1e-3)
    assert nn.functional.cross_entropy(net(images), labels) < loss


def test_recipes_are_cuda_convnets() -> None:
    """layer-params-conv-local-13pct.cfg and -11pct.cfg: epsW 0.001, epsB 0.002, wc of the convolutions 0."""
    for name, last in (("cifar10-13pct", 0.004), ("cifar10-11pct", 0.01)):
        recipe = recipe_named(name)
        assert (recipe.crop, recipe.augmentation.mirror, recipe.augmentation.mean) == (24, True, "crop")
        assert (recipe.momentum, recipe.bias_lr_factor, recipe.decay) == (0.9, 2.0, 0.0)
        assert recipe.layer_decay == {"local3": 0.004, "local4": 0.004, "fc5": last}
    for name in ("cifar10-relu", "cifar10-tanh"):
        recipe = recipe_named(name)
        assert (recipe.crop, recipe.augmentation.mirror, recipe.augmentation.noise) == (32, False, "none")
        assert (recipe.decay, recipe.layer_decay, recipe.bias_decay) == (0.0, {}, 0.0)
        assert json.loads(json.dumps(recipe.describe())) == recipe.describe()
