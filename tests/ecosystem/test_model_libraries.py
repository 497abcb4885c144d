"""Networks of timm and torchvision themselves: what they say of their pixels, their calls, and AlexNet's weights there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alexprep.shards.errors import AlexprepError
from alexprep.train.config import TrainConfig
from alexprep.train.export import _named_weights
from alexprep.train.initial_weights import Weights, begin_with
from alexprep.train.model_libraries import library_factory
from alexprep.train.models.alexnet import alexnet_owt
from alexprep.train.trainer import train
from tests import made_up

torchvision: Any = pytest.importorskip("torchvision", reason="torchvision is not installed: `make ecosystem` has it")
timm: Any = pytest.importorskip("timm", reason="timm is not installed: `make ecosystem` has it")

NETWORKS = [
    ("torchvision/alexnet", 224, 224, False),
    ("torchvision/inception_v3", 299, 224, False),
    ("torchvision/googlenet", 224, 224, False),
    ("torchvision/vit_b_16", 224, 64, True),
    ("timm/resnet18", 224, 56, False),
    ("timm/vit_tiny_patch16_224.augreg_in21k", 224, 64, True),
    ("timm/test_vit", 160, 96, True),
]


@pytest.mark.parametrize(("name", "own", "crop", "fixed"), NETWORKS)
def test_networks_take_the_crop_that_is_used(name: str, own: int, crop: int, fixed: bool) -> None:
    factory = library_factory(name)
    assert factory is not None
    pixels = factory.pixels()
    assert (pixels.crop, pixels.fixed) == (own, fixed) and 0.8 < pixels.evaluation_scale <= 1
    network = factory(7, crop).train()
    assert network(torch.zeros(2, 3, crop, crop)).shape == (2, 7)


def test_names_that_they_do_not_have() -> None:
    for name in ("timm/resnet19", "torchvision/resnet19"):
        factory = library_factory(name)
        assert factory is not None
        with pytest.raises(AlexprepError, match=r"has no network 'resnet19', perhaps resnet18"):
            factory.pixels()


def test_torchvision_s_alexnet_there_and_back_bit_for_bit() -> None:
    theirs, ours = torchvision.models.alexnet(weights=None), alexnet_owt(1000)
    state = theirs.state_dict()
    assert begin_with(ours.state_dict(), Weights("alexnet", state, []), "*").fresh == {}
    back = _named_weights(ours, "torchvision")
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    torchvision.models.alexnet(weights=None).load_state_dict(back)


class Loader(made_up.MadeUpLoader):
    side, training, others = 56, 9, 4


@pytest.mark.parametrize("model", ["timm/resnet18", "torchvision/resnet18"])
def test_a_training(model: str, tmp_path: Path) -> None:
    data = made_up.write_data(tmp_path / "data", Loader, image={"size": 64, "format": "jpg"})
    options: dict[str, Any] = {"runs": tmp_path / "runs", "device": "cpu"}
    first = train(TrainConfig(data=data, recipe="tiny", model=model, batch_size=8, epochs=1, **options), Loader)
    assert (Path(first["run"]).name, first["steps"]) == ("resnet18", 2)
    assert train(TrainConfig(resume=True, epochs=2, **options), Loader)["steps"] == 4
