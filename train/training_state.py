"""All that a training is between two steps, and its way into a checkpoint and back, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from alexprep.train.checkpoint import Checkpoint
from alexprep.train.compiled import Compiled
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import Scheme
from alexprep.train.distributed.world import World
from alexprep.train.evaluation.sums import Sums
from alexprep.train.lr_schedule import ScheduleState
from alexprep.train.nonfinite import NotFinite
from alexprep.train.optimizer import optimizer_of
from alexprep.train.own.tryout import fitting_format
from alexprep.train.precision import Arithmetic, arithmetic, logits
from alexprep.train.recipes.recipe import Recipe
from alexprep.train.saved.init_from import PREFIX, saved_weights
from alexprep.train.update import Update


@dataclass
class Position:
    """Where a training stands. Values of JSON only; `schedule` holds the rate."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # whole epochs done, with their evaluation
    epoch_step: int = 0  # steps done in this epoch; equal to the epoch's length when only its evaluation is missing
    epoch_seconds: float = 0.0  # spent in this epoch so far
    schedule: ScheduleState = field(default_factory=ScheduleState)
    val: dict[str, Any] | None = None  # the last epoch's evaluation


class TrainingState:
    """Network, velocity, random numbers, sums and position."""

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
        """The state before the first step.

        Args:
            recipe: makes the network and its parameter groups.
            classes: outputs of the network.
            seed: of the initial weights and of dropout. torch's default generators are seeded with it.
            device: where it all lives.
            world: the ranks that share the training; None for this process alone.
            scheme: how they share it, see `alexprep.train.distributed.tensor_parallel.part_of`.
            computing: precision, memory, and whether steps on whole batches are compiled; by default float32 as suits the device.

        Raises:
            AlexprepError: the recipe's schedule or decays name a layer that its network does not have, or the network cannot be
                shared so.
        """
        torch.manual_seed(seed)
        network = recipe.make_network(classes, seed)
        computing = computing or arithmetic(device)
        form = fitting_format(network, computing.memory.format)
        # A mask of -inf is as it should be. Weights that begin so are not: training would spoil all others.
        self._never_finite = {
            name for name, buffer in network.named_buffers(remove_duplicate=False) if not _finite(buffer)
        }
        self.parallel = Parallel(network, scheme, world or World.alone(device), memory_format=form)
        self._parameters = [name for name, _ in self.network.named_parameters()]
        self.optimizer = optimizer_of(recipe, self.network)
        self._rates_of: tuple[int, ScheduleState] | None = None  # the epoch that the optimizer last had the rates of
        # The rates follow from the position alone, so nobody has to remember to set them.
        self.optimizer.register_step_pre_hook(lambda *_: self.set_rates(recipe))
        self.precision = computing.precision
        self.update = Update(self.parallel, self.optimizer, self.precision)
        self.compiled = Compiled(self.network) if computing.compile else None
        self._whole_batch = recipe.batch_size
        self.sums = Sums(device)
        self.position = Position()
        self.device = device

    @property
    def network(self) -> nn.Module:
        """This rank's part of the network; alone, the whole."""
        return self.parallel.network

    def logits(self, images: torch.Tensor, batch: int) -> torch.Tensor:
        """What the network gives, computed in the training's precision.

        Args:
            images: this rank's, float32 (n, C, H, W).
            batch: size of the whole batch. An epoch's last one, where it is smaller, is not compiled: on no rank, whatever its share.

        Returns:
            Float32 (batch, classes).
        """
        return logits(self.called_for(batch), images, self.precision)

    def called_for(self, batch: int) -> Compiled | nn.Module:
        """What computes a batch of this size: the compiled network, if there is one, for whole batches."""
        return self.network if self.compiled is None or batch != self._whole_batch else self.compiled

    def learning_rate(self, recipe: Recipe) -> float:
        """The rate of this epoch: that of the weights whose layer has none of its own."""
        return recipe.schedule.rate(recipe.lr, ".weight", self.position.epoch, self.position.schedule)

    def set_rates(self, recipe: Recipe) -> None:
        """Gives the optimizer this epoch's rate of every parameter. It happens by itself before every step."""
        epoch = (self.position.epoch, self.position.schedule)
        if self._rates_of != epoch:
            self._rates = recipe.rates(self._parameters, *epoch)
            self._rates_of = epoch
        self.optimizer.set_rates(self._rates)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything for a checkpoint that is a tensor, by name, with no trace of the scheme. All ranks call it.

        Raises:
            NotFinite: a weight, a velocity or the summed loss is NaN or infinite; or a buffer, unless it was so from the beginning.
        """
        weights = self.parallel.gather_state()
        found = {
            f"velocity.{number:03d}": velocity
            for number, velocity in enumerate(self.parallel.gather_velocities(self.optimizer))
        }
        found["sums"] = self.sums.totals
        if self.spoilt(weights) or not all(map(_finite, found.values())):
            raise NotFinite(f"after step {self.position.step} there is NaN or infinity in what would be saved")
        found |= {f"{PREFIX}{name}": weight for name, weight in weights.items()}
        found["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            found["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def spoilt(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """The names of those in the whole network's `state_dict` that are NaN or infinite, and must not be."""
        return [name for name, tensor in weights.items() if name not in self._never_finite and not _finite(tensor)]

    def facts(self) -> dict[str, Any]:
        """Everything for a checkpoint that is a JSON value."""
        return {"position": asdict(self.position), "update": self.update.state_dict()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Becomes what `tensors` and `facts` were taken from. The recipe and the classes must be the same; the caller checks."""
        tensors = checkpoint.tensors
        self.parallel.scatter_state(saved_weights(checkpoint))
        count = len(self.optimizer.velocities())
        self.parallel.scatter_velocities(self.optimizer, [tensors[f"velocity.{number:03d}"] for number in range(count)])
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.sums.totals.copy_(tensors["sums"])
        if "update" in checkpoint.facts:  # older ones have none: they are of fp32
            self.update.load_state_dict(checkpoint.facts["update"])
        position = checkpoint.facts["position"]
        self.position = Position(**{**position, "schedule": ScheduleState(**position["schedule"])})


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def load_weights(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies a checkpoint's weights into a network of the same recipe."""
    network.load_state_dict(saved_weights(checkpoint))


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """The sha256, in hex, of all weights' names, shapes and bits: equal for networks that are equal to the last bit.

    >>> weights_digest(nn.Linear(2, 1).state_dict()) == weights_digest(nn.Linear(2, 1).state_dict())
    False
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}".encode())
        values = weight.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes())  # as bytes, since numpy knows no bfloat16
    return digest.hexdigest()
