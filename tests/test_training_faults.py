"""Trainings that come to harm: values that are not finite, a full disk, a rank that is killed. Nothing saved is ever lost or spoilt."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import TEMPORARY_MARK, is_temporary
from alexprep.train import checkpoint, divergence, logger
from alexprep.train.distributed.world import World
from alexprep.train.divergence import Watch
from alexprep.train.launch import RankFailed, launch
from alexprep.train.recipes import registry as recipes
from alexprep.train.trainer import train
from tests import training_ranks as ranks
from tests.made_up import Batch, write_data

SECONDS = 120  # for each test
RANKS = ranks.__file__
ALONE = World.alone("cpu")
KINDS = ("pixel", "rate", "gradient", "weight")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set's facts, with the recipes in the registry."""
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))
    ranks.register()
    return write_data(tmp_path / "data", ranks.MadeUp)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set's facts, for runs of two ranks."""
    return write_data(tmp_path_factory.mktemp("shared") / "data", ranks.MadeUp)


@pytest.fixture(scope="module")
def job(shared: Path) -> list[dict[str, Any]]:
    """What two gloo ranks found, each; after others of which the first was killed in mid-save."""
    with pytest.raises(RankFailed, match="rank 0 was killed by SIGKILL"):
        launch(f"{RANKS}:killed", 2, {"data": str(shared), "step": 4}, device="cpu")
    folder = shared.parent / "runs" / "killed" / "checkpoints"
    assert [path.name for path in folder.glob(f".step-00000004*{TEMPORARY_MARK}*")]
    saved, damage = checkpoint.newest(folder)
    assert saved is not None and saved.step == 2 and not damage
    return launch(f"{RANKS}:everything", 2, {"data": str(shared)}, device="cpu")


def _events(run: Path) -> list[dict[str, Any]]:
    """What the log says of values that are not finite; every line must be JSON, which knows no NaN."""
    lines = (run / "log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda text: pytest.fail(text)) for line in lines]
    return [record for record in records if record["kind"] == "not finite"]


def _check(kind: str, words: str, run: Path) -> None:
    """The words name the step, the layer, the rate and the next step; what was saved is finite."""
    settings, found = ranks.POISONS[kind]
    assert found in words and f"at learning rate {settings.get('lr', 0.01)}" in words
    (event,) = _events(run)
    began = event["began"]
    assert f"it began in step {began['step']}," in found and began["name"] in found and began["value"] in found
    saved = [path.name[:13] for path in (run / "checkpoints").glob("*.safetensors")]
    assert saved == (["step-00000002"] if began["step"] == ranks.BAD_STEP else [])
    assert ("The checkpoint of step 2 is untouched" if saved else "Nothing was saved") in words
    for path in (run / "checkpoints").glob("*.safetensors"):
        assert all(np.isfinite(values).all() for name, values in load_file(path).items() if name != "random.cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_traced_to_its_layer(kind: str, data: Path) -> None:
    assert tuple(ranks.POISONS) == KINDS
    _check(kind, ranks.poisoned(ALONE, data, kind), data.parent / "runs" / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_trace_it_alike(kind: str, job: list[dict[str, Any]], shared: Path) -> None:
    """Though only one of the towers may have seen it."""
    assert job[0]["poisoned"][kind] == job[1]["poisoned"][kind]
    _check(kind, job[0]["poisoned"][kind], shared.parent / "runs" / kind)


def test_when_the_cause_is_gone_the_run_goes_on(data: Path) -> None:
    ranks.poisoned(ALONE, data, "pixel")
    whole = ranks.begun(ALONE, data, name="whole")
    assert ranks.gone_on(ALONE, data, "pixel")["weights_sha256"] == whole["weights_sha256"]
    assert not _events(data.parent / "runs" / "pixel")


def test_a_training_that_is_well_is_not_watched(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks at values, no second network is made, no layer has a hook."""
    monkeypatch.setattr(Watch, "see", None)
    networks, hooks = [], []
    forward = nn.Conv2d.forward

    def counted(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        hooks.append(len(layer._forward_hooks))
        networks.append(id(layer))
        return forward(layer, images)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    ranks.begun(ALONE, data)
    assert len(set(networks)) == 5 and not any(hooks)


def test_what_does_not_happen_again_is_told_by_what_is_left(data: Path) -> None:
    class Once(ranks.MadeUp):
        times = 0

        def __iter__(self) -> Iterator[Batch]:
            for images, labels in super().__iter__():
                if self.split == "train" and self.step == 3:
                    Once.times += 1
                    images = images * (float("nan") if Once.times == 1 else 1.0)
                yield Batch(images, labels)

    words = r"now conv1.weight, conv1.bias, conv2.weight and 13 more are not finite .*did not happen again"
    with pytest.raises(AlexprepError, match=words):
        train(ranks.config(data, log_steps=5), Once)


def test_a_search_that_would_take_long_is_left_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "SECONDS", 0.0)
    words = ranks.poisoned(ALONE, data, "rate")
    assert "to do the 2 steps since the last checkpoint again would take 0 s" in words
    assert _events(data.parent / "runs" / "rate")[0]["began"] is None


def test_weights_that_only_an_evaluation_finds_out(data: Path) -> None:
    """The last update made them so large that the next forward pass overflows."""
    words = r"gives NaN or infinity, at learning rate 100.0; every weight is finite, the largest is \d\.\de\+\d+, in \w+\.weight"
    with pytest.raises(AlexprepError, match=words):
        train(ranks.config(data, lr=100.0, steps=2), ranks.MadeUp)


def test_an_infinite_sum_of_losses_is_not_saved(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With finite gradients it spoils no weight, but it would make every resumed epoch infinite."""
    loss = nn.functional.cross_entropy
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda logits, labels: loss(logits, labels) + float("inf"))
    words = "after step 2 there is NaN or infinity in what would be saved.* in step 1, where the loss became inf"
    monkeypatch.setattr(math, "isfinite", lambda value: True)  # as if no record were due
    monkeypatch.setattr(logger.Meter, "_write", lambda *_: None)
    with pytest.raises(AlexprepError, match=words):
        train(ranks.config(data, checkpoint_steps=2), ranks.MadeUp)
    assert not (data.parent / "runs" / "narrow" / "checkpoints").exists()


def test_a_full_disk_costs_no_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th fsync finds no room, for all n: of config.json, of every checkpoint and of the summary."""
    whole = ranks.begun(ALONE, data, name="whole", steps=3)["weights_sha256"]
    fsync = os.fsync
    for n in range(1, 100):
        name = f"full{n}"
        run = data.parent / "runs" / name
        count, before = 0, 0

        def full(descriptor: int) -> None:
            nonlocal count, before
            count += 1
            if count == n:  # noqa: B023
                before = len(list((run / "checkpoints").glob("*.json")))  # noqa: B023
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                ranks.begun(ALONE, data, name=name, steps=3, checkpoint_steps=1)
            except AlexprepError as error:
                words = str(error)
            else:
                assert n > 15
                return
        assert str(run) in words and "No space left on device" in words, words
        assert " are free, make room and " in words
        assert not [path for path in run.rglob("*") if is_temporary(path.name)]
        begins = "run the same command again" in words
        assert begins == (n <= 2) and begins != ("go on with --resume" in words)
        assert len(list((run / "checkpoints").glob("*.json"))) >= before
        if (run / "config.json").exists():
            rest = train(ranks.config(data, name=name, resume=True, steps=3), ranks.MadeUp)
        else:
            rest = ranks.begun(ALONE, data, name=name, steps=3)
        assert rest["weights_sha256"] == whole, words
    pytest.fail("there was still an fsync after 100 times")


def test_a_log_that_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's /dev/full refuses every byte; closing the log does not try again."""
    monkeypatch.setattr(logger, "_keep_until", lambda log, step, epoch: None)
    words = r"/dev/full cannot be written \(No space left on device\): it needs 59 bytes"
    with pytest.raises(AlexprepError, match=words), logger.Meter(Path("/dev/full"), step=0, total_steps=1) as log:
        log.record_skip(step=1, epoch=0, loss_scale=2.0)


def test_a_disk_that_is_broken_is_no_matter_of_room(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(
            AlexprepError, match=r"config.json cannot be written \(Input/output error\): mend that and run"
        ):
            ranks.begun(ALONE, data, name="broken")


def test_two_ranks_resume_from_every_step_with_the_same_bits(job: list[dict[str, Any]]) -> None:
    """Grain's rule."""
    for rank in job:
        assert rank["resumed"] == [job[0]["whole"]] * (ranks.STEPS - 1)


def test_a_rank_that_is_killed_in_mid_save(job: list[dict[str, Any]], shared: Path) -> None:
    """The run goes on from the checkpoint before, ends with the same bits, and the half file is gone."""
    assert [rank["after the kill"] for rank in job] == [job[0]["whole"]] * 2
    folder = shared.parent / "runs" / "killed" / "checkpoints"
    assert not [path for path in folder.iterdir() if is_temporary(path.name)]
