"""Weights and velocities: from the ranks' parts to one whole state that knows nothing of the scheme, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from alexprep.train.distributed.tensor_parallel import Part
from alexprep.train.distributed.world import World
from alexprep.train.optimizer import MomentumSGD
from alexprep.train.parallel.collectives import gathered


def gather_state(part: Part, world: World) -> dict[str, torch.Tensor]:
    """The whole network's `state_dict`, on the CPU of every rank. All ranks call it."""
    return {name: _gather(name, tensor, part, world) for name, tensor in part.network.state_dict().items()}


def scatter_state(part: Part, world: World, state: Mapping[str, torch.Tensor]) -> None:
    """Copies a whole `state_dict` into the rank's part.

    Raises:
        KeyError: a tensor of the network is not in the state.
    """
    for name, tensor in part.network.state_dict().items():
        tensor.copy_(_own(name, state[name], part, world))


def gather_velocities(part: Part, world: World, optimizer: MomentumSGD) -> list[torch.Tensor]:
    """`optimizer.velocities()` as the whole network's would be, in the same order, on the CPU of every rank. All ranks call it."""
    named = zip(_names(part, optimizer), optimizer.velocities(), strict=True)
    return [_gather(name, velocity, part, world) for name, velocity in named]


def scatter_velocities(part: Part, world: World, optimizer: MomentumSGD, velocities: Sequence[torch.Tensor]) -> None:
    """Copies the whole network's velocities into the optimizer of the rank's part."""
    for name, own, whole in zip(_names(part, optimizer), optimizer.velocities(), velocities, strict=True):
        own.copy_(_own(name, whole, part, world))


def _names(part: Part, optimizer: MomentumSGD) -> list[str]:
    """The parameters' names in the order of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in part.network.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _gather(name: str, tensor: torch.Tensor, part: Part, world: World) -> torch.Tensor:
    if name in part.split:
        tensor = gathered(world, tensor.detach(), 0, part.split[name])
    return tensor.detach().cpu().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()


def _own(name: str, whole: torch.Tensor, part: Part, world: World) -> torch.Tensor:
    if name not in part.split:
        return whole
    sizes = part.split[name]
    return whole.narrow(0, sum(sizes[: world.rank]), sizes[world.rank])
