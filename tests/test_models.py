"""Networks and layers against the published numbers and against independent float64 arithmetic."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.fft import dctn
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.models import cpu_kernels, cuda_kernels
from alexprep.train.models.alexnet import AlexNet, alexnet, alexnet_1gpu, alexnet_6conv, alexnet_2012, alexnet_owt
from alexprep.train.models.cifar import (
    ConvLocal,
    cifar10_fast_net,
    cifar10_quick_net,
    conv_local_11pct,
    conv_local_13pct,
    conv_local_13pct_tanh,
    tiny_net,
)
from alexprep.train.models.layers import (
    Conv2d,
    LocallyConnected2d,
    LocalResponseNorm,
    MapWindow,
    PaperDropout,
    PatchWaves,
    PixelWindow,
    Residual,
    SpatialResponseNorm,
    initialised,
)
from tests.made_up import FAMILY
from tests.support import compiled

# Written out from facts about layers-145.cfg, layers-145-half.cfg, layers-146-2012-2011.cfg and layers-imagenet-1gpu.cfg:
# (kernels, maps that a kernel sees, its side) of each convolution, and the parameters in all.
TOWERS = [(96, 3, 11), (256, 48, 5), (384, 256, 3), (384, 192, 3), (256, 192, 3)]
PUBLISHED = {
    "alexnet": (TOWERS, 60_965_224),
    "alexnet-2012": (TOWERS, 60_965_224),
    "alexnet-1gpu": ([(48, 3, 11), (128, 48, 5), (192, 128, 3), (192, 192, 3), (256, 192, 3)], 59_798_312),
    "alexnet-6conv": ([*TOWERS, (256, 256, 3)], 61_555_304),
    "alexnet-owt": ([(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)], 61_100_840),
}


@pytest.fixture(scope="module", params=FAMILY, ids=lambda design: design.name)
def full(request: pytest.FixtureRequest) -> tuple[AlexNet, nn.Sequential]:
    """A network in its full width, made once, one at a time: 61 million random numbers."""
    return request.param, request.param(1000).eval()


def shapes(network: nn.Sequential, images: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """The output shape of every layer, without the batch."""
    found = {}
    with torch.no_grad():
        for name, layer in network.named_children():
            images = layer(images)
            found[name] = tuple(images.shape[1:])
    return found


def test_shapes_and_parameters_are_the_published_ones(full: tuple[AlexNet, nn.Sequential]) -> None:
    design, network = full
    convolutions, parameters = PUBLISHED[design.name]
    found = shapes(network, torch.zeros(1, 3, 224, 224))
    sides = {1: 55, 2: 27, 3: 13, 4: 13, 5: 13, 6: 6}
    for number, (kernels, inputs, side) in enumerate(convolutions, start=1):
        layer = network.get_submodule(f"conv{number}")
        assert isinstance(layer, nn.Conv2d)
        assert layer.weight.shape == (kernels, inputs, side, side)
        assert found[f"conv{number}"] == (kernels, sides[number], sides[number])
    assert [found[name][1:] for name in ("pool1", "pool2", "pool5")] == [(27, 27), (13, 13), (6, 6)]
    assert [network.get_submodule(f"pool{n}").kernel_size for n in (1, 2, 5)] == [3, 3, 3]  # they overlap
    assert [found[name] for name in ("flatten", "fc6", "fc7", "fc8")] == [(9216,), (4096,), (4096,), (1000,)]
    counted = sum(kernels * (inputs * side * side + 1) for kernels, inputs, side in convolutions)
    counted += 4096 * (9216 + 1) + 4096 * (4096 + 1) + 1000 * (4096 + 1)
    assert counted == parameters
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert ("conv6" in found) == (design is alexnet_6conv)


def check_drawn(network: nn.Module, deviations: dict[str, float], biases: dict[str, float]) -> None:
    """Weights are normal with these deviations, 0.01 where none is given, and biases are these constants, or 0."""
    for name, parameter in network.named_parameters():
        layer, _, kind = name.partition(".")
        if kind == "bias":
            assert (parameter == biases.get(layer, 0.0)).all(), name
        else:
            deviation = deviations.get(layer, 0.01)
            # Five standard errors of a mean and of a deviation.
            error = 5 * deviation / parameter.numel() ** 0.5
            assert abs(parameter.mean().item()) < error, name
            assert abs(parameter.std().item() - deviation) < error, name
            assert parameter.abs().max() > 2.5 * deviation, name  # not a uniform distribution of this deviation


def test_initial_weights_and_biases(full: tuple[AlexNet, nn.Sequential]) -> None:
    """Section 5; with 0.03 in the middle, and -7 in the last layer, where cuda-convnet has them."""
    design, network = full
    middle = 0.01 if design in (alexnet, alexnet_1gpu) else 0.03
    biases = dict.fromkeys(("conv2", "conv4", "conv5", "conv6", "fc6", "fc7"), 1.0)
    biases["fc8"] = -7.0 if design is alexnet_owt else 0.0
    check_drawn(network, dict.fromkeys(("conv3", "conv4", "conv5", "conv6"), middle), biases)


def test_initial_weights_of_the_small_nets() -> None:
    """layers-conv-local-13pct.cfg and layers-80sec.cfg."""
    check_drawn(conv_local_13pct(10, seed=5), {"conv1": 1e-4, "local3": 0.04, "local4": 0.04}, {})
    check_drawn(cifar10_quick_net(10, seed=5), {"conv1": 1e-4, "fc4": 0.1, "fc5": 0.1}, {})


def order(design: AlexNet) -> list[str]:
    """The names of a network's layers up to fc6, without the one that pads."""
    names = [name for name, _ in design(3, 67, width=0.0625).named_children()]
    return names[1 : names.index("flatten")]


def test_order_of_layers() -> None:
    middle = ["conv3", "relu3", "conv4", "relu4", "conv5"]
    paper = ["conv1", "relu1", "norm1", "pool1", "conv2", "relu2", "norm2", "pool2", *middle, "relu5", "pool5"]
    assert order(alexnet) == order(alexnet_1gpu) == paper
    code = ["conv1", "norm1", "pool1", "relu1", "conv2", "relu2", "norm2", "spatial2", "pool2"]
    code += [*middle, "pool5", "relu5"]
    assert order(alexnet_2012) == code
    assert order(alexnet_6conv) == [*code, "conv6", "conv6_relu"]
    assert order(alexnet_owt) == [name for name in code if name != "spatial2"]


def test_norms_have_their_numbers() -> None:
    for design in FAMILY:
        alpha = 1e-4 if design in (alexnet, alexnet_1gpu) else 2e-5
        norms = [layer for layer in design(3, 67, width=0.0625) if isinstance(layer, LocalResponseNorm)]
        assert [(n.size, n.k, n.alpha, n.beta, n.towers) for n in norms] == [(5, 2.0, alpha, 0.75, design.towers)] * 2
    spatial = alexnet_2012(3, 67, width=0.0625).get_submodule("spatial2")
    assert isinstance(spatial, SpatialResponseNorm)
    assert (spatial.size, spatial.k, spatial.alpha, spatial.beta) == (5, 1.0, 4e-5, 0.75)


def test_relu_and_pool_may_change_places() -> None:
    """What the 2012 code does after conv5, the paper does before the pool: to the same effect."""
    here, there = AlexNet()(3, 67, width=0.0625), AlexNet(then5=("pool", "relu"))(3, 67, width=0.0625)
    images = torch.randn(3, 3, 67, 67, generator=torch.Generator().manual_seed(0)) * 60
    assert torch.equal(here.eval()(images), there.eval()(images))


def test_pools_overlap_or_not() -> None:
    overlapping = alexnet(3, 224, width=0.0625)
    assert [overlapping.get_submodule(f"pool{n}").kernel_size for n in (1, 2, 5)] == [3, 3, 3]
    apart = AlexNet(pool=2)(3, 224, width=0.0625)
    found = shapes(apart.eval(), torch.zeros(1, 3, 224, 224))
    assert [found[name][1:] for name in ("pool1", "pool2", "pool5")] == [(27, 27), (13, 13), (6, 6)]


def test_norms_can_be_left_out() -> None:
    """The nets that the paper compares with to say what normalisation is worth (section 3.3)."""
    bare = AlexNet(then1=("relu", "pool"), then2=("relu", "pool"))
    assert not [name for name in order(bare) if name.startswith("norm")]
    assert order(bare) == order(AlexNet(norm=False))
    assert not [name for name in order(replace(alexnet_2012, norm=False)) if name.startswith(("norm", "spatial"))]
    with_relu = AlexNet(then2=("norm", "relu", "pool"))(3, 67, width=0.0625)
    with_relu(torch.randn(2, 3, 67, 67)).sum().backward()  # what ReLU changes in place is not needed by the norm


@pytest.mark.parametrize("design", [*FAMILY, conv_local_13pct_tanh, conv_local_11pct], ids=lambda design: design.name)
def test_every_network_learns(design: AlexNet | ConvLocal) -> None:
    """Gradients reach every parameter, and those of a narrow network lower its loss."""
    side = 67 if isinstance(design, AlexNet) else 9
    network = design(3, side, width=0.125)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(6)  # so few inputs a neuron would stay silent
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(6, 3, side, side, generator=generator) * 60, torch.tensor([0, 1, 2, 0, 1, 2])
    network.eval()
    loss = nn.functional.cross_entropy(network(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name
            parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=1e-3)
    assert nn.functional.cross_entropy(network(images), labels) < loss


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"then1": ("relu", "norm")}, "then1 is"),
        ({"then2": ("relu", "relu", "pool")}, "then2 is"),
        ({"then5": ("pool", "tanh")}, "then5 is"),
        ({"towers": 3}, "not 3 and 3"),
        ({"pool": 4}, "not 2 and 4"),
        ({"without": ("conv1",)}, "AlexNet without 'conv1' is not"),
        ({"activation": "selu"}, "activation 'selu' is not"),
    ],
)
def test_switches_without_such_a_position_are_refused(switches: dict, message: str) -> None:
    with pytest.raises(AlexprepError, match=message):
        AlexNet(**switches)


@pytest.mark.parametrize("make", [*FAMILY, conv_local_13pct, cifar10_quick_net, cifar10_fast_net, tiny_net])
def test_weights_depend_on_the_seed_alone(make: Callable[..., nn.Module]) -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in make(5, 80, seed=seed, width=0.125).parameters()])

    first = weights(3)
    torch.rand(7)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


@pytest.mark.parametrize("design", [alexnet, alexnet_2012, alexnet_6conv], ids=lambda design: design.name)
def test_towers_meet_only_at_conv3_and_above(design: AlexNet) -> None:
    network = design(3, 67, width=0.125)

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

    for layer in ("norm1", "conv2", "pool2"):
        assert reach(layer) == [True, False]
    assert reach("conv3") == [True, True]


def test_the_last_filter_hangs_over_the_right_and_bottom_edge() -> None:
    pixels = torch.randn(3, 224, 224, dtype=torch.float64)
    both = alexnet(3, 224, width=0.0625)[:2].double()
    with torch.no_grad():
        out = both(pixels[None])[0, 0]
    kernel = both[1].weight[0].detach()  # type: ignore[index]
    padded = torch.zeros(3, 227, 227, dtype=torch.float64)
    padded[:, :224, :224] = pixels
    assert out.shape == (55, 55)
    for y, x in ((0, 0), (0, 54), (54, 0), (54, 54)):
        value = (padded[:, 4 * y : 4 * y + 11, 4 * x : 4 * x + 11] * kernel).sum()
        assert out[y, x].item() == pytest.approx(value.item(), rel=1e-12)


def reference_norm(
    a: NDArray[np.float64], axes: tuple[int, ...], size: int, k: float, alpha: float, beta: float
) -> NDArray[np.float64]:
    """Section 3.3 written out, one value at a time; its window is along `axes`: 0 of maps, 1 and 2 of pixels."""
    b = np.empty_like(a)
    for place in np.ndindex(a.shape[1:]):
        reaches = [size // 2 if axis in axes else 0 for axis in range(3)]
        window = [slice(max(0, n - reach), n + reach + 1) for n, reach in zip(place, reaches, strict=True)]
        total = (a[(slice(None), *window)] ** 2).sum(axis=(1, 2, 3))
        here = (slice(None), *place)
        b[here] = a[here] / (k + alpha * total) ** beta
    return b


def test_response_norm_keeps_towers_apart() -> None:
    values = torch.randn(3, 14, 2, 2) * 100
    halves = [LocalResponseNorm()(half) for half in values.chunk(2, dim=1)]
    assert torch.equal(LocalResponseNorm(towers=2)(values), torch.cat(halves, dim=1))


MAPS = {"axes": (0,), "size": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75}  # the paper's
PIXELS = {"axes": (1, 2), "size": 5, "k": 1.0, "alpha": 4e-5, "beta": 0.75}  # the 2012 code's
SHAPES = {
    LocalResponseNorm: [(6, maps, 5, 3) for maps in (1, 2, 4, 5, 13)],  # 6 images: a whole chunk and a part of one
    SpatialResponseNorm: [(6, 3, 27, 27), (1, 2, 5, 9), (5, 1, 1, 1), (2, 3, 2, 3), (4, 1, 13, 4)],
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("norm", "usual", "numbers"),
    [
        (LocalResponseNorm, MAPS, {}),
        (LocalResponseNorm, MAPS, {"alpha": 2e-5}),
        (LocalResponseNorm, MAPS, {"size": 9, "k": 1.0, "alpha": 0.001 / 9}),  # cuda-convnet's CIFAR-10 net
        (LocalResponseNorm, MAPS, {"size": 1, "k": 0.5, "alpha": 0.01, "beta": 0.3}),
        (SpatialResponseNorm, PIXELS, {}),
        (SpatialResponseNorm, PIXELS, {"size": 3, "k": 2.0, "alpha": 5e-5, "beta": 0.5}),
    ],
)
def test_norms_are_their_formula(norm: Any, usual: Any, numbers: Any, memory: torch.memory_format) -> None:
    for shape in SHAPES[norm]:
        a = np.random.default_rng(sum(shape)).normal(scale=200, size=shape)
        out = norm(**numbers)(torch.from_numpy(a).float().to(memory_format=memory))
        assert out.is_contiguous(memory_format=memory)
        np.testing.assert_allclose(out.numpy(), reference_norm(a, **usual | numbers), rtol=3e-6)


def test_sums_are_the_same_in_one_kernel() -> None:
    """The way of a GPU and of a compiler; on the CPU it can be compared with the CPU's own."""
    values = torch.randn(3, 4, 7, 9, dtype=torch.float64).square()
    for window in (PixelWindow(2), MapWindow(2, towers=2), MapWindow(3)):
        filled = window.sum_into(values, torch.empty_like(values))
        torch.testing.assert_close(filled, window.sum(values), rtol=1e-12, atol=0)


NORMS = [
    *(LocalResponseNorm(), LocalResponseNorm(7), LocalResponseNorm(size=3, k=1.0, alpha=0.02, beta=0.4)),
    *(SpatialResponseNorm(), SpatialResponseNorm(3, k=0.5, alpha=0.02)),
]


@pytest.mark.parametrize("layer", NORMS, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 1, 2), (1, 7, 3, 4), (2, 7, 5, 3)])
def test_norms_have_the_gradient_of_what_they_give(layer: nn.Module, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 50
    assert torch.autograd.gradcheck(layer, (values.requires_grad_(),), eps=1e-4, atol=1e-8, rtol=1e-6)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> cpu_kernels.Kernels:
    """response_norm.c, compiled."""
    source = Path(cpu_kernels.__file__).parent / "compiled" / "response_norm.c"
    found = cpu_kernels.loaded(compiled.library(source, tmp_path_factory.mktemp("compiled")))
    assert found is not None
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_norm_has_the_bits_of_torch_s(
    threads: int, kernels: cpu_kernels.Kernels, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """And its gradient, also where that lies otherwise in memory; every shape and window, by threads that share the rows unevenly."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu_kernels, "_SHARED", 1)
    generator = torch.Generator().manual_seed(seed)
    called = []
    monkeypatch.setattr(
        cpu_kernels, "_over_rows", lambda *given, real=cpu_kernels._over_rows: called.append(real(*given))
    )
    shapes = [(5, 2 * maps, 5, 3) for maps in (1, 2, 3, 16, 48)] + [(1, 4, 1, 1), (2, 34, 1, 7)]
    for shape, size, towers in itertools.product(shapes, (1, 3, 5, 9), (1, 2)):
        norm = LocalResponseNorm(towers, size=size, k=1.5, alpha=0.01)
        values = (torch.randn(shape, generator=generator) * 100).relu().contiguous(memory_format=torch.channels_last)
        slope = torch.randn(shape, generator=generator)
        found = []
        for each in (None, kernels):
            monkeypatch.setattr(cpu_kernels, "kernels", lambda each=each: each)
            images = values.clone().requires_grad_()
            out = norm(images)
            out.backward(slope)
            found.append((out, images.grad))
        for expected, result in zip(*found, strict=True):
            assert torch.equal(expected.view(torch.int32), result.view(torch.int32)) and result.is_contiguous(
                memory_format=torch.channels_last
            )
    assert len(called) == 2 * len(shapes) * 4 * 2
    assert norm(torch.empty(0, 4, 2, 2).contiguous(memory_format=torch.channels_last)).shape == (0, 4, 2, 2)


def test_what_the_compiled_norm_is_not_for(kernels: cpu_kernels.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that towers share unevenly, other types and orders in memory, other powers: torch's passes do these."""
    monkeypatch.setattr(cpu_kernels, "kernels", lambda: kernels)
    monkeypatch.setattr(cpu_kernels, "_over_rows", None)
    values = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1)) * 9).contiguous(
        memory_format=torch.channels_last
    )
    halves = [LocalResponseNorm()(part.contiguous()) for part in values.chunk(2, dim=1)]
    assert torch.equal(LocalResponseNorm(towers=2)(values), torch.cat(halves, dim=1))
    for given in (values.contiguous(), values.bfloat16(), values.double()):
        assert LocalResponseNorm()(given).dtype == given.dtype
    assert LocalResponseNorm(beta=0.5)(values).shape == values.shape
    with pytest.raises(TypeError):
        LocalResponseNorm()(values)


def test_a_compiled_norm_that_errs_is_not_used(tmp_path: Path) -> None:
    assert cpu_kernels.loaded(tmp_path / "response_norm.so") is None
    source = (Path(cpu_kernels.__file__).parent / "compiled" / "response_norm.c").read_text()
    for right, wrong in (("* alpha + k", "* alpha + k + 0.1f"), ("* a[c] * factor", "* factor")):
        assert right in source
        altered = tmp_path / f"response_norm_{len(wrong)}.c"
        altered.write_text(source.replace(right, wrong))
        assert cpu_kernels.loaded(compiled.library(altered, tmp_path)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_of_a_gpu_are_the_same_norm(dtype: torch.dtype, memory: torch.memory_format) -> None:
    """And the same gradient; also of maps that a slice leaves with gaps, and where the gradient lies otherwise in memory."""
    assert cuda_kernels.HERE
    generator = torch.Generator().manual_seed(7)
    for shape in [(2, 6, 5, 7), (3, 8, 3, 3), (2, 96, 13, 11), (1, 10, 1, 1), (4, 14, 6, 5), (0, 4, 2, 2)]:
        for norm in (LocalResponseNorm(), LocalResponseNorm(2, size=3, k=1.0, alpha=0.02, beta=0.4)):
            values = (torch.randn(2, *shape, generator=generator) * 100).to("cuda", dtype)
            slope = torch.randn(shape, generator=generator).to("cuda", dtype)
            for given in (values[0].contiguous(memory_format=memory), values.transpose(0, 1)[:, 1]):
                ours, exact = (each.detach().requires_grad_() for each in (given, given.double()))
                out, expected = norm(ours), norm(exact)
                assert out.dtype == dtype and out.shape == given.shape
                out.backward(slope.transpose(2, 3).contiguous().transpose(2, 3))
                expected.backward(slope.double())
                near: Any = dict.fromkeys(("rtol", "atol"), 1e-5 if dtype == torch.float32 else 2e-2)
                torch.testing.assert_close(out.double(), expected, **near)
                torch.testing.assert_close(cast(torch.Tensor, ours.grad).double(), exact.grad, **near)


CONVOLUTIONS = [
    *(
        (3, 8, 11, {"stride": 4}),
        (3, 6, 5, {"stride": 2}),
        (2, 4, (5, 3), {"stride": (2, 3)}),
        (4, 4, 4, {"stride": 2}),
    ),
    *((8, 6, 3, {"padding": 1, "groups": 2}), (9, 6, (3, 5), {"groups": 3, "stride": (1, 2), "bias": False})),
]


@pytest.mark.parametrize(("maps", "kernels", "sides", "options"), CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("size", [(2, 51, 47), (3, 24, 35), (1, 11, 12)])
def test_what_a_gpu_makes_of_convolutions_is_the_same_function(
    maps: int, kernels: int, sides: Any, options: dict[str, Any], size: tuple[int, int, int]
) -> None:
    torch.manual_seed(3)
    layer = Conv2d(maps, kernels, sides, **options).double()
    images = torch.randn(size[0], maps, *size[1:], dtype=torch.float64).to(memory_format=torch.channels_last)
    other = layer._group_by_group if layer.groups > 1 else layer._over_blocks
    for found in (other(images), other(images.contiguous())):
        torch.testing.assert_close(found, layer(images), rtol=1e-12, atol=1e-12)
    weights = list(layer.parameters())
    slopes = [torch.autograd.grad(made.square().sum(), weights) for made in (other(images), layer(images))]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize(("maps", "kernels", "sides", "options"), CONVOLUTIONS, ids=str)
def test_on_a_gpu_convolutions_are_so_in_half_precision(maps: int, kernels: int, sides: Any, options: Any) -> None:
    torch.manual_seed(3)
    layer = Conv2d(maps, kernels, sides, **options).cuda()
    images = torch.randn(2, maps, 51, 47, device="cuda")
    expected = copy.deepcopy(layer).double()(images.double())
    with torch.autocast("cuda", torch.bfloat16):
        found = layer(images)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(
        layer(images).double(), expected, rtol=2e-3, atol=2e-3
    )  # as torch does it, perhaps in TF32


@pytest.mark.parametrize("make", [LocalResponseNorm, SpatialResponseNorm])
@pytest.mark.parametrize("numbers", [{"size": 4}, {"size": 0}, {"k": 0.0}, {"alpha": -1e-4}, {"beta": float("nan")}])
def test_senseless_norms_are_refused(make: type[nn.Module], numbers: dict) -> None:
    with pytest.raises(AlexprepError, match="response norm"):
        make(**numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_scales_as_the_paper_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.full((1000, 100), 3.0, dtype=dtype, requires_grad=True)
    layer = PaperDropout()
    out = layer(values)
    assert set(out.unique().tolist()) == {0.0, 3.0}
    kept = (out != 0).double().mean().item()
    assert abs(kept - 0.5) < 5 * 0.5 / 100_000**0.5
    out.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, (out != 0).to(dtype))  # what was dropped takes no part in back-propagation
    layer.eval()
    assert torch.equal(layer(values), values * 0.5)


def test_quick_net_pools_to_16_8_4() -> None:
    found = shapes(cifar10_quick_net(10), torch.zeros(1, 3, 32, 32))
    assert [found[name] for name in ("pool1", "pool2", "pool3")] == [(32, 16, 16), (32, 8, 8), (64, 4, 4)]
    average = cifar10_quick_net(10).get_submodule("pool2")(torch.ones(1, 1, 16, 16))
    assert torch.equal(average, torch.ones(1, 1, 8, 8))  # windows over the edge are divided by what they cover


@pytest.mark.parametrize("network", [conv_local_13pct, conv_local_13pct_tanh, conv_local_11pct])
def test_nets_for_cifar_are_the_published_ones(network: ConvLocal) -> None:
    """From facts about layers-conv-local-13pct.cfg and -11pct.cfg."""
    third = 64 if network is conv_local_11pct else 32
    layers = dict(network(10).named_children())
    found = shapes(network(10), torch.randn(2, 3, 24, 24) * 60)
    wanted = [(64, 24, 24), (64, 12, 12), (64, 12, 12), (64, 6, 6), (third, 6, 6), (32, 6, 6), (1152,), (10,)]
    names = ("conv1", "pool1", "conv2", "pool2", "local3", "local4", "flatten", "fc5")
    assert [found[name] for name in names] == wanted
    counted = 64 * (3 * 25 + 1) + 64 * (64 * 25 + 1)
    counted += 36 * third * (64 * 9 + 1) + 36 * 32 * (third * 9 + 1) + 10 * (1152 + 1)
    assert sum(weight.numel() for layer in layers.values() for weight in layer.parameters()) == counted
    norms = [layer for layer in layers.values() if isinstance(layer, LocalResponseNorm)]
    numbers = [(norm.size, norm.k, round(norm.alpha * 9, 12), norm.beta) for norm in norms]
    assert numbers == ([(9, 1.0, 0.001, 0.75)] * 2 if network is conv_local_11pct else [])
    order = [name for name in layers if name in ("pool1", "norm1", "conv2", "norm2", "pool2")]
    assert order == (["pool1", "norm1", "conv2", "norm2", "pool2"] if norms else ["pool1", "conv2", "pool2"])


def test_patches_are_taken_apart_into_waves() -> None:
    """By scipy's transform, patch by patch; the other waves of a colour are left out; what a patch holds is kept where it has brightness alone."""
    images = torch.randn(2, 3, 9, 6, generator=torch.Generator().manual_seed(0))
    found = PatchWaves()(images).double().numpy()
    assert found.shape == (2, 24, 4, 3) and not PatchWaves().state_dict()
    padded = np.pad(images.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    colours = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    for row, column in np.ndindex(4, 3):
        patches = padded[:, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
        waves = dctn(np.einsum("kc,ncij->nkij", colours, patches), axes=(2, 3), norm="ortho")
        kept = [waves[:, 0].reshape(2, 16), *(waves[:, n, :2, :2].reshape(2, 4) for n in (1, 2))]
        np.testing.assert_allclose(found[:, :, row, column], np.concatenate(kept, axis=1), atol=1e-5)


def test_the_fast_net_for_cifar_whitens_and_goes_past_layers() -> None:
    """What reaches the first convolution has mean 0 and deviation 1, whatever the scale of the images; and nothing of it is trained."""
    network = cifar10_fast_net(10, 28)
    assert [name for name, _ in network.named_parameters() if name.startswith(("waves", "norm0"))] == []
    images = 40 * torch.randn(64, 3, 28, 28, generator=torch.Generator().manual_seed(1)) + 100
    seen = network[1](network[0](images))
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(24), rtol=1e-3, atol=0)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(24), rtol=0, atol=1e-3)
    doubled = Residual(nn.Identity())
    assert torch.equal(doubled(images), 2 * images)
    assert [name for name, layer in network.named_children() if isinstance(layer, Residual)] == ["residual3"]


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_convolutions_of_the_fast_net_hand_their_maps_on(width: float) -> None:
    """At the start, as far as there are kernels; the others are drawn, and all are of about one length."""
    convolutions = [
        layer for layer in cifar10_fast_net(10, 28, seed=3, width=width).modules() if type(layer) is nn.Conv2d
    ]
    assert len(convolutions) == 4
    for layer in convolutions:
        kernels = min(layer.weight.shape[:2])
        maps = torch.randn(2, layer.in_channels, 5, 7, generator=torch.Generator().manual_seed(0))
        weight = layer.weight.detach()
        found, lengths = layer(maps).detach(), weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(found[:, :kernels], lengths[0] * maps[:, :kernels])
        assert (
            float(lengths[0]) == pytest.approx(3**-0.5, rel=0.1)
            and ((lengths - lengths[0]).abs() < 0.3 * lengths[0]).all()
        )
        drawn = weight[kernels:]
        assert not len(drawn) or float(drawn.std()) == pytest.approx((27 * layer.in_channels) ** -0.5, rel=0.1)


def test_only_the_activation_differs() -> None:
    relu, tanh = conv_local_13pct(10, 32, seed=1), conv_local_13pct_tanh(10, 32, seed=1)
    for (name, ours), (_, theirs) in zip(relu.named_parameters(), tanh.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    kinds = [[type(layer) for layer in network if not isinstance(layer, nn.ReLU | nn.Tanh)] for network in (relu, tanh)]
    assert kinds[0] == kinds[1]
    assert [type(layer) for layer in tanh if isinstance(layer, nn.ReLU | nn.Tanh)] == [nn.Tanh] * 4


@pytest.mark.parametrize(
    ("make", "crops"),
    [(tiny_net, (16, 56, 57, 64)), (cifar10_fast_net, (8, 9, 28, 33)), (alexnet, (67, 100, 224, 227))],
)
def test_networks_take_any_crop(make: Callable[..., nn.Module], crops: tuple[int, ...]) -> None:
    for crop in crops:
        assert make(7, crop, width=0.0625)(torch.zeros(2, 3, crop, crop)).shape == (2, 7)


@pytest.mark.parametrize(
    ("make", "crop", "width", "message"),
    [
        (alexnet, 66, 1.0, "at least 67 pixels, not 66"),
        (alexnet, 224, 0.01, "width 0.01"),
        (tiny_net, 15, 1.0, "at least 16 pixels, not 15"),
        (cifar10_quick_net, 32, 17.0, "width 17.0"),
        (conv_local_13pct, 7, 1.0, "at least 8 pixels, not 7"),
        (cifar10_fast_net, 7, 1.0, "at least 8 pixels, not 7"),
    ],
)
def test_senseless_sizes_are_refused(make: Callable[..., nn.Module], crop: int, width: float, message: str) -> None:
    with pytest.raises(AlexprepError, match=message):
        make(10, crop, width=width)


def test_layers_without_a_bias_are_drawn_too() -> None:
    first, last = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2)
    layers = [("first", first), ("flat", nn.Flatten()), ("last", last)]
    initialised(layers, 1, {"first": 0.5, "last": 0.25}, {"last": 1.0})
    generator = torch.Generator().manual_seed(1)
    for weight, deviation in ((first.weight, 0.5), (last.weight, 0.25)):
        assert torch.equal(weight, torch.empty_like(weight).normal_(0.0, deviation, generator=generator))
    assert torch.equal(last.bias, torch.ones(2))


SIZES = [(3, 5, 7, 3), (4, 1, 6, 5), (2, 3, 2, 1)]  # in_channels, out_channels, side, kernel_size


def made(size: tuple[int, int, int, int]) -> LocallyConnected2d:
    layer = LocallyConnected2d(*size)
    torch.manual_seed(3)
    with torch.no_grad():
        layer.bias.normal_()
    return layer


def by_hand(layer: LocallyConnected2d, images: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum over a window of each value times the weight that this position has for it."""
    weight, bias = (parameter.detach().double().numpy() for parameter in (layer.weight, layer.bias))
    side, _, kernel, _, inputs, outputs = weight.shape
    padded = np.pad(images, ((0, 0), (0, 0), (kernel // 2, kernel // 2), (kernel // 2, kernel // 2)))
    out = np.empty((len(images), outputs, side, side))
    for n, o, y, x in np.ndindex(out.shape):
        total = bias[o, y, x]
        for i, j, c in np.ndindex(kernel, kernel, inputs):
            total += weight[y, x, i, j, c, o] * padded[n, c, y + i, x + j]
        out[n, o, y, x] = total
    return out


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
def test_locally_connected_is_its_formula(size: tuple[int, int, int, int], memory: torch.memory_format) -> None:
    layer = made(size)
    images = torch.randn(3, size[0], size[2], size[2], generator=torch.Generator().manual_seed(4))
    wanted = by_hand(layer, images.double().numpy())
    found = layer(images.contiguous(memory_format=memory))
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 2, 4, 3), SIZES[2]])
def test_locally_connected_has_its_formulas_gradient(size: tuple[int, int, int, int]) -> None:
    layer = made(size).double()
    images = torch.randn(2, size[0], size[2], size[2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (images,))
    assert torch.autograd.gradcheck(
        lambda weight, bias: torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (images.detach(),)),
        (layer.weight, layer.bias),
    )


def test_a_layer_left_out_takes_what_follows_it_along() -> None:
    """Its pool stays, so the layers above see maps of the sides that they are used to, and every other weight has the same shape."""
    whole = alexnet(3, 67, width=0.0625)
    names = [name for name, _ in whole.named_children()]
    gone = {"conv2": {"conv2", "relu2", "norm2"}, "conv3": {"conv3", "relu3"}, "conv5": {"conv5", "relu5"}}
    gone |= {"fc7": {"fc7", "relu7", "drop7"}}
    for layer, with_it in gone.items():
        network = AlexNet(without=(layer,))(3, 67, width=0.0625)  # type: ignore[arg-type]
        assert [name for name, _ in network.named_children()] == [name for name in names if name not in with_it]
        assert network(torch.randn(2, 3, 67, 67)).shape == (2, 3)
    without_two = AlexNet(without=("conv4", "fc6"), sixth=True)(3, 224, width=0.0625)
    found = shapes(without_two, torch.zeros(1, 3, 224, 224))
    assert (found["pool5"][1:], found["conv6"][1:], found["fc7"]) == ((6, 6), (6, 6), (256,))
    tanh = AlexNet(activation="tanh", sixth=True)(3, 67, width=0.0625)
    assert len([layer for layer in tanh if isinstance(layer, nn.Tanh)]) == 8
    assert not any(isinstance(layer, nn.ReLU) for layer in tanh)
    sure = AlexNet(dropout=False)(3, 67, width=0.0625).train()
    images = torch.randn(2, 3, 67, 67)
    assert torch.equal(sure(images), sure(images)) and not torch.equal(whole(images), whole(images))


def test_normalisation_alone_can_be_tested() -> None:
    """The 11 % net has it and a wider third layer."""
    alone, wide = ConvLocal("alone", norm=True)(10), conv_local_11pct(10)
    assert [name for name, _ in alone.named_children()] == [name for name, _ in wide.named_children()]
    plain = {name: weight.shape for name, weight in conv_local_13pct(10).named_parameters()}
    assert {name: weight.shape for name, weight in alone.named_parameters()} == plain
    assert wide.get_parameter("local3.weight").shape[-1] == 64
