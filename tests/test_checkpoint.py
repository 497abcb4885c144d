"""Checkpoints: bits come back, whatever is broken the newest whole one is found, and another network begins with its weights."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import digest_json
from alexprep.train import checkpoint
from alexprep.train.checkpoint import Checkpoint, Damaged, init_from, newest, read, save, saved_weights
from alexprep.train.models.alexnet import AlexNet, alexnet_6conv, alexnet_2012

ALL = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": torch.randn(3, 5, generator=generator),
        "sums": torch.randn(4, dtype=torch.float64, generator=generator),
        "random": generator.get_state(),
    }


def save_steps(folder: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        save(folder, step, tensors(step), {"note": f"of {step}"}, keep)


def assert_is(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert (found.step, found.facts) == (step, {"note": f"of {step}"})
    assert found.tensors.keys() == tensors(step).keys()
    for name, tensor in tensors(step).items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


def marks_and_tensors(folder: Path) -> list[int]:
    """The step of each file."""
    return sorted(int(path.name[5:13]) for path in folder.iterdir())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    special = {
        "last channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "empty": torch.zeros(0, 3),
    }
    facts = {"rate": 0.1 + 0.2, "none": None, "list": [1, {"a": "ä"}]}
    save(tmp_path, 7, special, facts, keep=1)
    found, damage = newest(tmp_path)
    assert found is not None
    assert (found.step, found.facts, damage) == (7, facts, [])
    for name, tensor in special.items():
        assert found.tensors[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes()


def test_keeps_the_newest(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert marks_and_tensors(tmp_path) == [3, 3, 4, 4]
    assert_is(newest(tmp_path)[0], 4)
    save_steps(tmp_path, 99_999_999, 100_000_000)  # by number, not by name
    assert_is(newest(tmp_path)[0], 100_000_000)


@pytest.mark.parametrize("part", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bit", "longer"])
def test_damage_is_told_and_skipped(tmp_path: Path, part: str, damage: str, seed: int) -> None:
    rng = random.Random(seed)
    save_steps(tmp_path, 1, 2)
    (path,) = tmp_path.glob(f"step-00000002*.{part}")
    before = path.read_bytes()
    for _ in range(40 if damage in ("cut", "bit") else 1):
        place = rng.randrange(1, len(before))
        flipped = bytes([before[place] ^ 1 << rng.randrange(8)])
        cases = {"empty": b"", "cut": before[:place], "longer": before + b"\0", "missing": b""}
        after = cases.get(damage, before[:place] + flipped + before[place + 1 :])
        path.write_bytes(after)
        if damage == "missing":
            path.unlink()
        found, sentences = newest(tmp_path)
        if part == "json" and (damage == "missing" or after.rstrip() == before.rstrip()):
            assert_is(found, 1 if damage == "missing" else 2)
            assert sentences == []
        else:
            assert_is(found, 1)
            (sentence,) = sentences
            assert sentence.startswith("skipped the checkpoint of step 2: ")


def test_where_none_is_whole_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") == (None, [])
    save_steps(tmp_path, 1, 2, 3)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"x")
    found, sentences = newest(tmp_path)
    assert found is None
    assert [sentence[:32] for sentence in sentences] == [f"skipped the checkpoint of step {n}" for n in (3, 2, 1)]
    mark = tmp_path / "step-00000001.json"
    for text in ("[]", "3", '"a"', "{}", '{"digest": 1}', "null"):
        mark.write_text(text)
        with pytest.raises(Damaged):
            read(mark)


def test_later_steps_go_when_an_earlier_one_is_saved_again(tmp_path: Path) -> None:
    """After a fall-back from a damaged step 9, the run goes on below 9; the broken 9 must not outlive what follows."""
    save_steps(tmp_path, 3, 6, 9)
    next(tmp_path.glob("step-00000009*.safetensors")).unlink()
    save_steps(tmp_path, 7, keep=3)
    assert marks_and_tensors(tmp_path) == [3, 3, 6, 6, 7, 7]
    assert_is(newest(tmp_path)[0], 7)


@contextlib.contextmanager
def failing_reads(name: str, code: int) -> Iterator[None]:
    """Reads of files of this name fail as the system has them fail."""
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if fnmatch.fnmatch(path.name, name):
            raise OSError(code, os.strerror(code), str(path))
        return read_bytes(path)

    with mock.patch.object(Path, "read_bytes", failing):
        yield


@pytest.mark.parametrize("name", ["step-00000002.json", "step-00000002-*.safetensors"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_what_cannot_be_read_just_now_is_not_damaged(tmp_path: Path, name: str, code: int) -> None:
    """It is told by its name, and nothing older takes its place."""
    save_steps(tmp_path, 1, 2)
    words = rf"{name[:13]}.* cannot be read \({os.strerror(code)}\): .*nothing was"
    with failing_reads(name, code), pytest.raises(AlexprepError, match=words):
        newest(tmp_path)
    assert_is(newest(tmp_path)[0], 2)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOENT])
def test_no_tensors_go_while_a_mark_cannot_be_read(tmp_path: Path, code: int) -> None:
    """The save itself is done; the next one tidies up."""
    save_steps(tmp_path, 1, 2, 3)
    with failing_reads("step-00000003.json", code):
        save_steps(tmp_path, 4, keep=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert_is(read(tmp_path / "step-00000003.json"), 3)
    save_steps(tmp_path, 5, keep=2)
    assert marks_and_tensors(tmp_path) == [4, 4, 5, 5]


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    refusal = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))
    monkeypatch.setattr(os, "listdir", mock.Mock(side_effect=refusal))
    with pytest.raises(AlexprepError, match=rf"{tmp_path} cannot be read \(Permission denied\)"):
        newest(tmp_path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    """It is no damage: an older one is not trained on in its stead, and overwritten."""
    save_steps(tmp_path, 1, 2)
    mark = tmp_path / "step-00000002.json"
    document = json.loads(mark.read_text()) | {"format_version": 2}
    del document["digest"]
    mark.write_text(json.dumps(document | {"digest": digest_json(document)}))
    with pytest.raises(AlexprepError, match=r"step-00000002.json has format version 2, this alexprep reads 1: use"):
        newest(tmp_path)


def narrow(design: AlexNet, classes: int, seed: int) -> nn.Sequential:
    """With random biases: those that networks begin with are constants, equal in all of them."""
    network = design(classes, 67, seed=seed, width=0.0625)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(generator=generator)
    return network


def equal_layers(one: nn.Module, other: dict[str, torch.Tensor]) -> list[str]:
    """The layers of which every tensor is the same."""
    same = {name: name in other and torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items()}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in same)
    return [layer for layer in layers if same[f"{layer}.weight"] and same[f"{layer}.bias"]]


def test_fine_tuning_takes_all_but_the_classes() -> None:
    """As net #146 went from 21,843 classes to 1,000; what is taken is copied."""
    saved, network = narrow(alexnet_6conv, 9, seed=1).state_dict(), narrow(alexnet_6conv, 4, seed=2)
    fresh = network.get_parameter("fc8.weight").clone()
    tensors = {f"weight.{name}": tensor for name, tensor in saved.items()} | {"velocity.000": torch.ones(3)}
    report = init_from(network.state_dict(), saved_weights(Checkpoint(7, tensors, {})))
    assert report.taken == [*ALL[:5], "conv6", "fc6", "fc7"] == equal_layers(network, saved)
    assert (report.fresh, report.unused) == ({"fc8": "saved 9x256, here 4x256"}, [])
    assert report.sentences()[1] == "fc8 begins fresh: saved 9x256, here 4x256"
    assert torch.equal(network.get_parameter("fc8.weight"), fresh)
    with torch.no_grad():
        network.get_parameter("fc7.weight").zero_()
    assert saved["fc7.weight"].any() and all(parameter.requires_grad for parameter in network.parameters())


def test_a_layer_more_or_less() -> None:
    """As net #146 began with the convolutions of #145."""
    saved, network = narrow(alexnet_2012, 4, seed=1).state_dict(), narrow(alexnet_6conv, 4, seed=2)
    report = init_from(network.state_dict(), saved, ["conv[1-5]"])
    assert report.taken == ALL[:5] == equal_layers(network, saved)
    assert report.fresh == dict.fromkeys(("conv6", "fc6", "fc7", "fc8"), "not asked for")
    back = init_from(narrow(alexnet_2012, 4, seed=3).state_dict(), network.state_dict())
    assert (back.taken, back.fresh, back.unused) == (ALL, {}, ["conv6"])
    assert back.sentences()[-1] == "saved, but not in this network: conv6"
    assert init_from(network.state_dict(), saved).fresh == {"conv6": "not saved"}


SAVED: dict[str, torch.Tensor] = narrow(alexnet_2012, 9, seed=1).state_dict()


@pytest.mark.parametrize(
    ("saved", "layers", "message"),
    [
        ({}, ["conv*", "fc8"], "fc8: saved 9x256, here 4x256"),
        ({}, ["conv*", "conv9"], "conv9 matches no layer"),
        ({}, ["conv6"], "conv6: not saved"),
        ({}, [], "do not fit"),
        ({"fc7.bias": torch.full((256,), float("nan"))}, "matching", "NaN"),
        (dict.fromkeys(SAVED) | {"stem.weight": torch.ones(3)}, "matching", "do not fit"),
        (dict.fromkeys(SAVED) | {"fc7.weight": SAVED["fc7.weight"]}, "matching", "saved weight, here weight, bias"),
    ],
)
def test_what_cannot_be_had_is_refused(saved: dict[str, Any], layers: Any, message: str) -> None:
    network = narrow(alexnet_6conv, 4, seed=2)
    given = {name: tensor for name, tensor in (SAVED | saved).items() if tensor is not None}
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(AlexprepError, match=message):
        init_from(network.state_dict(), given, layers)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
