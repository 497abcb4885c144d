"""The training that tests/stress/training.py harms: as a program, and what its ranks do.

python tests/stress/training_job.py JSON      {"options": of TrainConfig, "fault": {"kind", "rank", "step", "note"}}
"""

from __future__ import annotations

import functools
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from alexprep.pipeline.batch import Batch
from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.train import launch as launching
from alexprep.train import run_dir
from alexprep.train.config import TrainConfig
from alexprep.train.distributed.world import World
from alexprep.train.launch import launch_ranks
from alexprep.train.trainer import train

CGROUP = Path("/sys/fs/cgroup/memory")  # of version 1; where it is missing, no memory kill is tried
Options = dict[str, Any]


def main() -> None:
    """Trains as `alexprep train --gpus` does; with a fault, the ranks are this file's."""
    job = json.loads(sys.argv[1])
    if "fault" in job:

        def with_fault(target: str, ranks: int, arguments: Options, **options: Any) -> list[Any]:
            return launch_ranks(f"{__file__}:faulty_rank", ranks, {**arguments, "fault": job["fault"]}, **options)

        vars(launching)["launch_ranks"] = with_fault
    try:
        summary = launching.launch_training(config(job["options"]))
    except AlexprepError as error:
        sys.exit(f"Error: {error}")
    if summary["stopped_by"]:
        sys.exit(128 + signal.Signals[summary["stopped_by"]])


def config(options: Options) -> TrainConfig:
    """From JSON values."""
    return TrainConfig(**{**options, **{name: Path(options[name]) for name in ("data", "runs")}})


def faulty_rank(world: World, options: Options, fault: dict[str, Any]) -> dict[str, Any]:
    """A rank whose loader misbehaves at a step."""
    mine = fault if world.rank == fault["rank"] else None
    return train(config(options), functools.partial(Faulty, fault=mine), world)


class Faulty(Loader):
    """Misbehaves before it delivers the batch of a step."""

    def __init__(self, *arguments: Any, fault: dict[str, Any] | None, **options: Any) -> None:
        """As `Loader`; `fault` is {"kind", "step", "note"}, the latter a file for the time of the fault."""
        super().__init__(*arguments, **options)
        self.fault = fault if options["views"] == "random" else None

    def __iter__(self) -> Iterator[Batch]:
        """As `Loader`."""
        for batch in super().__iter__():
            done = self.epoch * len(self) + self.step
            if self.fault is not None and done == self.fault["step"]:
                Path(self.fault["note"]).write_text(str(time.time()))
                FAULTS[self.fault["kind"]]()
            yield batch


def _raise() -> None:
    raise ValueError("a bad day")


def _leave() -> None:
    os._exit(3)


def _forbid_memory() -> None:
    """No more address space than there is now: the next large tensor finds none."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
    hoard = []
    while True:
        hoard.append(torch.ones(2**22))


def _take_memory() -> None:
    """Until the kernel kills this process, the largest one in a group with a limit."""
    group = CGROUP / f"alexprep-faults-{os.getppid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(64 * 2**20))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    hoard = []
    while True:
        hoard.append(b"x" * 2**20)


FAULTS: dict[str, Callable[[], Any]] = {
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "a loader that hangs": lambda: time.sleep(10**6),
    "an exception": _raise,
    "sys.exit": lambda: sys.exit(3),
    "os._exit": _leave,
    "no more memory (RLIMIT_AS)": _forbid_memory,
    "killed for memory (cgroup)": _take_memory,
}


class Recording(Loader):
    """Notes which samples each training step has."""

    samples_of: dict[int, list[int]] = {}  # noqa: RUF012  one for all, cleared by `from_each_step`

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As `Loader`."""
        super().__init__(*arguments, **options)
        self.trains = options["views"] == "random"

    def __iter__(self) -> Iterator[Batch]:
        """As `Loader`."""
        for batch in super().__iter__():
            if self.trains:
                self.samples_of[self.epoch * len(self) + self.step] = batch.indices.tolist()
            yield batch


def from_each_step(
    world: World, options: Options, whole: str, folder: str, steps: int, chosen: list[int]
) -> list[dict[str, Any]]:
    """Goes on from the chosen checkpoints of a finished run, in a folder of its own each; all ranks do.

    Returns:
        Of each: weights_sha256, the samples of all steps from there on, and the run.
    """
    found = []
    sys.stderr = io.StringIO()  # nobody reads the progress of so many runs
    for step in chosen:
        run = Path(folder) / f"{world.size}-{step}"
        if world.leads:
            shutil.copytree(whole, run, ignore=shutil.ignore_patterns(run_dir.CHECKPOINTS, run_dir.SUMMARY))
            (run / run_dir.CHECKPOINTS).mkdir()
            for path in Path(whole, run_dir.CHECKPOINTS).glob(f"step-{step:08d}*"):
                shutil.copy(path, run / run_dir.CHECKPOINTS)
        world.any(False)
        Recording.samples_of.clear()
        resumed = {**options, "runs": folder, "name": run.name, "resume": True, "ranks": world.size, "steps": steps}
        summary = train(config(resumed), Recording, world)
        found.append({"run": str(run), "sha256": summary["weights_sha256"], "samples": dict(Recording.samples_of)})
    return found


if __name__ == "__main__":
    main()
