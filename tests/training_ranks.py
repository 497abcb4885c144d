"""Small trainings for tests, some of which come to harm: in the test's process, and in ranks that `launch` starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train import recipes
from alexprep.train.config import TrainConfig
from alexprep.train.distributed.world import World
from alexprep.train.lr_schedule import Steps
from alexprep.train.trainer import train
from tests import resuming
from tests.made_up import BATCH, Batch, MadeUpLoader, small_alexnet, small_recipe, write_data

STEPS = 6  # an epoch
EVERY = 2  # steps between checkpoints
BAD_STEP = 4
# Settings of another update than the paper's, with all that may go with it.
ADAMW: dict[str, Any] = {
    "lr": 0.001,
    "schedule": "one-cycle",
    "settings": ("optimizer=adamw", "clip=0.5", "average=0.9"),
}
SAMPLE = (2, 5)  # steps after which a run is resumed
# What is wrong, settings that go with it, and the words that tell.
POISONS: dict[str, tuple[dict[str, Any], str]] = {
    "pixel": ({}, "it began in step 4, where the images held nan"),
    "rate": ({"lr": 1.0}, "it began in step 4, where the output of fc8 became inf"),
    "gradient": ({"recipe": "gradient"}, "it began in step 1, where the gradient of fc8.bias became nan"),
    "weight": ({"recipe": "weight"}, "it began in step 1, where conv3.bias held inf before the step"),
}


class MadeUp(MadeUpLoader):
    training, others = BATCH * STEPS, BATCH


class Poisoned(MadeUp):
    """One pixel of one step is no number."""

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in super().__iter__():
            if self.split == "train" and (self.epoch, self.step) == (0, BAD_STEP):
                images[BATCH // 2, 0, 1, -1] = float("nan")
            yield Batch(images, labels)


class Kink(nn.Module):
    """The identity; its gradient at 0 is 0 · inf."""

    mixes_maps = False

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + 0 * values.abs().sqrt()


def with_infinity(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    network = small_alexnet(classes, crop, seed=seed, width=width)
    with torch.no_grad():
        network.get_parameter("conv3.bias")[-1] = float("inf")  # the second tower's
    return network


def with_kink(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    """The first logit is 0 for any image."""
    network = small_alexnet(classes, crop, seed=seed, width=width)
    with torch.no_grad():
        network.get_parameter("fc8.weight")[0] = 0
        network.get_parameter("fc8.bias")[0] = 0
    network.add_module("kink", Kink())
    return network


def register() -> None:
    """Puts the recipes of these trainings into the registry."""
    recipes.RECIPES["small"] = small_recipe()
    for name, network in {"narrow": small_alexnet, "weight": with_infinity, "gradient": with_kink}.items():
        recipes.RECIPES[name] = small_recipe(name=name, network=network, schedule=Steps(after=()), epochs=1)


def registered(folder: Path, patch: pytest.MonkeyPatch, loader: type[MadeUpLoader] = MadeUp) -> Path:
    """The recipes in the registry as long as the patch holds, and a data set's facts, without images, in a new folder."""
    patch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))
    register()
    return write_data(folder / "data", loader)


def config(data: Path, **changes: Any) -> TrainConfig:
    """Settings of a run beside the data set."""
    settings: dict[str, Any] = {"data": data, "recipe": "narrow", "runs": data.parent / "runs", "device": "cpu"}
    return TrainConfig(**{**settings, "log_steps": 1, **changes})


def small_config(data: Path, **changes: Any) -> TrainConfig:
    """Likewise, of the recipe that the made-up loader goes with."""
    return config(data, **{"recipe": "small", "log_steps": 4, **changes})


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Those of a run's log; every line must be JSON, which knows no NaN."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} in {run}")

    lines = [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def begun(world: World, data: Path, loader: type[MadeUp] = MadeUp, **settings: Any) -> dict[str, Any]:
    """A new training by all ranks, of which the first makes the run."""
    return train(config(data, **settings, ranks=world.size), loader, world)


def gone_on(world: World, data: Path, name: str) -> dict[str, Any]:
    """A training that is resumed, to the end."""
    return train(config(data, name=name, ranks=world.size, resume=True, epochs=1), MadeUp, world)


def poisoned(world: World, data: Path, kind: str) -> str:
    """The words that a poisoned training ends with. Its log is sparse: by the time it is noticed, every weight may be NaN."""
    loader = Poisoned if kind == "pixel" else MadeUp
    try:
        begun(world, data, loader, name=kind, checkpoint_steps=EVERY, **{"log_steps": 5, **POISONS[kind][0]})
    except AlexprepError as error:
        return str(error)
    return "nothing"


def everything(world: World, data: str, specks: str, chosen: list[tuple[str, str]]) -> dict[str, Any]:
    """For ranks: weights of a training and of those that go on from some of its steps; the words of poisoned ones; and `resuming.everything`."""
    register()
    folder = Path(data)
    whole = begun(world, folder, name="whole")["weights_sha256"]
    resumed = []
    for step in SAMPLE:
        begun(world, folder, name=f"part{step}", steps=step)
        resumed.append(gone_on(world, folder, f"part{step}")["weights_sha256"])
    other = begun(world, folder, name="adamw", **ADAMW)
    begun(world, folder, name="part-of-adamw", steps=3, **ADAMW)
    adamw = [(run["weights_sha256"], run["val_loss"]) for run in (other, gone_on(world, folder, "part-of-adamw"))]
    return {
        "whole": whole,
        "resumed": resumed,
        "adamw": adamw,
        "otherwise": resuming.everything(world, specks, chosen),
        "poisoned": {kind: poisoned(world, folder, kind) for kind in POISONS},
    }
