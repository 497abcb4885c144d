"""Progressive resizing: the first epochs' crops have sides of their own, of the same images in the same order, after any interruption."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.train import recipes
from alexprep.train.data import ByCrop
from alexprep.train.trainer import train
from tests import training_ranks as ranks
from tests.made_up import CLASSES, CROP, Batch, MadeUpLoader, small_recipe
from tests.training_ranks import small_config as config

EARLY = (40, 40, 56)
EPOCHS = 4


class Cropped(MadeUpLoader):
    """Gives the top left corners of its images, as large as the augmentation's crops; remembers which were opened."""

    opened: ClassVar[list[tuple[int, int | None]]] = []

    def __init__(self, *arguments: Any, augmentation: Augmentation, epochs: int | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.crop = augmentation.crop
        if self.split == "train":
            self.opened.append((int(str(self.crop)), epochs))

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in super().__iter__():
            yield Batch(images[:, :, : self.crop, : self.crop].contiguous(memory_format=self.form), labels)


def pooled_network(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())
    return nn.Sequential(layers | OrderedDict(last=nn.Linear(4, classes)))


@pytest.fixture
def cropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = ranks.registered(tmp_path, monkeypatch, MadeUpLoader)
    pooled = small_recipe(network=pooled_network, width=1.0, epochs=EPOCHS, early_crops=EARLY, lr=0.001)
    monkeypatch.setitem(recipes.RECIPES, "small", pooled)
    monkeypatch.setattr(Cropped, "opened", [])
    return folder


def test_epochs_are_those_of_loaders_of_their_crops(data: Path) -> None:
    """To the last bit, also from any state on; the state itself knows of no crop."""
    whole = Augmentation(crop=64, noise="none", mean="none")

    def opened(side: int, end: int) -> Loader:
        augmentation, known = replace(whole, crop=side), min(end, EPOCHS)
        return Loader(data, "train", augmentation=augmentation, batch_size=5, seed=3, device="cpu", epochs=known)

    wanted = []
    for epoch, side in enumerate((*EARLY, 64)):
        with opened(side, EPOCHS) as loader:
            loader.load_state_dict(loader.state_dict() | {"epoch": epoch})
            wanted.append([batch.images for batch in loader])
    growing = ByCrop(opened, EARLY, 64)
    assert len(growing) == len(wanted[0]) and growing.samples == loader.samples and growing.digest == loader.digest
    states = []
    for images in wanted:
        states.append(growing.state_dict())
        for mine, own in zip(growing, images, strict=True):
            assert torch.equal(mine.images, own)
    for epoch, step in itertools.product((2, 0, 3, 1), (0, 1)):
        growing.load_state_dict(states[0] | {"epoch": epoch, "step": step})
        assert growing.state_dict()["step"] == step
        assert torch.equal(next(iter(growing)).images, wanted[epoch][step])
    growing.close()


@pytest.mark.parametrize("steps", [3, 12, 13, 18, 20])
def test_a_run_goes_on_to_the_same_bits(cropped: Path, steps: int) -> None:
    """Within an epoch, between epochs of one crop, and where the crop changes; each loader knows where its epochs end."""
    whole = train(config(cropped, name="whole"), Cropped)
    assert Cropped.opened == [(40, 2), (56, 3), (CROP, EPOCHS)]
    train(config(cropped, name="cut", steps=steps), Cropped)
    again = train(config(cropped, name="cut", resume=True, epochs=EPOCHS), Cropped)
    for name in ("weights_sha256", "val_loss", "train_loss"):
        assert again[name] == whole[name]
    other = train(config(cropped, name="plain", settings=("early_crops=none",)), Cropped)
    assert other["weights_sha256"] != whole["weights_sha256"]


def test_a_network_of_one_size_is_refused(cropped: Path) -> None:
    words = r"network of recipe small does not take images of 40 pixels, as early_crops has them, but of 67.*early_crops=none"
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * CROP * CROP, CLASSES))
    recipes.RECIPES["small"] = replace(recipes.RECIPES["small"], network=lambda *_, **__: fixed)
    with pytest.raises(AlexprepError, match=words):
        train(config(cropped), Cropped)
    with pytest.raises(AlexprepError, match=r"early_crops 68 is not in \[1, 67\]"):
        train(config(cropped, settings=("early_crops=40,68",)), Cropped)
