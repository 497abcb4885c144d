"""Finds the step and the layer in which NaN or infinity first appeared, by doing the last steps again and looking at every value.

Nothing of it runs while a training is well: values that are not finite are noticed where the loss is logged and weights are saved.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.data import BatchSource
from alexprep.train.distributed.world import World
from alexprep.train.logger import Meter, duration
from alexprep.train.precision import NotFinite, Origin, What
from alexprep.train.signals_and_memory import StopRequest
from alexprep.train.training_state import TrainingState, take_step

SECONDS = 300.0  # that a search may take; beyond that the training is over sooner without it
NAMED = 3  # of the weights that are not finite


@contextlib.contextmanager
def explained(
    run: str,
    state: TrainingState,
    saved_state: Callable[[], TrainingState],
    loader: BatchSource,
    meter: Meter,
    stop: StopRequest,
) -> Iterator[None]:
    """Turns `NotFinite` into words that name the step, the layer and what the user can do, and into a record in the log.

    All ranks notice it after the same step, since each has the loss of the whole batch and the whole state; so all search together,
    from what `saved_state` makes, which is the state that a resume would begin with.
    """
    try:
        yield
    except NotFinite as error:
        position, lr = state.position, state.learning_rate()
        before, saved_step, origin, hindrance = None, 0, None, ""
        try:
            before = saved_state()
            before.epoch_steps = state.epoch_steps
            saved_step = before.position.step
        except (AlexprepError, OSError, torch.OutOfMemoryError) as failure:
            hindrance = str(failure)
        if state.parallel.world.any(before is None):  # from here on all ranks do the same
            hindrance = hindrance or "another rank has no such state"
        elif before is not None and not (hindrance := _hindrance(state, before, meter)):
            meter.say(f"{error.what}: doing the steps since step {saved_step} again, to find where it began")
            try:
                origin = _origin(state, before, loader, stop)
            except (AlexprepError, OSError, torch.OutOfMemoryError) as failure:
                hindrance = str(failure)
        meter.record_not_finite(origin, step=position.step, epoch=position.epoch, lr=lr)
        found = origin.sentence() if origin else _present_weights(state, hindrance)
        next_step = _next_step(saved_step, origin)
        raise NotFinite(f"{error.what}, at learning rate {lr}; {found}. {next_step}") from None


class Watch:
    """Looks at the values of a step in the order in which they come about.

    The ranks of a training look at the same values in the same order, each at its own part; the first one that any of them finds is
    what all of them tell.
    """

    def __init__(self, world: World) -> None:
        """Nothing seen yet."""
        self.world = world
        self._seen: list[tuple[What, str]] = []
        self._first: tuple[int, int] | None = None  # place in `_seen`, and whether it is NaN

    def see(self, what: What, name: str, tensor: torch.Tensor) -> None:
        """Looks at a value; on a GPU it waits for it."""
        if self._first is None and not torch.isfinite(tensor).all():
            self._first = len(self._seen), int(tensor.isnan().any())
        self._seen.append((what, name))

    def step(self, state: TrainingState, images: torch.Tensor, *labels: torch.Tensor) -> None:
        """Takes a step, and looks at all of it; at every layer's output also where the next layer overwrites it."""
        named = list(state.network.named_parameters())
        for name, weight in named:
            self.see("weight", name, weight)
        self.see("images", "", images)
        with contextlib.ExitStack() as stack:
            for name, layer in state.network.named_modules():
                if name and not isinstance(layer, nn.Sequential):
                    stack.callback(layer.register_forward_hook(functools.partial(self._see_output, name)).remove)
            loss, _ = take_step(state, images, *labels)
        self.see("loss", "", loss)
        for name, weight in reversed(named):
            if weight.grad is not None:
                self.see("gradient", name, weight.grad)
        for name, weight in named:
            self.see("update", name, weight)

    def first(self, step: int) -> Origin | None:
        """The first value that was not finite on any rank since the last call, if there is one; all ranks call it."""
        none = len(self._seen), 0
        place, is_nan = min(map(tuple, self.world.exchange(self._first or none)))
        seen, self._seen, self._first = self._seen, [], None
        return None if place == len(seen) else Origin(step, *seen[place], "nan" if is_nan else "inf")

    def _see_output(self, name: str, layer: nn.Module, given: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.see("output", name, output)


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


def _origin(state: TrainingState, before: TrainingState, loader: BatchSource, stop: StopRequest) -> Origin | None:
    """Goes from `before` to where `state` stands, and looks at everything on the way."""
    loader.load_state_dict(loader.state_dict() | before.position.loader_state(len(loader)))
    watch = Watch(before.parallel.world)
    before.compiled = None  # only layers that run one by one can be watched; without, results differ by rounding
    for batch in before.parallel.batches(loader, lambda: stop.signal):
        before.position.step += 1
        skipped = before.update.skipped
        watch.step(before, *batch)
        before.position.epoch_step += 1
        origin = watch.first(before.position.step)
        if origin and origin.what == "gradient" and before.update.skipped > skipped:
            origin = None  # in fp16 a gradient may overflow now and then, and does no harm
        if origin or before.position.step == state.position.step or before.parallel.requested:
            return origin
    return None


def _present_weights(state: TrainingState, hindrance: str) -> str:
    """What the weights are now, and why there is no more to tell. All ranks call it."""
    weights = state.parallel.gather_state()
    if names := state.not_finite(weights):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        now = f"now {', '.join(names[:NAMED])}{more} are not finite"
    else:
        finite = {name: weight[weight.isfinite()] for name, weight in weights.items()}
        sizes = {name: float(weight.double().abs().max()) for name, weight in finite.items() if weight.numel()}
        largest = max(sizes, key=sizes.__getitem__)
        now = f"every weight is finite, the largest is {sizes[largest]:.2g}, in {largest}"
    return f"{now} (where it began is not known: {hindrance or 'it did not happen again'})"


def _next_step(saved_step: int, origin: Origin | None) -> str:
    kept = f"The checkpoint of step {saved_step} is untouched" if saved_step else "Nothing was saved"
    what = origin.what if origin else ""
    if what == "images":
        return f"{kept}: look at the data and its statistics with `alexprep verify`, then go on with --resume"
    if what == "weight":
        return f"{kept}: begin a new run with other initial weights"
    if saved_step:
        return f"{kept}: go on with --resume and a lower --lr, or train again with one"
    return f"{kept}: train again with a lower --lr"
