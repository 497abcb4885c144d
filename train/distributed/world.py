"""The processes of a job as one of them sees them: its rank, its device, and the groups through which it talks to the others.

`from_environment` joins a job that somebody has started; starting and watching ranks is in `alexprep.train.launch`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from alexprep.shards.errors import AlexprepError
from alexprep.train.signals_and_memory import span

TIMEOUT = 60.0  # seconds until a rank that does not answer ends the job
START = timedelta(minutes=5)  # for all ranks to have started: to import torch from a slow disk, on hosts that boot
STORE = "ALEXPREP_STORE"  # set by `launch`, whose process holds the store at MASTER_ADDR:MASTER_PORT


@dataclass
class World:
    """A rank among `size` ranks, and how it talks to the others."""

    rank: int
    size: int
    device: torch.device  # of this rank's tensors
    group: dist.ProcessGroup | None = None  # for tensors; None in a world of one that needs no communication
    # For a few integers between hosts' processors, always gloo, so that it has timeouts of its own beside a GPU's.
    control: dist.ProcessGroup | None = None
    staged: bool = False  # tensors travel through the CPU, since gloo cannot send a GPU's

    @staticmethod
    def alone(device: torch.device | str) -> World:
        """A world of one process."""
        return World(0, 1, torch.device(device))

    @property
    def leads(self) -> bool:
        """Whether this rank writes checkpoints and logs."""
        return self.rank == 0

    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's values, by rank; all ranks call it with the same number of them. Waits for the slowest.

        >>> World.alone("cpu").exchange([7, 0])
        [[7, 0]]
        """
        own = torch.tensor(list(values), dtype=torch.int64)
        if self.control is None:
            return [own.tolist()]
        received = [torch.empty_like(own) for _ in range(self.size)]
        with span("wait for ranks"):
            dist.all_gather(received, own, group=self.control)
        return [tensor.tolist() for tensor in received]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank: the same answer on all, so that all take the same decision."""
        return any(up for (up,) in self.exchange([flag]))

    def close(self) -> None:
        """Leaves the groups."""
        if self.group is not None:
            self.group = self.control = None
            dist.destroy_process_group()


def from_environment(device: str | None = None, backend: str | None = None, timeout: float = TIMEOUT) -> World:
    """Joins the job that `launch_ranks` or torchrun started this process for: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Args:
        device: "cpu", "cuda" for the GPU numbered LOCAL_RANK, or one by its number; by default a GPU where there are any.
        backend: "nccl" or "gloo"; by default nccl for GPUs. With gloo several ranks may share a GPU.
        timeout: seconds until a collective without an answer raises (gloo); after twice that NCCL's watchdog ends the process.

    Raises:
        AlexprepError: the process was not started as a rank, or there are fewer GPUs than ranks here.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise AlexprepError(f"{', '.join(missing)} are not set: start the ranks with torchrun or --gpus")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", rank)), backend)
    backend = backend or ("nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo")
    if backend not in ("nccl", "gloo") or (backend == "nccl" and chosen.type != "cuda"):
        raise AlexprepError(f"backend {backend} does not go with {chosen}: use nccl on GPUs, gloo anywhere")
    if backend == "nccl" and size > 1 and device is not None and torch.device(device).index is not None:
        raise AlexprepError(f"{size} ranks cannot share {device}: name just cuda, for a GPU each, or use gloo")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    limit = timedelta(seconds=timeout)
    dist.init_process_group(
        backend,
        store=_meet(rank, size),
        rank=rank,
        world_size=size,
        timeout=2 * limit if backend == "nccl" else limit,  # the control group's words come first: they name the cause
        device_id=chosen if backend == "nccl" else None,
    )
    group = dist.group.WORLD
    control = dist.new_group(backend="gloo", timeout=limit) if backend == "nccl" else group
    return World(rank, size, chosen, group, control, staged=backend == "gloo" and chosen.type == "cuda")


def _meet(rank: int, size: int) -> Any:
    """The store of the job, when all ranks have come to it."""
    if STORE in os.environ:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, START
        )
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=START))  # type: ignore[attr-defined]
    store.set(f"alexprep/started/{rank}", "")
    store.wait([f"alexprep/started/{other}" for other in range(size)], START)
    return store


def _device(name: str | None, local_rank: int, backend: str | None) -> torch.device:
    """The device of this rank, if there is one for it."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    here = torch.cuda.device_count()
    number = local_rank if device.index is None else device.index
    if backend == "gloo" and device.index is None and here:
        number %= here
    if number >= here:
        raise AlexprepError(
            f"rank {local_rank} of this machine has no GPU of its own, torch sees {here}: start fewer ranks, or use gloo on the CPU"
        )
    return torch.device("cuda", number)
