"""All that a training is between two steps, and its way into a checkpoint and back, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.checkpoint import Checkpoint
from alexprep.train.data import memory_format
from alexprep.train.init_from import PREFIX, saved_weights
from alexprep.train.optim import MomentumSGD, parameter_groups
from alexprep.train.parallel.schemes import Parallel
from alexprep.train.parallel.split import Scheme
from alexprep.train.parallel.world import World
from alexprep.train.recipes import Recipe
from alexprep.train.schedule import ScheduleState, unmatched_patterns
from alexprep.train.sums import Sums


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
    ) -> None:
        """The state before the first step.

        Args:
            recipe: makes the network and its parameter groups.
            classes: outputs of the network.
            seed: of the initial weights and of dropout. torch's default generators are seeded with it.
            device: where it all lives.
            world: the ranks that share the training; None for this process alone.
            scheme: how they share it, see `alexprep.train.parallel.split.part_of`.

        Raises:
            AlexprepError: the recipe's schedule or decays name a layer that its network does not have, or the network cannot be
                shared so.
        """
        torch.manual_seed(seed)
        network = recipe.make_network(classes, seed)
        self.parallel = Parallel(network, scheme, world or World.alone(device), memory_format=memory_format(device))
        groups = parameter_groups(
            self.network,
            decay=recipe.decay,
            layer_decay=recipe.layer_decay,
            bias_lr_factor=recipe.bias_lr_factor,
            bias_decay=recipe.bias_decay,
        )
        self._parameters = [name for name, _ in self.network.named_parameters()]
        if unmatched := unmatched_patterns(recipe.schedule, self._parameters):
            raise AlexprepError(f"the schedule names {', '.join(unmatched)}, which the network does not have")
        self.optimizer = MomentumSGD(groups, lr=recipe.lr, momentum=recipe.momentum, decay=recipe.decay)
        self._rates_of: tuple[int, ScheduleState] | None = None  # the epoch that the optimizer last had the rates of
        # The rates follow from the position alone, so nobody has to remember to set them.
        self.optimizer.register_step_pre_hook(lambda *_: self.set_rates(recipe))
        self.sums = Sums(device)
        self.position = Position()
        self.device = device

    @property
    def network(self) -> nn.Module:
        """This rank's part of the network; alone, the whole."""
        return self.parallel.network

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
            AlexprepError: a weight is NaN or infinite.
        """
        weights = self.parallel.gather_state()
        spoilt = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
        if spoilt:
            raise AlexprepError(
                f"after step {self.position.step} {', '.join(spoilt)} hold NaN or infinity, so nothing is saved: "
                "continue from the last checkpoint with --resume, or train again with a lower --lr"
            )
        random = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return (
            {f"{PREFIX}{name}": weight for name, weight in weights.items()}
            | {
                f"velocity.{number:03d}": velocity
                for number, velocity in enumerate(self.parallel.gather_velocities(self.optimizer))
            }
            | random
            | {"sums": self.sums.totals}
        )

    def facts(self) -> dict[str, Any]:
        """Everything for a checkpoint that is a JSON value."""
        return asdict(self.position)

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
        position = checkpoint.facts["position"]
        self.position = Position(**{**position, "schedule": ScheduleState(**position["schedule"])})


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
        array: np.ndarray[Any, Any] = weight.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
