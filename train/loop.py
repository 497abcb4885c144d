"""The training loop: batch, step, count; at an epoch's end evaluate, let the schedule look, save."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.shards.files import publish_json
from alexprep.train import checkpoint, runs
from alexprep.train.config import Job, TrainConfig, prepare, run_versions
from alexprep.train.data import BatchSource, OpenLoader
from alexprep.train.evaluate import evaluate
from alexprep.train.fed import begin_with, loader_position, open_split, own_examples, until_stopped, where
from alexprep.train.host import Stopped, StopRequest, keep_freed_memory
from alexprep.train.meter import Meter, forecast
from alexprep.train.parallel.world import World
from alexprep.train.state import TrainingState, weights_digest
from alexprep.train.sums import Means, Pace

UNMEASURED = ("images_per_second", "data_wait_ms", "step_ms")
EARLY_RECORDS = (1, 6)  # a first sign of life; then steps 2 to 6, after the slow first one, give the forecast


def train(config: TrainConfig, open_loader: OpenLoader | None = None, world: World | None = None) -> dict[str, Any]:
    """Trains one run, or goes on with it.

    Being killed at any moment costs at most the steps since the last checkpoint. On one CPU with the same versions, a run that was killed
    and resumed ends with the same weights, to the last bit, as one that was not.

    Args:
        config: what to do.
        open_loader: opens a split, as `alexprep.pipeline.loader.Loader` does; by default that, with the settings for this machine.
        world: the ranks that share the run, each of which calls this, as `alexprep.train.ranks` arranges; None for a run in this
            process alone.

    Returns:
        The summary, which is also in the run's summary.json: run, recipe, device, steps, epochs, epoch_steps, train_loss (nats),
        val_split, val_top1_error and val_top5_error (percent), val_loss, images_per_second, data_wait_ms, step_ms, seconds (of this
        process), weights_sha256, stopped_by ("SIGTERM", "SIGINT" or None). What was not measured is None.

    Raises:
        AlexprepError: the data does not suit the recipe, the run began with other settings or data, or the loss is not finite.
    """
    started = time.monotonic()
    world = world or World.alone(choose_device(config.device))
    job = prepare(config, world.device)
    open_loader = open_loader or functools.partial(Loader, tuning=job.tuning)
    if job.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if world.leads:
            stack.enter_context(runs.locked(job.run))
        stop = stack.enter_context(StopRequest().listening())
        state, notes = _first_state(job, world)
        parallel = state.parallel
        loader = stack.enter_context(contextlib.closing(open_split(job, open_loader, "train", parallel.shard)))
        split = job.facts.evaluation_split
        validation = None
        if split:
            validation = stack.enter_context(contextlib.closing(open_split(job, open_loader, split, parallel.shard)))

        position, epochs = state.position, job.config.epochs or job.recipe.epochs
        last_step = min(epochs * len(loader), job.config.steps or epochs * len(loader))
        log = job.run / runs.LOG if world.leads else None
        meter = stack.enter_context(Meter(log, step=position.step, total_steps=last_step))
        for note in [*job.notes, *notes]:
            meter.say(note)
        meter.say(
            f"{job.run}: {job.recipe.name} on {where(parallel)}, {loader.samples} images in {job.facts.classes} classes, "
            f"{len(loader)} steps of {job.recipe.batch_size} an epoch, from step {position.step} to at most {last_step}"
        )
        if validation is None:
            meter.say(
                "there is no val or test split: no validation error is measured, the schedule looks at the training error"
            )

        def save() -> None:
            facts = {"identity": job.identity, "position": state.facts(), "versions": run_versions()}
            tensors = state.tensors()  # of all ranks
            if world.leads:
                checkpoint.save(job.run / runs.CHECKPOINTS, position.step, tensors, facts, job.config.keep)

        def measure() -> dict[str, Any] | None:
            if validation is None:
                return None
            meter.say(f"evaluating on {validation.samples} images of {split}")
            return {"split": split} | evaluate(
                parallel.network, until_stopped(parallel, own_examples(job, validation), stop)
            )

        loader.load_state_dict(loader_position(loader, state))
        means, val = None, position.val
        with contextlib.suppress(Stopped):
            while position.epoch < epochs and position.step < last_step and not position.schedule.finished:
                means = _train_epoch(job, state, loader, meter, stop, save, last_step) or means
                if parallel.requested is not None or position.epoch_step < len(loader):
                    break
                val = measure()
                _end_epoch(job, state, meter, val)
                save()
            if parallel.requested is None and position.epoch_step:  # --steps ended within an epoch
                save()
                val = measure()
        if parallel.requested is not None:
            save()
            if position.epoch_step:
                val = None  # the last epoch's was of other weights
            meter.say(f"stopped by {parallel.requested.name} after step {position.step}: go on with --resume")

        return _finish(
            job,
            world,
            {
                "steps": position.step,
                "epochs": position.epoch,
                "epoch_steps": len(loader),
                "train_loss": None if means is None else means.loss,
                "val_split": split,
                **{f"val_{name}": None if val is None else val[name] for name in ("top1_error", "top5_error", "loss")},
                **(meter.pace.since(Pace()) if meter.pace.steps else dict.fromkeys(UNMEASURED)),
                "seconds": time.monotonic() - started,
                "weights_sha256": weights_digest(parallel.gather_state()),
                "stopped_by": None if parallel.requested is None else parallel.requested.name,
            },
        )


def _first_state(job: Job, world: World) -> tuple[TrainingState, list[str]]:
    """The state to go on from, and what to say about it.

    Raises:
        AlexprepError: the run began with another identity.
    """
    saved, notes = checkpoint.newest(job.run / runs.CHECKPOINTS)
    began = runs.read_config(job.run)["identity"] if saved is None else saved.facts["identity"]
    if changes := checkpoint.differences(began, job.identity):
        raise AlexprepError(f"{job.run} cannot be resumed: {'; '.join(changes)}. Begin a new run without --resume")
    state = TrainingState(job.recipe, job.facts.classes, job.seed, job.device, world, job.scheme)
    if saved is None and job.config.init_from is not None:
        notes += begin_with(state.parallel, job.config)
    if saved is not None:
        state.restore(saved)
        notes += [
            f"{change}: the last bits may differ"
            for change in checkpoint.differences(saved.facts["versions"], run_versions())
        ]
    return state, notes


def _train_epoch(
    job: Job,
    state: TrainingState,
    loader: BatchSource,
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
    for images, labels in parallel.batches(own_examples(job, loader), lambda: stop.signal):
        wait_seconds = pace.lap()
        logits = state.network(images)
        loss = F.cross_entropy(logits, labels)  # the negative of the paper's objective, section 3.5
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        parallel.sum_gradients()
        state.optimizer.step()
        sums.add(loss, logits, labels)
        position.step += 1
        position.epoch_step += 1
        last = position.epoch_step == epoch_steps or position.step == last_step or parallel.requested is not None
        due = last or position.step % job.config.log_steps == 0 or pace.steps + 1 in EARLY_RECORDS
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


def _end_epoch(job: Job, state: TrainingState, meter: Meter, val: dict[str, Any] | None) -> None:
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


def _finish(job: Job, world: World, figures: dict[str, Any]) -> dict[str, Any]:
    """Publishes the summary."""
    summary = {
        "run": str(job.run),
        "recipe": job.recipe.name,
        "device": str(job.device),
        "ranks": world.size,
        **figures,
    }
    if world.leads:
        publish_json(job.run / runs.SUMMARY, summary)
    return summary
