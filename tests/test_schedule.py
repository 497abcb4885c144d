"""When the rate falls, against an independent reading of the rules."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import pytest

from alexprep.shards.errors import AlexprepError
from alexprep.train.schedule import Plateau, Schedule, ScheduleState, Steps, describe


def run(schedule: Schedule, errors: list[float]) -> list[tuple[int, bool]]:
    """(drops, finished) after every epoch; the state passes through JSON each time."""
    state, found = ScheduleState(), []
    for epochs, error in enumerate(errors, start=1):
        state = schedule.after_epoch(state, epochs, error)
        state = ScheduleState(**json.loads(json.dumps(asdict(state))))
        found.append((state.drops, state.finished))
    return found


def test_steps_fall_after_their_epochs() -> None:
    assert [drops for drops, _ in run(Steps(after=(2, 4)), [50.0] * 6)] == [0, 1, 1, 2, 2, 2]
    assert not any(finished for _, finished in run(Steps(after=()), [50.0] * 6))


def test_plateau_falls_three_times_then_ends() -> None:
    errors = [60.0, 50.0, 50.0, 50.0, 40.0] + [41.0] * 6
    assert run(Plateau(patience=2, drops=3), errors) == [
        (0, False),
        (0, False),
        (0, False),
        (1, False),  # two epochs without progress
        (1, False),  # progress
        (1, False),
        (2, False),
        (2, False),
        (3, False),
        (3, False),
        (3, True),
    ]


def test_plateau_takes_small_progress_as_none() -> None:
    assert run(Plateau(patience=2, margin=0.5), [50.0, 49.7, 49.6])[-1] == (1, False)
    assert run(Plateau(patience=2, margin=0.5), [50.0, 49.7, 49.5])[-1] == (0, False)


def test_plateau_equals_a_rereading_of_the_history() -> None:
    """The state says no more than the list of errors since the last drop does."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    for _ in range(200):
        schedule = Plateau(patience=rng.randint(1, 4), margin=rng.choice([0.0, 0.3]), drops=rng.randint(0, 3))
        errors = [rng.choice([50.0, 49.8, 49.5, 49.0]) - 0.1 * epoch * rng.random() for epoch in range(30)]
        best, last_event, drops, finished, wanted = float("inf"), 0, 0, False, []
        for epoch, error in enumerate(errors):
            if best == float("inf") or error <= best - schedule.margin:
                best, last_event = error, epoch
            elif epoch - last_event >= schedule.patience:
                if drops < schedule.drops:
                    drops, last_event = drops + 1, epoch
                else:
                    finished = True
            wanted.append((drops, finished))
        assert run(schedule, errors) == wanted, f"seed {seed}: {schedule}"


def test_describe_tells_schedules_apart() -> None:
    assert describe(Plateau()) == {"kind": "Plateau", "patience": 5, "margin": 0.05, "drops": 3, "divisor": 10.0}
    assert json.loads(json.dumps(describe(Steps(after=(8, 9))))) == describe(Steps(after=(8, 9)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Steps(after=(4, 2)),
        lambda: Steps(after=(0,)),
        lambda: Steps(after=(1,), divisor=1.0),
        lambda: Plateau(patience=0),
        lambda: Plateau(margin=float("nan")),
        lambda: Plateau(divisor=float("inf")),
    ],
)
def test_senseless_schedules_are_refused(make: type) -> None:
    with pytest.raises(AlexprepError):
        make()
