"""Trainings that come to harm, for tests/test_training_faults.py: in its process, and in ranks that `launch` starts."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.shards.files import TEMPORARY_MARK
from alexprep.train.config import TrainConfig
from alexprep.train.job import prepare
from alexprep.train.loop import train
from alexprep.train.networks.alexnet import alexnet
from alexprep.train.parallel.world import World
from alexprep.train.recipes import registry as recipes
from alexprep.train.recipes.recipe import Recipe
from alexprep.train.recipes.schedule import Steps
from alexprep.train.saved import checkpoint
from alexprep.train.saved.disk import publish

CLASSES, BATCH, STEPS, CROP = 3, 8, 6, 67  # steps an epoch
EVERY = 2  # steps between checkpoints
BAD_STEP = 4
# What is wrong, settings that go with it, and the words that tell.
POISONS: dict[str, tuple[dict[str, Any], str]] = {
    "pixel": ({}, "it began in step 4, where the images held nan"),
    "rate": ({"lr": 1.0}, "it began in step 4, where the output of fc8 became inf"),
    "gradient": ({"recipe": "gradient"}, "it began in step 1, where the gradient of fc8.bias became nan"),
    "weight": ({"recipe": "weight"}, "it began in step 1, where conv3.bias held inf before the step"),
}


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


class MadeUp:
    """Noise around one colour a class, from (epoch, step) alone; `poison` is added to one pixel of one step."""

    digest = "made up"
    poison = 0.0

    def __init__(self, data: str | Path, split: str = "train", *, seed: int = 0, **options: Any) -> None:
        self.seed, self.split, self.last = seed, split, options["layout"] == "channels_last"
        self.steps = STEPS if split == "train" else 1
        self.samples, self.epoch, self.step = BATCH * self.steps, 0, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        while self.epoch == epoch:
            rng = np.random.default_rng((self.epoch, self.step) if self.split == "train" else 0)
            self.step += 1
            labels = rng.integers(0, CLASSES, BATCH)
            images = rng.normal(scale=30, size=(BATCH, CROP, CROP, 3)).astype(np.float32)
            images[np.arange(BATCH), :, :, labels] += 60
            if self.split == "train" and (self.epoch, self.step) == (0, BAD_STEP):
                images[BATCH // 2, 1, CROP - 1, 0] += self.poison
            if self.step == len(self):
                self.epoch, self.step = self.epoch + 1, 0
            pixels = torch.from_numpy(images).movedim(-1, 1)
            yield Batch(pixels if self.last else pixels.contiguous(), torch.from_numpy(labels))

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]

    def close(self) -> None:
        pass


class Poisoned(MadeUp):
    poison = float("nan")


class Kink(nn.Module):
    """The identity; its gradient at 0 is 0 · inf."""

    mixes_maps = False

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + 0 * values.abs().sqrt()


def narrow(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    """AlexNet, narrow, dropout included; larger weights, since its few inputs a neuron would stay silent with 0.01."""
    network = alexnet(classes, crop, seed=seed, width=width)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight") and not name.startswith("conv1."):
                parameter.mul_(8)
    return network


def with_infinity(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    network = narrow(classes, crop, seed=seed, width=width)
    with torch.no_grad():
        network.get_parameter("conv3.bias")[-1] = float("inf")  # the second tower's
    return network


def with_kink(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    """The first logit is 0 for any image."""
    network = narrow(classes, crop, seed=seed, width=width)
    with torch.no_grad():
        network.get_parameter("fc8.weight")[0] = 0
        network.get_parameter("fc8.bias")[0] = 0
    network.add_module("kink", Kink())
    return network


def register() -> None:
    """Puts the recipes of these trainings into the registry."""
    for name, network in {"narrow": narrow, "weight": with_infinity, "gradient": with_kink}.items():
        recipe = Recipe(
            name=name,
            network=network,
            augmentation=Augmentation(crop=CROP, noise="none"),
            stored_sizes=(CROP, CROP),
            schedule=Steps(after=()),
            epochs=1,
            batch_size=BATCH,
            width=0.125,
        )
        recipes.RECIPES[name] = lambda recipe=recipe: recipe  # type: ignore[misc]


def write_data(folder: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """A data set's facts without its images."""
    folder.mkdir()
    document = {
        "format_version": 1,
        "digest": MadeUp.digest,
        "classes": [f"class{n}" for n in range(CLASSES)],
        "image": {"size": CROP},
        "splits": {split: {"samples": BATCH} for split in splits},
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def config(data: Path, **changes: Any) -> TrainConfig:
    """Settings of a run beside the data set."""
    settings: dict[str, Any] = {
        "data": data,
        "recipe": "narrow",
        "runs": data.parent / "runs",
        "device": "cpu",
        "log_steps": 1,
    }
    return TrainConfig(**settings | changes)


def begun(world: World, data: Path, loader: type[MadeUp] = MadeUp, **settings: Any) -> dict[str, Any]:
    """A new training by all ranks, of which the first makes the run."""
    chosen = config(data, **settings, ranks=world.size)
    if world.leads:
        prepare(chosen, world.device, made_up=True)
    world.any(False)
    return train(replace(chosen, resume=True), loader, world)


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


def everything(world: World, data: str) -> dict[str, Any]:
    """For ranks: weights of a training, of those that go on from each of its steps and from a kill; the words of poisoned ones."""
    register()
    folder = Path(data)
    whole = begun(world, folder, name="whole")["weights_sha256"]
    resumed = []
    for step in range(1, STEPS):
        begun(world, folder, name=f"part{step}", steps=step)
        resumed.append(gone_on(world, folder, f"part{step}")["weights_sha256"])
    return {
        "whole": whole,
        "resumed": resumed,
        "after the kill": gone_on(world, folder, "killed")["weights_sha256"],
        "poisoned": {kind: poisoned(world, folder, kind) for kind in POISONS},
    }


def killed(world: World, data: str, step: int) -> None:
    """For ranks: the first is killed while it saves the checkpoint of a step, and leaves half a file."""
    register()

    def dying(path: Path, content: bytes, next_step: str = "") -> None:
        if path.name.startswith(f"step-{step:08d}") and path.suffix == ".safetensors":
            path.with_name(f".{path.name}{TEMPORARY_MARK}1").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        publish(path, content)

    vars(checkpoint)["publish"] = dying
    begun(world, Path(data), name="killed", checkpoint_steps=EVERY)
