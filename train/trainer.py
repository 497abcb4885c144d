"""The training: `train` is its loop, whole, and `Run` what the loop is about.

What to do is decided in `alexprep.train.config`, one step is in `alexprep.train.training_state`, what is logged in
`alexprep.train.logger`. Several ranks are started by `alexprep.train.launch`; each of them goes through this loop, in step.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import Loader
from alexprep.shards.dataset_format import read_json
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import json_bytes
from alexprep.shards.worker_pool import cores
from alexprep.train import checkpoint, run_dir
from alexprep.train.config import Job, TrainConfig, prepare_together, run_versions
from alexprep.train.data import BatchSource, ByCrop, Examples, LoadedBatch, OpenLoader, WithoutLastStep
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.world import World
from alexprep.train.initial_weights import begin_with, find_weights
from alexprep.train.logger import Board, Meter, forecast
from alexprep.train.lr_schedule import ends, why_ended
from alexprep.train.metrics import SPEED, Means, StepTimer, doubts, loss_doubt, validate
from alexprep.train.nonfinite import explained
from alexprep.train.precision import float32_kernels
from alexprep.train.profiler import Trace
from alexprep.train.run_dir import check_unsaved
from alexprep.train.run_writer import RunWriter, writer_of
from alexprep.train.signals_and_memory import (
    Stopped,
    StoppedAtOnce,
    StopRequest,
    enough_memory,
    keep_freed_memory,
    span,
)
from alexprep.train.training_state import TrainingState, compile_first, take_step, to_compile, weights_digest
from alexprep.train.user_code import fails_on, has_batch_norm

EARLY_RECORDS = (1, 6)  # a first sign of life; then steps 2 to 6, after the slow first one, give the forecast


def train(config: TrainConfig, open_loader: OpenLoader | None = None, world: World | None = None) -> dict[str, Any]:
    """Trains one run, or goes on with it.

    Being killed at any moment costs at most the steps since the last checkpoint. On one CPU with the same versions, a run that was killed
    and resumed ends with the same weights, to the last bit, as one that was not.

    Args:
        config: what to do.
        open_loader: opens a split, as `alexprep.pipeline.loader.Loader` does; by default that, with the settings for this machine.
        world: the ranks that share the run, each of which calls this, as `alexprep.train.launch` arranges; None for a run in this
            process alone.

    Returns:
        The summary, which is also in the run's summary.json: run, recipe, device, precision, ranks, steps, epochs, epoch_steps, train_loss
        (nats), val_split, val_top1_error and val_top5_error (percent), val_loss, images_per_second, data_wait_ms, step_ms, skipped_steps
        (of the whole run, in fp16), seconds (of this process), weights_sha256, stopped_by ("SIGTERM", "SIGINT", "SIGHUP" or None); of the
        evaluation with the lowest error best_step, best_epoch (from 1) and best_top1_error; doubts, sentences about a loss or an error that
        is no better than a guess's. What was not measured is None. Where nothing was left to do, it is the one that was there.

    Raises:
        AlexprepError: the data does not suit the recipe, the run began with other settings or data, or the loss is not finite.
    """
    with open_run(config, open_loader, world) as run:  # recipe, network, optimizer, loaders; from the checkpoint on
        if not run.goes_on() and (summary := run.earlier_summary()) is not None:
            return summary
        while run.goes_on():
            for batch in run.batches():  # images and labels; with mixup or CutMix two labels, and their weights
                loss, logits = take_step(run.state, *batch)  # forward, backward, sum over the ranks, update
                run.log(loss, logits, batch.counted_labels)
                if run.pauses():  # the epoch's last step or the training's, or a signal
                    break
                run.save_when_due()
            if run.stopping or not run.epoch_done:
                break
            run.evaluate()
            if run.stopping:
                break
            run.end_epoch()  # the schedule looks at the error
            run.save()
        if not run.between_epochs and not run.stopping:  # --steps ended within an epoch
            run.save()
            run.evaluate()
        if run.stopping:
            run.leave()
        return run.write_summary()


@contextlib.contextmanager
def open_run(config: TrainConfig, open_loader: OpenLoader | None, world: World | None) -> Iterator[Run]:
    """Opens everything that a training needs, all that can fail early first, and closes it after the block."""
    started = time.monotonic()
    world = world or World.alone(choose_device(config.device))
    job = prepare_together(config, world, check_statistics=open_loader is None)
    config = job.config
    open_loader = open_loader or functools.partial(Loader, tuning=job.tuning)
    if job.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(job.user_errors())
        enter(enough_memory())
        writer = enter(writer_of(job.run)) if world.leads else None
        enter(float32_kernels(job.computing.precision))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stop = enter(StopRequest().listening())
        state, notes = first_state(job, world)
        loader = enter(contextlib.closing(open_training(job, open_loader, state)))
        state.epoch_steps = len(loader)
        validation = None
        if split := job.facts.evaluation_split:
            validation = enter(contextlib.closing(open_split(job, open_loader, split, state.parallel.shard)))
        steps, step = job.epochs * len(loader), state.position.step
        last_step = min(steps, config.steps or steps)
        board = None
        if writer is not None and config.tensorboard:
            board = enter(contextlib.closing(Board(writer.folder / run_dir.TENSORBOARD, step)))
        log = None if writer is None else writer.folder / run_dir.LOG
        epoch, epochs = state.position.epoch, job.epochs
        meter = enter(Meter(log, step=step, total_steps=last_step, epoch=epoch, epochs=epochs, board=board))
        if writer is not None and config.resume:
            change = {"step": step, "changes": job.changes} if job.changes else {}
            recipe = {name: job.identity["recipe"][name] for name in ("lr", "schedule")}
            run_dir.remember(writer.folder, job.remembered(), job.data, change, recipe)
        if job.changes:
            meter.record_change(job.changes, step=step, epoch=state.position.epoch, lr=state.learning_rate())
        for note in [*job.notes, *notes, *_opening_words(job, state, loader, last_step)]:
            meter.say(note)
        loader.load_state_dict(loader.state_dict() | state.position.loader_state(len(loader)))
        trace = enter(Trace(job.run / run_dir.TRACE, config.trace, meter, world, step=step, last_step=last_step))
        enter(explained(job.run.name, state, lambda: first_state(job, world)[0], loader, meter, stop))
        yield Run(
            job, state, loader, validation, meter, trace, stop, writer, last_step, started, val=state.position.val
        )


@dataclass
class Run:
    """A training under way: what goes from step to step, and what is done between steps."""

    job: Job
    state: TrainingState  # changed in place
    loader: BatchSource  # of the training split, at the state's position
    validation: BatchSource | None  # of the split that is evaluated on
    meter: Meter
    trace: Trace
    stop: StopRequest
    writer: RunWriter | None  # of the rank that leads
    last_step: int  # at which the training ends at the latest
    started: float  # when this process began with it, seconds of the monotonic clock
    val: dict[str, Any] | None = None  # the evaluation of the present weights, and of which split
    means: Means | None = None  # of the last epoch, as far as it was trained here

    def goes_on(self) -> bool:
        """Whether there is a step or an evaluation left to do."""
        position = self.state.position
        # An epoch whose last step is done may still lack its evaluation, where a signal came meanwhile.
        steps_left = position.step < self.last_step or self.epoch_done
        return position.epoch < self.job.epochs and steps_left and not position.schedule.finished

    @property
    def stopping(self) -> bool:
        """Whether a signal asked for an end; the same on all ranks."""
        return self.state.parallel.requested is not None

    @property
    def epoch_done(self) -> bool:
        """Whether all steps of this epoch are taken."""
        return self.state.position.epoch_step == len(self.loader)

    @property
    def between_epochs(self) -> bool:
        """Whether no step is taken since an epoch ended with its evaluation."""
        return self.state.position.epoch_step == 0

    def batches(self) -> Iterator[Examples]:
        """The batches of the epoch that are left. How long each is waited for is measured here, how long a step takes in `log`."""
        if self.epoch_done:
            return
        self._recorded = self.state.sums.totals.clone()
        self.meter.timer.lap()
        for batch in self.state.parallel.batches(self.trace.steps(self.loader), lambda: self.stop.signal):
            self._wait_seconds, self._skipped = self.meter.timer.lap(), self.state.update.skipped
            if not self._compiled(batch):
                return
            yield batch
        raise RuntimeError(f"the loader ended after {self.state.position.epoch_step} of {len(self.loader)} steps")

    def _compiled(self, batch: Examples) -> bool:
        """Has the network compiled before its first step; false where a stop was requested by then, and so nothing was done."""
        if to_compile(self.state, batch.images, batch.labels) is None:
            return True
        if self.stopping:  # on all ranks
            return False
        try:
            with self.stop.heard_at_once(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Error detected in")  # torch's words where it is left in the middle
                compile_first(self.state, batch.images, batch.labels)
        except StoppedAtOnce:
            if (
                self.state.parallel.world.size > 1
            ):  # others may wait for this rank: they end with it, and none has taken a step
                self.stop.take_effect()
            self.state.parallel.requested = self.stop.signal
            return False
        return True

    def log(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Counts a step that was taken, and logs it and those before it where a record is due."""
        state, meter, timer, position = self.state, self.meter, self.meter.timer, self.state.position
        state.sums.add(loss, logits, labels)
        position.step += 1
        position.epoch_step += 1
        last = self.pauses()
        due = last or position.step % self.job.config.log_steps == 0 or timer.steps + 1 in EARLY_RECORDS
        if state.update.skipped > self._skipped:
            meter.record_skip(step=position.step, epoch=position.epoch, loss_scale=state.update.loss_scale)
        means = state.sums.since(self._recorded) if due else None  # waits for a GPU, so that the lap has its work in it
        busy_seconds = timer.lap()
        timer.count(len(labels), self._wait_seconds, busy_seconds)
        position.epoch_seconds += self._wait_seconds + busy_seconds
        if means is not None:
            speed = meter.record_steps(means, step=position.step, epoch=position.epoch, lr=state.learning_rate())
            self._recorded = state.sums.totals.clone()
            if timer.steps == EARLY_RECORDS[-1] and position.epoch >= len(state.recipe.early_crops):
                meter.say(forecast(state.recipe.name, state.device, speed, len(self.loader), self.job.epochs))
        if last:
            self.means = self._epoch_means()

    def pauses(self) -> bool:
        """Whether no further step of this epoch is to be taken now."""
        return self.epoch_done or self.state.position.step == self.last_step or self.stopping

    def save_when_due(self) -> None:
        """Writes a checkpoint after every so many steps."""
        if self.state.position.step % self.job.checkpoint_steps == 0:
            self.save()
            self.meter.timer.lap()

    def evaluate(self) -> None:
        """Measures the errors on the validation split; there are none where this is not due, or a stop is requested meanwhile."""
        self.val = None
        position, every = self.state.position, self.job.evaluate_every
        last = position.step == self.last_step or position.epoch + 1 >= self.job.epochs
        if self.validation is None or not (last or (position.epoch + 1) % every == 0):
            return
        split, parallel = self.job.facts.evaluation_split, self.state.parallel
        self.meter.evaluating(self.validation.samples, str(split))
        with span("evaluate"), contextlib.suppress(Stopped), self.state.averaged():
            batches = until_stopped(parallel, self.validation, self.stop)
            self.val = {"split": split} | validate(parallel.network, batches, self.job.computing.precision)

    def end_epoch(self) -> None:
        """Logs the epoch, asks the schedule, and moves the position to the next epoch."""
        state, position, val = self.state, self.state.position, self.val
        means = self._epoch_means()
        where: dict[str, Any] = {"step": position.step, "epoch": position.epoch, "lr": state.learning_rate()}
        if val is not None:
            position.note_best(val)
        self.meter.record_epoch(means, **where, seconds=position.epoch_seconds, val=val, best=position.best)
        if position.epoch == 0 and (doubt := loss_doubt(self.job.facts.classes, self._comparable(means.loss), val)):
            self.meter.say(doubt)
        error = means.top1_error if val is None else float(val["top1_error"])
        position.schedule = state.recipe.schedule.after_epoch(position.schedule, position.epoch + 1, error)
        position.epoch, position.epoch_step, position.epoch_seconds, position.val = position.epoch + 1, 0, 0.0, val
        state.sums.totals.zero_()

    def save(self) -> None:
        """Writes a checkpoint. All ranks take part, the first one writes."""
        job, state = self.job, self.state
        facts = {"identity": job.identity, **state.facts(), **_last_bits(job)}
        with span("checkpoint"):
            tensors = state.tensors()  # of all ranks
            if self.writer is not None:
                best = (state.position.best or {}).get("step")
                self.writer.save(state.position.step, tensors, facts, job.keep, best)

    def leave(self) -> None:
        """Saves what there is when a stop was requested, and says how to go on."""
        requested = self.state.parallel.requested
        assert requested is not None
        self.save()
        if self.writer is not None:
            self.writer.settle()
        if not self.between_epochs:
            self.val = None  # the last epoch's was of other weights
        done, options = self.state.position.step, self.job.resume_options()
        self.meter.say(f"stopped by {requested.name} after step {done}: go on with {options}")

    def write_summary(self) -> dict[str, Any]:
        """What `train` returns, which the first rank writes to summary.json."""
        job, state, position, parallel = self.job, self.state, self.state.position, self.state.parallel
        timer, val, best = self.meter.timer, self.val, position.best
        loss = None if self.means is None else self.means.loss
        summary: dict[str, Any] = {
            "run": str(job.run),
            "recipe": job.recipe.name,
            "device": str(job.device),
            "precision": job.computing.precision,
            "ranks": parallel.world.size,
            "steps": position.step,
            "epochs": position.epoch,
            "epoch_steps": len(self.loader),
            "train_loss": loss,
            "val_split": job.facts.evaluation_split,
            **{f"val_{name}": None if val is None else val[name] for name in ("top1_error", "top5_error", "loss")},
            **{f"best_{name}": None if best is None else best[name] for name in ("step", "epoch", "top1_error")},
            **(timer.since(StepTimer()) if timer.steps else dict.fromkeys(SPEED)),
            "skipped_steps": state.update.skipped if job.computing.precision == "fp16" else None,
            "seconds": time.monotonic() - self.started,
            "weights_sha256": weights_digest(parallel.gather_state()),
            "stopped_by": None if parallel.requested is None else parallel.requested.name,
            "doubts": [] if self.stopping else doubts(job.facts.classes, self._comparable(loss), val),
        }
        for doubt in summary["doubts"]:
            self.meter.say(doubt)
        if position.schedule.finished and not self.stopping:
            self.meter.say(why_ended(self.state.recipe.schedule, position.schedule))
        if best is not None and not self.stopping:
            where = f"epoch {best['epoch']}, {best['top1_error']:.2f} % on {best['split']}"
            self.meter.say(f"best: {where}; evaluate it as {job.run.name}@{run_dir.BEST}")
        if self.writer is not None:
            self.writer.publish(run_dir.SUMMARY, json_bytes(summary))
        return summary

    def earlier_summary(self) -> dict[str, Any] | None:
        """The summary of a run that has come to its end with these very weights, and why; None where there is no such summary."""
        job, position, parallel = self.job, self.state.position, self.state.parallel
        if position.schedule.finished:
            why = f"step {position.step} was the last: {why_ended(self.state.recipe.schedule, position.schedule)}"
        else:
            within = position.step < job.epochs * len(self.loader)
            bound = f"--steps {job.config.steps}" if within else f"--epochs {job.epochs}"
            why = f"step {position.step} is done, which {bound} does not go beyond; --resume with more --epochs or --steps goes on"
        self.meter.say(f"nothing left to do: {why}")
        ended = [position.step, weights_digest(parallel.gather_state()), None]

        def read() -> dict[str, Any] | None:
            try:
                summary = read_json(job.run / run_dir.SUMMARY, "") | {"run": str(job.run)}
            except AlexprepError:
                return None
            return (
                summary if [summary.get(name) for name in ("steps", "weights_sha256", "stopped_by")] == ended else None
            )

        summary: dict[str, Any] | None = parallel.world.of_first(read)
        return summary

    def _comparable(self, loss: float | None) -> float | None:
        """A loss that can be held beside a guess's: only the softmax's can."""
        return loss if self.job.recipe.loss == "softmax" else None

    def _epoch_means(self) -> Means:
        return self.state.sums.since(torch.zeros_like(self.state.sums.totals))


def first_state(job: Job, world: World) -> tuple[TrainingState, list[str]]:
    """The state to go on from, of the newest checkpoint or from scratch, and what to say about it."""
    saved, notes = _saved(job, world)
    state = TrainingState(job.recipe, job.facts.classes, job.seed, job.device, world, job.scheme, job.computing)
    if saved is not None:
        _keep_threads(saved.facts.get("rounding", {}).get("threads"), world)
        whose = f"the network of recipe {job.recipe.name}"
        checkpoint.check_layers(saved, state.network.state_dict(), whose, parts=job.scheme in ("towers", "hybrid"))
        state.restore(saved)
        standing = state.position.schedule
        state.position.schedule = replace(standing, finished=ends(state.recipe.schedule, standing))
        for name, now in _last_bits(job).items():
            changes = checkpoint.differences(now | saved.facts.get(name, {}), now)  # older ones do not say all of it
            notes += [f"{change}: the last bits may differ" for change in changes]
    elif job.config.init_from is not None:
        whole = state.parallel.gather_state()
        runs, named, layers = job.config.runs, job.config.init_from, job.config.init_layers
        notes += world.of_first(lambda: begin_with(whole, find_weights(runs, named), layers).sentences())
        state.parallel.scatter_state(world.tensors_of_first(whole))
        state.begin_average()
    return state, notes


def _saved(job: Job, world: World) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The newest checkpoint, if there is one, and what to say about it. Rank 0 reads it, and the others have it from there."""
    tensors: dict[str, torch.Tensor] = {}

    def read() -> tuple[int | None, dict[str, Any], list[str]]:
        saved, notes = checkpoint.newest(job.run / run_dir.CHECKPOINTS)
        if saved is None:
            check_unsaved(job.run, notes)
        if changes := job.differences(run_dir.read_config(job.run), None if saved is None else saved.facts):
            raise AlexprepError(
                f"{job.run} cannot be resumed: {checkpoint.some_of(changes)}. Begin a new run without --resume"
            )
        tensors.update({} if saved is None else saved.tensors)
        return (None, {}, notes) if saved is None else (saved.step, saved.facts, notes)

    step, facts, notes = world.of_first(read)
    return None if step is None else checkpoint.Checkpoint(step, world.tensors_of_first(tensors), facts), notes


def _keep_threads(threads: int | None, world: World) -> None:
    """Has torch compute with as many threads as before, if this machine has cores for them and the user does not say otherwise."""
    if threads and world.size == 1 and threads <= cores() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)


def _last_bits(job: Job) -> dict[str, Any]:
    """What a checkpoint says of all that decides no more than the last bits."""
    rounding: dict[str, Any] = {"channels_last": job.computing.memory.channels_last, "compile": job.computing.compile}
    if job.device.type == "cpu":
        rounding["threads"] = torch.get_num_threads()
    return {"rounding": rounding, "versions": run_versions()}


def _opening_words(job: Job, state: TrainingState, loader: BatchSource, last_step: int) -> list[str]:
    world = state.parallel.world
    where = str(world.device)
    if world.size > 1:
        where = f"{world.size} ranks ({state.parallel.scheme}), {world.device.type}"
    compiled = ", compiled" if job.computing.compile else ""
    images = f"{loader.samples:,} images in {job.facts.classes} classes"
    steps = f"{len(loader)} steps of {job.recipe.batch_size} an epoch, from step {state.position.step} to at most {last_step}"
    lines = [f"{job.run}: {job.recipe.name} on {where} in {job.computing.precision}{compiled}", f"{images}, {steps}"]
    if job.facts.evaluation_split is None:
        lines.append(
            "there is no val or test split with labels: no validation error is measured, the schedule looks at the training error"
        )
    return lines


def open_split(
    job: Job,
    open_loader: OpenLoader,
    split: str,
    shard: tuple[int, int],
    crop: int | None = None,
    end: int = sys.maxsize,
) -> BatchSource:
    """Opens a rank's loader of a split; `shard` is its (rank, world_size), `crop` a side other than the recipe's, for the epochs below `end`."""
    training = split == "train"
    augmentation = job.recipe.augmentation if training else job.recipe.evaluation_augmentation
    return open_loader(
        job.data,
        split,
        batch_size=job.recipe.batch_size,
        augmentation=augmentation if crop is None else replace(augmentation, crop=crop),
        views="random" if training else "centre",
        order=job.order if training else "sequential",
        epochs=min(job.epochs, end) if training else None,
        seed=job.seed,
        rank=shard[0],
        world_size=shard[1],
        device=str(job.device),
        memory_format=job.computing.memory.memory_format,
        threads=job.config.threads,
        statistics=job.config.statistics,
        on_bad=job.config.on_bad or "error",
    )


def open_training(job: Job, open_loader: OpenLoader, state: TrainingState) -> BatchSource:
    """Opens a rank's loader of the training split; without the epoch's last step where that has one image and the network cannot take it."""
    opened = functools.partial(open_split, job, open_loader, "train", state.parallel.shard)
    early, crop = job.recipe.early_crops, job.recipe.crop
    loader = ByCrop(opened, early, crop, state.position.epoch) if early else opened()
    # Ranks take empty batches, and so one image.
    asked = state.parallel.world.size == 1 or has_batch_norm(state.network)
    if loader.samples % job.recipe.batch_size != 1 or not asked:
        return loader
    if not any(fails_on(state.network, _blank(job, state, side)) for side in {*early, crop}):
        return loader
    if len(loader) == 1:
        loader.close()
        raise AlexprepError(
            "this network needs two images a step, as batch normalisation does, and there is one to train on: take another or more images"
        )
    job.notes.append(
        f"of {loader.samples:,} images the last step of an epoch would have one, too few for this network, as for batch normalisation: it is left "
        "out, another image in each epoch"
    )
    return WithoutLastStep(loader)


def _blank(job: Job, state: TrainingState, side: int) -> torch.Tensor:
    """One image of zeros as the network gets it, of a side in pixels."""
    made = torch.zeros(1, job.recipe.augmentation.channels, side, side, device=state.device)
    return made.contiguous(memory_format=job.computing.memory.format)


def until_stopped(parallel: Parallel, batches: Iterable[LoadedBatch], stop: StopRequest) -> Iterator[Examples]:
    """The ranks' batches; raises `Stopped` on all of them where one was asked to stop."""
    for batch in parallel.batches(batches, lambda: stop.signal):
        if parallel.requested is not None:
            raise Stopped
        yield batch
