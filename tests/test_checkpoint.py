"""Checkpoints: bits come back, whatever is broken the newest whole one is found, and another network begins with its weights."""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import digest_json
from alexprep.train import checkpoint
from alexprep.train.checkpoint import (
    Checkpoint,
    Damaged,
    differences,
    init_from,
    newest,
    read,
    save,
    saved_weights,
    with_defaults,
)
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


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
    assert [name[:13] for name in files(tmp_path)] == ["step-00000003"] * 2 + ["step-00000004"] * 2
    assert_is(newest(tmp_path)[0], 4)
    save_steps(tmp_path, 99_999_999, 100_000_000)  # by number, not by name
    assert_is(newest(tmp_path)[0], 100_000_000)


@pytest.mark.parametrize("part", ["tensors", "mark"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bit", "longer"])
def test_damage_is_told_and_skipped(tmp_path: Path, part: str, damage: str, seed: int) -> None:
    rng = random.Random(seed)
    save_steps(tmp_path, 1, 2)
    path = next(path for path in tmp_path.glob("step-00000002*") if (path.suffix == ".json") == (part == "mark"))
    before = path.read_bytes()
    for _ in range(1 if damage in ("missing", "empty", "longer") else 40):
        after = bytearray(before)
        if damage == "cut":
            del after[rng.randrange(1, len(after)) :]
        elif damage == "bit":
            position = rng.randrange(len(after))
            after[position] ^= 1 << rng.randrange(8)
        elif damage == "longer":
            after += b"\0"
        elif damage == "empty":
            after.clear()
        assert damage == "missing" or after != before
        path.write_bytes(after)
        if damage == "missing":
            path.unlink()
        found, sentences = newest(tmp_path)
        if part == "mark" and (damage == "missing" or same_document(before, bytes(after))):
            assert_is(found, 1 if damage == "missing" else 2)
            assert sentences == []
        else:
            assert_is(found, 1)
            (sentence,) = sentences
            assert sentence.startswith("skipped the checkpoint of step 2: ")


def same_document(before: bytes, after: bytes) -> bool:
    """Whether a damaged JSON still says the same, as when a cut takes only its last newline."""
    try:
        return bool(json.loads(before) == json.loads(after))
    except ValueError:
        return False


def test_where_none_is_whole_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") == (None, [])
    save_steps(tmp_path, 1, 2, 3)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"x")
    found, sentences = newest(tmp_path)
    assert found is None
    assert [sentence[:33] for sentence in sentences] == [f"skipped the checkpoint of step {n}:"[:33] for n in (3, 2, 1)]


def test_a_mark_that_is_no_object_is_damage(tmp_path: Path) -> None:
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
    assert {name[:13] for name in files(tmp_path)} == {"step-00000003", "step-00000006", "step-00000007"}
    assert_is(newest(tmp_path)[0], 7)


@pytest.mark.parametrize("call", ["open", "fsync", "rename", "unlink"])
def test_dying_at_any_system_call_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Saves over an existing checkpoint of the same step, with the n-th call failing, for all n; `keep` also deletes one."""

    class Died(BaseException):
        pass

    original = getattr(os, call)
    for n in range(1, 50):
        folder = tmp_path / f"{call}{n}"
        save_steps(folder, 1, 2)
        save(folder, 3, tensors(33), {"note": "old"}, keep=10)
        count = 0

        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= n:  # noqa: B023
                raise Died
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                save_steps(folder, 3, keep=2)
            except Died:
                died = True
            else:
                died = False
        found, sentences = newest(folder)
        assert found is not None
        assert sentences == []
        if found.facts == {"note": "old"}:
            assert torch.equal(found.tensors["weights"], tensors(33)["weights"])
            assert died
        else:
            assert_is(found, 3)
        save_steps(folder, 4, keep=2)  # the next save cleans up
        assert [name[:13] for name in files(folder)] == ["step-00000003"] * 2 + ["step-00000004"] * 2
        if not died:
            assert n > 1
            return
    pytest.fail(f"{call} was still called after 50 times")


def test_differences_name_the_fields() -> None:
    saved = {"recipe": {"lr": 0.01, "decay": {"fc4": 0.03}}, "seed": 0, "old": 1}
    wanted = {"recipe": {"lr": 0.02, "decay": {}}, "seed": 0, "new": [2]}
    assert differences(saved, wanted) == [
        "recipe.lr was 0.01, is now 0.02",
        "recipe.decay.fc4 was 0.03, is now None",
        "old was 1, is now None",
        "new was None, is now [2]",
    ]
    assert differences(saved, json.loads(json.dumps(saved))) == []


def test_what_a_description_lacks_is_at_its_default() -> None:
    @dataclass(frozen=True)
    class Inner:
        needed: int
        added: tuple[int, ...] = (1, 2)

    @dataclass(frozen=True)
    class Outer:
        inner: Inner
        layers: dict[str, float] = field(default_factory=dict)
        plain: int = 3

    now = Outer(Inner(5), plain=4)
    told = {"inner": {"needed": 5, "added": [1, 2]}, "layers": {}, "plain": 3}
    assert with_defaults({"inner": {"needed": 5}}, now) == told
    assert with_defaults({"inner": "a name", "unknown": 1}, now) == {
        "inner": "a name",
        "unknown": 1,
        "layers": {},
        "plain": 3,
    }
    assert with_defaults(told | {"plain": 7}, now) == told | {"plain": 7}
    assert with_defaults(None, now) is None and with_defaults({"a": 1}, "no dataclass") == {"a": 1}


def failing_reads(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Reads of files of this name fail as the system has them fail."""
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if fnmatch.fnmatch(path.name, name):
            raise OSError(code, os.strerror(code), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)


@pytest.mark.parametrize("name", ["step-00000002.json", "step-00000002-*.safetensors"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE])
def test_what_cannot_be_read_just_now_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """It is told by its name, and nothing older takes its place."""
    save_steps(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        failing_reads(patch, name, code)
        with pytest.raises(
            AlexprepError, match=rf"{name[:13]}.* cannot be read \({os.strerror(code)}\): .*nothing was"
        ):
            newest(tmp_path)
    assert_is(newest(tmp_path)[0], 2)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOENT])
def test_no_tensors_go_while_a_mark_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The save itself is done; the next one tidies up."""
    save_steps(tmp_path, 1, 2, 3)
    with monkeypatch.context() as patch:
        failing_reads(patch, "step-00000003.json", code)
        save_steps(tmp_path, 4, keep=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert_is(read(tmp_path / "step-00000003.json"), 3)
    save_steps(tmp_path, 5, keep=2)
    assert [name[:13] for name in files(tmp_path)] == ["step-00000004"] * 2 + ["step-00000005"] * 2


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(os, "listdir", refuse)
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
    tensors = one.state_dict()
    layers = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return [
        layer
        for layer in layers
        if all(
            other.get(name) is not None and torch.equal(tensor, other[name])
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] == layer
        )
    ]


def test_fine_tuning_takes_all_but_the_classes() -> None:
    """As net #146 went from 21,843 classes to 1,000."""
    saved, network = narrow(alexnet_6conv, 9, seed=1).state_dict(), narrow(alexnet_6conv, 4, seed=2)
    fresh = network.get_parameter("fc8.weight").clone()
    report = init_from(network.state_dict(), saved)
    assert report.taken == [*ALL[:5], "conv6", "fc6", "fc7"] == equal_layers(network, saved)
    assert report.fresh == {"fc8": "saved 9x256, here 4x256"}
    assert report.unused == []
    assert torch.equal(network.get_parameter("fc8.weight"), fresh)
    assert report.sentences()[1] == "fc8 begins fresh: saved 9x256, here 4x256"


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


def test_weights_come_out_of_a_checkpoint_and_are_copied() -> None:
    saved = narrow(alexnet_2012, 4, seed=1).state_dict()
    tensors = {f"weight.{name}": tensor for name, tensor in saved.items()} | {"velocity.000": torch.ones(3)}
    found = saved_weights(Checkpoint(7, tensors, {}))
    assert found.keys() == saved.keys()
    network = narrow(alexnet_2012, 4, seed=2)
    assert init_from(network.state_dict(), found).taken == ALL == equal_layers(network, saved)
    with torch.no_grad():
        network.get_parameter("fc8.weight").zero_()
    assert saved["fc8.weight"].abs().sum() > 0
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["conv*", "fc8"], "fc8: saved 9x256, here 4x256"),
        (["conv*", "conv9"], "conv9 matches no layer"),
        (["conv6"], "conv6: not saved"),
        ([], "do not fit"),
    ],
)
def test_a_choice_that_cannot_be_had_is_refused(layers: list[str], message: str) -> None:
    saved, network = narrow(alexnet_2012, 9, seed=1).state_dict(), narrow(alexnet_6conv, 4, seed=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(AlexprepError, match=message):
        init_from(network.state_dict(), saved, layers)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_strangers_and_spoilt_weights_are_refused() -> None:
    network = narrow(alexnet_2012, 4, seed=2)
    with pytest.raises(AlexprepError, match="do not fit"):
        init_from(network.state_dict(), {"stem.weight": torch.ones(3)})
    saved = narrow(alexnet_2012, 4, seed=1).state_dict()
    saved["fc7.bias"][0] = float("nan")
    before = network.get_parameter("conv1.weight").clone()
    with pytest.raises(AlexprepError, match="NaN"):
        init_from(network.state_dict(), saved)
    assert torch.equal(network.get_parameter("conv1.weight"), before)


def test_a_layer_without_its_bias_is_not_taken_in_part() -> None:
    saved = {"0.weight": torch.ones(2, 2)}
    with pytest.raises(AlexprepError, match="saved weight, here weight, bias"):
        init_from(nn.Sequential(nn.Linear(2, 2)).state_dict(), saved)
