"""Whatever the optimizer and the schedule, one rank or two: a training that was broken off ends with the bits of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alexprep.train import recipes
from alexprep.train.distributed.world import World
from alexprep.train.launch import launch_ranks
from alexprep.train.lr_schedule import AROUND_ANOTHER, KINDS, Schedule
from tests import resuming
from tests.made_up import write_data


def kinds(schedule: Schedule) -> set[str]:
    inner = kinds(schedule.schedule) if isinstance(schedule, AROUND_ANOTHER) else set()
    return {type(schedule).__name__} | inner


def test_every_schedule_and_every_optimizer_is_a_case() -> None:
    assert set().union(*map(kinds, resuming.SCHEDULES.values())) == set(KINDS)
    assert {"paper", "sgd", "nesterov", "adamw", "Adam", "RMSprop", "Adafactor"} < set(resuming.optimizers())
    assert len(resuming.cases()) == len(resuming.optimizers()) * len(resuming.SCHEDULES)


@pytest.mark.parametrize("schedule", resuming.SCHEDULES)
def test_every_optimizer_goes_on_to_the_bit_under(schedule: str) -> None:
    """From the best epoch's end, and from within it."""
    found = [words for optimizer in resuming.optimizers() for words in resuming.differs_in_memory(optimizer, schedule)]
    assert not found


def test_runs_go_on_to_the_bit_from_their_checkpoints(
    whole: bool, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the best one, where those after it are lost, and from one in mid-epoch."""
    chosen = resuming.cases() if whole else resuming.sample(seed, 3)
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))
    data = write_data(tmp_path / "data", resuming.Specks)
    assert not resuming.everything(World.alone(torch.device("cpu")), str(data), chosen)
    if whole:
        (tmp_path / "two").mkdir()
        given = {"data": str(write_data(tmp_path / "two" / "data", resuming.Specks)), "chosen": chosen}
        assert launch_ranks(f"{resuming.__file__}:everything", 2, given, device="cpu") == [[], []]
