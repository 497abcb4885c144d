"""Runs independent tasks, one a shard, on the machines of a Ray cluster: the engine of `--engine ray`.

Ray brings tasks to machines and repeats those whose machine is lost. Inside each Ray worker the task runs in a supervised process of
`alexprep.shards.worker_pool`, as it would locally, so an input that ends processes is found out there and Ray never hears of it.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import platform
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from alexprep.shards.errors import AlexprepError
from alexprep.shards.worker_pool import (
    IMAGE_BYTES,
    IMAGE_SECONDS,
    IN_A_WORKER,
    POLL_SECONDS,
    LocalEngine,
    Progress,
    Result,
    Task,
    WorkerPool,
    cores,
)

_OLDEST = (2, 56)
_STORE_BYTES = 128 * 2**20  # of a local Ray's object store; the largest results, moments of a shard, take 1.5 MB
_GRACE_SECONDS = 5 * POLL_SECONDS
_ANSWER_SECONDS = 10.0
_RETRIES = 20  # of one task whose Ray worker or machine is lost; a shard is minutes of work, so this is many losses
# Tasks under way for each CPU. No more, since there is no safe way to call them back: `ray.cancel` may abort the caller when a
# task ends at that moment (2.60: "Tried to complete task that was not pending").
_AHEAD = 4


@dataclass(frozen=True)
class RayEngine:
    """Runs tasks on every CPU of a Ray cluster; refuses values out of bounds with AlexprepError.

    A task is repeated when its worker or its machine is lost, so it may be done more than once; what counts is the rename
    that publishes its sidecar. Errors are not repeated. Paths must mean the same on all machines; relative ones are taken from
    the working folder of the process that calls `run`.

    `address` is the cluster's, as `ray.init` takes it; None for $RAY_ADDRESS, or else a Ray of its own on this machine, on the
    loopback interface only. Where the process is connected to Ray already, that connection is used.
    """

    address: str | None = None
    image_seconds: float = IMAGE_SECONDS  # that one input may take
    image_bytes: int = IMAGE_BYTES  # of memory that one input may need; 0 for no bound

    def __post_init__(self) -> None:
        LocalEngine(1, self.image_seconds, self.image_bytes)

    def run(
        self, task: Task[Result], arguments: Sequence[Any], progress: Progress = lambda finished: None
    ) -> Iterator[Result]:
        """See `Engine`. `progress` hears of a task's inputs when the task is done.

        Raises AlexprepError from a task, or where Ray is missing, too old or not to be reached, or a machine lacks alexprep.
        """
        if not arguments:
            return
        ray = _import_ray()
        with _connected(ray, self.address):
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
            raise RuntimeError(f"in a Ray worker: {_first_line(cause).removeprefix(IN_A_WORKER)}\n{error}") from error
        raise AlexprepError(
            f"Ray gave a shard up ({type(cause).__name__}: {_first_line(cause)}): see `ray status`, and that RAY_AUTH_MODE and the "
            "token are the same on every machine; then run the same command again, finished shards are kept"
        ) from error
    if not good:
        words, machine = answer
        raise AlexprepError(words if machine == platform.node() else f"{words} (on {machine})")
    return answer, count


# What follows runs in Ray's workers. Each has a pool of one process, kept from task to task: starting one takes half a second.
_pools: dict[str, WorkerPool] = {}


def _in_ray_worker(run: str, folder: str, bounds: LocalEngine, task: Task[Any], argument: Any) -> tuple[bool, Any, int]:
    """Whether it went well; the result, or what went wrong and where; finished inputs."""
    counts = [0]
    try:
        if run not in _pools:  # the worker is new, or was left by an earlier run of the same program
            _close_pools()
            with contextlib.suppress(OSError):
                os.chdir(folder)
            _pools[run] = WorkerPool(bounds, 1)
        (answer,) = _pools[run].run(task, [argument], counts.append)
    except AlexprepError as error:
        _close_pools()
        return False, (error.as_made, platform.node()), 0
    except BaseException:
        _close_pools()
        raise
    return True, answer, counts[-1]


def _close_pools() -> None:
    while _pools:
        _pools.popitem()[1].close()


# The connection: to a cluster that is there, or to a Ray of this machine's own.


def _import_ray() -> Any:
    """The module `ray`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise AlexprepError("--engine ray needs Ray: pip install 'alexprep[ray]'") from None
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise AlexprepError(
            f"Ray {ray.__version__} is older than {oldest}, which closes known holes (CVE-2026-57516 among them): "
            f"pip install 'ray>={oldest}' on every machine"
        )
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to Ray; one that was there before stays."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray takes SIGTERM for itself, prints a stack and leaves everything as it is: the end is ours to tidy up.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main else None
    # Ray would print, on stdout, whatever befalls its machines.
    with _switch("ray._private.worker", "_worker_logs_enabled", False):
        try:
            try:
                _open_connection(ray, address)
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise AlexprepError(
                    f"--ray-address {address}: no connection ({_first_line(error)}): see `ray status` there; "
                    "on a machine of the cluster the address is auto"
                ) from error
            if in_main:
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            if not ray.cluster_resources().get("CPU"):
                raise AlexprepError(
                    f"the Ray cluster at {address} has no CPU to run tasks: add a machine with `ray start`"
                )
            try:
                yield
            except BaseException:  # Ctrl-C among them
                ray.shutdown()  # ends the workers, and their children notice: then their unfinished files can be removed
                time.sleep(_GRACE_SECONDS)
                raise
        finally:
            ray.shutdown()
            if in_main:
                signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _switch(module: str, name: str, value: bool) -> Iterator[None]:
    """A switch of Ray's that has no public handle; without effect in a Ray that has no such switch."""
    where = importlib.import_module(module)
    before = getattr(where, name, None)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def _open_connection(ray: Any, address: str) -> None:
    """Connects to a cluster, or to a Ray of this machine's cores that nobody outside can talk to (from 2.59 on nobody without its token)."""
    quiet: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address != "local":
        if "://" in address:
            raise OSError("Ray Client is not supported: give HOST:PORT, from a machine of the cluster")
        host, _, port = address.rpartition(":")
        if port.isdecimal():  # where nobody listens, Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
        ray.init(**quiet)
        return
    # Ray replaces 127.0.0.1 by the machine's address, and then listens on every interface, unless it believes itself on a
    # system where clusters are not supported. Should this switch go, tests/test_ray_runner.py finds the open ports.
    with _switch("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", False):
        here = {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "_node_ip_address": "127.0.0.1"}
        ray.init(num_cpus=cores(), **here, **quiet)


def _first_line(error: BaseException) -> str:
    """What an error says, without the stack that Ray puts behind it."""
    return str(error).strip().partition("\n")[0]
