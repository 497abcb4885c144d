"""The update rule against float64 numpy, with rates that change on the way, and the groups of parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.optimizer import MomentumSGD, TorchRule, parameter_groups
from alexprep.train.recipes import recipe


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_update_is_section_5(dtype: torch.dtype, tolerance: float) -> None:
    """A reference that knows one parameter at a time: its decay, and its rate at every step; at 0 nothing of it changes."""
    rng = np.random.default_rng(6)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 2), "b.bias": (2,), "c.weight": (3,)}
    rates = {
        "a.weight": [0.1, 0.1, 0.0, 0.0, 0.05, 0.01],
        "a.bias": [0.2, 0.2, 0.0, 0.0, 0.0, 0.0],
        "b.weight": [0.1, 0.01, 0.01, 0.01, 0.001, 0.001],
        "b.bias": [0.2] * 6,
        "c.weight": [0.0, 0.0, 0.01, 0.01, 0.1, 0.1],
    }
    decays = {"a.weight": 0.3, "b.weight": 0.3, "c.weight": 0.02}  # in the order of the groups, biases last
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    weights = {name: nn.Parameter(torch.tensor(value, dtype=dtype)) for name, value in start.items()}
    groups = [
        {"params": [weights[name] for name in names], "names": names, "decay": decay}
        for names, decay in ((["a.weight", "b.weight"], 0.3), (["c.weight"], 0.02), (["a.bias", "b.bias"], 0.0))
    ]
    optimizer = MomentumSGD(groups, lr=123.0)
    w, v = {n: value.copy() for n, value in start.items()}, {n: np.zeros_like(value) for n, value in start.items()}
    live = dict(zip([*decays, "a.bias", "b.bias"], optimizer.velocities(), strict=True))
    for step in range(6):
        optimizer.set_rates({name: rates[name][step] for name in shapes})
        for name, weight in weights.items():
            gradient = rng.normal(size=shapes[name])
            weight.grad = torch.tensor(gradient, dtype=dtype)
            epsilon = rates[name][step]
            if epsilon:
                v[name] = 0.9 * v[name] - decays.get(name, 0.0) * epsilon * w[name] - epsilon * gradient
                w[name] = w[name] + v[name]
        frozen = {name: (weights[name].clone(), live[name].clone()) for name in shapes if not rates[name][step]}
        optimizer.step()
        for name in shapes:
            np.testing.assert_allclose(weights[name].detach().numpy(), w[name], rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(live[name].numpy(), v[name], rtol=tolerance, atol=tolerance)
        for name, (before, velocity) in frozen.items():
            assert torch.equal(before, weights[name]) and torch.equal(velocity, live[name])


@pytest.mark.gpu
@pytest.mark.parametrize("strides", ["alike", "apart"])
def test_a_gpu_moves_weights_likewise(strides: str) -> None:
    """In one pass, or in torch's own where a gradient lies otherwise in memory than its weight."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(6, 3, 5, 5), (7, 1001), (13,)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    weights[0].data = weights[0].data.to(memory_format=torch.channels_last)
    moved = [torch.nn.Parameter(weight.detach().cuda()) for weight in weights]
    rules = [MomentumSGD([{"params": some}], lr=0.1, momentum_correction=True) for some in (weights, moved)]
    for rate in (0.1, 0.1, 0.02):
        for weight, copied in zip(weights, moved, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            copied.grad = weight.grad.cuda()
            if strides == "alike":
                copied.grad = torch.empty_like(copied).copy_(copied.grad)
        for rule in rules:
            rule.param_groups[0]["rates"] = [rate] * len(shapes)
            rule.step()
    for expected, found in zip([*weights, *rules[0].velocities()], [*moved, *rules[1].velocities()], strict=True):
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [-1.0, float("nan")])
def test_senseless_rates_are_refused(rate: float) -> None:
    groups = parameter_groups(nn.Sequential(nn.Linear(2, 2)), decay=0.0, layer_decay={}, bias_lr_factor=2.0)
    with pytest.raises(AlexprepError, match=f"rate is {rate}"):
        MomentumSGD(groups, lr=0.1).set_rates({"0.weight": rate, "0.bias": 0.1})


def test_torch_sgd_agrees_until_the_rate_changes() -> None:
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    paper = MomentumSGD([{"params": [ours], "names": ["ours"]}], lr=0.1, momentum=0.9, decay=0.01)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(8):
        if step == 5:
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
            paper.set_rates({"ours": 0.01})
            sgd.param_groups[0]["lr"] = 0.01
        for weight in (ours, theirs):
            weight.grad = torch.cos(weight.detach() * (step + 1))
        paper.step()
        sgd.step()
    assert (ours - theirs).abs().max() > 0.01


def test_with_correction_it_is_torch_sgd_at_every_rate() -> None:
    """Rates that fall, rise and differ between parameters; a velocity that was saved goes on with the rate that it moved at."""
    start = {name: torch.linspace(-1, 1, 7, dtype=torch.float64) + number for number, name in enumerate("ab")}
    rates = {
        "a": [0.1, 0.1, 0.01, 0.01, 0.05, 0.001, 0.001, 0.02],
        "b": [0.02, 0.03, 0.04, 0.05, 0.05, 0.02, 0.0125, 0.4],
    }

    def corrected(weights: dict[str, nn.Parameter]) -> MomentumSGD:
        groups = [{"params": list(weights.values()), "names": list(weights)}]
        return MomentumSGD(groups, lr=7.0, momentum=0.9, decay=0.01, momentum_correction=True)

    ours, theirs = ({name: nn.Parameter(value.clone()) for name, value in start.items()} for _ in range(2))
    optimizer = corrected(ours)
    assert optimizer.velocity_rates() == [None, None]
    sgd = torch.optim.SGD([{"params": [weight]} for weight in theirs.values()], lr=7.0, momentum=0.9, weight_decay=0.01)
    for step in range(8):
        if step == 5:
            saved = [velocity.clone() for velocity in optimizer.velocities()], optimizer.velocity_rates()
            assert saved[1] == [0.05, 0.05]
            optimizer = corrected(ours)
            for velocity, value in zip(optimizer.velocities(), saved[0], strict=True):
                velocity.copy_(value)
            optimizer.set_velocity_rates(saved[1])
        optimizer.set_rates({name: values[step] for name, values in rates.items()})
        for group, values in zip(sgd.param_groups, rates.values(), strict=True):
            group["lr"] = values[step]
        for weight in (*ours.values(), *theirs.values()):
            weight.grad = torch.cos(weight.detach() * (step + 1))
        optimizer.step()
        sgd.step()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-13, atol=1e-13)


def test_parameters_without_gradient_stay() -> None:
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MomentumSGD([{"params": [moved, still]}], lr=1.0)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert moved[0] < 0.1 and torch.equal(still, torch.ones(2))
    assert not optimizer.velocities()[1].any()


def test_weight_decay_spares_biases() -> None:
    network = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("a", "b", "c")})
    groups = parameter_groups(network, decay=0.004, layer_decay={"b": 0.03}, bias_lr_factor=2.0)
    found = [(group["names"], group["decay"], group["lr_factor"]) for group in groups]
    assert found == [
        (["a.weight", "c.weight"], 0.004, 1.0),
        (["b.weight"], 0.03, 1.0),
        (["a.bias", "b.bias", "c.bias"], 0.0, 2.0),
    ]
    for group in groups:
        assert [id(weight) for weight in group["params"]] == [
            id(network.get_parameter(name)) for name in group["names"]
        ]
    rates = [group["rates"] for group in MomentumSGD(groups, lr=0.25).param_groups]
    assert rates == [[0.25, 0.25], [0.25], [0.5, 0.5, 0.5]]
    decayed = parameter_groups(network, decay=0.004, layer_decay={}, bias_lr_factor=1.0, bias_decay=0.001)
    assert [group["decay"] for group in decayed] == [0.004, 0.001]


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "RMSprop"])
def test_torchs_rules_are_torchs(name: str) -> None:
    """With a rate for each parameter at each step; at a rate of 0 neither a weight nor its state moves."""
    rates = {"a.weight": [0.1, 0.05, 0.05, 0.2], "b.weight": [0.1, 0.05, 0.01, 0.2], "a.bias": [0.2, 0.0, 0.0, 0.1]}
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
        "nesterov": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        "adamw": torch.optim.AdamW,
        "RMSprop": functools.partial(torch.optim.RMSprop, alpha=0.8),
    }
    ours, theirs = ({each: nn.Parameter(torch.linspace(-1, 1, 6).double()) for each in rates} for _ in range(2))
    groups = [
        {"params": [ours["a.weight"], ours["b.weight"]], "names": ["a.weight", "b.weight"], "decay": 0.03},
        {"params": [], "names": [], "decay": 0.5},
        {"params": [ours["a.bias"]], "names": ["a.bias"], "decay": 0.0},
    ]
    rule = TorchRule(name, groups, lr=9.0, momentum=0.9, options={"alpha": 0.8} if name == "RMSprop" else {})
    alone = {
        each: kinds[name]([weight], lr=9.0, weight_decay=0.0 if each == "a.bias" else 0.03)
        for each, weight in theirs.items()
    }
    for step in range(4):
        rule.set_rates({each: values[step] for each, values in rates.items()})
        for each in rates:
            for weight in (ours[each], theirs[each]):
                weight.grad = torch.cos(weight.detach() * (step + 1))
            alone[each].param_groups[0]["lr"] = rates[each][step]
            if rates[each][step]:
                alone[each].step()
        rule.step()
        for each, weight in ours.items():
            assert torch.equal(weight, theirs[each]), (each, step)
    rule.zero_grad()
    assert all(weight.grad is None for weight in ours.values())


def test_what_torch_does_not_take_is_refused() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "names": ["a"], "decay": 0.0}]
    for name in ("LBFGS", "Optimizer", "lr_scheduler", "sdg"):
        with pytest.raises(
            AlexprepError, match=f"no optimizer '{name}': choose paper, sgd, nesterov, adamw, or a class"
        ):
            TorchRule(name, groups, lr=0.1, momentum=0.9)
    with pytest.raises(AlexprepError, match=r"optimizer adamw cannot be made: .*alpha"):
        TorchRule("adamw", groups, lr=0.1, momentum=0.9, options={"alpha": 1})
    with pytest.raises(AlexprepError, match="rate is -1"):
        TorchRule("sgd", groups, lr=0.1, momentum=0.9).set_rates({"a": -1.0})
    with pytest.raises(AlexprepError, match="optimizer_options betas: optimizer paper takes none"):
        replace(recipe("tiny"), optimizer_options={"betas": [0.9, 0.95]}).make_optimizer(nn.Linear(1, 1))


def test_norms_need_not_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    for norm_decay, wanted in ((True, 0.004), (False, 0.001)):
        groups = parameter_groups(
            network, decay=0.004, layer_decay={"2": 0.03}, bias_lr_factor=1.0, bias_decay=0.001, norm_decay=norm_decay
        )
        decays = {name: group["decay"] for group in groups for name in group["names"]}
        assert decays == {
            "0.weight": 0.004,
            "1.weight": wanted,
            "2.weight": 0.03,
            **dict.fromkeys(("0.bias", "1.bias", "2.bias"), 0.001),
        }


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(AlexprepError, match="names fc9"):
        parameter_groups(nn.Sequential(nn.Linear(1, 1)), decay=0.0, layer_decay={"fc9": 1.0}, bias_lr_factor=1.0)
