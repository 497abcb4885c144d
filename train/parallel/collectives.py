"""Tensors between ranks: what each has for the others in one exchange, and sums over the ranks.

Everything travels in the order of the dimensions, N C H W, whatever it looks like in memory: ranks need not agree on that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from alexprep.train.distributed.world import World
from alexprep.train.parallel.traffic import Phase, ring_bytes


def gathered(
    world: World, own: torch.Tensor, dim: int, sizes: Sequence[int], label: tuple[str, Phase] | None = None
) -> torch.Tensor:
    """The ranks' tensors in one, joined along `dim`.

    Args:
        world: whose ranks all call this.
        own: this rank's part, `sizes[rank]` long in `dim` and of the same shape elsewhere.
        dim: dimension that is split.
        sizes: of every rank's part.
        label: what to count the bytes under.
    """
    shapes = [(*own.shape[:dim], size, *own.shape[dim + 1 :]) for size in sizes]
    return torch.cat(_swap(world, [own] * world.size, shapes, label), dim)


def scattered_sum(
    world: World, whole: torch.Tensor, dim: int, sizes: Sequence[int], label: tuple[str, Phase] | None = None
) -> torch.Tensor:
    """This rank's part, along `dim`, of the sum of the ranks' tensors, which are of one shape and dtype.

    Added up in order of the ranks; what travels as bfloat16 or float16 is added up in float32.
    """
    parts = [part.contiguous() for part in torch.split(whole, list(sizes), dim)]
    received = _swap(world, parts, [parts[world.rank].shape] * world.size, label)
    total = received[0] if whole.dtype.itemsize >= torch.float32.itemsize else received[0].float()
    for part in received[1:]:
        total = total + part
    return total.to(whole.dtype)


class Pending(NamedTuple):
    """A sum under way."""

    work: dist.Work
    sent: torch.Tensor  # contiguous, where the sum arrives
    tensor: torch.Tensor  # where it belongs

    def wait(self) -> None:
        """Until the sum is in its tensor; on a GPU, until what is queued from now on sees it there."""
        self.work.wait()
        if self.sent is not self.tensor:
            self.tensor.copy_(self.sent)


def start_sum(world: World, tensor: torch.Tensor, layer: str) -> Pending:
    """Begins to replace a tensor by its sum over the ranks."""
    sent = tensor.contiguous()
    if world.staged:
        sent = sent.cpu()
    world.traffic.add(layer, "gradients", ring_bytes(sent.nbytes, world.size))
    work = dist.all_reduce(sent, group=world.group, async_op=True)
    assert work is not None
    return Pending(work, sent, tensor)


def _swap(
    world: World, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], label: tuple[str, Phase] | None
) -> list[torch.Tensor]:
    """Sends `parts[r]` to rank r; returns what each rank sent here, of the shapes given, this rank's own part among them."""
    if world.size == 1:
        return list(parts)
    counts = [0 if r == world.rank else parts[r].numel() for r in range(world.size)]
    expected = [0 if r == world.rank else math.prod(shapes[r]) for r in range(world.size)]
    flat = [parts[r].reshape(-1) for r in range(world.size) if r != world.rank]
    outgoing = flat[0] if len(flat) == 1 else torch.cat(flat)
    if world.staged:
        outgoing = outgoing.cpu()
    incoming = outgoing.new_empty(sum(expected))
    dist.all_to_all_single(incoming, outgoing, expected, counts, group=world.group)
    if label is not None:
        world.traffic.add(*label, outgoing.nbytes)
    pieces = torch.split(incoming.to(parts[0].device), expected)
    return [parts[r] if r == world.rank else pieces[r].reshape(tuple(shapes[r])) for r in range(world.size)]
