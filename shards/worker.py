"""The child's side of an engine: serves tasks from a pipe, and says at every moment which input it is at work on."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError, DeviceLostError

POLL_SECONDS = 0.2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
# One record a worker, in memory that parent and workers share.
SLOT = np.dtype([("row", "<i8"), ("began_ns", "<i8"), ("finished", "<i8"), ("deaths", "<i8"), ("reading", "S400")])

_slot: Any = np.zeros(1, SLOT)[0]  # replaced by the shared one in a worker
_memory_bytes: int | None = None


@contextlib.contextmanager
def attending(*rows: int) -> Iterator[None]:
    """Around the work on inputs of a task: should the process die or hang in it, a single input is the suspect.

    Of several none is: the task is done again, and is then to take them one at a time (see `again`).
    """
    _slot["row"] = rows[0] if len(rows) == 1 else -1
    _slot["began_ns"] = time.monotonic_ns()
    yield
    _slot["began_ns"] = 0
    _slot["row"] = -1
    _slot["finished"] += len(rows)


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Around the reading of one input, inside `attending`: if it takes too long, `place` is to blame, and not the input.

    The time that is left for the input itself begins afterwards.
    """
    _slot["began_ns"] = time.monotonic_ns()
    _slot["reading"] = place.encode("utf-8", "backslashreplace")
    try:
        yield
    finally:
        _slot["began_ns"] = time.monotonic_ns()
        _slot["reading"] = b""


def again() -> bool:
    """Whether a process has ended in the task at hand."""
    return bool(_slot["deaths"])


def limit_memory(extra_bytes: int = 0) -> None:
    """Bounds what this worker may allocate from here on; beyond it allocations fail (MemoryError in Python).

    Called by a task once its tools are loaded. Without effect in a process that is no worker, and after the first call.

    Args:
        extra_bytes: what the task keeps, over what one input may need.
    """
    global _memory_bytes
    if _memory_bytes is None:
        return
    with open("/proc/self/status", encoding="ascii") as status:
        now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = now + _memory_bytes + extra_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (bound if hard < 0 else min(bound, hard), hard))
    _memory_bytes = None


def map_slots(descriptor: int, count: int) -> NDArray[Any]:
    """The shared records behind a descriptor: (count,) of `SLOT`."""
    return np.frombuffer(mmap.mmap(descriptor, count * SLOT.itemsize), SLOT)


def serve(pipe: int, slots: int, count: int, index: int, parent: int, memory_bytes: int) -> None:
    """Runs tasks until the parent closes the pipe or dies."""
    global _slot, _memory_bytes
    _slot = map_slots(slots, count)[index : index + 1][0]
    _memory_bytes = memory_bytes or None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    # Decoders written in C report every bad image on descriptor 2; the ledger has the reason. Python's own words go on.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    one_thread()
    _reuse_memory()
    connection: Connection[Any, Any] = Connection(pipe)
    while True:
        try:
            task, argument, condemned = connection.recv()
        except EOFError:
            return
        _slot["row"], _slot["began_ns"], _slot["finished"], _slot["reading"] = -1, 0, 0, b""
        try:
            answer = (True, task(argument, condemned))
        except DeviceLostError:
            os.abort()  # the engine starts a new process, in which the GPU works again
        except AlexprepError as error:
            answer = (False, (error, ""))
        except BaseException as error:  # noqa: BLE001  (it is told where it can be handled, in words: not all can be sent)
            answer = (False, (None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        try:
            connection.send(answer)
        except OSError:  # the parent has gone
            raise
        except Exception as error:  # noqa: BLE001  (what cannot be sent; pickle raises many kinds)
            connection.send((False, (None, f"{type(error).__name__}: {error}: {answer[1]!r}")))


def one_thread() -> None:
    """Keeps numpy's matrix products to one thread: parallel work here is by processes. (numpy must be loaded, and is.)"""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def _reuse_memory() -> None:
    """Lets glibc's malloc keep the memory of an image for the next one: fresh pages for each cost 4 % of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 128 * 2**20)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
