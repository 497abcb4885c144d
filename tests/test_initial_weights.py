"""Weights to begin with: every form of a file, hostile ones, names of other programs, and what is told of layers that do not fit."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.checkpoint import init_from
from alexprep.train.config import TrainConfig
from alexprep.train.initial_weights import (
    TORCHVISION_ALEXNET,
    Weights,
    begin_with,
    find_weights,
    state_dict_of,
    under_names_of,
)
from alexprep.train.models.alexnet import AlexNet, alexnet_owt
from alexprep.train.trainer import train
from tests import made_up
from tests.made_up import MadeUpLoader


def torchvision_alexnet(classes: int, width: float = 1.0) -> nn.ModuleDict:
    """Its layers with weights, as torchvision/models/alexnet.py numbers them, each `width` as wide; the others have none."""
    c1, c2, c3, c4, c5, hidden = (int(count * width) for count in (64, 192, 384, 256, 256, 4096))
    convolutions = {0: (3, c1, 11), 3: (c1, c2, 5), 6: (c2, c3, 3), 8: (c3, c4, 3), 10: (c4, c5, 3)}
    features = {str(n): nn.Conv2d(*shape) for n, shape in convolutions.items()}
    side = 6 if width == 1 else 1
    linear = {1: (c5 * side * side, hidden), 4: (hidden, hidden), 6: (hidden, classes)}
    classifier = {str(n): nn.Linear(*shape) for n, shape in linear.items()}
    return nn.ModuleDict({"features": nn.ModuleDict(features), "classifier": nn.ModuleDict(classifier)})


def narrow_owt(classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return alexnet_owt(classes, 67, seed=seed, width=1 / 16).state_dict()


def test_torchvision_s_alexnet_fits_and_goes_back_bit_for_bit() -> None:
    theirs = torchvision_alexnet(7, width=1 / 16).state_dict()
    ours = narrow_owt(7)
    report = begin_with(ours, Weights("alexnet.pth", theirs, []), None)
    assert (report.taken, report.fresh, report.unused) == (list(TORCHVISION_ALEXNET.values()), {}, [])
    back = under_names_of(theirs, ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert all(
        torch.equal(ours[f"{ours_name}.weight"], theirs[f"{name}.weight"])
        for name, ours_name in TORCHVISION_ALEXNET.items()
    )


def test_its_shapes_are_those_of_the_whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its 61 million values."""
    monkeypatch.setattr(
        "alexprep.train.models.layers.initialised", lambda layers, *_: nn.Sequential(OrderedDict(layers))
    )
    with torch.device("meta"):
        ours, theirs = AlexNet.__call__(alexnet_owt, 1000).state_dict(), torchvision_alexnet(1000).state_dict()
    assert sum(each.numel() for each in theirs.values()) == 61_100_840  # as torchvision's page of it says
    named = under_names_of(ours, theirs)
    assert {name: each.shape for name, each in named.items()} == {name: each.shape for name, each in ours.items()}


def test_another_number_of_classes_leaves_the_last_layer_fresh() -> None:
    theirs = torchvision_alexnet(9, width=1 / 16).state_dict()
    report = begin_with(narrow_owt(4), Weights("alexnet.pth", theirs, []), None)
    assert report.fresh == {"fc8": "saved 9x256, here 4x256"}
    assert report.sentences()[1:] == ["fc8 begins fresh: saved 9x256, here 4x256"]
    with pytest.raises(
        AlexprepError,
        match=r"--init-from alexnet.pth: the saved weights do not fit the network \(fc8: saved 9x256, here 4x256\)",
    ):
        begin_with(narrow_owt(4), Weights("alexnet.pth@sha256:12", theirs, []), "*")


def test_more_layers_that_do_not_fit_bring_advice() -> None:
    saved = narrow_owt(4) | {"conv2.weight": torch.zeros(12, 4, 3, 3)}
    del saved["fc7.weight"], saved["fc7.bias"]
    said = init_from(narrow_owt(4), saved).sentences()
    assert said[1:] == [
        "conv2 begins fresh: saved 12x4x3x3, here 12x4x5x5",
        "fc7 begins fresh: not saved",
        "2 layers do not fit: where all should, --init-layers '*' refuses what does not",
    ]


def test_batch_normalisation_of_older_files_and_other_kinds_of_numbers() -> None:
    """Files of before 2018 do not count batches; torch takes them, and so does a training."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Linear(3, 2))
    state = network.state_dict()
    saved = {name: each + 1 for name, each in state.items() if not name.endswith("tracked")}
    assert init_from(state, saved).fresh == {}
    assert state["0.num_batches_tracked"] == 0 and torch.equal(state["0.running_mean"], torch.ones(3))
    half = {name: each.half() for name, each in saved.items()}
    assert init_from(state, half).fresh == {} and state["1.weight"].dtype == torch.float32
    whole = saved | {"1.weight": torch.zeros(2, 3, dtype=torch.int8)}
    assert init_from(state, whole).fresh == {"1": "saved int8, here float32"}


def test_names_that_programs_put_before_are_taken_off() -> None:
    wanted = {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    for prefix in ("", "module.", "module._orig_mod.", "model."):
        assert (
            under_names_of(wanted, {f"{prefix}{name}": each for name, each in wanted.items()}).keys() == wanted.keys()
        )
    own = {"model.fc.weight": torch.zeros(1)}
    assert under_names_of(own, own).keys() == own.keys()  # a part of the network has that name
    mixed = {"module.fc.weight": torch.zeros(1), "head.weight": torch.zeros(1)}
    assert under_names_of(wanted, mixed).keys() == mixed.keys()


@pytest.mark.parametrize("ending", ["pt", "pth", "safetensors"])
def test_every_form_of_a_file(ending: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / f"w.{ending}", {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
    if ending == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save({"epoch": 3, "state_dict": OrderedDict(tensors)} if ending == "pth" else tensors, path)
    found = find_weights(tmp_path, str(path))
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], each) for name, each in tensors.items())
    assert find_weights(tmp_path, found.name).name == found.name  # also as it is remembered
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(AlexprepError, match=r"is not the file that was named: its sha256 is"):
        find_weights(tmp_path, found.name)


class Hostile:
    """What would run a program where a file is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch run-by-a-file",)


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Hostile()}, "hostile.pt")
    torch.save(nn.Linear(2, 2), "module.pt")
    torch.save([torch.ones(2)], "list.pt")
    torch.save({"epoch": 3}, "empty.pt")
    torch.save({"a": torch.ones(20)}, "cut.pt")
    Path("cut.pt").write_bytes(Path("cut.pt").read_bytes()[:-300])
    Path("text.pt").write_text("no weights")
    Path("text.safetensors").write_text("no weights")
    Path("nothing.safetensors").write_bytes(b"")
    with zipfile.ZipFile("zip.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touchq\x00\x85R.")
    for name, words in {
        "hostile.pt": "holds more than tensors, which could only be had by running code",
        "module.pt": "holds more than tensors",
        "list.pt": "holds a list without tensors by name",
        "empty.pt": "holds a dict without tensors by name",
        "cut.pt": "is damaged, or no such file",
        "text.pt": "is damaged",
        "text.safetensors": "is damaged, or no such file as its ending says",
        "nothing.safetensors": "is damaged",
        "zip.pt": "zip.pt",
        "none.pt": "cannot be read .*name a .safetensors or .pt file, or a run",
    }.items():
        with pytest.raises(AlexprepError, match=words) as error:
            find_weights(tmp_path, name)
        assert "\n" not in str(error.value)
    assert not Path("run-by-a-file").exists()


def test_a_training_begins_with_a_file_and_remembers_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint's own file is taken too. A run that goes on needs the file no more."""
    data = made_up.write_data(tmp_path / "data")
    recipes = tmp_path / "r.py"
    recipes.write_text("from tests.made_up import small_recipe as recipe\n")
    options: dict[str, Any] = {"recipe": str(recipes), "runs": tmp_path / "runs", "device": "cpu"}
    first = train(TrainConfig(data=data, name="first", steps=2, **options), MadeUpLoader)
    (file,) = (tmp_path / "runs/first/checkpoints").glob("*.safetensors")
    weights = state_dict_of(file.read_bytes(), file)
    assert weights.keys() >= {"conv1.weight", "fc8.bias"} and not any("velocity" in name for name in weights)
    torch.save(weights, tmp_path / "begin.pt")
    names: dict[str, Any] = {
        name: {"init_from": name if name == "first" else str(tmp_path / "begin.pt")} for name in ("first", "file")
    }
    ended = [
        train(TrainConfig(data=data, name=f"from-{name}", steps=3, **options, **init), MadeUpLoader)["weights_sha256"]
        for name, init in names.items()
    ]
    assert ended[0] == ended[1] != first["weights_sha256"]
    assert "begun with the saved weights of conv1, conv2" in capsys.readouterr().err
    remembered = json.loads((tmp_path / "runs/from-file/config.json").read_text())["options"]["init_from"]
    assert remembered.startswith(f"{tmp_path / 'begin.pt'}@sha256:")
    (tmp_path / "begin.pt").unlink()
    options |= {"resume": True, "steps": 4}
    assert train(TrainConfig(name="from-file", **options), MadeUpLoader)["steps"] == 4
