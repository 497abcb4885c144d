"""`alexprep check-grads`: right gradients pass, wrong ones are named, and those that nothing can be said of are told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from alexprep.cli.main import cli
from alexprep.train.gradient_check import check_gradients
from alexprep.train.recipes import RECIPES
from tests import layer_texts

OWN = """
import torch
from torch import nn

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * FACTOR

class Layer(nn.Module):
    def forward(self, values):
        return Doubled.apply(values)

def make(classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 8), nn.Tanh(), Layer(), nn.Linear(8, classes))
    network.idle = nn.Parameter(torch.zeros(3))
    return network
"""


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["check-grads", *words], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "euclidean"])
def test_right_gradients_pass(loss: str) -> None:
    settings = [
        "width=0.0625",
        f"loss={loss}",
        "network.pool=stochastic",
        "network.dropout=weights",
        "network.norm=true",
    ]
    status, said = run(
        "--recipe", "small-net", "--entries", "3", *(word for each in settings for word in ("--set", each))
    )
    assert status == 0 and said.count("right") == 8 and "WRONG" not in said, said


def test_of_a_layer_file(tmp_path: Path) -> None:
    for name, text in zip(("layers-x.cfg", "layer-params-x.cfg"), layer_texts.quick(), strict=True):
        (tmp_path / name).write_text(text.replace("filters=32", "filters=4").replace("channels=32", "channels=4"))
    status, said = run(
        "--recipe", "cifar10-quick", "--model", str(tmp_path / "layers-x.cfg"), "--entries", "2", "--json"
    )
    told = json.loads(said.splitlines()[-1])
    assert status == 0 and told["wrong"] == [] and len(told["parameters"]) == 10


@pytest.mark.parametrize("factor", [2, 2.002])
def test_a_wrong_gradient_is_named(factor: float, tmp_path: Path) -> None:
    """One that is a thousandth too long: what lies below that layer, and nothing else."""
    (tmp_path / "own.py").write_text(OWN.replace("FACTOR", str(factor)))
    status, said = run("--recipe", "small-net", "--model", str(tmp_path / "own.py"), "--classes", "3")
    wrong = {line.split()[0] for line in said.splitlines() if line.endswith("WRONG")}
    assert (status, wrong) == ((1, {"1.weight", "1.bias"}) if factor != 2 else (0, set())), said
    assert "no part" in next(line for line in said.splitlines() if line.startswith("idle"))


def test_weights_are_as_before_and_random_numbers_go_on() -> None:
    made: list[nn.Module] = []

    def remember(*arguments: Any, **options: Any) -> nn.Module:
        made.append(RECIPES["small-net"].network(*arguments, **options))
        return made[-1]

    state = torch.get_rng_state()
    check_gradients(replace(RECIPES["small-net"], network=remember, width=0.0625), 4, entries=2)
    assert torch.equal(state, torch.get_rng_state())
    fresh = RECIPES["small-net"].network(4, 28, seed=0, width=0.0625).double()
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), fresh.parameters(), strict=True))


def test_gradients_below_rounding_are_told_apart() -> None:
    """Initial weights of the paper's net in small leave almost nothing of a gradient below conv2."""
    paper = RECIPES["alexnet"]
    small = replace(paper, width=1 / 16, stored_sizes=(67, 67), augmentation=replace(paper.augmentation, crop=67))
    found = check_gradients(small, 10, entries=2)
    assert not any(one.wrong for one in found)
    assert all(one.agrees for one in found if one.name.startswith("fc"))
