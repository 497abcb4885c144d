"""A training step in each precision, with and without channels last and compilation: the same step on one batch of noise, in turns.

python benchmarks/step.py [--recipes alexnet cifar10-quick] [--device cuda] [--batch-size 512] [--threads 1] [--rounds 5] [--save]

Figures: images/s, and a second of processor time; each contestant's over fp32's as it is by default; and how far its gradients lie
from those, as length of the difference over length, in the layer where that is most. Where somebody else uses the machine, take one
thread and processor time. fp16 is left out on a CPU, where gradients of convolutions take minutes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from common import command_line, report

from alexprep.train.precision import PRECISIONS, Precision, arithmetic, float32_kernels, logits
from alexprep.train.recipes import recipe as recipe_named
from alexprep.train.signals_and_memory import keep_freed_memory
from alexprep.train.training_state import Compiled, TrainingState, Update, take_step

CLASSES = {"alexnet": 1000}  # others: 10


@dataclass(frozen=True)
class Way:
    """How a contestant computes."""

    precision: Precision
    channels_last: bool
    compile: bool

    def __str__(self) -> str:
        """For the table."""
        return f"{self.precision}{', channels last' * self.channels_last}{', compiled' * self.compile}"


class Contest:
    """The ways of one recipe. Those with the same memory share a network, so that memory suffices for all."""

    def __init__(self, recipe: str, device: torch.device, ways: list[Way], batch_size: int | None = None) -> None:
        """Makes the networks and one batch, by default of the recipe's size."""
        self.recipe, self.device, self.ways = recipe_named(recipe), device, ways
        if batch_size:
            self.recipe = replace(self.recipe, batch_size=batch_size)
        classes, generator = CLASSES.get(recipe, 10), torch.Generator().manual_seed(0)
        shape = self.recipe.batch_size, 3, self.recipe.crop, self.recipe.crop
        self.labels = torch.randint(classes, shape[:1], generator=generator).to(device)
        images = 60 * torch.randn(shape, generator=generator)
        self.states, self.images, self.compiled = {}, {}, {}
        for last in sorted({way.channels_last for way in ways}):
            computing = arithmetic(device, channels_last=last)
            self.states[last] = TrainingState(self.recipe, classes, 0, device, computing=computing)
            self.states[last].epoch_steps = 1000  # for schedules that move with every step
            self.images[last] = images.to(device).contiguous(memory_format=computing.memory.format)
            self.compiled[last] = Compiled(self.states[last].network)
            # How far its gradients lie from others is among the figures.
            self.compiled[last].checked.add(images.shape[-2:])

    def prepared(self, way: Way) -> TrainingState:
        """The state, computing in this way."""
        state = self.states[way.channels_last]
        state.precision, state.compiled = way.precision, self.compiled[way.channels_last] if way.compile else None
        state.update = Update(state.parallel, state.optimizer, way.precision)
        return state

    def gradients(self, way: Way) -> dict[str, torch.Tensor]:
        """Of the initial weights."""
        state = self.prepared(way)
        torch.manual_seed(1)
        state.optimizer.zero_grad()
        with float32_kernels(way.precision):
            found = logits(state.called_for(len(self.labels)), self.images[way.channels_last], way.precision)
            F.cross_entropy(found, self.labels).backward()  # type: ignore[no-untyped-call]
        named = state.network.named_parameters()
        return {name: weight.grad.double().cpu() for name, weight in named if weight.grad is not None}

    def turn(self, way: Way, steps: int) -> tuple[float, float]:
        """Seconds a step: by the clock, and of the processors."""
        state = self.prepared(way)
        began = time.perf_counter(), time.process_time()
        with float32_kernels(way.precision):
            for _ in range(steps):
                take_step(state, self.images[way.channels_last], self.labels)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        return (time.perf_counter() - began[0]) / steps, (time.process_time() - began[1]) / steps


def main() -> None:
    """Measures what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("--recipes", nargs="+", default=["alexnet", "cifar10-quick"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn-seconds", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, help="images a step; default: the recipe's")
    parser.add_argument("--ways", help="only those whose name begins so, such as 'bf16, channels last'")
    parser.add_argument("--no-compile", action="store_true", help="leave out what is compiled")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    precisions = PRECISIONS if device.type == "cuda" else ("fp32", "bf16")
    both = (True, False)
    ways = [
        Way(precision, last, compile)
        for compile in ((False,) if options.no_compile else (False, True))
        for precision in precisions
        for last in both
    ]
    default = Way("fp32", arithmetic(device).memory.channels_last, False)
    ways = [way for way in ways if way == default or str(way).startswith(options.ways or "")]
    figures: dict[str, float | str | int] = {"threads": torch.get_num_threads()}
    for recipe in options.recipes:
        contest = Contest(recipe, device, ways, options.batch_size)
        right = contest.gradients(default)
        apart = {}
        for way in ways:
            found = contest.gradients(way)
            apart[way] = max(float((found[name] - right[name]).norm() / right[name].norm()) for name in right)
        steps = {way: max(1, round(options.turn_seconds / contest.turn(way, 1)[0])) for way in ways}
        turns: dict[Way, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way in ways:
                turns[way].append(contest.turn(way, steps[way]))
        medians = {way: [statistics.median(column) for column in zip(*turns[way], strict=True)] for way in ways}
        for way in ways:
            label = f"{recipe}: {way}"
            figures[f"{label}, images/s"] = contest.recipe.batch_size / medians[way][0]
            figures[f"{label}, images a processor second"] = contest.recipe.batch_size / medians[way][1]
            figures[f"{label}, over the default"] = medians[default][0] / medians[way][0]
            figures[f"{label}, over the default, by processor time"] = medians[default][1] / medians[way][1]
            figures[f"{label}, gradients apart"] = apart[way]
    report(f"step-{device.type}", figures, options.save)


if __name__ == "__main__":
    main()
