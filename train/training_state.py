"""What a training is between two steps, its way into a checkpoint and back, bit for bit, and one step.

This is where to change what a checkpoint holds (`TrainingState.tensors`, `facts` and `restore`). A step is forward, loss, backward, sums
of gradients over the ranks, and update, on the network as written or compiled by torch. The loop over the steps is in
`alexprep.train.trainer`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.checkpoint import (
    AVERAGE,
    POSITION,
    RANDOM_CPU,
    RANDOM_CUDA,
    TOTALS,
    UPDATE,
    VELOCITY,
    VELOCITY_RATES,
    WEIGHT,
    Checkpoint,
    saved_weights,
)
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import Gather, Scheme, SharedDraws, SharedDropout
from alexprep.train.distributed.world import World
from alexprep.train.losses import image_losses, mixed_loss
from alexprep.train.lr_schedule import ScheduleState, is_per_step, rate_at
from alexprep.train.metrics import RunningTotals
from alexprep.train.optimizer import SLOT, MomentumSGD, Rule, shorten_kernels
from alexprep.train.precision import HALF, Arithmetic, NotFinite, Precision, arithmetic, logits
from alexprep.train.recipes import Recipe
from alexprep.train.signals_and_memory import span
from alexprep.train.user_code import memory_format_of

# Length of the difference over length, in one layer. Rounding alone makes 0.004 of it in AlexNet's float32, and in bf16 0.4.
MOST_APART, MOST_APART_IN_HALF = 0.1, 0.8
LEAST_SCALE = 1.0  # of the loss, in fp16: gradients that overflow without any scaling are no matter of scaling


@dataclass
class Position:
    """Where a training stands: JSON values, and the state of its schedule, from which the rates follow."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # whole epochs done, with their evaluation
    epoch_step: int = 0  # steps done in this epoch; equal to the epoch's length when only its evaluation is missing
    epoch_seconds: float = 0.0  # spent in this epoch so far
    schedule: ScheduleState = field(default_factory=ScheduleState)
    val: dict[str, Any] | None = None  # the last epoch's evaluation
    best: dict[str, Any] | None = None  # the best evaluation so far, and the step and epoch (from 1) after which it was

    def loader_state(self, epoch_steps: int) -> dict[str, int]:
        """Epoch and step at which a loader goes on; after the last of an epoch's steps that is the next epoch's beginning."""
        if self.epoch_step < epoch_steps:
            return {"epoch": self.epoch, "step": self.epoch_step}
        return {"epoch": self.epoch + 1, "step": 0}

    def note_best(self, val: Mapping[str, Any]) -> None:
        """Notes the evaluation that ends the present epoch where its top-1 error is the lowest so far, or as low at a lower loss."""
        if self.best is None or (val["top1_error"], val["loss"]) < (self.best["top1_error"], self.best["loss"]):
            self.best = {"step": self.step, "epoch": self.epoch + 1, **val}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Position:
        """The position that a checkpoint holds as JSON values, if this version knows all of it: else it would go on without."""
        schedule = saved["schedule"]
        for document, kind in ((saved, cls), (schedule, ScheduleState)):
            if unknown := sorted(document.keys() - {known.name for known in fields(kind)}):
                raise AlexprepError(
                    f"the checkpoint's position has {', '.join(unknown)}, which this alexprep does not know: use the alexprep that wrote it"
                )
        return cls(**{**saved, "schedule": ScheduleState(**schedule)})


class TrainingState:
    """A training between two steps: network, velocities, random numbers, sums of the epoch so far, and position."""

    def __init__(
        self,
        recipe: Recipe,
        classes: int,
        seed: int,
        device: torch.device,
        world: World | None = None,
        scheme: Scheme = "single",
        computing: Arithmetic | None = None,
    ) -> None:
        """The state before the first step. torch's default generators are seeded."""
        torch.manual_seed(seed)
        self.recipe = recipe = recipe.planned()
        network = recipe.make_network(classes, seed)
        computing = computing or arithmetic(device)
        form = memory_format_of(network, computing.memory.format)
        # A mask of -inf is as it should be. Weights that begin so are not: training would spoil all others.
        self._never_finite = {
            name for name, buffer in network.named_buffers(remove_duplicate=False) if not _finite(buffer)
        }
        self.parallel = Parallel(network, scheme, world or World.alone(device), memory_format=form)
        self.network = self.parallel.network  # this rank's part; alone, the whole
        self._parameters = [name for name, _ in self.network.named_parameters()]
        self.optimizer = recipe.make_optimizer(self.network)
        # Epochs done, and the schedule's state, that the optimizer's rates are of.
        self._rated: tuple[float, ScheduleState] | None = None
        # The rates follow from the position alone, so nobody has to remember to set them.
        self.optimizer.register_step_pre_hook(lambda *_: self.set_rates())
        self.precision = computing.precision
        self.update = Update(self.parallel, self.optimizer, self.precision, recipe.clip)
        self.average: dict[str, torch.Tensor] = {}  # of this rank's weights and buffers, where the recipe wants it
        self.begin_average()
        self.compiled = Compiled(self.network) if computing.compile else None
        self.sums = RunningTotals(device)
        self.position = Position()
        self.epoch_steps = 0  # of the loader, once it is known: schedules that move within an epoch need it
        self.device = device

    def called_for(self, batch: int) -> Compiled | nn.Module:
        """What computes a batch of this size, of all ranks together: the compiled network, if there is one.

        An epoch's last batch, where it is smaller, is not compiled: on no rank, whatever its share.
        """
        whole = self.recipe.batch_size // self.recipe.accumulate
        return self.network if self.compiled is None or batch != whole else self.compiled

    def loss(
        self,
        output: torch.Tensor,
        labels: torch.Tensor,
        partner_labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean loss (), of logits (N, classes) and labels (N,), by default in nats the negative of the paper's objective, section 3.5.

        Where pairs are mixed it is `mixed_loss`; other losses than the softmax's are in `alexprep.train.losses`.
        """
        smoothing, kind = self.recipe.label_smoothing, self.recipe.loss
        if partner_labels is not None and weights is not None:
            return mixed_loss(output, labels, partner_labels, weights, smoothing, kind)
        if kind != "softmax":
            return image_losses(kind, output, labels, smoothing).mean()
        loss = F.cross_entropy(output, labels, label_smoothing=smoothing)
        return loss

    @torch.no_grad()
    def begin_average(self) -> None:
        """The mean of the weights is what they are now."""
        if self.recipe.average:
            floating = {name: each for name, each in self.network.state_dict().items() if each.is_floating_point()}
            self.average = {name: each.detach().clone() for name, each in floating.items()}

    @torch.no_grad()
    def move_average(self) -> None:
        """Moves the mean of the weights towards what they are now; in a training's beginning faster, so that it forgets the first ones."""
        if self.average:
            steps = self.position.step + 1
            decay = min(self.recipe.average, (1 + steps) / (10 + steps))
            weights = self.network.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [weights[name] for name in self.average], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block, the network has the mean of its weights, where one is kept."""
        weights = {name: each for name, each in self.network.state_dict().items() if name in self.average}
        kept = {name: each.clone() for name, each in weights.items()}
        try:
            for name, each in weights.items():
                each.copy_(self.average[name])
            yield
        finally:
            for name, each in weights.items():
                each.copy_(kept[name])

    def learning_rate(self) -> float:
        """The rate of the epoch's step that was last taken, else of its first: that of the weights whose layer has none of its own."""
        progress = self._progress(max(0, self.position.epoch_step - 1))
        return rate_at(self.recipe.schedule, self.recipe.lr, ".weight", progress, self.position.schedule)

    def set_rates(self) -> None:
        """Gives the optimizer the coming step's rate of every parameter. It happens by itself before every step."""
        # With single images a step takes two milliseconds, a tenth of one the rates of some layers, which mostly are as before.
        place = self._progress(self.position.epoch_step), self.position.schedule
        if place != self._rated:
            self.optimizer.set_rates(self.recipe.rates(self._parameters, *place))
            self._rated = place

    def _progress(self, epoch_step: int) -> float:
        """Epochs done after so many steps of this one, as a schedule counts them."""
        if not is_per_step(self.recipe.schedule):
            return self.position.epoch
        if not self.epoch_steps:
            raise RuntimeError("the schedule moves with every step: set `epoch_steps`")
        return self.position.epoch + epoch_step / self.epoch_steps

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything for a checkpoint that is a tensor, by name, with no trace of the scheme. All ranks call it.

        Raises:
            NotFinite: a weight, a velocity or the summed loss is NaN or infinite; or a buffer, unless it was so from the beginning.
        """
        weights = self.parallel.gather_state()
        found = self.parallel.gather_slots(self.optimizer)
        found[TOTALS] = self.sums.totals
        if self.not_finite(weights) or not all(map(_finite, found.values())):
            raise NotFinite(f"after step {self.position.step} there is NaN or infinity in what would be saved")
        found |= {f"{WEIGHT}{name}": weight for name, weight in weights.items()}
        found |= {f"{AVERAGE}{name}": mean for name, mean in self.parallel.gather(self.average).items()}
        found[RANDOM_CPU] = torch.get_rng_state()
        if self.device.type == "cuda":
            found[RANDOM_CUDA] = torch.cuda.get_rng_state(self.device)
        return found

    def not_finite(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """The names of those in the whole network's `state_dict` that are NaN or infinite, and must not be."""
        return [name for name, tensor in weights.items() if name not in self._never_finite and not _finite(tensor)]

    def facts(self) -> dict[str, Any]:
        """Everything for a checkpoint that is a JSON value."""
        found: dict[str, Any] = {POSITION: asdict(self.position), UPDATE: self.update.state_dict()}
        if isinstance(self.optimizer, MomentumSGD) and self.optimizer.momentum_correction:
            found[VELOCITY_RATES] = self.optimizer.velocity_rates()
        return found

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes to where `tensors` and `facts` were taken from. The recipe and the classes must be the same; the caller checks."""
        tensors = checkpoint.tensors
        self.parallel.scatter_state(saved_weights(checkpoint))
        slots = {name: tensor for name, tensor in tensors.items() if name.startswith((VELOCITY, SLOT))}
        self.parallel.scatter_slots(self.optimizer, slots)
        with torch.no_grad():
            for name, mean in self.average.items():
                mean.copy_(self.parallel.own_part(name, tensors[f"{AVERAGE}{name}"]))
        if isinstance(self.optimizer, MomentumSGD) and self.optimizer.momentum_correction:
            self.optimizer.set_velocity_rates(checkpoint.facts[VELOCITY_RATES])
        torch.set_rng_state(tensors[RANDOM_CPU])
        if self.device.type == "cuda" and RANDOM_CUDA in tensors:
            torch.cuda.set_rng_state(tensors[RANDOM_CUDA], self.device)
        self.sums.totals.copy_(tensors[TOTALS])
        if UPDATE in checkpoint.facts:  # older ones have none: they are of fp32
            self.update.load_state_dict(checkpoint.facts[UPDATE])
        self.position = Position.of(checkpoint.facts[POSITION])


def take_step(
    state: TrainingState,
    images: torch.Tensor,
    labels: torch.Tensor,
    partner_labels: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Changes weights, velocities and random numbers; the position is the caller's to move. All ranks call it.

    Images are this rank's, float32 (n, C, H, W), labels those of the whole batch, int64 (N,); where its pairs are mixed, each image has
    its partner's label too, and the weight of its own, float32 (N,). Gives the mean loss (), nats, and the logits (N, classes), both of
    the whole batch, from before the update.
    """
    compile_first(state, images, labels)
    parts = state.recipe.accumulate
    losses, outputs = [], []
    with compiler_errors(state.device):
        state.optimizer.zero_grad()
        for some, theirs, partners, shares in _parts(state.recipe.accumulate, images, labels, partner_labels, weights):
            with span("forward"):
                output = logits(state.called_for(len(theirs)), some, state.precision)
                loss = state.loss(output, theirs, partners, shares)
            if parts > 1:
                loss, output = loss * (len(theirs) / len(labels)), output.detach()
            state.update.backward(loss)
            losses.append(loss)
            outputs.append(output)
        state.update.step()
    if state.recipe.max_norm is not None:
        shorten_kernels(state.network, state.recipe.max_norm)
    state.move_average()
    if parts > 1:
        return torch.stack(losses).detach().sum(), torch.cat(outputs)
    return loss, output


def _parts(count: int, *batch: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """A batch cut into parts of equal length, but for the last; what it does not have is None in each."""
    if count == 1:
        yield batch
        return
    cut = [each.chunk(count) if each is not None else itertools.repeat(None) for each in batch]
    yield from zip(*cut, strict=False)


def compile_first(state: TrainingState, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Compiles the network and checks it, minutes of work, where a batch such as this is the first one that needs it compiled.

    Weights, buffers and random numbers stay as they are, also where it is left in the middle. All ranks call it.
    """
    if (network := to_compile(state, images, labels)) is not None:
        parts = state.recipe.accumulate
        with compiler_errors(state.device):
            check_compiled(state, network, images.chunk(parts)[0], labels.chunk(parts)[0])
        network.checked.add(images.shape[-2:])


def to_compile(state: TrainingState, images: torch.Tensor, labels: torch.Tensor) -> Compiled | None:
    """What `compile_first` would compile for a batch of these images and labels, if anything."""
    network = state.called_for(len(labels.chunk(state.recipe.accumulate)[0]))
    return network if isinstance(network, Compiled) and images.shape[-2:] not in network.checked else None


class Update:
    """Moves the weights of one network with one optimizer; all ranks call it together.

    In fp16 the loss is multiplied before gradients are computed, so that small ones do not vanish, and the gradients are divided after
    their sum over the ranks: `torch.amp.GradScaler`. Where one is infinite or NaN on any rank, no rank moves a weight, and the factor is
    halved on all.
    """

    def __init__(self, parallel: Parallel, optimizer: Rule, precision: Precision, clip: float | None = None) -> None:
        """For the network of `parallel`, whose gradient is made no longer than `clip`."""
        self._parallel, self._optimizer, self._clip = parallel, optimizer, clip
        self._scaler = torch.amp.GradScaler(parallel.world.device.type, enabled=precision == "fp16")
        self.skipped = 0  # steps of the whole run that moved nothing because a gradient overflowed

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by at present; 1 in every precision but fp16. On a GPU this waits for the queue."""
        return float(self._scaler.get_scale())

    def __call__(self, loss: torch.Tensor) -> None:
        """Moves the weights once, down the gradient of a mean loss, float32 (), of the whole batch."""
        self._optimizer.zero_grad()
        self.backward(loss)
        self.step()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients that of a loss: a batch's mean, or a part's share of it."""
        with span("backward"):
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Moves the weights once, by the gradients of all ranks."""
        with span("gradient sums"):
            self._parallel.sum_gradients()
        with span("update"):
            if self._scaler.is_enabled():
                self._step_scaled()
            else:
                self._shorten()
                self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """JSON values: {"skipped", "scaler"}; the latter is empty in every precision but fp16."""
        return {"skipped": self.skipped, "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave in the same precision."""
        self.skipped = state["skipped"]
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    @torch.no_grad()
    def _shorten(self) -> None:
        """Makes the gradient no longer than it may be: as `torch.nn.utils.clip_grad_norm_` does, over the parts of all ranks."""
        if self._clip is not None:
            factor = (self._clip / (self._parallel.gradient_norm() + 1e-6)).clamp(max=1.0)
            for weight in self._parallel.network.parameters():
                if weight.grad is not None:
                    weight.grad.mul_(factor.to(weight.grad.dtype))

    def _step_scaled(self) -> None:
        """The optimizer's step, if every gradient of every rank is finite."""
        world = self._parallel.world
        if world.size > 1:
            gradients = [w.grad for w in self._parallel.network.parameters() if w.grad is not None]
            if world.any(not torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
                gradients[0].fill_(math.inf)  # so that this rank's scaler finds it too
        before = self.loss_scale
        if self._clip is not None:
            self._scaler.unscale_(self._optimizer)  # type: ignore[arg-type]
        self._shorten()
        self._scaler.step(self._optimizer)  # type: ignore[arg-type]
        self._scaler.update()
        if self.loss_scale < before:
            self.skipped += 1
            if self.loss_scale < LEAST_SCALE:
                raise AlexprepError(
                    f"gradients overflow in fp16 with the loss multiplied by only {before:g}: nothing was saved since the last "
                    "checkpoint; train with --precision bf16, or with a lower --lr"
                )


class Compiled:
    """A network compiled by torch.compile, for batches of one size, of images of one size or a few.

    Random numbers are drawn as without compilation; results differ by rounding. The network's modules and the names of its weights stay
    as they are. What ranks exchange in the middle of it is left out of the compilation, which makes several pieces of the rest.

    It is for whole batches: another size would take a minute to compile. All ranks must use it for the same ones, for gradients come in
    another order than without, and ranks add them up as they come.
    """

    def __init__(self, network: nn.Module) -> None:
        """Nothing is compiled before the first call; `network` is in training mode then."""
        # Heights and widths of images with which it was held against the network as written.
        self.checked: set[torch.Size] = set()
        _leave_exchanges_out()
        for layer in network.modules():
            # Without padding this says the same; but with the default, torch 2.13 compiles a wrong gradient for windows that hang over the
            # edge (pytorch issue 198119).
            if isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d)) and layer.padding in (0, (0,), (0, 0)):
                layer.count_include_pad = False
        self._whole: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            network, dynamic=False, options={"fallback_random": True}
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> logits."""
        return self._whole(images)


def check_compiled(
    state: TrainingState,
    compiled: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    """Refuses a compiled network whose gradients differ from those of the network as written by more than rounding.

    Both are computed of a whole batch. Weights, buffers and random numbers stay as they are; all ranks call it.
    """
    right = _gradients(state, state.network, images, labels)
    with warnings.catch_warnings():
        # torch's advice to allow tf32, which is --precision tf32; where warnings are errors, the compiler's.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        found = _gradients(state, compiled, images, labels)
    state.optimizer.zero_grad()
    last = images.is_contiguous(memory_format=torch.channels_last)
    most = MOST_APART_IN_HALF if state.precision in HALF else MOST_APART
    for name, gradient in right.items():
        other = found.get(name, torch.zeros_like(gradient))
        apart, length = float((other - gradient).norm()), float(gradient.norm())
        if not apart <= most * length:
            raise AlexprepError(
                f"--compile: torch {torch.__version__} compiles a wrong gradient of {name}: it differs from that of the network as "
                f"written by {apart / length if length else apart:.2g} times its length. Nothing was trained with it: go on with "
                f"--resume --no-compile{'' if last else ', or with --channels-last'}"
            )


@contextlib.contextmanager
def compiler_errors(device: torch.device) -> Iterator[None]:
    """Inside the block, which calls a compiled network and computes its gradient, an error of the compiler becomes a sentence."""
    try:
        yield
    except Exception as error:
        dynamo = sys.modules.get("torch._dynamo.exc")  # a second to import; whoever compiles has it
        if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
            raise
        needed = "a C++ compiler (g++)" if device.type == "cpu" else "triton and a C compiler (gcc)"
        raise AlexprepError(
            f"--compile: {str(error).strip().splitlines()[0]}. It needs {needed} and Python's headers: install what is "
            "missing, or go on with --resume --no-compile"
        ) from None


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """The sha256, in hex, of all weights' names, shapes and bits: equal for networks that are equal to the last bit."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}".encode())
        values = weight.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())  # as bytes, since numpy knows no bfloat16
    return digest.hexdigest()


def _gradients(
    state: TrainingState,
    network: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Of the mean loss, by parameter, in float32, times the factor that fp16 needs."""
    state.optimizer.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in state.network.named_buffers()}
    try:
        with torch.random.fork_rng([state.device] if state.device.type == "cuda" else []):
            loss = state.loss(logits(network, images, state.precision), labels)
            (loss * state.update.loss_scale).backward()  # type: ignore[no-untyped-call]
            state.parallel.sum_gradients()
    finally:
        with torch.no_grad():
            for name, buffer in state.network.named_buffers():
                buffer.copy_(buffers[name])
    named = state.network.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


@functools.cache
def _leave_exchanges_out() -> None:
    """Tells the compiler, once, to call what ranks exchange as it is written."""
    for exchange in (Gather, SharedDropout):
        exchange.forward = torch.compiler.disable(exchange.forward)  # type: ignore[method-assign, no-untyped-call]
    SharedDraws.__call__ = torch.compiler.disable(SharedDraws.__call__)  # type: ignore[method-assign, no-untyped-call]


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
