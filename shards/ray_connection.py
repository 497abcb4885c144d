"""A connection to Ray: a cluster that is there, or a Ray of this machine's own, and the end of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from alexprep.shards.errors import AlexprepError
from alexprep.shards.worker import POLL_SECONDS
from alexprep.shards.worker_pool import cores

_OLDEST = (2, 56)
_STORE_BYTES = 128 * 2**20  # of a local Ray's object store; the largest results, moments of a shard, take 1.5 MB
_GRACE_SECONDS = 5 * POLL_SECONDS
_KNOCK_SECONDS = 10.0


def ray_module() -> Any:
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
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to Ray; one that was there before stays."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray takes SIGTERM for itself, prints a stack and leaves everything as it is: the end is ours to tidy up.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main else None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Ray would print, on stdout, whatever befalls its machines.
    with _switched("ray._private.worker", "_worker_logs_enabled", False):
        try:
            try:
                if address == "local":
                    _start_here(ray, quiet)
                else:
                    _knock(address)
                    ray.init(address=address, **quiet)
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise AlexprepError(
                    f"--ray-address {address}: no connection ({first_line(error)}): see `ray status` there; "
                    "on a machine of the cluster the address is auto"
                ) from error
            if in_main:
                signal.signal(signal.SIGTERM, _terminated)
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


def _terminated(number: int, frame: object) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def _switched(module: str, name: str, value: bool) -> Iterator[None]:
    """A switch of Ray's that has no public handle; without effect in a Ray that has no such switch."""
    where = importlib.import_module(module)
    before = getattr(where, name, None)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def _start_here(ray: Any, quiet: dict[str, Any]) -> None:
    """A Ray of this machine's cores that nobody outside can talk to, and from 2.59 on nobody inside without its token."""
    # Ray replaces 127.0.0.1 by the machine's address, and then listens on every interface, unless it believes itself on a
    # system where clusters are not supported. Should this switch go, tests/test_ray.py finds the open ports.
    with _switched("ray._private.ray_constants", "ENABLE_RAY_CLUSTER", False):
        ray.init(
            address="local",
            num_cpus=cores(),
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            **quiet,
        )


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that Ray puts behind it."""
    return str(error).strip().partition("\n")[0]


def _knock(address: str) -> None:
    """Raises OSError where nobody listens; Ray itself would try for minutes."""
    if "://" in address:
        raise OSError("Ray Client is not supported: give HOST:PORT, from a machine of the cluster")
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
