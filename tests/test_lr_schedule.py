"""When the rate falls, against an independent reading of the rules."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as scheduler

from alexprep.shards.errors import AlexprepError
from alexprep.train.lr_schedule import (
    ByHand,
    Cosine,
    DExp,
    EarlyStop,
    Linear,
    OneCycle,
    Plateau,
    Schedule,
    ScheduleState,
    Steps,
    WarmUp,
    describe,
    planned,
    rate_at,
    recorded_schedule,
    without_unmatched,
)
from alexprep.train.recipes import RATES_145, RATES_146_TUNE


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
    found = run(Plateau(patience=2, drops=3), [60.0, 50.0, 50.0, 50.0, 40.0] + [41.0] * 6)
    assert [drops for drops, _ in found] == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
    ]  # the first after two epochs without progress
    assert [finished for _, finished in found] == [False] * 10 + [True]


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


def test_falling_schedules_divide_every_rate() -> None:
    for schedule in (Steps(after=(1,)), Plateau()):
        for parameter in ("conv1.weight", "fc8.bias"):
            rates = [schedule.rate(0.02, parameter, 7, ScheduleState(drops=drops)) for drops in range(4)]
            assert rates == [0.02, 0.02 / 10, 0.02 / 10**2, 0.02 / 10**3]


def test_dexp_is_cuda_convnets() -> None:
    """Progress p through the training is in step floor(4 p); step 3 ends at a 250th of the first rate."""
    schedule = DExp(epochs=90)
    for epoch in range(90):
        progress = epoch / 90
        weight, bias = math.floor(progress * 4), math.floor(progress * 2)
        assert schedule.rate(0.01, "fc6.weight", epoch, ScheduleState()) == pytest.approx(0.01 * 250 ** (-weight / 3))
        assert schedule.rate(0.02, "fc6.bias", epoch, ScheduleState()) == (0.02, pytest.approx(0.002))[bias]
    rates = [schedule.rate(0.01, "a.weight", epoch, ScheduleState()) for epoch in range(200)]
    assert rates[89] == pytest.approx(0.00004) and set(rates[90:]) == {rates[89]}
    assert [rates.count(rate) for rate in sorted(set(rates[:90]), reverse=True)] == [23, 22, 23, 132]
    assert run(schedule, [50.0] * 3) == [(0, False)] * 3


def by_epoch(schedule: Schedule, parameter: str, base: float, epochs: int) -> list[float]:
    return [schedule.rate(base, parameter, epoch, ScheduleState()) for epoch in range(epochs)]


def test_rates_of_net_145() -> None:
    """The notes at the end of layer-params-145.cfg, written out as rates."""
    weights = [0.01] * 25 + [0.001] * 26 + [0.0001] * 28 + [0.00001] * 12
    assert by_epoch(RATES_145, "fc6.weight", 0.01, 91) == pytest.approx(weights)
    first = [0.01] * 25 + [0.001] * 26 + [0.0001] * 16 + [0.00001] * 5
    assert by_epoch(RATES_145, "conv1.weight", 0.01, 72) == pytest.approx(first)
    assert by_epoch(RATES_145, "conv1.weight", 0.01, 91)[72:] == [0.0] * 19
    assert by_epoch(RATES_145, "conv1.bias", 0.02, 91) == [0.02] * 72 + [0.0] * 19
    assert by_epoch(RATES_145, "fc8.bias", 0.02, 91) == [0.02] * 91


def test_rates_of_net_146_when_tuned() -> None:
    """The notes at the end of layer-params-146-2012-2011.cfg."""
    assert by_epoch(RATES_146_TUNE, "conv1.weight", 0.01, 54) == pytest.approx([1e-4] * 5 + [1e-5] * 2 + [0.0] * 47)
    assert by_epoch(RATES_146_TUNE, "fc7.weight", 0.01, 54) == pytest.approx([1e-3] * 22 + [1e-4] * 20 + [1e-5] * 12)
    assert by_epoch(RATES_146_TUNE, "fc8.weight", 0.01, 54) == pytest.approx(
        [1e-2] * 9 + [1e-3] * 13 + [1e-4] * 20 + [1e-5] * 12
    )
    assert by_epoch(RATES_146_TUNE, "conv2.bias", 0.02, 54) == [0.02] * 54
    assert by_epoch(RATES_146_TUNE, "conv1.bias", 0.02, 54) == [0.02] * 7 + [0.0] * 47


def test_the_last_row_that_matches_holds() -> None:
    rows = ByHand(((1, "*", 0.5), (1, "conv?.*", 0.25), (3, "*.bias", 0.1)))
    assert by_epoch(rows, "conv1.weight", 1.0, 4) == [1.0, 0.25, 0.25, 0.25]
    assert by_epoch(rows, "conv1.bias", 1.0, 4) == [1.0, 0.25, 0.25, 0.1]
    assert by_epoch(rows, "fc6.weight", 1.0, 4) == [1.0, 0.5, 0.5, 0.5]


def test_patterns_that_match_nothing_are_found() -> None:
    good, names = ByHand(((1, "conv1.*", 0.5),)), ["conv1.weight", "conv1.bias"]
    rows = ByHand((*good.rows, (2, "conv9.*", 0.0), (3, "conv9.*", 0.1)))
    assert without_unmatched(rows, names) == (good, ["conv9.*"])
    assert without_unmatched(EarlyStop(rows), names) == (EarlyStop(good), ["conv9.*"])
    assert without_unmatched(Plateau(), []) == (Plateau(), [])


def test_early_stopping_equals_a_rereading_of_the_history() -> None:
    rng = random.Random(8)
    for _ in range(200):
        inner = Steps(after=(2, 9))
        stopping = EarlyStop(inner, patience=rng.randint(1, 4), margin=rng.choice([0.0, 0.3]))
        errors = [rng.choice([50.0, 49.8, 49.5, 49.0]) - 0.1 * epoch * rng.random() for epoch in range(30)]
        best, last_progress, finished, wanted = float("inf"), 0, False, []
        for epoch, error in enumerate(errors):
            if error < best - stopping.margin:
                best, last_progress = error, epoch
            finished = finished or epoch - last_progress >= stopping.patience
            wanted.append(finished)
        assert [end for _, end in run(stopping, errors)] == wanted
        assert [drops for drops, _ in run(stopping, errors)] == [drops for drops, _ in run(inner, errors)]


def test_early_stopping_leaves_the_rest_to_its_schedule() -> None:
    plateau = Plateau(patience=2, drops=1)
    assert run(EarlyStop(plateau, patience=99), [50.0] * 6) == run(plateau, [50.0] * 6)
    assert run(EarlyStop(plateau, patience=99), [50.0] * 6)[-1] == (1, True)
    assert EarlyStop(RATES_145).rate(0.01, "conv1.weight", 80, ScheduleState()) == 0.0


EPOCHS, STEPS = 5, 7  # of the schedules that move with every step
TORCHS: dict[str, tuple[Schedule, Callable[[torch.optim.Optimizer], Any]]] = {
    "linear": (
        Linear(final=0.1),
        lambda optimizer: scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS * STEPS),
    ),
    "cosine": (
        Cosine(final=0.1),
        lambda optimizer: scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * STEPS, eta_min=0.02),
    ),
    "one cycle": (  # torch's last rate is in its last step, not after it; and its rise ends a step earlier
        OneCycle(rise=0.3, start=0.04, final=0.001),
        lambda optimizer: scheduler.OneCycleLR(
            optimizer,
            max_lr=0.2,
            total_steps=EPOCHS * STEPS + 1,
            pct_start=(0.3 * EPOCHS * STEPS + 1) / (EPOCHS * STEPS + 1),
            cycle_momentum=False,
            div_factor=25,
            final_div_factor=1 / 0.025,
        ),
    ),
    "warm-up": (
        WarmUp(Steps(after=(3,)), epochs=2, start=0.25),
        lambda optimizer: scheduler.ChainedScheduler(
            [
                scheduler.LinearLR(optimizer, 0.25, 1.0, total_iters=2 * STEPS),
                scheduler.MultiStepLR(optimizer, [3 * STEPS], gamma=0.1),
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_schedules_that_move_with_every_step_are_torchs(name: str) -> None:
    schedule, make = TORCHS[name]
    schedule = planned(EarlyStop(schedule), EPOCHS)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    theirs = make(optimizer)
    state, found, wanted = ScheduleState(), [], []
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            found.append(rate_at(schedule, 0.2, "fc.weight", epoch + step / STEPS, state))
            wanted.append(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()
        state = schedule.after_epoch(state, epoch + 1, 50.0)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert len(set(found)) > EPOCHS  # they do move within an epoch
    last = rate_at(schedule, 0.2, "fc.weight", EPOCHS + 3.5, state)
    assert last == rate_at(schedule, 0.2, "fc.weight", EPOCHS, state) == pytest.approx(theirs.get_last_lr()[0])


def test_a_schedule_of_the_users_own_is_asked_once_an_epoch() -> None:
    class Own:
        def rate(self, base: float, parameter: str, epoch: float, state: ScheduleState) -> float:
            assert isinstance(epoch, int)
            return base / (1 + epoch)

    own: Any = Own()
    assert [rate_at(own, 1.0, "a.weight", epoch, ScheduleState()) for epoch in (0, 0.9, 1.0, 3.2)] == [1, 1, 0.5, 0.25]
    assert planned(own, 3) is own and recorded_schedule({"kind": "Own"}) is None
    assert rate_at(WarmUp(own, epochs=2, start=0.5), 1.0, "a.weight", 1.0, ScheduleState()) == 0.5 * 0.75


def test_a_schedule_is_found_again_in_what_a_run_recorded() -> None:
    inner: list[Schedule] = [
        Steps(after=(8, 9)),
        Plateau(drops=1),
        DExp(epochs=95),
        RATES_145,
        OneCycle(epochs=4, rise=0.2),
    ]
    for schedule in [*inner, *(EarlyStop(WarmUp(one, epochs=0.5), patience=3) for one in inner)]:
        assert recorded_schedule(json.loads(json.dumps(describe(schedule)))) == schedule


def test_a_length_that_was_left_open_is_the_runs() -> None:
    for kind in (Linear, Cosine, OneCycle):
        with pytest.raises(AlexprepError, match="number of epochs is open"):
            kind().rate(0.1, "a.weight", 0, ScheduleState())
        assert planned(WarmUp(kind(), epochs=1), 9) == WarmUp(kind(epochs=9), epochs=1)
        assert planned(kind(epochs=4), 9) == kind(epochs=4)


def test_describe_tells_schedules_apart() -> None:
    assert describe(Plateau()) == {"kind": "Plateau", "patience": 5, "margin": 0.05, "drops": 3, "divisor": 10.0}
    several = [Steps(after=(8, 9)), DExp(), DExp(epochs=95), RATES_145, EarlyStop(RATES_145), EarlyStop(Plateau())]
    told = [describe(schedule) for schedule in several]
    assert len({json.dumps(one) for one in told}) == len(several)
    assert told[-1] == {"kind": "EarlyStop", "schedule": describe(Plateau()), "patience": 10, "margin": 0.0}
    assert describe(RATES_145)["rows"][0] == (25, "*.weight", 0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Steps(after=(4, 2)),
        lambda: Steps(after=(0,)),
        lambda: Steps(after=(1,), divisor=1.0),
        lambda: Plateau(patience=0),
        lambda: Plateau(margin=float("nan")),
        lambda: Plateau(divisor=float("inf")),
        lambda: DExp(epochs=0),
        lambda: DExp(steps=1),
        lambda: DExp(bias_steps=0),
        lambda: DExp(factor=1.0),
        lambda: ByHand(((3, "*", 0.1), (2, "*", 0.1))),
        lambda: ByHand(((-1, "*", 0.1),)),
        lambda: ByHand(((1, "*", -0.1),)),
        lambda: ByHand(((1, "*", float("nan")),)),
        lambda: Linear(epochs=0),
        lambda: Cosine(final=1.5),
        lambda: OneCycle(rise=1.0),
        lambda: OneCycle(start=0.0),
        lambda: WarmUp(Plateau(), epochs=0),
        lambda: WarmUp(Plateau(), epochs=1, start=0.0),
        lambda: EarlyStop(Plateau(), patience=0),
        lambda: EarlyStop(Plateau(), margin=-1.0),
    ],
)
def test_senseless_schedules_are_refused(make: type) -> None:
    with pytest.raises(AlexprepError):
        make()
