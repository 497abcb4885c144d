"""A training under way: its steps, the end of its epochs, what it saves."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from alexprep.train import checkpoint, run_dir
from alexprep.train.data import BatchSource
from alexprep.train.evaluation.sums import Means
from alexprep.train.fed import until_stopped
from alexprep.train.job import Job, run_versions
from alexprep.train.logger import Meter, forecast
from alexprep.train.metrics import evaluate
from alexprep.train.profiler import Trace
from alexprep.train.runtime import Stopped, StopRequest
from alexprep.train.spans import span
from alexprep.train.step import take_step
from alexprep.train.training_state import TrainingState

EARLY_RECORDS = (1, 6)  # a first sign of life; then steps 2 to 6, after the slow first one, give the forecast


@dataclass(frozen=True)
class Training:
    """What goes from step to step.

    Attributes:
        job: what is to be done.
        state: what there is so far; changed in place.
        loader: of the training split, at the state's position.
        validation: of the split that is evaluated on; None where there is none.
        meter: says and logs.
        trace: records what some steps spend their time on.
        stop: a signal that asks for an end.
        last_step: at which the training ends at the latest.
    """

    job: Job
    state: TrainingState
    loader: BatchSource
    validation: BatchSource | None
    meter: Meter
    trace: Trace
    stop: StopRequest
    last_step: int

    def to_the_end(self) -> tuple[Means | None, dict[str, Any] | None]:
        """Trains until the last step is done, the schedule is finished, or a stop is requested; then saves.

        Returns:
            Means over the last epoch, as far as it was trained here; and the evaluation of the present weights. None for what there is not.
        """
        position, parallel = self.state.position, self.state.parallel
        means, val = None, position.val
        with contextlib.suppress(Stopped):
            while self.goes_on():
                means = self._epoch() or means
                if parallel.requested is not None or position.epoch_step < len(self.loader):
                    break
                val = self._evaluation()
                self._end_epoch(val)
                self.save()
            if parallel.requested is None and position.epoch_step:  # --steps ended within an epoch
                self.save()
                val = self._evaluation()
        if parallel.requested is not None:
            self.save()
            if position.epoch_step:
                val = None  # the last epoch's was of other weights
            self.meter.say(
                f"stopped by {parallel.requested.name} after step {position.step}: go on with {self.job.go_on()}"
            )
        return means, val

    def save(self) -> None:
        """Writes a checkpoint. All ranks take part, the first one writes."""
        job, state = self.job, self.state
        facts = {
            "identity": job.identity,
            **state.facts(),
            "rounding": job.computing.rounding,
            "versions": run_versions(),
        }
        with span("checkpoint"):
            tensors = state.tensors()  # of all ranks
            if state.parallel.world.leads:
                checkpoint.save(job.run / run_dir.CHECKPOINTS, state.position.step, tensors, facts, job.keep)

    def why_ended(self) -> str:
        """Why there is no step left to take, and how there would be."""
        position, steps = self.state.position, self.job.config.steps
        if position.schedule.finished:
            return f"the schedule ended the training after step {position.step}"
        bound = (
            f"--steps {steps}" if position.step < self.job.epochs * len(self.loader) else f"--epochs {self.job.epochs}"
        )
        return f"step {position.step} is done, which {bound} does not go beyond; --resume with more --epochs or --steps goes on"

    def goes_on(self) -> bool:
        """Whether there is a step or an evaluation left to do."""
        position = self.state.position
        # An epoch whose last step is done may still lack its evaluation, where a signal came meanwhile.
        steps_left = position.step < self.last_step or position.epoch_step == len(self.loader)
        return position.epoch < self.job.epochs and steps_left and not position.schedule.finished

    def _epoch(self) -> Means | None:
        """Trains to the end of the epoch, to the last step, or until a stop is requested.

        Returns:
            Means over the epoch so far; None if there was nothing left to do.
        """
        job, state, meter, parallel = self.job, self.state, self.meter, self.state.parallel
        position, pace, sums = state.position, meter.pace, state.sums
        epoch_steps, lr = len(self.loader), state.learning_rate(job.recipe)
        if position.epoch_step == epoch_steps:
            return None
        recorded = sums.totals.clone()
        pace.lap()
        for images, labels in parallel.batches(self.trace.steps(self.loader), lambda: self.stop.signal):
            wait_seconds = pace.lap()
            skipped = state.update.skipped
            loss, logits = take_step(state, images, labels)
            sums.add(loss, logits, labels)
            position.step += 1
            position.epoch_step += 1
            last = (
                position.epoch_step == epoch_steps or position.step == self.last_step or parallel.requested is not None
            )
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
                    meter.say(forecast(job.recipe.name, job.device, speed, epoch_steps, self.job.epochs))
            if last:
                break
            if position.step % job.checkpoint_steps == 0:
                self.save()
                pace.lap()
        else:
            raise RuntimeError(f"the loader ended after {position.epoch_step} of {epoch_steps} steps")
        return sums.since(torch.zeros_like(sums.totals))

    def _evaluation(self) -> dict[str, Any] | None:
        """Errors on the validation split; raises `Stopped` where a stop is requested meanwhile."""
        if self.validation is None:
            return None
        split, parallel = self.job.facts.evaluation_split, self.state.parallel
        self.meter.say(f"evaluating on {self.validation.samples} images of {split}")
        with span("evaluate"):
            batches = until_stopped(parallel, self.validation, self.stop)
            return {"split": split} | evaluate(parallel.network, batches, self.job.computing.precision)

    def _end_epoch(self, val: dict[str, Any] | None) -> None:
        """Logs the epoch, asks the schedule, and moves the position to the next epoch."""
        state = self.state
        position, sums = state.position, state.sums
        means = sums.since(torch.zeros_like(sums.totals))
        self.meter.record_epoch(
            means,
            step=position.step,
            epoch=position.epoch,
            lr=state.learning_rate(self.job.recipe),
            seconds=position.epoch_seconds,
            val=val,
        )
        error = means.top1_error if val is None else float(val["top1_error"])
        position.schedule = self.job.recipe.schedule.after_epoch(position.schedule, position.epoch + 1, error)
        position.epoch, position.epoch_step, position.epoch_seconds, position.val = position.epoch + 1, 0, 0.0, val
        sums.totals.zero_()
