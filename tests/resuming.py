"""Trainings of one small net under every update rule and every schedule, broken off and gone on with; also for ranks that `launch` starts.

A case is an optimizer and a schedule. Its run has a checkpoint after each epoch, two of which are kept and the best; then it goes on from copies
that lost what came after the best one, and after one in mid-epoch.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexprep.pipeline.augmentation import Augmentation
from alexprep.train import recipes
from alexprep.train.checkpoint import Checkpoint, newest
from alexprep.train.config import TrainConfig
from alexprep.train.distributed.world import World
from alexprep.train.field_values import PAPER
from alexprep.train.lr_schedule import (
    ByHand,
    Cosine,
    DExp,
    EarlyStop,
    Linear,
    OneCycle,
    Plateau,
    Schedule,
    Steps,
    WarmUp,
)
from alexprep.train.models.layers import PaperDropout
from alexprep.train.optimizer import NOT_BY_GRADIENTS_ALONE
from alexprep.train.recipes import Recipe
from alexprep.train.run_dir import best_step
from alexprep.train.trainer import train
from alexprep.train.training_state import TrainingState, take_step
from tests.made_up import BATCH, CLASSES, MadeUpLoader

EPOCHS, EPOCH_STEPS = 3, 2
SCHEDULES: dict[str, Schedule] = {
    "steps": Steps(after=(1,)),
    "plateau": Plateau(patience=1, margin=50.0),
    "d-exp": DExp(epochs=3, steps=3),
    "by-hand": ByHand(((1, "conv1.*", 0.0), (2, "conv1.weight", 0.5))),
    "linear": Linear(),
    "cosine": Cosine(final=0.1),
    "one-cycle": OneCycle(),
    "warm": WarmUp(Plateau(patience=1, margin=50.0), epochs=1.5),
    "stop": EarlyStop(WarmUp(Cosine(), epochs=1.25), patience=3),
}
ONLY_MATRICES = {"Muon"}  # torch's class refuses biases
SMALL_RATES = {"sgd", "nesterov", "SGD", PAPER, "paper-2012", "ASGD"}


def optimizers() -> list[str]:
    """The names of all that a recipe can have; "paper-2012" is the paper's rule without momentum correction."""
    classes = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    found = [PAPER, "paper-2012", "sgd", "nesterov", "adamw", *sorted(classes - NOT_BY_GRADIENTS_ALONE - ONLY_MATRICES)]
    return found


def cases() -> list[tuple[str, str]]:
    return [(optimizer, schedule) for optimizer in optimizers() for schedule in SCHEDULES]


def sample(seed: int, count: int) -> list[tuple[str, str]]:
    """Of the cases, as many optimizers and as many schedules as there is room for."""
    chance = random.Random(seed)
    rules, schedules = chance.sample(optimizers(), count), chance.sample(list(SCHEDULES), count)
    return list(zip(rules, schedules, strict=True))


class Specks(MadeUpLoader):
    """Images of a few pixels, two steps an epoch, the second of fewer images."""

    side, training, others = 4, 2 * BATCH - 3, BATCH


def speck_net(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(3, 4, 2))
    network.add_module("relu1", nn.ReLU())
    network.add_module("flatten", nn.Flatten())
    network.add_module("dropout", PaperDropout())
    network.add_module("fc2", nn.Linear(4 * (crop - 1) ** 2, classes))
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.05, generator=generator)
    return network


def recipe_of(optimizer: str, schedule: str) -> Recipe:
    rule = PAPER if optimizer.startswith(PAPER) else optimizer
    return Recipe(
        name=f"{optimizer}-{schedule}",
        network=speck_net,
        augmentation=Augmentation(crop=Specks.side, noise="none"),
        stored_sizes=(Specks.side, Specks.side),
        schedule=SCHEDULES[schedule],
        epochs=EPOCHS,
        batch_size=BATCH,
        optimizer=rule,
        lr=1e-3 if optimizer in SMALL_RATES else 0.02,
        momentum_correction=optimizer != "paper-2012",
        average=0.9 if rule == "adamw" else 0.0,
    )


def register(chosen: list[tuple[str, str]]) -> None:
    """Puts the cases' recipes into the registry."""
    made = [recipe_of(*case) for case in chosen]
    recipes.RECIPES.update({each.name: each for each in made})


def trained(world: World, data: Path, recipe: str, name: str, **changes: Any) -> dict[str, Any]:
    """A run's summary, and what its newest checkpoint holds."""
    settings: dict[str, Any] = {"runs": data.parent / "runs", "device": "cpu", "keep": 1, "checkpoint_steps": 1}
    chosen = TrainConfig(data, recipe, name=name, ranks=world.size, log_steps=2, **settings | changes)
    summary = train(chosen, Specks, world)
    world.any(False)  # the first rank has written all
    saved, _ = newest(data.parent / "runs" / name / "checkpoints")
    assert saved is not None
    return {"summary": summary, "tensors": saved.tensors, "position": saved.facts["position"]}


def differs(world: World, data: Path, optimizer: str, schedule: str) -> list[str]:
    """What is otherwise in a training that was broken off and gone on with, of one that was not: nothing."""
    recipe, found = f"{optimizer}-{schedule}", []
    scheme = {} if world.size == 1 else {"scheme": "ddp"}
    whole = trained(world, data, recipe, f"{recipe}-whole", keep=2 * EPOCHS * EPOCH_STEPS, **scheme)
    runs = data.parent / "runs"
    for place, step in (("best", best_step(runs / f"{recipe}-whole")), ("middle", EPOCH_STEPS + 1)):
        part = runs / f"{recipe}-{place}"
        if world.leads:
            shutil.copytree(runs / f"{recipe}-whole", part)
            for mark in (part / "checkpoints").glob("*.json"):
                if int(mark.stem.rpartition("-")[2]) > step:
                    mark.unlink()
        world.any(False)
        rest = trained(world, data, recipe, part.name, resume=True, **scheme)
        same = all(rest["summary"][name] == whole["summary"][name] for name in ("steps", "weights_sha256", "val_loss"))
        same = same and rest["tensors"].keys() == whole["tensors"].keys()
        same = same and all(torch.equal(rest["tensors"][name], each) for name, each in whole["tensors"].items())
        timeless = [{**each["position"], "epoch_seconds": 0.0} for each in (rest, whole)]
        if not same or timeless[0] != timeless[1]:
            found.append(f"{optimizer}, {schedule}, on {world.size} ranks, from {place}, step {step}")
    return found


def everything(world: World, data: str, chosen: list[tuple[str, str]]) -> list[str]:
    """What is otherwise in any of the cases; also for ranks."""
    register(chosen)
    return [words for optimizer, schedule in chosen for words in differs(world, Path(data), optimizer, schedule)]


# The same in memory, which takes a tenth of the time: what a checkpoint would hold, and the loop's way from step to step.

ERRORS = (80.0, 40.0, 60.0)  # of the epochs' evaluations: the second is the best


def walk(state: TrainingState, until: int) -> None:
    """Takes steps as the loop does, with images that depend on the step alone."""
    position, schedule = state.position, state.recipe.schedule
    while position.step < until and not position.schedule.finished:
        generator = torch.Generator().manual_seed(position.step)
        images = 60 * torch.randn(BATCH - position.epoch_step, 3, Specks.side, Specks.side, generator=generator)
        labels = torch.randint(CLASSES, (len(images),), generator=generator)
        state.sums.add(*take_step(state, images, labels), labels)
        position.step += 1
        position.epoch_step += 1
        if position.epoch_step == EPOCH_STEPS:
            position.schedule = schedule.after_epoch(position.schedule, position.epoch + 1, ERRORS[position.epoch])
            position.epoch, position.epoch_step = position.epoch + 1, 0


def begun_anew(recipe: Recipe, saved: Checkpoint | None = None) -> TrainingState:
    """The state before the first step; or, in another process than before, so to speak, that of a checkpoint."""
    state = TrainingState(recipe, CLASSES, 0 if saved is None else 1, torch.device("cpu"))
    state.epoch_steps = EPOCH_STEPS
    if saved is not None:
        state.restore(saved)
    return state


def snapshot(state: TrainingState) -> Checkpoint:
    """What a checkpoint would hold, its facts after their way through JSON."""
    tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
    return Checkpoint(state.position.step, tensors, json.loads(json.dumps(state.facts())))


def differs_in_memory(optimizer: str, schedule: str) -> list[str]:
    """As `differs`: gone on with from the best epoch's end, and from the step before it."""
    recipe = recipe_of(optimizer, schedule)
    whole = begun_anew(recipe)
    saved = []
    for step in (2 * EPOCH_STEPS - 1, 2 * EPOCH_STEPS, EPOCHS * EPOCH_STEPS):
        walk(whole, step)
        saved.append(snapshot(whole))
    *parts, right = saved
    found = []
    for part in parts:
        state = begun_anew(recipe, part)
        walk(state, right.step)
        rest = snapshot(state)
        same = rest.facts == right.facts and rest.tensors.keys() == right.tensors.keys()
        if not same or not all(torch.equal(rest.tensors[name], each) for name, each in right.tensors.items()):
            found.append(f"{optimizer}, {schedule}, from step {part.step}")
        if all(torch.equal(part.tensors[name], each) for name, each in right.tensors.items()):
            found.append(f"{optimizer}, {schedule}: nothing moved after step {part.step}")
    return found
