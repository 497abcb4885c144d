"""What a training loop needs of several devices: a network, its batches, the sums of its gradients, its whole state."""

from __future__ import annotations

import functools
import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.data import Examples, LoadedBatch
from alexprep.train.distributed.tensor_parallel import Part, Pending, Rows, Scheme, gathered, part_of, start_sum
from alexprep.train.distributed.world import World
from alexprep.train.optimizer import MomentumSGD
from alexprep.train.spans import span

# -------------------- Weights and velocities: from the ranks' parts to one whole state that knows nothing of the scheme, and back, bit for bit.


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


# -------------------- What a training loop needs of several devices: a network, its batches, the sums of its gradients, its whole state.


class Parallel:
    """A network over the ranks of a world: every rank makes one, from the same whole network, and takes the same steps.

        for images, labels in parallel.batches(loader_of_this_rank):
            logits = parallel.network(images)             # of the whole batch, on every rank
            loss = F.cross_entropy(logits, labels)        # the same on every rank
            optimizer.zero_grad()
            loss.backward()
            parallel.sum_gradients()
            optimizer.step()

    Each rank's loss is that of the whole batch, so the update is that of one device whatever a rank's share of the images is, none
    included; and since every rank has all logits, counts of errors need no exchange.

    Attributes:
        network: this rank's part, on its device. Parameters are named as in the whole network, those of split layers hold some kernels.
        scheme: see `alexprep.train.distributed.tensor_parallel.part_of`.
        world: the ranks.
        shard: (rank, world_size) for this rank's `Loader`.
        requested: the signal by which a stop was asked of any rank before the present batch: the same on every rank.
    """

    def __init__(
        self,
        network: nn.Module,
        scheme: Scheme,
        world: World,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        share_batches: bool = False,
    ) -> None:
        """Splits a network.

        Args:
            network: the whole one with its weights, the same on every rank. Not to be used afterwards.
            scheme: "single", "ddp", "towers" or "hybrid".
            world: of this process.
            memory_format: of the part's weights.
            share_batches: with towers, each rank loads (and decodes) only its share of the images and gets the others' by exchange,
                instead of loading all.

        Raises:
            AlexprepError: the network cannot be split like this.
        """
        self._part = part_of(network, scheme, world)
        self.scheme, self.world = scheme, world
        self.network: nn.Module = self._part.network.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
        self._share = Rows(world.size) if share_batches and scheme == "towers" else None
        splits_rows = self._part.rows is not None or self._share is not None
        self.shard = (world.rank, world.size) if splits_rows else (0, 1)
        self.requested: signal.Signals | None = None
        self._pending: list[Pending] = []
        if world.group is not None:
            summed = dict(self.network.named_parameters())
            for name in self._part.summed:
                if not summed[name].requires_grad:
                    continue
                hook = functools.partial(self._start_sum, name.rpartition(".")[0])
                summed[name].register_post_accumulate_grad_hook(hook)

    def batches(
        self, batches: Iterable[LoadedBatch], stop: Callable[[], signal.Signals | None] | None = None
    ) -> Iterator[Examples]:
        """This rank's batches, made ready for `network`: all ranks take them in step.

        Args:
            batches: of a loader with `shard`; as many on every rank. Images (n, C, H, W) or (n, views, C, H, W), labels int64 (n,).
            stop: tells whether this rank was asked to stop; what any rank says is in `requested` on all.

        Yields:
            The images that this rank computes on, and the labels of the whole batch, int64 (N,).

        Raises:
            AlexprepError: the ranks' first batches have different labels where they must be the same.
        """
        same_rows = self._part.rows is None and self._share is None
        first = same_rows and self.world.size > 1
        for batch in batches:
            images, labels = batch.images, batch.labels
            asked = stop() if stop is not None else None
            heard = self.world.exchange([len(labels), asked or 0, _fingerprint(labels) if first else 0])
            requests = [number for _, number, _ in heard if number]
            self.requested = signal.Signals(requests[0]) if requests else None
            if first and len({(count, print_) for count, _, print_ in heard}) > 1:
                raise AlexprepError(
                    "the ranks were given different batches: with towers, every rank's loader takes `shard`"
                )
            first = False
            if not same_rows:
                counts = [count for count, _, _ in heard]
                with span("exchange"):
                    labels = gathered(self.world, labels, 0, counts, ("labels", "forward"))
                    if self._share is not None:
                        images = gathered(self.world, images, 0, counts, ("images", "forward"))
                if self._share is None:
                    views = images.shape[1] if images.ndim == 5 else 1
                    assert self._part.rows is not None
                    self._part.rows.sizes = [count * views for count in counts]
            yield Examples(images, labels)

    def sum_gradients(self) -> None:
        """Between `backward`, of which there is one a step, and the optimizer's step: waits for the sums that `backward` began.

        They travel while the layers below are still computed.
        """
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def gather_state(self) -> dict[str, torch.Tensor]:
        """The whole network's `state_dict`, on the CPU of every rank, with no trace of the scheme. All ranks call it."""
        return gather_state(self._part, self.world)

    def scatter_state(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Copies a whole `state_dict`, of any scheme, into this rank's part."""
        scatter_state(self._part, self.world, whole)

    def gather_velocities(self, optimizer: MomentumSGD) -> list[torch.Tensor]:
        """The whole network's velocities in the order of `optimizer`, which has this rank's. All ranks call it."""
        return gather_velocities(self._part, self.world, optimizer)

    def scatter_velocities(self, optimizer: MomentumSGD, whole: Sequence[torch.Tensor]) -> None:
        """Copies the whole network's velocities, of any scheme, into this rank's optimizer."""
        scatter_velocities(self._part, self.world, optimizer, whole)

    def _start_sum(self, layer: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._pending.append(start_sum(self.world, parameter.grad, layer))


def _fingerprint(labels: torch.Tensor) -> int:
    """Equal for equal labels."""
    return int.from_bytes(hashlib.sha256(labels.cpu().numpy().tobytes()).digest()[:7], "big")
