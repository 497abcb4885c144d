"""Where NaN and infinity came from, found by doing the last steps again. As long as all is finite this costs nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from alexprep.shards.errors import AlexprepError
from alexprep.train.data import BatchSource
from alexprep.train.fed import loader_position
from alexprep.train.job import Job
from alexprep.train.logger import Meter, duration
from alexprep.train.nonfinite import NotFinite, Sight, Watch
from alexprep.train.runtime import StopRequest
from alexprep.train.step import take_step
from alexprep.train.training_state import TrainingState

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
    seconds = steps * (meter.pace.wait_seconds + meter.pace.busy_seconds) / max(meter.pace.steps, 1)
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
