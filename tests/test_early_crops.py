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
from alexprep.train import recipes, training_state
from alexprep.train.data import ByCrop
from alexprep.train.settings import recipe_of
from alexprep.train.trainer import train
from tests import training_ranks as ranks
from tests.made_up import CLASSES, CROP, Batch, MadeUpLoader, forget, pooled_network, small_recipe
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
    growing = ByCrop(opened, EARLY, 64, epoch=0)
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


def test_a_run_from_before_goes_on_without(cropped: Path) -> None:
    """That a recipe has early crops in a later release changes no run that began without."""
    early = recipes.RECIPES["small"]
    recipes.RECIPES["small"] = replace(early, early_crops=())
    whole = train(config(cropped, name="whole"), Cropped)
    train(config(cropped, name="cut", steps=9), Cropped)
    recipes.RECIPES["small"] = early
    forget(cropped.parent / "runs" / "cut", "early_crops")
    Cropped.opened.clear()
    again = train(config(cropped, name="cut", resume=True, epochs=EPOCHS), Cropped)
    assert again["weights_sha256"] == whole["weights_sha256"] and Cropped.opened == [(CROP, EPOCHS)]


def test_a_last_step_of_one_image_is_tried_at_every_side(cropped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch normalisation of maps of one pixel needs two images, and this net has such maps at 40 pixels alone."""

    def normed(classes: int, crop: int, *, seed: int, width: float) -> nn.Sequential:
        torch.manual_seed(seed)
        small = OrderedDict(conv=nn.Conv2d(3, 4, 40, stride=8), norm=nn.BatchNorm2d(4), pool=nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(small | OrderedDict(flatten=nn.Flatten(), last=nn.Linear(4, classes)))

    recipes.RECIPES["small"] = replace(recipes.RECIPES["small"], network=normed, early_crops=(40,))
    monkeypatch.setattr(Cropped, "training", 41)  # five steps of eight, and one of one
    assert train(config(cropped, epochs=2), Cropped)["epoch_steps"] == 5


def test_each_size_is_compiled_and_checked_once(cropped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    monkeypatch.setattr(
        training_state, "check_compiled", lambda state, net, images, labels: checked.append(images.shape[-1])
    )
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    train(config(cropped, compile=True), Cropped)
    assert checked == [40, 56, CROP]
    sizes = ",".join(map(str, range(30, 38)))
    with pytest.raises(AlexprepError, match="early_crops and the crop are 9 sizes, and at most 8 are compiled"):
        train(config(cropped, compile=True, name="many", settings=(f"early_crops={sizes}",)), Cropped)


def test_a_network_of_another_keeps_no_early_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said of the recipe's own; of a user's they are asked for."""
    fast = replace(recipes.RECIPES["cifar10-fast"], early_crops=(24,))
    monkeypatch.setitem(recipes.RECIPES, "cifar10-fast", fast)
    file = tmp_path / "mine.py"
    file.write_text("def net(classes, crop):\n    raise NotImplementedError\n")
    options = {"recipe": "cifar10-fast", "model": f"{file}:net"}
    assert recipe_of({"recipe": "cifar10-fast"}).early_crops and not recipe_of(options).early_crops
    assert recipe_of(options | {"settings": ["early_crops=20,24"]}).early_crops == (20, 24)


def test_a_network_of_one_size_is_refused(cropped: Path) -> None:
    words = r"network of recipe small does not take images of 40 pixels, as early_crops has them, but of 67: name larger ones.*early_crops=none"
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * CROP * CROP, CLASSES))
    recipes.RECIPES["small"] = replace(recipes.RECIPES["small"], network=lambda *_, **__: fixed)
    with pytest.raises(AlexprepError, match=words):
        train(config(cropped), Cropped)
    assert not (cropped.parent / "runs").exists()
    with pytest.raises(AlexprepError, match=r"early_crops \(or none\), at most the crop, 68 is not in \[1, 67\]"):
        train(config(cropped, settings=("early_crops=40,68",)), Cropped)
