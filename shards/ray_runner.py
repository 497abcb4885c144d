"""Runs independent tasks, one a shard, on the machines of a Ray cluster.

Ray brings tasks to machines and repeats those whose machine is lost. Inside each Ray worker the task runs in a supervised
child, as it would locally, so an input that ends processes is found out there and Ray never hears of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alexprep.shards.errors import AlexprepError
from alexprep.shards.ray_connection import connected, first_line, ray_module
from alexprep.shards.worker import POLL_SECONDS
from alexprep.shards.worker_pool import (
    IMAGE_BYTES,
    IMAGE_SECONDS,
    IN_A_WORKER,
    Crew,
    LocalEngine,
    Progress,
    Result,
    Task,
)

_RETRIES = 20  # of one task whose Ray worker or machine is lost; a shard is minutes of work, so this is many losses
# Tasks under way for each CPU. No more, since there is no safe way to call them back: `ray.cancel` may abort the caller when a
# task ends at that moment (2.60: "Tried to complete task that was not pending").
_AHEAD = 4

Outcome = tuple[bool, Any, int]  # whether it went well; the result, or what went wrong and where; finished inputs


@dataclass(frozen=True)
class RayEngine:
    """One Ray task a shard, on every CPU of a cluster.

    A task is repeated when its worker or its machine is lost, so it may be done more than once; what counts is the rename
    that publishes its sidecar. Errors are not repeated. Paths must mean the same on all machines; relative ones are taken from
    the working folder of the process that calls `run`.

    Attributes:
        address: of the cluster, as `ray.init` takes it; None for $RAY_ADDRESS, or else a Ray of its own on this machine, on
            the loopback interface only. Where the process is connected to Ray already, that connection is used.
        image_seconds: how long one input may take.
        image_bytes: how much memory one input may need; 0 for no bound.
    """

    address: str | None = None
    image_seconds: float = IMAGE_SECONDS
    image_bytes: int = IMAGE_BYTES

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        LocalEngine(1, self.image_seconds, self.image_bytes)

    def run(
        self, task: Task[Result], arguments: Sequence[Any], progress: Progress = lambda finished: None
    ) -> Iterator[Result]:
        """See `Engine`. `progress` hears of a task's inputs when the task is done.

        Raises:
            AlexprepError: from a task; or Ray is missing, too old or not to be reached, or a machine lacks alexprep.
        """
        if not arguments:
            return
        ray = ray_module()
        with connected(ray, self.address):
            bounds = LocalEngine(1, self.image_seconds, self.image_bytes)
            start = ray.remote(num_cpus=1, max_retries=_RETRIES)(_in_ray_worker).remote
            shared = ray.put(task)
            run = secrets.token_hex(8)
            waiting = iter(arguments)
            pending: list[Any] = []
            wanted = finished = 0
            while True:
                if len(pending) <= wanted // 2:
                    wanted = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 0)))  # machines come and go
                    some = itertools.islice(waiting, max(0, wanted - len(pending)))
                    pending += [start(run, os.getcwd(), bounds, shared, argument) for argument in some]
                if not pending:
                    return
                ready, pending = ray.wait(pending, timeout=POLL_SECONDS)
                for reference in ready:
                    result, count = _outcome(ray, reference)
                    finished += count
                    yield result
                progress(finished)


def _outcome(ray: Any, reference: Any) -> tuple[Any, int]:
    """A finished task's result, and how many inputs it worked on."""
    try:
        good, answer, count = ray.get(reference)
    except ray.exceptions.RayError as error:
        if "No module named 'alexprep" in str(error):
            raise AlexprepError(
                "a machine of the Ray cluster cannot import alexprep: pip install alexprep there, in the same version as here"
            ) from error
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        ours = not isinstance(cause, ray.exceptions.RayError)
        if ours:
            line = first_line(cause)
            words = (
                line.removeprefix(IN_A_WORKER) if line.startswith(IN_A_WORKER) else f"{type(cause).__name__}: {line}"
            )
            raise RuntimeError(f"in a Ray worker: {words}\n{error}") from error
        raise AlexprepError(
            f"Ray gave a shard up ({type(cause).__name__}: {first_line(cause)}): see `ray status`, and that RAY_AUTH_MODE and the "
            "token are the same on every machine; then run the same command again, finished shards are kept"
        ) from error
    if not good:
        words, machine = answer
        raise AlexprepError(words if machine == platform.node() else f"{words} (on {machine})")
    return answer, count


# What follows runs in Ray's workers. Each has one child, kept from task to task: starting one takes half a second.
_crews: dict[str, Crew] = {}


def _in_ray_worker(run: str, folder: str, bounds: LocalEngine, task: Task[Any], argument: Any) -> Outcome:
    counts = [0]
    try:
        if run not in _crews:  # the worker is new, or was left by an earlier run of the same program
            _dismiss()
            with contextlib.suppress(OSError):
                os.chdir(folder)
            _crews[run] = Crew(bounds, 1)
        (answer,) = _crews[run].run(task, [argument], counts.append)
    except AlexprepError as error:
        _dismiss()
        return False, (str(error), platform.node()), 0
    except BaseException:
        _dismiss()
        raise
    return True, answer, counts[-1]


def _dismiss() -> None:
    while _crews:
        _crews.popitem()[1].close()
