"""The processes of a job as one of them sees them: its rank, its device, and the groups through which it talks to the others.

`from_environment` joins a job that somebody has started; starting and watching ranks is in `alexprep.train.launch`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from alexprep.shards.errors import AlexprepError
from alexprep.shards.patience import given_up_seconds
from alexprep.shards.storage import json_bytes
from alexprep.train.signals_and_memory import span

TIMEOUT = 60.0  # seconds until a rank that does not answer ends the job
START = timedelta(minutes=5)  # for all ranks to have started: to import torch from a slow disk, on hosts that boot
STORE = "ALEXPREP_STORE"  # set by `launch`, whose process holds the store at MASTER_ADDR:MASTER_PORT
POLL_SECONDS = 0.1  # between looks at who has started


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
    owned: bool = True  # whether the groups were made here

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

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank; all ranks call it.

        >>> World.alone("cpu").gather({"host": "a"})
        [{'host': 'a'}]
        """
        if self.control is None:
            return [value]
        own = torch.frombuffer(bytearray(json_bytes(value, indent=None)), dtype=torch.uint8)
        sizes = [size for (size,) in self.exchange([len(own)])]
        received = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
        own = torch.cat([own, own.new_zeros(max(sizes) - len(own))])
        dist.all_gather(received, own, group=self.control)
        return [json.loads(bytes(tensor[:size].numpy())) for tensor, size in zip(received, sizes, strict=True)]

    def of_first(self, made: Callable[[], Any]) -> Any:
        """The JSON value that `made` gives on rank 0, where alone it is called; all ranks call this. An AlexprepError of it is raised on all."""
        if self.control is None:
            return made()
        answer: dict[str, Any] = {}
        if self.leads:
            try:
                answer = {"value": made()}
            except AlexprepError as error:
                answer = {"error": error.as_made}
        answer = self.gather(answer)[0]
        if "error" in answer:
            raise AlexprepError(answer["error"])
        return answer["value"]

    def tensors_of_first(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rank 0's tensors by name, on the CPU of every rank, bit for bit; what others give is not looked at. All ranks call it."""
        if self.control is None:
            return dict(tensors)
        form = self.of_first(lambda: [[name, str(each.dtype)[6:], list(each.shape)] for name, each in tensors.items()])
        found = {}
        for name, dtype, shape in form:
            found[name] = (
                tensors[name].cpu().contiguous() if self.leads else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            if found[name].numel():
                dist.broadcast(found[name].reshape(-1).view(torch.uint8), 0, group=self.control)
        return found

    def close(self) -> None:
        """Leaves the groups."""
        if self.group is not None:
            self.group = self.control = None
            if self.owned:
                dist.destroy_process_group()


def rank_wait(seconds: float, of_store: bool) -> float:
    """Seconds that ranks wait for one another, told to wait so many: where they need what is in a store, at least until one has given that up.

    >>> rank_wait(60, of_store=False), rank_wait(60, of_store=True), rank_wait(1000, of_store=True)
    (60, 320.0, 1000)
    """
    return max(seconds, given_up_seconds()) if of_store else seconds


def from_environment(device: str | None = None, backend: str | None = None, timeout: float = TIMEOUT) -> World:
    """Joins the job that `launch_ranks`, torchrun or Ray Train started this process for: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Where torch.distributed has its default group already, as in Ray Train, that is taken.

    Args:
        device: "cpu", "cuda" for the GPU numbered LOCAL_RANK, or one by its number; by default a GPU where there are any.
        backend: "nccl" or "gloo"; by default nccl for GPUs. With gloo several ranks may share a GPU.
        timeout: seconds until a collective without an answer raises (gloo); after twice that NCCL's watchdog ends the process.

    Raises:
        AlexprepError: the process was not started as a rank, there are fewer GPUs than ranks here, or not all ranks came.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise AlexprepError(f"{', '.join(missing)} are not set: start the ranks with torchrun or --gpus")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit, owned, problem = timedelta(seconds=timeout), not dist.is_initialized(), None
    try:
        chosen, backend = _chosen(device, backend if owned else dist.get_backend(), size)
    except AlexprepError as error:
        if not owned:
            raise
        problem = error
    if owned:
        try:
            store = _meet(rank, size, problem)
            if chosen.type == "cuda":
                torch.cuda.set_device(chosen)
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=2 * limit
                if backend == "nccl"
                else limit,  # the control group's words come first: they name the cause
                device_id=chosen if backend == "nccl" else None,
            )
        except RuntimeError as error:
            words, where = str(error).partition("\n")[0], "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
            raise AlexprepError(
                f"rank {rank} cannot join the others at {where} ({words}): see what became of them"
            ) from error
    group = dist.group.WORLD
    control = dist.new_group(backend="gloo", timeout=limit) if backend == "nccl" or not owned else group
    staged = backend == "gloo" and chosen.type == "cuda"
    return World(rank, size, chosen, group, control, staged, owned)


def started_elsewhere() -> bool:
    """Whether this process is one of several ranks that torchrun, Slurm or Ray started, and not `alexprep train --gpus`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and STORE not in os.environ


def _chosen(device: str | None, backend: str | None, size: int) -> tuple[torch.device, str]:
    """This rank's device and what tensors go through, if they fit each other."""
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), backend)
    backend = backend or ("nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo")
    if backend not in ("nccl", "gloo") or (backend == "nccl" and chosen.type != "cuda"):
        raise AlexprepError(f"backend {backend} does not go with {chosen}: use nccl on GPUs, gloo anywhere")
    if backend == "nccl" and size > 1 and device is not None and torch.device(device).index is not None:
        raise AlexprepError(f"{size} ranks cannot share {device}: name just cuda, for a GPU each, or use gloo")
    return chosen, backend


def _meet(rank: int, size: int, problem: AlexprepError | None) -> Any:
    """The store of the job, when all ranks have come to it; raises the `problem` with which this one comes, or another's, which ends all."""
    if STORE in os.environ:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, START)  # type: ignore[attr-defined]
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=START))  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may start ranks again
    ours, waiting = dist.PrefixStore(f"alexprep/{attempt}", store), set(range(size))  # type: ignore[attr-defined]
    card = {"host": socket.gethostname(), "problem": problem and problem.as_made}
    ours.set(f"started/{rank}", json.dumps(card))
    if problem is not None:
        raise problem
    end = time.monotonic() + START.total_seconds()
    while waiting:
        for other in [each for each in waiting if ours.check([f"started/{each}"])]:
            waiting.remove(other)
            if (card := json.loads(ours.get(f"started/{other}")))["problem"] is not None:
                raise AlexprepError(f"rank {other} on {card['host']}: {card['problem']}")
        if waiting and time.monotonic() > end:
            late = ", ".join(map(str, sorted(waiting)))
            raise AlexprepError(f"rank {late} of {size} did not come within {START}: see on its host what became of it")
        time.sleep(POLL_SECONDS if waiting else 0)
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
