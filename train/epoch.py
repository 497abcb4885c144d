"""The steps of an epoch, and what is done when it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from alexprep.train.data import BatchSource
from alexprep.train.evaluation.sums import Means
from alexprep.train.host import StopRequest
from alexprep.train.job import Job
from alexprep.train.state import TrainingState
from alexprep.train.step import take_step
from alexprep.train.watching.meter import Meter, forecast
from alexprep.train.watching.trace import Trace

EARLY_RECORDS = (1, 6)  # a first sign of life; then steps 2 to 6, after the slow first one, give the forecast


def train_epoch(
    job: Job,
    state: TrainingState,
    loader: BatchSource,
    trace: Trace,
    meter: Meter,
    stop: StopRequest,
    save: Callable[[], None],
    last_step: int,
) -> Means | None:
    """Trains to the end of the epoch, to `last_step`, or until a stop is requested.

    Returns:
        Means over the epoch so far; None if there was nothing left to do.
    """
    position, pace, sums = state.position, meter.pace, state.sums
    epoch_steps, lr = len(loader), state.learning_rate(job.recipe)
    if position.epoch_step == epoch_steps:
        return None
    recorded = sums.totals.clone()
    pace.lap()
    parallel = state.parallel
    for images, labels in parallel.batches(trace.steps(loader), lambda: stop.signal):
        wait_seconds = pace.lap()
        skipped = state.update.skipped
        loss, logits = take_step(state, images, labels)
        sums.add(loss, logits, labels)
        position.step += 1
        position.epoch_step += 1
        last = position.epoch_step == epoch_steps or position.step == last_step or parallel.requested is not None
        due = last or position.step % job.config.log_steps == 0 or pace.steps + 1 in EARLY_RECORDS
        if state.update.skipped > skipped:
            meter.record_skip(step=position.step, epoch=position.epoch, loss_scale=state.update.loss_scale)
        means = sums.since(recorded) if due else None  # waits for a GPU, so that the lap below has its work in it
        busy_seconds = pace.lap()
        pace.count(len(labels), wait_seconds, busy_seconds)
        position.epoch_seconds += wait_seconds + busy_seconds
        if means is not None:
            speed = meter.record_steps(means, step=position.step, epoch=position.epoch, lr=lr)
            recorded = sums.totals.clone()
            if pace.steps == EARLY_RECORDS[-1]:
                epochs = job.config.epochs or job.recipe.epochs
                meter.say(forecast(job.recipe.name, job.device, speed, epoch_steps, epochs))
        if last:
            break
        if position.step % job.config.checkpoint_steps == 0:
            save()
            pace.lap()
    else:
        raise RuntimeError(f"the loader ended after {position.epoch_step} of {epoch_steps} steps")
    return sums.since(torch.zeros_like(sums.totals))


def end_epoch(job: Job, state: TrainingState, meter: Meter, val: dict[str, Any] | None) -> None:
    """Logs the epoch, asks the schedule, and moves the position to the next epoch."""
    position = state.position
    means = state.sums.since(torch.zeros_like(state.sums.totals))
    meter.record_epoch(
        means,
        step=position.step,
        epoch=position.epoch,
        lr=state.learning_rate(job.recipe),
        seconds=position.epoch_seconds,
        val=val,
    )
    error = means.top1_error if val is None else float(val["top1_error"])
    position.schedule = job.recipe.schedule.after_epoch(position.schedule, position.epoch + 1, error)
    position.epoch, position.epoch_step, position.epoch_seconds, position.val = position.epoch + 1, 0, 0.0, val
    state.sums.totals.zero_()
