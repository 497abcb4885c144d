"""Networks of timm and torchvision by name, with stand-ins for both libraries; tests/ecosystem has the libraries themselves."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.loading import load
from alexprep.train.settings import recipe_of
from alexprep.train.trainer import train
from tests import made_up


class Told(NamedTuple):
    """What timm says of a network's pixels."""

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.25)
    crop_pct: float = 0.95
    fixed_input_size: bool = False


class Small(nn.Module):
    """Batch normalisation, and of one image a wrong shape: as networks of others have it."""

    def __init__(self, classes: int, side: int | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Linear(4, classes)
        self.side = side

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert self.side in (None, images.shape[-1])
        maps = self.norm(self.conv(images)).relu().mean((2, 3), keepdim=True)
        return self.fc(maps.squeeze())  # type: ignore[no-any-return]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins with one network each, and how these were called."""
    called: dict[str, Any] = {}

    def create_model(name: str, *, pretrained: bool, num_classes: int, img_size: int | None = None) -> nn.Module:
        called["timm"] = {"name": name, "pretrained": pretrained, "img_size": img_size}
        return Small(num_classes, img_size or (224 if "fixed" in name else None))

    def get_model(name: str, *, weights: None, num_classes: int, **more: Any) -> nn.Module:
        called["torchvision"] = {"name": name, "weights": weights} | more
        return Small(num_classes)

    preset = types.SimpleNamespace(
        crop_size=[299], resize_size=[342], mean=(0.485, 0.456, 0.406), std=[0.229, 0.224, 0.225]
    )
    names = ["small", "small_fixed.tag_in1k", "plain"]
    told: dict[str, Any] = {"small": Told(), "small_fixed.tag_in1k": Told(fixed_input_size=True), "plain": None}
    timm = types.SimpleNamespace(
        create_model=create_model,
        is_model=names.__contains__,
        list_models=lambda: names,
        get_pretrained_cfg=lambda name, allow_unregistered: told[name],
    )
    weights = {
        "inception_v3": types.SimpleNamespace(DEFAULT=types.SimpleNamespace(transforms=lambda: preset)),
        "vit_b_16": types.SimpleNamespace(),
    }
    models = types.SimpleNamespace(
        get_model=get_model, get_model_weights=weights.__getitem__, list_models=lambda module: list(weights)
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    return called


def test_pixels_are_the_library_s(libraries: dict[str, Any]) -> None:
    """Its crop too, where the recipe's images are large enough for it."""
    half = (127.5, 127.5, 127.5)
    for model, base, crop, mean, std in (
        ("timm/small", "alexnet", 224, "inception", (127.5, 127.5, 63.75)),
        ("timm/small", "tiny", 56, "inception", (127.5, 127.5, 63.75)),
        ("timm/plain", "alexnet", 224, "imagenet", "imagenet"),
        ("torchvision/inception_v3", "alexnet", 224, "imagenet", "imagenet"),  # 299 pixels are not in 256
        ("torchvision/vit_b_16", "alexnet", 224, "imagenet", "imagenet"),
    ):
        made = recipe_of({"recipe": base, "model": model})
        augmentation = made.augmentation
        assert (augmentation.crop, augmentation.mean, augmentation.std) == (crop, mean, std), model
        assert made.stored_sizes[0] >= crop and half
    assert recipe_of({"recipe": "tiny", "model": None}).augmentation.mean == "crop"


def test_factories_are_called_as_the_libraries_want(libraries: dict[str, Any]) -> None:
    def made(model: str, crop: int) -> dict[str, Any]:
        network = recipe_of({"recipe": "tiny", "model": model}).network
        assert network(5, crop, seed=1, width=1.0)(torch.zeros(2, 3, crop, crop)).shape == (2, 5)
        return dict(libraries[model.partition("/")[0]])

    assert made("timm/small", 56) == {"name": "small", "pretrained": False, "img_size": None}
    assert (
        made("timm/small_fixed.tag_in1k", 56)["img_size"] == 56
        and made("timm/small_fixed.tag_in1k", 224)["img_size"] is None
    )
    assert made("torchvision/inception_v3", 56) == {
        "name": "inception_v3",
        "weights": None,
        "aux_logits": False,
        "init_weights": True,
    }
    assert made("torchvision/vit_b_16", 56)["image_size"] == 56


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("timm/smal", "timm has no network 'smal', perhaps small"),
        ("torchvision/inception", "perhaps inception_v3 is meant: torchvision.models.list_models"),
        ("timm/hf-hub:someone/net", "names no Python code: write FILE.py:FUNCTION or MODULE:FUNCTION, timm/NAME"),
        ("keras/small", "names no Python code"),
    ],
)
def test_mistakes_are_told(libraries: dict[str, Any], model: str, words: str, tmp_path: Path) -> None:
    made_up.write_data(tmp_path / "data")
    with pytest.raises(AlexprepError, match=words):
        prepare(TrainConfig(data=tmp_path / "data", model=model, runs=tmp_path / "runs", device="cpu"))
    assert not (tmp_path / "runs").exists()


def test_a_library_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        AlexprepError, match=r"--model timm/… needs timm, which cannot be imported .*: pip install timm"
    ):
        recipe_of({"recipe": "tiny", "model": "timm/another"})


def test_trained_resumed_and_loaded_without_naming_it_again(
    libraries: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """48 images in steps of 47 leave one, which the network cannot take."""
    options: dict[str, Any] = {"runs": tmp_path, "device": "cpu", "batch_size": 47, "threads": 1}
    first = train(TrainConfig(data=data, recipe="tiny", model="timm/small_fixed.tag_in1k", steps=1, **options))
    run = Path(first["run"])
    assert (run.name, first["epoch_steps"]) == ("small_fixed", 1)
    said = capsys.readouterr().err
    assert "crops of 56 pixels less mean inception" in said and "too few for this network" in said
    assert train(TrainConfig(resume=True, epochs=2, runs=tmp_path, device="cpu"))["steps"] == 2
    assert json.loads((run / "config.json").read_text())["options"]["model"] == "timm/small_fixed.tag_in1k"
    network, classes, transform = load(run)
    with transform:
        images = transform([torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()] * 2)
    assert network(images).shape == (2, len(classes))
    assert images[0, :, 0, 0].tolist() == pytest.approx([-1, -1, -2])
