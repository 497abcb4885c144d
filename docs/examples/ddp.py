"""Any number of ranks under DistributedDataParallel, with the result of one process on the whole batch.

    torchrun --standalone --nproc-per-node 2 docs/examples/ddp.py alexprep-data

A rank's part of a step may be one sample smaller than another's, and at an epoch's end empty. DDP averages the ranks' gradients,
so the mean loss of a rank's part, the usual choice, would weigh samples unequally. The sum of its losses times
world_size / (samples of the step on all ranks) is right: the ranks' average is then the mean over the whole batch.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from alexprep.pipeline import Augmentation, Loader

EPOCHS = 2


def network(classes: int) -> nn.Module:
    """Small, for crops of any size, and without batch norm, which would see only a rank's part."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(32 * 9, classes)
    )


def main() -> None:
    """One rank of the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("weights.pt"))
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128, help="over all ranks")
    options = parser.parse_args()
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo"
    )  # torchrun says where the others are
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    with Loader(
        options.data,
        batch_size=options.batch_size,
        augmentation=Augmentation(crop=options.crop),
        rank=rank,
        world_size=world_size,
        device=device,
    ) as loader:
        model = DistributedDataParallel(network(len(loader.classes)).to(device))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        while loader.epoch < EPOCHS:
            for images, labels, _ in loader:  # as many steps on every rank
                samples = torch.tensor(len(labels), device=device)
                distributed.all_reduce(samples)
                losses = functional.cross_entropy(model(images / 64), labels, reduction="sum")
                optimizer.zero_grad()
                (losses * world_size / samples).backward()
                optimizer.step()
    if rank == 0:
        torch.save(model.module.state_dict(), options.weights)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
