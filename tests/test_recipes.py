"""Recipes: their numbers, their identity, that their rates reach the weights, and what is left out for a network of the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from alexprep.cli.recipes import recipes as recipes_command
from alexprep.pipeline.augmentation import Augmentation, augmentation_named
from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint, recipes
from alexprep.train.demo import SHAPES, photo
from alexprep.train.lr_schedule import ByHand, DExp, EarlyStop, OneCycle, Plateau, ScheduleState, Steps, WarmUp
from alexprep.train.models.alexnet import alexnet_6conv
from alexprep.train.precision import logits
from alexprep.train.recipes import RECIPES, Recipe, fitted
from alexprep.train.training_state import TrainingState, take_step
from tests.made_up import FAMILY

NAMES = [name for name in RECIPES if name.startswith("alexnet")]
CPU = torch.device("cpu")
RESIDUAL = Path(__file__).parents[1] / "docs" / "examples" / "own_nets" / "residual.py"


def test_every_network_has_its_recipe() -> None:
    assert {recipes.recipe(design.name).network for design in FAMILY} == set(FAMILY)
    assert recipes.recipe("alexnet-6conv-tune").network == alexnet_6conv


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_the_family(name: str) -> None:
    recipe = recipes.recipe(name)
    assert recipe.name == name
    assert (recipe.crop, recipe.stored_sizes, recipe.batch_size, recipe.lr) == (224, (256, 256), 128, 0.01)
    assert (recipe.momentum, recipe.decay, recipe.layer_decay, recipe.bias_decay) == (0.9, 0.0005, {}, 0.0)
    papers = name in ("alexnet", "alexnet-1gpu")
    assert recipe.bias_lr_factor == (1.0 if papers else 2.0)
    if papers:
        assert (recipe.augmentation, recipe.schedule, recipe.epochs) == (Augmentation(), Plateau(), 90)
    told = recipe.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["network"] == json.loads(json.dumps(recipe.network.describe()))  # type: ignore[attr-defined]
    recipe.check_sides((256, 256))
    with pytest.raises(AlexprepError, match="--recipe tiny"):
        recipe.check_sides((64, 64))


def test_epochs_and_augmentation_of_the_released_nets() -> None:
    code = augmentation_named("2012-code")
    assert (recipes.recipe("alexnet-2012").augmentation, recipes.recipe("alexnet-2012").epochs) == (code, 91)
    tuned = recipes.recipe("alexnet-6conv-tune")
    assert (tuned.augmentation, tuned.epochs) == (replace(code, noise_epochs=38), 54)
    later = recipes.recipe("alexnet-owt")
    assert (later.schedule, later.epochs) == (DExp(epochs=90, factor=250, steps=4, bias_factor=10, bias_steps=2), 90)
    assert (later.augmentation.share, later.augmentation.noise_epochs) == (1, None)


def test_identities_differ() -> None:
    assert len({json.dumps(recipes.recipe(name).describe()) for name in RECIPES}) == len(RECIPES)
    recipe = recipes.recipe("alexnet")
    changes: dict[str, Any] = {
        "network": replace(FAMILY[0], last_bias=-7.0),
        "schedule": EarlyStop(Plateau()),
        "bias_decay": 0.0005,
        "bias_lr_factor": 2.0,
        "layer_decay": {"fc8": 0.01},
        "momentum": 0.8,
        "augmentation": replace(recipe.augmentation, share=32),
    }
    for name, value in changes.items():
        assert checkpoint.differences(recipe.describe(), replace(recipe, **{name: value}).describe()), name


def test_recipes_for_cifar_are_cuda_convnets() -> None:
    """layer-params-conv-local-13pct.cfg and -11pct.cfg: epsW 0.001, epsB 0.002, wc of the convolutions 0."""
    for name, last in (("cifar10-13pct", 0.004), ("cifar10-11pct", 0.01)):
        recipe = recipes.recipe(name)
        assert (recipe.crop, recipe.augmentation.mirror, recipe.augmentation.mean) == (24, True, "crop")
        assert (recipe.momentum, recipe.bias_lr_factor, recipe.decay) == (0.9, 2.0, 0.0)
        assert recipe.layer_decay == {"local3": 0.004, "local4": 0.004, "fc5": last}
    for name in ("cifar10-relu", "cifar10-tanh"):
        recipe = recipes.recipe(name)
        assert (recipe.crop, recipe.augmentation.mirror, recipe.augmentation.noise) == (32, False, "none")
        assert (recipe.decay, recipe.layer_decay, recipe.bias_decay) == (0.0, {}, 0.0)


def test_recipes_are_listed() -> None:
    listed = CliRunner().invoke(recipes_command, ["--json"], catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in listed[1:-1]] == list(RECIPES) == list(json.loads(listed[-1]))
    line = next(line for line in listed if line.startswith("cifar10-quick "))
    assert line.split() == ["cifar10-quick", "32", "32", "128", "0.002", "15", "Steps"]
    mine = CliRunner().invoke(recipes_command, [str(RESIDUAL)], catch_exceptions=False).stdout
    assert "\nnetwork=residual:make  (" in mine and "\nepochs=10  (whole number)\n" in mine
    assert f"--recipe {RESIDUAL} --set" in mine
    assert recipes.recipe("tiny").describe()["network"] == "tiny_net"  # a plain function


def test_rates_know_weights_and_biases_by_any_name() -> None:
    names = ["scale", "bias", "attention.in_proj_weight", "norm.bias", "conv.weight"]
    falling = ByHand(((0, "*.weight", 0.1), (0, "scale", 0.5), (0, "*.bias", 2.0)))
    recipe = replace(recipes.recipe("tiny"), lr=1.0, bias_lr_factor=3.0, schedule=falling)
    rates = recipe.rates(names, 0, ScheduleState())
    assert rates == {"scale": 0.5, "bias": 6.0, "attention.in_proj_weight": 0.1, "norm.bias": 6.0, "conv.weight": 0.1}
    assert DExp().rate(0.02, "bias", 45, ScheduleState()) == pytest.approx(0.002)


def test_what_a_recipe_says_of_layers_that_are_not_there_is_left_out() -> None:
    recipe = recipes.recipe("alexnet-2012")
    stopping = replace(recipe, schedule=EarlyStop(recipe.schedule), layer_decay={"fc8": 0.1, "conv": 0.2})
    found, (note,) = fitted(stopping, ["conv.weight", "conv.bias"])
    assert found.layer_decay == {"conv": 0.2} and isinstance(found.schedule, EarlyStop)
    assert isinstance(found.schedule.schedule, ByHand)
    assert [row[1] for row in found.schedule.schedule.rows] == ["*.weight"] * 3
    assert note.startswith("the network has no fc8, conv1.weight, conv1.*: what recipe alexnet-2012 says")
    assert fitted(recipe, ["conv1.weight", "conv1.bias"]) == (recipe, [])


def small(**changes: Any) -> Recipe:
    """`alexnet-2012`, narrow; conv1 falls after one epoch and is frozen after two."""
    rows = ByHand(((1, "*.weight", 0.1), (1, "conv1.weight", 0.01), (2, "conv1.*", 0.0)))
    narrow: dict[str, Any] = {
        "augmentation": Augmentation(crop=67),
        "stored_sizes": (67, 67),
        "schedule": rows,
        "width": 0.0625,
    }
    return replace(recipes.ALEXNET_2012, **narrow | changes)


def steps(state: TrainingState, count: int) -> None:
    """Steps on images that depend on the step alone, as a loop takes them, and two of them are an epoch."""
    for _ in range(count):
        position = state.position
        generator = torch.Generator().manual_seed(position.step)
        images = torch.randn(3, 3, 67, 67, generator=generator) * 60
        state.optimizer.zero_grad()
        F.cross_entropy(state.network(images), torch.tensor([0, 1, 2])).backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        position.step += 1
        position.epoch_step += 1
        if position.epoch_step == 2:
            position.epoch, position.epoch_step = position.epoch + 1, 0


def rates(state: TrainingState) -> Iterator[tuple[str, float]]:
    for group in state.optimizer.param_groups:
        yield from zip(group["names"], group["rates"], strict=True)


def test_rates_follow_the_epoch_and_a_frozen_layer_stays() -> None:
    recipe = small()
    state = TrainingState(recipe, 3, 0, CPU)
    wanted = [(0.01, 0.01, 0.02, 0.02), (0.001, 0.0001, 0.02, 0.02), (0.001, 0.0, 0.02, 0.0)]
    names = ("fc6.weight", "conv1.weight", "fc6.bias", "conv1.bias")
    for epoch in range(3):
        before = {name: weight.clone() for name, weight in state.network.state_dict().items()}
        velocities = [velocity.clone() for _, _, velocity in state.optimizer.slots()]
        state.optimizer.set_rates(dict.fromkeys(state.network.state_dict(), 0.5))  # of no effect: the position decides
        steps(state, 2)
        assert [dict(rates(state))[name] for name in names] == pytest.approx(wanted[epoch])
        moved = {name for name, weight in state.network.state_dict().items() if not torch.equal(before[name], weight)}
        frozen = {"conv1.weight", "conv1.bias"} if epoch == 2 else set()
        assert moved >= {"fc8.weight", "fc8.bias"} and moved.isdisjoint(frozen)
        for (name, _), old, (_, _, new) in zip(rates(state), velocities, state.optimizer.slots(), strict=True):
            assert name not in frozen or (old.any() and torch.equal(old, new))
    assert state.learning_rate() == pytest.approx(0.001)  # of the epoch that comes


@pytest.mark.parametrize("kind", ["by hand", "one cycle"])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_resumed_rates_are_exact(cut: int, kind: str) -> None:
    """Cut in mid-epoch, between epochs, or with a frozen layer, the rates and the weights go on as if nothing had been."""
    inner = small().schedule if kind == "by hand" else WarmUp(OneCycle(epochs=3, final=0.1), epochs=1.5)
    recipe = small(schedule=EarlyStop(inner, patience=2), momentum_correction=kind != "by hand")
    whole = TrainingState(recipe, 3, 0, CPU)
    whole.epoch_steps = 2
    whole.position.schedule = ScheduleState(stop_best=40.0, stop_waited=1)
    steps(whole, cut)
    tensors = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    saved = checkpoint.Checkpoint(cut, tensors, json.loads(json.dumps(whole.facts())))
    steps(whole, 6 - cut)
    resumed = TrainingState(recipe, 3, 1, CPU)
    resumed.epoch_steps = 2
    resumed.restore(saved)
    assert resumed.position.schedule == ScheduleState(stop_best=40.0, stop_waited=1)
    steps(resumed, 6 - cut)
    assert dict(rates(resumed)) == dict(rates(whole))
    for one, other in zip(whole.tensors().values(), resumed.tensors().values(), strict=True):
        assert torch.equal(one, other)


def batch(step: int, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 3, 67, 67, generator=generator) * 60, torch.arange(count) % 3


def without_dropout(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    torch.manual_seed(seed)
    first = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16)
    return nn.Sequential(*first, nn.Tanh(), nn.Linear(16, classes))


def taken(state: TrainingState, count: int) -> None:
    for _ in range(count):
        take_step(state, *batch(state.position.step))
        state.position.step += 1


@pytest.mark.parametrize("optimizer", ["paper", "sgd", "nesterov", "adamw", "Adafactor", "NAdam"])
def test_every_optimizer_goes_on_to_the_bit(optimizer: str) -> None:
    """With all that a step may have besides; cut before the first step and after the second."""
    changes = {"clip": 0.5, "accumulate": 2, "label_smoothing": 0.1, "average": 0.9, "norm_decay": False}
    recipe = small(schedule=Plateau(), network=without_dropout, optimizer=optimizer, batch_size=4, **changes)
    whole = TrainingState(recipe, 3, 0, CPU)
    saved = []
    for count in (0, 2, 1):
        taken(whole, count)
        tensors = {name: tensor.clone() for name, tensor in whole.tensors().items()}
        saved.append(checkpoint.Checkpoint(whole.position.step, tensors, json.loads(json.dumps(whole.facts()))))
    for begun in saved[:2]:
        resumed = TrainingState(recipe, 3, 1, CPU)
        resumed.restore(begun)
        taken(resumed, 3 - begun.step)
        found = resumed.tensors()
        assert found.keys() == saved[2].tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in saved[2].tensors.items())
    assert any(not torch.equal(saved[1].tensors[name], saved[2].tensors[name]) for name in found if "average." in name)


def test_a_step_is_what_its_switches_say() -> None:
    """Against torch's own functions on the whole batch: smoothed, cut into parts, shortened, averaged."""
    plain = small(schedule=Plateau(), network=without_dropout, batch_size=4)
    switched = replace(plain, clip=0.01, accumulate=4, label_smoothing=0.2, average=0.5)
    state, network = TrainingState(switched, 3, 0, CPU), plain.make_network(3, 0)
    optimizer = plain.make_optimizer(network)
    mean = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    for step in range(2):
        images, labels = batch(step)
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.2)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        length = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.01)
        optimizer.step()
        found, outputs = take_step(state, images, labels)
        state.position.step += 1
        assert length > 0.01 and outputs.shape == (4, 3)
        torch.testing.assert_close(found, loss.detach())
        decay = min(0.5, (2 + step) / (11 + step))
        for name, weight in network.named_parameters():
            mean[name] = decay * mean[name] + (1 - decay) * weight.detach()
            torch.testing.assert_close(state.network.get_parameter(name), weight, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(state.average[name], mean[name], rtol=1e-4, atol=1e-7)
    moved = {name: weight.clone() for name, weight in state.network.named_parameters()}
    with state.averaged():
        assert all(torch.equal(weight, state.average[name]) for name, weight in state.network.named_parameters())
    assert all(torch.equal(weight, moved[name]) for name, weight in state.network.named_parameters())
    final = checkpoint.final_weights(checkpoint.Checkpoint(2, state.tensors(), {}))
    assert all(torch.equal(final[name], mean) for name, mean in state.average.items())


@pytest.mark.parametrize(
    ("changes", "scheme", "words"),
    [
        ({"optimizer": "Adafactor"}, "towers", r"optimizer Adafactor looks at whole tensors, .* take --scheme ddp"),
        ({"accumulate": 2}, "ddp", "--accumulate 2 is for one rank"),
        ({"optimizer": "Adam2"}, "single", "there is no optimizer 'Adam2'"),
    ],
)
def test_what_a_scheme_cannot_do_is_refused_by_name(changes: dict[str, Any], scheme: Any, words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        replace(small(), **changes).check_scheme(scheme)
    for optimizer in ("paper", "sgd", "nesterov", "adamw"):
        replace(small(), optimizer=optimizer).check_scheme("hybrid")


def test_schedules_that_name_no_layer_are_refused() -> None:
    with pytest.raises(AlexprepError, match=r"conv9\.\*, which the network does not have"):
        TrainingState(small(schedule=ByHand(((1, "conv9.*", 0.0),))), 3, 0, CPU)


def test_decay_of_biases_is_a_switch() -> None:
    for decay in (0.25, 0.0):
        groups = TrainingState(small(bias_decay=decay), 3, 0, CPU).optimizer.param_groups
        assert {group["decay"] for group in groups} == {0.0005, decay}


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    labels = torch.arange(64) % len(SHAPES)
    drawn = [np.asarray(photo(SHAPES[label], rng).resize((32, 32)), np.float32) for label in labels]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    return images - images.mean(0), labels


def rise_at_a_drop(made: Recipe, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    """How high the loss of all images rises in ten steps after the rate fell to a tenth, after so many steps, over its mean in the ten before."""
    seen: dict[str, Any] = {"augmentation": replace(made.augmentation, crop=32), "stored_sizes": (32, 32)}
    made = replace(made, **seen, schedule=Steps(after=(1,)), batch_size=8)
    state, chance, losses = TrainingState(made, len(SHAPES), 0, CPU), torch.Generator().manual_seed(0), []
    for step in range(steps + 10):
        rows = torch.randperm(len(images), generator=chance)[: made.batch_size]
        take_step(state, images[rows], labels[rows])
        state.position.step += 1
        if state.position.step == steps:
            state.position.epoch = 1
            state.position.schedule = made.schedule.after_epoch(state.position.schedule, 1, 50.0)
        if step >= steps - 10:
            with torch.no_grad():
                losses.append(float(state.loss(logits(state.network, images, "fp32"), labels)))
    return max(losses[10:]) / (sum(losses[:10]) / 10)


def test_the_loss_does_not_jump_where_the_rate_drops(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Of all images: a batch of eight may be a hard one by chance. With the paper's rule, which does not follow the rate, it does jump."""
    tiny = recipes.recipe("tiny")
    assert rise_at_a_drop(tiny, *pictures, 200) < 1.25
    assert rise_at_a_drop(recipes.recipe("cifar10-quick"), *pictures, 60) < 1.25
    assert rise_at_a_drop(replace(tiny, momentum_correction=False), *pictures, 200) > 1.5
