"""What a rank sends to the others in one training step, by layer: the figures of docs/parallel.md.

python benchmarks/traffic.py [--network alexnet] [--ranks 2] [--batch 128] [--precision bf16]

One rank's part of the network takes a step in this process on the CPU; in place of torch.distributed's two functions there are ones that
count the bytes and answer at once. Sums of gradients count as what a ring needs, 2 (R - 1) / R of their size. Control messages (24 bytes
a step) are not counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from alexprep.train.data import Examples
from alexprep.train.distributed.parallel import Parallel
from alexprep.train.distributed.tensor_parallel import LOGITS, Gather, Scheme
from alexprep.train.distributed.world import World
from alexprep.train.models import alexnet as networks
from alexprep.train.precision import Precision, logits
from alexprep.train.signals_and_memory import keep_freed_memory

CROP, CLASSES = 224, 1000
SCHEMES: tuple[Scheme, ...] = ("towers", "ddp", "hybrid")
Sent = Counter[tuple[str, str]]  # bytes by layer and kind: forward, backward or gradients


class Ring(World):
    """Rank 0 of several, of which there is no other: each says of itself what rank 0 does."""

    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values."""
        return [list(values)] * self.size


def sent_in_a_step(network: nn.Module, scheme: Scheme, ranks: int, batch: int, precision: Precision = "fp32") -> Sent:
    """Bytes that rank 0 sends; `batch` is that of all ranks, which divides it."""
    sent: Sent = Counter()
    place = [LOGITS, "forward"]  # the exchange that is going on: under ddp there is but this one

    def all_to_all(received: torch.Tensor, given: torch.Tensor, *sizes: Any, **options: Any) -> None:
        sent[place[0], place[1]] += given.nbytes
        received.zero_()

    def all_reduce(tensor: torch.Tensor, **options: Any) -> mock.Mock:
        sent["all", "gradients"] += 2 * (ranks - 1) * tensor.nbytes // ranks
        return mock.Mock()

    group: Any = object()
    parallel = Parallel(network, scheme, Ring(0, ranks, torch.device("cpu"), group))
    for gather in [module for module in parallel.network.modules() if isinstance(module, Gather)]:
        gather.register_forward_pre_hook(
            lambda module, given: place.__setitem__(slice(2), [str(module.layer), "forward"])
        )
        gather.register_full_backward_pre_hook(
            lambda module, given: place.__setitem__(slice(2), [str(module.layer), "backward"])
        )
    rows = batch if parallel.shard[1] == 1 else batch // ranks
    example = Examples(torch.randn(rows, 3, CROP, CROP), torch.zeros(rows, dtype=torch.int64))
    with mock.patch.object(dist, "all_to_all_single", all_to_all), mock.patch.object(dist, "all_reduce", all_reduce):
        place[0] = "labels"
        ((images, labels),) = parallel.batches([example])
        place[0] = LOGITS
        F.cross_entropy(logits(parallel.network, images, precision), labels).backward()  # type: ignore[no-untyped-call]
        parallel.sum_gradients()
    return sent


def main() -> None:
    """Prints a table a scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="alexnet", help="a name in alexprep.train.models.alexnet")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    keep_freed_memory()
    for scheme in SCHEMES:
        network = getattr(networks, options.network)(CLASSES, CROP, seed=0)
        sent = sent_in_a_step(network, scheme, options.ranks, options.batch, options.precision)
        print(f"{scheme}: {sum(sent.values()) / 1e6:.2f} MB")
        for (layer, kind), size in sent.items():
            print(f"  {layer:<8} {kind:<9} {size / 1e6:8.2f} MB")


if __name__ == "__main__":
    main()
