"""What trainings in tests do without: a data set, its loader, a large network. Also for processes that tests start."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.storage import digest_json
from alexprep.train import checkpoint
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.lr_schedule import Steps
from alexprep.train.models import alexnet as networks
from alexprep.train.precision import MemoryFormat
from alexprep.train.recipes import Recipe
from alexprep.train.training_state import TrainingState

DIGEST = "made up"
CLASSES, BATCH, CROP = 3, 8, 67
FAMILY = tuple(value for value in vars(networks).values() if isinstance(value, networks.AlexNet))  # a new one too


class Batch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor


class MadeUpLoader:
    """Noise around one colour a class, from (seed, epoch) alone; the epoch rises when its last batch is delivered.

    Attributes:
        side: of the images, pixels; for subclasses to change.
        training: samples of the training split, likewise: six steps, the last of six images.
        others: samples of each other split, likewise.
    """

    digest = DIGEST
    side, training, others = CROP, 46, 20

    def __init__(
        self,
        data: str | Path,
        split: str = "train",
        *,
        batch_size: int = BATCH,
        seed: int = 0,
        memory_format: MemoryFormat = "NCHW",
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.split, self.batch_size, self.seed, self.device = split, batch_size, seed, device
        self.form = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self.samples = self.training if split == "train" else self.others
        self.epoch = self.step = 0

    def __len__(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        rng = np.random.default_rng((self.seed, epoch, 0) if self.split == "train" else (self.seed, 0, 1))
        labels = rng.integers(0, CLASSES, self.samples)
        pixels = rng.normal(scale=30, size=(self.samples, 3, self.side, self.side))
        pixels[np.arange(self.samples), labels] += 60
        images = torch.from_numpy(pixels.astype(np.float32))
        while self.epoch == epoch:
            rows = slice(self.step * self.batch_size, (self.step + 1) * self.batch_size)
            self.step += 1
            if self.step == len(self):
                self.epoch, self.step = epoch + 1, 0
            own = images[rows].clone(memory_format=self.form)
            yield Batch(own.to(self.device), torch.from_numpy(labels[rows]).to(self.device))

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state["seed"] == self.seed
        assert 0 <= state["step"] < len(self)
        self.epoch, self.step = state["epoch"], state["step"]

    def close(self) -> None:
        pass


def changed(
    change: Callable[[MadeUpLoader, torch.Tensor], torch.Tensor], loader: type[MadeUpLoader] = MadeUpLoader
) -> type[MadeUpLoader]:
    """A loader whose images are changed as they are delivered, by what is also told where it is then."""

    class Changed(loader):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[Batch]:
            for images, labels in super().__iter__():
                yield Batch(change(self, images), labels)

    return Changed


def write_data(
    folder: Path,
    loader: type[MadeUpLoader] = MadeUpLoader,
    splits: tuple[str, ...] = ("train", "val"),
    **changes: Any,
) -> Path:
    """What dataset.json would say of a loader's images, in a new folder."""
    folder.mkdir()
    document = {
        "format_version": 1,
        "digest": DIGEST,
        "classes": [f"class{n}" for n in range(CLASSES)],
        "image": {"size": loader.side, "format": "jpg"},
        "splits": {split: {"samples": loader(folder, split).samples} for split in splits},
    }
    (folder / "dataset.json").write_text(json.dumps(document | changes))
    return folder


def small_alexnet(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    """AlexNet, narrow, dropout included; larger weights, since its few inputs a neuron would stay silent with 0.01."""
    network = networks.alexnet(classes, crop, seed=seed, width=width)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight") and not name.startswith("conv1."):
                parameter.mul_(8)
    return network


def pooled_network(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    """A network for images of any size."""
    torch.manual_seed(seed)
    layers = OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return nn.Sequential(layers | OrderedDict(last=nn.Linear(4, classes)))


def small_recipe(**changes: Any) -> Recipe:
    recipe = Recipe(
        name="small",
        network=small_alexnet,
        augmentation=Augmentation(crop=CROP, noise="none"),
        stored_sizes=(CROP, CROP),
        schedule=Steps(after=(2,)),
        epochs=3,
        batch_size=BATCH,
        width=0.125,
    )
    return replace(recipe, **changes)


def make_run(runs: Path, name: str, data: Path, seed: int, steps: tuple[int, ...] = (2,), recipe: str = "tiny") -> Path:
    """A run with untrained checkpoints, each of other weights."""
    job = prepare(TrainConfig(data=data, recipe=recipe, seed=seed, runs=runs, name=name, device="cpu"))
    for step in steps:
        state = TrainingState(job.recipe, job.facts.classes, seed + 100 * step, torch.device("cpu"))
        state.position.step = step
        facts = {"identity": job.identity, **state.facts(), "versions": {}}
        checkpoint.save(job.run / "checkpoints", step, state.tensors(), facts, keep=9)
    return job.run


def forget(run: Path, field: str) -> None:
    """Leaves a field of the recipe out of what a run has recorded, as a release does that knows no such field."""
    for file in (run / "config.json", *(run / "checkpoints").glob("*.json")):
        document = json.loads(file.read_text())
        del document.get("facts", document)["identity"]["recipe"][field]
        if "digest" in document:
            document["digest"] = digest_json({name: value for name, value in document.items() if name != "digest"})
        file.write_text(json.dumps(document))
