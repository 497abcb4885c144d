"""One run from beginning to end: everything is opened, the state is found, the training goes on, the summary is written."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import Loader
from alexprep.shards.dataset_format import read_json
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import json_bytes
from alexprep.train import checkpoint, run_dir
from alexprep.train.checkpoint import init_from, publish, saved_weights, wanted_layers
from alexprep.train.config import Job, TrainConfig, prepare, run_versions
from alexprep.train.data import BatchSource, Examples, LoadedBatch, OpenLoader
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.world import World
from alexprep.train.logger import Board, Meter, duration, forecast
from alexprep.train.metrics import SPEED, Means, StepTimer, validate
from alexprep.train.nonfinite import NotFinite, Sight, Watch
from alexprep.train.precision import float32_kernels
from alexprep.train.profiler import Trace
from alexprep.train.run_dir import check_unsaved, place_named, saved_checkpoint
from alexprep.train.runtime import Stopped, StopRequest, enough_memory, keep_freed_memory
from alexprep.train.spans import span
from alexprep.train.training_state import TrainingState, take_step, weights_digest
from alexprep.train.user_code import comparable

# -------------------- What a rank's network is fed, and from which place on.


def open_split(job: Job, open_loader: OpenLoader, split: str, shard: tuple[int, int]) -> BatchSource:
    """A rank's loader of a split; `shard` is its (rank, world_size)."""
    training = split == "train"
    return open_loader(
        job.data,
        split,
        batch_size=job.recipe.batch_size,
        augmentation=job.recipe.augmentation,
        views="random" if training else "centre",
        order="shuffle" if training else "sequential",
        seed=job.seed,
        rank=shard[0],
        world_size=shard[1],
        device=str(job.device),
        memory_format=job.computing.memory.memory_format,
        threads=job.config.threads,
    )


def loader_position(loader: BatchSource, state: TrainingState) -> dict[str, int]:
    """The loader's state at the training's position. After an epoch's last step it is the next epoch's beginning."""
    epoch, step = state.position.epoch, state.position.epoch_step
    return loader.state_dict() | (
        {"epoch": epoch, "step": step} if step < len(loader) else {"epoch": epoch + 1, "step": 0}
    )


def until_stopped(parallel: Parallel, batches: Iterable[LoadedBatch], stop: StopRequest) -> Iterator[Examples]:
    """The ranks' batches; raises `Stopped` on all of them where one was asked to stop."""
    for batch in parallel.batches(batches, lambda: stop.signal):
        if parallel.requested is not None:
            raise Stopped
        yield batch


def where(job: Job, parallel: Parallel) -> str:
    """The devices and what they compute in, for people."""
    world = parallel.world
    devices = str(world.device) if world.size == 1 else f"{world.size} ranks ({parallel.scheme}), {world.device.type}"
    return f"{devices} in {job.computing.precision}{', compiled' if job.computing.compile else ''}"


def begin_with(parallel: Parallel, job: Job) -> list[str]:
    """Gives a network the weights of another run; what to say about it. Every rank does the same to the whole state.

    Raises:
        AlexprepError: there is no such checkpoint, or it does not fit.
    """
    notes: list[str] = []
    source = job.began_from
    if source is None:
        source, notes = saved_checkpoint(place_named(job.config.runs, job.config.init_from))
    whole = parallel.gather_state()
    report = init_from(whole, saved_weights(source), wanted_layers(job.config.init_layers))
    parallel.scatter_state(whole)
    return [*notes, *report.sentences()]


# -------------------- Where NaN and infinity came from, found by doing the last steps again. As long as all is finite this costs nothing.


SECONDS = 300.0  # that a search may take; beyond that the training is over sooner without it
NAMED = 3  # of the weights that are not finite


@contextlib.contextmanager
def explained(
    job: Job,
    state: TrainingState,
    saved_state: Callable[[], tuple[TrainingState, object]],
    loader: BatchSource,
    meter: Meter,
    stop: StopRequest,
) -> Iterator[None]:
    """Turns `NotFinite` into words that name the step, the layer and what the user can do, and a record in the log.

    All ranks notice it after the same step, since each has the loss of the whole batch and the whole state; so all search together.

    Args:
        job: of the training.
        state: of the training, as it goes on.
        saved_state: makes the state that a resume would begin with.
        loader: of the training split.
        meter: says and logs.
        stop: ends the search early.

    Raises:
        AlexprepError: in place of `NotFinite`.
    """
    try:
        yield
    except NotFinite as error:
        position, lr = state.position, state.learning_rate(job.recipe)
        saved_step, sight, before, why = 0, None, None, ""
        try:
            before, _ = saved_state()
            saved_step = before.position.step
        except (AlexprepError, OSError, torch.OutOfMemoryError) as failure:
            why = str(failure)
        if state.parallel.world.any(before is None):  # from here on all ranks do the same
            why = why or "another rank has no such state"
        elif before is not None and not (why := _hindrance(state, before, meter)):
            meter.say(f"{error.what}: doing the steps since step {saved_step} again, to find where it began")
            try:
                sight = _first_sight(state, before, loader, stop)
            except (AlexprepError, OSError, torch.OutOfMemoryError) as failure:
                why = str(failure)
        meter.record_not_finite(sight, step=position.step, epoch=position.epoch, lr=lr)
        found = sight.sentence() if sight else _present(state, why)
        next_step = _next_step(job.run.name, saved_step, sight)
        raise AlexprepError(f"{error.what}, at learning rate {lr}; {found}. {next_step}") from None


def _hindrance(state: TrainingState, before: TrainingState, meter: Meter) -> str:
    """Why the steps are not done again; "" where nothing speaks against it. The same on all ranks."""
    steps = state.position.step - before.position.step
    if steps == 0:
        return "no step was taken since the last checkpoint"
    if state.position.epoch != before.position.epoch:
        return f"the last checkpoint, of step {before.position.step}, is of another epoch"
    seconds = steps * (meter.timer.wait_seconds + meter.timer.busy_seconds) / max(meter.timer.steps, 1)
    if state.parallel.world.any(seconds > SECONDS):
        return f"to do the {steps} steps since the last checkpoint again would take {duration(seconds)}"
    return ""


def _first_sight(state: TrainingState, before: TrainingState, loader: BatchSource, stop: StopRequest) -> Sight | None:
    """Goes from `before` to where `state` stands, and looks at everything on the way."""
    loader.load_state_dict(loader_position(loader, before))
    watch = Watch(before.parallel.world)
    before.compiled = None  # only layers that run one by one can be watched; without, results differ by rounding
    for images, labels in before.parallel.batches(loader, lambda: stop.signal):
        before.position.step += 1
        skipped = before.update.skipped
        _watched_step(before, images, labels, watch)
        sight = watch.first(before.position.step)
        if sight and sight.what == "gradient" and before.update.skipped > skipped:
            sight = None  # in fp16 a gradient may overflow now and then, and does no harm
        if sight or before.position.step == state.position.step or before.parallel.requested:
            return sight
    return None


def _watched_step(state: TrainingState, images: torch.Tensor, labels: torch.Tensor, watch: Watch) -> None:
    named = list(state.network.named_parameters())
    for name, weight in named:
        watch.see("weight", name, weight)
    watch.see("images", "", images)
    with watch.outputs(state.network):
        loss, _ = take_step(state, images, labels)
    watch.see("loss", "", loss)
    for name, weight in reversed(named):
        if weight.grad is not None:
            watch.see("gradient", name, weight.grad)
    for name, weight in named:
        watch.see("update", name, weight)


def _present(state: TrainingState, why: str) -> str:
    """What the weights are now, and why there is no more to tell. All ranks call it."""
    weights = state.parallel.gather_state()
    spoilt = state.spoilt(weights)
    more = f" and {len(spoilt) - NAMED} more" if len(spoilt) > NAMED else ""
    if spoilt:
        now = f"now {', '.join(spoilt[:NAMED])}{more} are not finite"
    else:
        finite = {name: weight[weight.isfinite()] for name, weight in weights.items()}
        sizes = {name: float(weight.double().abs().max()) for name, weight in finite.items() if weight.numel()}
        largest = max(sizes, key=sizes.__getitem__)
        now = f"every weight is finite, the largest is {sizes[largest]:.2g}, in {largest}"
    return f"{now} (where it began is not known: {why or 'it did not happen again'})"


def _next_step(run: str, saved_step: int, sight: Sight | None) -> str:
    kept = f"The checkpoint of step {saved_step} is untouched" if saved_step else "Nothing was saved"
    if sight is not None and sight.what == "images":
        return f"{kept}: look at the data and its statistics with `alexprep verify`, then go on with --resume"
    if sight is not None and sight.what == "weight":
        return f"{kept}: begin a new run with other initial weights"
    begin = f", from the beginning or with --init-from {run}" if saved_step else ""
    return f"{kept}: train again with a lower --lr{begin}"


# -------------------- A training under way: its steps, the end of its epochs, what it saves.


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
        position, pace, sums = state.position, meter.timer, state.sums
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
            return {"split": split} | validate(parallel.network, batches, self.job.computing.precision)

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


# -------------------- One run from beginning to end: everything is opened, the state is found, the training goes on, the summary is written.


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
            **(meter.timer.since(StepTimer()) if meter.timer.steps else dict.fromkeys(SPEED)),
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
