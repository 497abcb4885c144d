"""The recipes of the AlexNet family: their numbers, their identity, and that their rates reach the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from alexprep.pipeline.augmentation import Augmentation, augmentation_named
from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint
from alexprep.train.lr_schedule import ByHand, DExp, EarlyStop, Plateau, ScheduleState, Steps
from alexprep.train.models.alexnet import alexnet_6conv
from alexprep.train.recipes.recipe import Recipe
from alexprep.train.recipes.registry import RECIPES, recipe_named
from alexprep.train.training_state import TrainingState
from tests.made_up import FAMILY

NAMES = [name for name in RECIPES if name.startswith("alexnet")]
CPU = torch.device("cpu")


def test_every_network_has_its_recipe() -> None:
    assert {recipe_named(design.name).network for design in FAMILY} == set(FAMILY)
    assert recipe_named("alexnet-6conv-tune").network == alexnet_6conv


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_the_family(name: str) -> None:
    recipe = recipe_named(name)
    assert recipe.name == name
    assert (recipe.crop, recipe.stored_sizes, recipe.batch_size, recipe.lr) == (224, (256, 256), 128, 0.01)
    assert (recipe.momentum, recipe.decay, recipe.layer_decay, recipe.bias_decay) == (0.9, 0.0005, {}, 0.0)
    papers = name in ("alexnet", "alexnet-1gpu")
    assert recipe.bias_lr_factor == (1.0 if papers else 2.0)
    if papers:
        assert (recipe.augmentation, recipe.schedule, recipe.epochs) == (Augmentation(), Plateau(), 90)
    told = recipe.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["network"] == recipe.network.describe()  # type: ignore[attr-defined]
    recipe.check_size(256)
    with pytest.raises(AlexprepError, match="--recipe tiny"):
        recipe.check_size(64)


def test_epochs_and_augmentation_of_the_released_nets() -> None:
    code = augmentation_named("2012-code")
    assert (recipe_named("alexnet-2012").augmentation, recipe_named("alexnet-2012").epochs) == (code, 91)
    tuned = recipe_named("alexnet-6conv-tune")
    assert (tuned.augmentation, tuned.epochs) == (replace(code, noise_epochs=38), 54)
    later = recipe_named("alexnet-owt")
    assert (later.schedule, later.epochs) == (DExp(epochs=90, factor=250, steps=4, bias_factor=10, bias_steps=2), 90)
    assert (later.augmentation.share, later.augmentation.noise_epochs) == (1, None)


def test_identities_differ() -> None:
    assert len({json.dumps(recipe_named(name).describe()) for name in RECIPES}) == len(RECIPES)
    recipe = recipe_named("alexnet")
    changes: list[dict[str, object]] = [
        {"network": replace(FAMILY[0], last_bias=-7.0)},
        {"schedule": EarlyStop(Plateau())},
        {"bias_decay": 0.0005},
        {"bias_lr_factor": 2.0},
        {"layer_decay": {"fc8": 0.01}},
        {"momentum": 0.8},
        {"augmentation": replace(recipe.augmentation, share=32)},
    ]
    for change in changes:
        changed = replace(recipe, **change)  # type: ignore[arg-type]
        assert checkpoint.differences(recipe.describe(), changed.describe()), change


def test_plain_functions_are_networks_too() -> None:
    assert recipe_named("tiny").describe()["network"] == "tiny_net"


def small(**changes: object) -> Recipe:
    """`alexnet-2012`, narrow; conv1 falls after one epoch and is frozen after two."""
    rows = ByHand(((1, "*.weight", 0.1), (1, "conv1.weight", 0.01), (2, "conv1.*", 0.0)))
    recipe = replace(
        recipe_named("alexnet-2012"),
        augmentation=Augmentation(crop=67),
        stored_sizes=(67, 67),
        schedule=rows,
        width=0.0625,
    )
    return replace(recipe, **changes)  # type: ignore[arg-type]


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
        velocities = [velocity.clone() for velocity in state.optimizer.velocities()]
        state.optimizer.set_learning_rate(0.5)  # of no effect: the position decides
        steps(state, 2)
        assert [dict(rates(state))[name] for name in names] == pytest.approx(wanted[epoch])
        after = state.network.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        frozen = {"conv1.weight", "conv1.bias"} if epoch == 2 else set()
        watched = {"conv1.weight", "conv1.bias", "fc8.weight", "fc8.bias"}
        assert moved & watched == watched - frozen
        order = [name for group in state.optimizer.param_groups for name in group["names"]]
        for name, old, new in zip(order, velocities, state.optimizer.velocities(), strict=True):
            if name in frozen:
                assert old.abs().sum() > 0 and torch.equal(old, new)
        assert state.learning_rate() == pytest.approx(0.001)  # of the epoch that comes


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_resumed_rates_are_exact(cut: int) -> None:
    """Cut in mid-epoch, between epochs, or with a frozen layer, the rates and the weights go on as if nothing had been."""
    recipe = small(schedule=EarlyStop(small().schedule, patience=2))
    whole = TrainingState(recipe, 3, 0, CPU)
    whole.position.schedule = ScheduleState(stop_best=40.0, stop_waited=1)
    steps(whole, cut)
    tensors = {name: tensor.clone() for name, tensor in whole.tensors().items()}
    saved = checkpoint.Checkpoint(cut, tensors, json.loads(json.dumps(whole.facts())))
    steps(whole, 6 - cut)
    resumed = TrainingState(recipe, 3, 1, CPU)
    resumed.restore(saved)
    assert resumed.position.schedule == ScheduleState(stop_best=40.0, stop_waited=1)
    steps(resumed, 6 - cut)
    assert dict(rates(resumed)) == dict(rates(whole))
    for one, other in zip(whole.tensors().values(), resumed.tensors().values(), strict=True):
        assert torch.equal(one, other)


def test_schedules_that_name_no_layer_are_refused() -> None:
    with pytest.raises(AlexprepError, match=r"conv9\.\*, which the network does not have"):
        TrainingState(small(schedule=ByHand(((1, "conv9.*", 0.0),))), 3, 0, CPU)


def test_decay_of_biases_is_a_switch() -> None:
    state = TrainingState(small(bias_decay=0.25, schedule=Steps(after=())), 3, 0, CPU)
    assert {group["decay"] for group in state.optimizer.param_groups} == {0.0005, 0.25}
    state = TrainingState(small(bias_decay=0.0), 3, 0, CPU)
    assert {group["decay"] for group in state.optimizer.param_groups} == {0.0005, 0.0}
