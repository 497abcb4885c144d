"""One run from beginning to end: everything is opened, the state is found, the training goes on, the summary is written."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import Loader
from alexprep.shards.dataset_format import read_json
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import json_bytes
from alexprep.train import checkpoint, run_dir
from alexprep.train.config import TrainConfig
from alexprep.train.culprit import explained
from alexprep.train.data import OpenLoader
from alexprep.train.distributed.world import World
from alexprep.train.evaluation.sums import SPEED, Pace
from alexprep.train.fed import begin_with, loader_position, open_split, where
from alexprep.train.job import Job, prepare, run_versions
from alexprep.train.logger import Meter
from alexprep.train.own.tryout import comparable
from alexprep.train.precision import float32_kernels
from alexprep.train.profiler import Trace
from alexprep.train.runtime import StopRequest, enough_memory, keep_freed_memory
from alexprep.train.saved.disk import publish
from alexprep.train.saved.places import check_unsaved
from alexprep.train.training import Training
from alexprep.train.training_state import TrainingState, weights_digest
from alexprep.train.watching.board import Board


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
        The summary, which is also in the run's summary.json: run, recipe, device, precision, ranks, steps, epochs, epoch_steps, train_loss
        (nats), val_split, val_top1_error and val_top5_error (percent), val_loss, images_per_second, data_wait_ms, step_ms, skipped_steps
        (of the whole run, in fp16), seconds (of this process), weights_sha256, stopped_by ("SIGTERM", "SIGINT", "SIGHUP" or None). What was not
        measured is None. Where nothing was left to do, it is the one that was there.

    Raises:
        AlexprepError: the data does not suit the recipe, the run began with other settings or data, or the loss is not finite.
    """
    started = time.monotonic()
    world = world or World.alone(choose_device(config.device))
    job = prepare(config, world.device, made_up=open_loader is not None)
    open_loader = open_loader or functools.partial(Loader, tuning=job.tuning)
    if job.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(job.blamed())
        stack.enter_context(enough_memory())
        if world.leads:
            stack.enter_context(run_dir.locked(job.run))
        stack.enter_context(float32_kernels(job.computing.precision))
        stop = stack.enter_context(StopRequest().listening())
        state, notes = _first_state(job, world)
        job = replace(job, began_from=None)  # it has done its part, and takes memory
        parallel = state.parallel
        loader = stack.enter_context(contextlib.closing(open_split(job, open_loader, "train", parallel.shard)))
        split = job.facts.evaluation_split
        validation = None
        if split:
            validation = stack.enter_context(contextlib.closing(open_split(job, open_loader, split, parallel.shard)))

        position = state.position
        steps = job.epochs * len(loader)
        last_step = min(steps, job.config.steps or steps)
        log = job.run / run_dir.LOG if world.leads else None
        board = None
        if log is not None and job.config.tensorboard:
            board = stack.enter_context(contextlib.closing(Board(job.run / run_dir.TENSORBOARD, position.step)))
        meter = stack.enter_context(
            Meter(log, step=position.step, total_steps=last_step, epoch=position.epoch, board=board)
        )
        if world.leads and config.resume:
            run_dir.remember(job.run, job.remembered(), job.data)
        for note in [*job.notes, *notes]:
            meter.say(note)
        meter.say(
            f"{job.run}: {job.recipe.name} on {where(job, parallel)}, {loader.samples} images in {job.facts.classes} classes, "
            f"{len(loader)} steps of {job.recipe.batch_size} an epoch, from step {position.step} to at most {last_step}"
        )
        if validation is None:
            meter.say(
                "there is no val or test split with labels: no validation error is measured, the schedule looks at the "
                "training error"
            )
        loader.load_state_dict(loader_position(loader, state))
        trace = stack.enter_context(
            Trace(job.run / run_dir.TRACE, job.config.trace, meter, world, step=position.step, last_step=last_step)
        )
        saved_state = functools.partial(_first_state, job, world)
        stack.enter_context(explained(job, state, saved_state, loader, meter, stop))
        training = Training(job, state, loader, validation, meter, trace, stop, last_step)
        if not training.goes_on():
            meter.say(f"nothing left to do: {training.why_ended()}")
            ended = _summary_of(job.run, position.step, weights_digest(parallel.gather_state()))
            if world.any(ended is not None):
                return ended or {}
        means, val = training.to_the_end()
        summary = {
            "run": str(job.run),
            "recipe": job.recipe.name,
            "device": str(job.device),
            "precision": job.computing.precision,
            "ranks": world.size,
            "steps": position.step,
            "epochs": position.epoch,
            "epoch_steps": len(loader),
            "train_loss": None if means is None else means.loss,
            "val_split": split,
            **{f"val_{name}": None if val is None else val[name] for name in ("top1_error", "top5_error", "loss")},
            **(meter.pace.since(Pace()) if meter.pace.steps else dict.fromkeys(SPEED)),
            "skipped_steps": state.update.skipped if job.computing.precision == "fp16" else None,
            "seconds": time.monotonic() - started,
            "weights_sha256": weights_digest(parallel.gather_state()),
            "stopped_by": None if parallel.requested is None else parallel.requested.name,
        }
        if world.leads:
            publish(job.run / run_dir.SUMMARY, json_bytes(summary))
        return summary


def _summary_of(run: Path, step: int, digest: str) -> dict[str, Any] | None:
    """The summary of a run that came to its end with these very weights; None where there is no such summary."""
    try:
        summary = read_json(run / run_dir.SUMMARY, "")
    except AlexprepError:
        return None
    then = [summary.get(name) for name in ("steps", "weights_sha256", "stopped_by")]
    return {**summary, "run": str(run)} if then == [step, digest, None] else None


def _first_state(job: Job, world: World) -> tuple[TrainingState, list[str]]:
    """The state to go on from, and what to say about it.

    Raises:
        AlexprepError: the run began with another identity; or it has no checkpoint, though it had one.
    """
    saved, notes = checkpoint.newest(job.run / run_dir.CHECKPOINTS)
    if saved is None:
        check_unsaved(job.run, notes)
    began = run_dir.read_config(job.run) if saved is None else saved.facts
    made_with = began.get("versions", {})
    then, now = (comparable(identity, made_with) for identity in (began["identity"], job.identity))
    if changes := checkpoint.differences({"precision": "fp32"} | then, now):  # older runs do not say it
        raise AlexprepError(
            f"{job.run} cannot be resumed: {checkpoint.some_of(changes)}. Begin a new run without --resume"
        )
    state = TrainingState(job.recipe, job.facts.classes, job.seed, job.device, world, job.scheme, job.computing)
    if saved is None and job.config.init_from is not None:
        notes += begin_with(state.parallel, job)
    if saved is not None:
        state.restore(saved)
        notes += [
            f"{change}: the last bits may differ"
            for change in [
                *checkpoint.differences(saved.facts["versions"], run_versions()),
                *checkpoint.differences(saved.facts.get("rounding", job.computing.rounding), job.computing.rounding),
            ]
        ]
    return state, notes
