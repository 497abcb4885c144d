"""Values that are not finite: traced to the step and layer where they began, and never saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train import logger, nonfinite
from alexprep.train.distributed.world import World
from alexprep.train.launch import launch_ranks
from alexprep.train.trainer import train
from tests import resuming
from tests import training_ranks as ranks
from tests.made_up import Batch, changed, write_data

ALONE = World.alone("cpu")
KINDS = ("pixel", "rate", "gradient", "weight")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return ranks.registered(tmp_path, monkeypatch)


def _check(kind: str, words: str, run: Path) -> None:
    """The words name the step, the layer, the rate and the next step; what was saved is finite."""
    settings, found = ranks.POISONS[kind]
    assert found in words and f"at learning rate {settings.get('lr', 0.01)}" in words
    (event,) = ranks.records(run, "not finite")
    began = event["began"]
    assert f"it began in step {began['step']}," in found and began["name"] in found and began["value"] in found
    saved = [path.name[:13] for path in (run / "checkpoints").glob("*.safetensors")]
    assert saved == (["step-00000002"] if began["step"] == ranks.BAD_STEP else [])
    assert ("The checkpoint of step 2 is untouched" if saved else "Nothing was saved") in words
    if began["what"] in ("loss", "output", "gradient"):
        # A program is told the names of TrainConfig's fields, without the command's dashes.
        assert words.replace("--", "").endswith(
            "with resume and a lower lr, or train again with one" if saved else "with a lower lr"
        )
    for path in (run / "checkpoints").glob("*.safetensors"):
        assert all(np.isfinite(values).all() for name, values in load_file(path).items() if name != "random.cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_traced_to_its_layer(kind: str, data: Path) -> None:
    assert tuple(ranks.POISONS) == KINDS
    _check(kind, ranks.poisoned(ALONE, data, kind), data.parent / "runs" / kind)


def test_two_ranks_trace_it_alike_and_resume_with_the_same_bits(data: Path, tmp_path: Path, seed: int) -> None:
    """Though only one of the towers may have seen it. Of optimizers and schedules a sample; tests/test_resuming.py has all of them."""
    (tmp_path / "more").mkdir()
    specks = write_data(tmp_path / "more" / "data", resuming.Specks)
    given = {"data": str(data), "specks": str(specks), "chosen": resuming.sample(seed, 3)}
    one, other = launch_ranks(f"{ranks.__file__}:everything", 2, given, device="cpu")
    assert one == other and one["otherwise"] == []
    assert one["resumed"] == [one["whole"]] * len(ranks.SAMPLE)
    assert one["adamw"][0] == one["adamw"][1]
    alone = ranks.begun(ALONE, data, name="alone", **ranks.ADAMW)
    assert alone["val_loss"] == pytest.approx(
        one["adamw"][0][1], rel=1e-3
    )  # the gradient's length is that of both towers
    for kind, words in one["poisoned"].items():
        _check(kind, words, data.parent / "runs" / kind)


def test_a_training_that_is_well_is_not_watched(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks at values, no layer has a hook."""
    monkeypatch.setattr(nonfinite, "Watch", None)
    monkeypatch.setattr(nn.Module, "register_forward_hook", None)
    assert ranks.begun(ALONE, data)["steps"] == ranks.STEPS


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
    monkeypatch.setattr(nonfinite, "SECONDS", 0.0)
    words = ranks.poisoned(ALONE, data, "rate")
    assert "to do the 2 steps since the last checkpoint again would take" in words
    assert ranks.records(data.parent / "runs" / "rate", "not finite")[0]["began"] is None


def test_weights_that_only_an_evaluation_finds_out(data: Path) -> None:
    """The last update made them so large that the next forward pass overflows."""
    words = r"gives NaN or infinity, at learning rate 100.0; every weight is finite, the largest is \d\.\de\+\d+, in \w+\.weight"
    with pytest.raises(AlexprepError, match=words):
        train(ranks.config(data, lr=100.0, steps=2), ranks.MadeUp)


def test_an_infinite_sum_of_losses_is_not_saved(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With finite gradients it spoils no weight, but it would make every resumed epoch infinite."""
    loss = nn.functional.cross_entropy
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda *given, **how: loss(*given, **how) + float("inf"))
    words = "after step 2 there is NaN or infinity in what would be saved.* in step 1, where the loss became inf"
    monkeypatch.setattr(math, "isfinite", lambda value: True)  # as if no record were due
    monkeypatch.setattr(logger.Meter, "_write", lambda *_: None)
    with pytest.raises(AlexprepError, match=words):
        train(ranks.config(data, checkpoint_steps=2), ranks.MadeUp)
    assert not (data.parent / "runs" / "narrow" / "checkpoints").exists()


def test_spoilt_weights_are_not_saved(data: Path) -> None:
    """The loss of step 6 is finite, its gradient is not: only the weights tell."""

    large = changed(
        lambda loader, images: images * (1e37 if (loader.epoch, loader.step) == (0, 5) else 1), ranks.MadeUp
    )
    with pytest.raises(AlexprepError, match=r"(within steps|after step) "):
        train(ranks.config(data, recipe="small", checkpoint_steps=1), large)
    saved = [path.name for path in (data.parent / "runs/small/checkpoints").glob("*.json")]
    assert max(saved) == "step-00000004.json"
