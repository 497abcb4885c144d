"""What a training loop needs of several devices: the network, its batches, the sums of its gradients, its whole state.

How a network is split is in `tensor_parallel`, what a rank is in `world`.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import nn

from alexprep.shards.errors import AlexprepError
from alexprep.train.data import Examples, LoadedBatch, MixedExamples, examples
from alexprep.train.distributed.tensor_parallel import Scheme, gathered, part_of, start_sum
from alexprep.train.distributed.world import World
from alexprep.train.optimizer import Rule
from alexprep.train.signals_and_memory import span


class Parallel:
    """A network shared by the ranks of a world: every rank makes one, from the same whole network, and takes the same steps.

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
    ) -> None:
        """Splits a network.

        Args:
            network: the whole one with its weights, the same on every rank. Not to be used afterwards.
            scheme: see `part_of` in `tensor_parallel`.
            world: of this process.
            memory_format: of the part's weights.

        Raises:
            AlexprepError: the network cannot be split like this.
        """
        self._part = part_of(network, scheme, world)
        self.scheme, self.world = scheme, world
        self.network: nn.Module = self._part.network.to(device=world.device, memory_format=memory_format)  # type: ignore[call-overload]
        self.shard = (0, 1) if self._part.rows is None else (world.rank, world.size)
        self.requested: signal.Signals | None = None
        self._pending: list[Callable[[], None]] = []
        if world.group is not None:
            parameters = dict(self.network.named_parameters())
            for name in self._part.summed:
                if parameters[name].requires_grad:
                    parameters[name].register_post_accumulate_grad_hook(self._start_sum)

    def batches(
        self, batches: Iterable[LoadedBatch], stop: Callable[[], signal.Signals | None] | None = None
    ) -> Iterator[Examples]:
        """This rank's batches, made ready for `network`: all ranks take them in step.

        Args:
            batches: of a loader with `shard`; as many on every rank. Images (n, C, H, W) or (n, views, C, H, W), labels int64 (n,).
            stop: tells whether this rank was asked to stop; what any rank says is in `requested` on all.

        Yields:
            The images that this rank computes on, and the labels of the whole batch, int64 (N,); where pairs are mixed, `MixedExamples`, with
            the partners' labels and the weights of the whole batch.

        Raises:
            AlexprepError: the ranks' first batches have different labels where they must be the same.
        """
        rows = self._part.rows
        to_compare = rows is None and self.world.size > 1
        for batch in batches:
            images, *others = examples(batch)  # labels, and of mixed pairs the partners' labels and the weights
            labels = others[0]
            asked = stop() if stop is not None else None
            received = self.world.exchange([len(labels), asked or 0, _fingerprint(labels) if to_compare else 0])
            requests = [signal_ for _, signal_, _ in received if signal_]
            self.requested = signal.Signals(requests[0]) if requests else None
            if to_compare and len({(count, digest) for count, _, digest in received}) > 1:
                raise AlexprepError(
                    "the ranks were given different batches: with towers, every rank's loader takes `shard`"
                )
            to_compare = False
            if rows is not None:
                counts = [count for count, _, _ in received]
                with span("exchange"):
                    others = [gathered(self.world, part, 0, counts) for part in others]
                views = images.shape[1] if images.ndim == 5 else 1
                rows[:] = [count * views for count in counts]
            made = Examples(images, *others) if len(others) == 1 else MixedExamples(images, *others)
            yield cast(Examples, made)

    def sum_gradients(self) -> None:
        """Between `backward`, of which there is one a step, and the optimizer's step: waits for the sums that `backward` began.

        They travel while the layers below are still computed.
        """
        for finish in self._pending:
            finish()
        self._pending.clear()

    def gather_state(self) -> dict[str, torch.Tensor]:
        """The whole network's `state_dict`, on the CPU of every rank, with no trace of the scheme. All ranks call it."""
        return self.gather(self.network.state_dict())

    def scatter_state(self, whole: Mapping[str, torch.Tensor]) -> None:
        """Copies a whole `state_dict`, of any scheme, into this rank's part.

        Raises:
            KeyError: a tensor of the network is not in the state.
        """
        for name, tensor in self.network.state_dict().items():
            tensor.copy_(self._own(name, whole[name]))

    def gather_slots(self, optimizer: Rule) -> dict[str, torch.Tensor]:
        """The state of `optimizer`, which has this rank's part, for the whole network: SLOT.NUMBER in the order of its parameters.

        All ranks call it.
        """
        names = self._names(optimizer)
        return {
            f"{slot}.{number:03d}": self._whole(names[number], tensor) if tensor.dim() else tensor.to("cpu", copy=True)
            for slot, number, tensor in optimizer.slots()
        }

    @torch.no_grad()
    def scatter_slots(self, optimizer: Rule, whole: Mapping[str, torch.Tensor]) -> None:
        """Copies what `gather_slots` gave, of any scheme, into this rank's optimizer."""
        names = self._names(optimizer)
        for key, tensor in whole.items():
            slot, _, number = key.rpartition(".")
            own = self._own(names[int(number)], tensor) if tensor.dim() else tensor
            optimizer.make_slot(slot, int(number), own).copy_(own)

    def gradient_norm(self) -> torch.Tensor:
        """The length of the gradient of the whole network, (), after `sum_gradients`: the same on every rank, which all call it."""
        gradients = {name: weight.grad for name, weight in self.network.named_parameters() if weight.grad is not None}
        split = [gradient for name, gradient in gradients.items() if name in self._part.split]
        squares = [
            gradient.double().square().sum() for name, gradient in gradients.items() if name not in self._part.split
        ]
        if self._part.split:
            own = (
                torch.stack([gradient.double().square().sum() for gradient in split]).sum()
                if split
                else torch.zeros(())
            )
            parts = gathered(self.world, own.reshape(1).to(self.world.device), 0, [1] * self.world.size)
            squares.append(parts.sum())
        return torch.stack(squares).sum().sqrt()

    def _start_sum(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._pending.append(start_sum(self.world, parameter.grad))

    def _names(self, optimizer: Rule) -> list[str]:
        """The parameters' names in the order of the optimizer's groups."""
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        return [names[id(parameter)] for parameter in optimizer.weights()]

    def gather(self, part: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What all ranks have of tensors that go with the network's, by their names, in one, on the CPU. All ranks call it."""
        return {name: self._whole(name, tensor) for name, tensor in part.items()}

    def own_part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor that goes with the network's of this name."""
        return self._own(name, whole)

    @torch.no_grad()
    def _whole(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """What all ranks have of a parameter or of what goes with it, in one, on the CPU and in memory of its own."""
        if name in self._part.split:
            own = gathered(self.world, own.detach(), 0, self._part.split[name])
        return own.detach().to("cpu", copy=True)

    def _own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        if name not in self._part.split:
            return whole
        sizes, rank = self._part.split[name], self.world.rank
        return whole.narrow(0, sum(sizes[:rank]), sizes[rank])


def _fingerprint(labels: torch.Tensor) -> int:
    """Equal for equal labels."""
    return int.from_bytes(hashlib.sha256(labels.cpu().numpy().tobytes()).digest()[:7], "big")
