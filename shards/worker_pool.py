"""Runs independent tasks, one a shard, in worker processes that may crash, hang or eat memory without harm to the rest.

An engine is what runs tasks, as the option --engine says: `LocalEngine` here, `alexprep.shards.ray_runner.RayEngine` on a cluster.
A worker is one of its processes. What a task does is none of this module's business: it only says, by `attending` and `reading`,
which input it has in hand, so that an input that ends processes can be told from bad luck.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

import numpy as np

from alexprep.shards.errors import AlexprepError, DeviceLostError
from alexprep.shards.patience import given_up_seconds
from alexprep.shards.storage import is_url

Result = TypeVar("Result")
Progress = Callable[[int], None]
# task(argument, condemned): `condemned` says which inputs must not be touched again, and why.
Task = Callable[[Any, Mapping[int, str]], Result]

IMAGE_SECONDS = 60.0  # the slowest legal image seen takes 3 s; a file server that stalls gets as long for each file
IMAGE_BYTES = 1800 * 2**20  # of address space, which is more than memory; the largest legal images take 1,250 MiB of it
POLL_SECONDS = 0.2
IN_A_WORKER = "in a worker: "  # begins the words of an unexpected error there; its type and text follow
_STRIKES = 2  # an input is condemned when it ends a worker twice: the first time may have been chance
_DEATHS = 8  # of one task, with no input to blame or always another one, until the engine gives up
# One record a worker, in memory that parent and workers share: the input in hand (-1 for none or several), since when, how many are
# finished, how often a process has ended in the task, and what is being read.
_RECORD = np.dtype([("row", "<i8"), ("began_ns", "<i8"), ("finished", "<i8"), ("deaths", "<i8"), ("reading", "S400")])
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Engine(Protocol):
    """Anything that runs tasks, one a shard: `LocalEngine`, `InProcessEngine`, `RayEngine`, or one of your own."""

    def run(self, task: Task[Result], arguments: Sequence[Any], progress: Progress) -> Iterator[Result]:
        """Runs task(argument, condemned) for each argument; yields results as they come, in any order."""


@dataclass(frozen=True)
class LocalEngine:
    """Runs tasks in worker processes on this machine; refuses values out of bounds with AlexprepError.

    Workers are started afresh, never forked, since the parent may hold threads. A worker leaves when its parent dies.
    One that crashes, or is at one input for longer than `image_seconds`, is replaced and its task done again; an input
    that ends a worker twice is condemned: the task is told to leave it out, with the reason. Where it is the reading that
    takes too long, the run stops: the way to the inputs is to blame.
    """

    workers: int  # at least 1
    image_seconds: float = IMAGE_SECONDS  # that one input may take
    image_bytes: int = IMAGE_BYTES  # of memory that one input may need; 0 for no bound

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise AlexprepError(f"--workers {self.workers} is less than 1")
        if not self.image_seconds > 0:  # NaN included
            raise AlexprepError(f"--image-seconds {self.image_seconds} is not above 0")

    def run(
        self, task: Task[Result], arguments: Sequence[Any], progress: Progress = lambda finished: None
    ) -> Iterator[Result]:
        """See `Engine`. `task` and arguments must be importable and picklable; `task` works inside `attending`.

        `progress` is called a few times a second with the number of finished inputs. Raises AlexprepError from a task, or where
        workers died with no input to blame, or an input cannot be read in time.
        """
        if not arguments:
            return
        with contextlib.closing(WorkerPool(self, min(self.workers, len(arguments)))) as pool:
            yield from pool.run(task, arguments, progress)


class InProcessEngine:
    """Runs tasks one after the other in this process, which then has their faults: for tests and debuggers."""

    def run(
        self, task: Task[Result], arguments: Sequence[Any], progress: Progress = lambda finished: None
    ) -> Iterator[Result]:
        """See `Engine`; there is no progress within a task."""
        for argument in arguments:
            yield task(argument, {})


def as_engine(engine: Engine | int) -> Engine:
    """An engine as it is; for a number, so many worker processes on this machine."""
    return LocalEngine(engine) if isinstance(engine, int) else engine


def cores() -> int:
    """The processor cores that this process may use (not those that the machine has)."""
    return len(os.sched_getaffinity(0))


class WorkerPool:
    """Worker processes that outlive a run of tasks. After an exception it can only be closed: a task may still be on its way."""

    def __init__(self, engine: LocalEngine, count: int) -> None:
        self._engine = engine
        self._memory = os.fdopen(os.memfd_create("alexprep"), "w+b")
        self._records = np.memmap(self._memory, _RECORD, "w+", shape=(count,))
        self._workers = [self._start(index) for index in range(count)]

    def _start(self, index: int) -> _Worker:
        self._records[index] = (-1, 0, 0, 0, b"")
        return _Worker(self._memory.fileno(), index, self._engine.image_bytes)

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()
        self._memory.close()

    def run(self, task: Task[Result], arguments: Sequence[Any], progress: Progress) -> Iterator[Result]:
        """See `LocalEngine.run`; may be called again once it has yielded every result."""
        waiting = [_Job(argument) for argument in reversed(arguments)]
        finished = 0
        while True:
            for index, worker in enumerate(self._workers):
                if worker.job is None and waiting:
                    worker.job = waiting.pop()
                    # A condemnation sets deaths back.
                    self._records[index]["deaths"] = worker.job.deaths + len(worker.job.condemned)
                    with contextlib.suppress(OSError):  # it died meanwhile: found out below
                        worker.connection.send((task, worker.job.argument, worker.job.condemned))
            busy = {worker.connection: index for index, worker in enumerate(self._workers) if worker.job is not None}
            if not busy:
                return
            for connection in wait(list(busy), POLL_SECONDS):
                index = busy[connection]  # type: ignore[index]
                worker = self._workers[index]
                try:
                    good, answer = worker.connection.recv()
                except (EOFError, OSError):
                    waiting.append(self._replace(index, ""))
                    continue
                if not good:
                    raise answer
                worker.job = None
                finished += int(self._records[index]["finished"])
                self._records[index]["finished"] = 0
                yield answer
            now = time.monotonic_ns()
            for index in busy.values():
                place = bytes(self._records[index]["reading"])  # before the time, which the worker sets first
                began, seconds = int(self._records[index]["began_ns"]), self._engine.image_seconds
                if is_url(place):  # the worker waits for the store, and says in the end what is the matter
                    seconds = max(seconds, given_up_seconds())
                if not began or now - began <= seconds * 1e9:
                    continue
                if place:  # the way to the images is blocked, so the next one would wait as long
                    raise AlexprepError(
                        f"{place.decode('utf-8', 'replace')} could not be read within {seconds:g} s: mend the disk or the "
                        "network, or raise --image-seconds, then run the same command again; finished shards are kept"
                    )
                waiting.append(self._replace(index, f"takes more than {seconds:g} s"))
            progress(finished + int(self._records["finished"].sum()))

    def _replace(self, index: int, reason: str) -> _Job:
        """A new worker in place of one that died, or that is ended for `reason`; returns its job, to be done again."""
        worker, row = self._workers[index], int(self._records[index]["row"])
        status = worker.end()
        job = worker.job
        assert job is not None
        self._workers[index] = self._start(index)
        job.deaths += 1
        if row >= 0:
            job.strikes[row] += 1
            if job.strikes[row] >= _STRIKES:
                job.condemned[row] = reason or f"ends the process that reads it ({_manner(status)})"
                job.deaths = 0
        if job.deaths >= _DEATHS:
            raise AlexprepError(
                f"a worker process ended {job.deaths} times in one shard ({_manner(status)}), never twice at the same "
                "input: if memory is short, use fewer --workers; then run the same command again, finished shards are kept"
            )
        return job


@dataclass
class _Job:
    """One task's argument on its way, with what is known of its inputs."""

    argument: Any
    condemned: dict[int, str] = field(default_factory=dict)
    strikes: Counter[int] = field(default_factory=Counter)
    deaths: int = 0


class _Worker:
    """One child process and the job that it has."""

    def __init__(self, records: int, index: int, memory_bytes: int) -> None:
        mine, theirs = socket.socketpair()
        arguments = (theirs.fileno(), records, index, os.getpid(), memory_bytes)
        boot = (
            f"import sys; sys.path[:] = {sys.path!r}; from alexprep.shards.worker_pool import serve; serve{arguments}"
        )
        with theirs:
            # Ctrl-C reaches the whole group: a worker holds it back until it can ignore it, which is after numpy is imported.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                self.process = subprocess.Popen([sys.executable, "-c", boot], pass_fds=(theirs.fileno(), records))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.connection: Connection[Any, Any] = Connection(mine.detach())
        self.job: _Job | None = None

    def end(self) -> int:
        """Kills the process; returns how it ended, as `subprocess` tells it."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()


def _manner(status: int) -> str:
    """How a process ended, in words: SIGSEGV, exit status 3."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    return f"exit status {status}"


# The worker's side.

_record: Any = np.zeros(1, _RECORD)[0]  # replaced by the shared one in a worker
_memory_bytes: int | None = None


@contextlib.contextmanager
def attending(*rows: int) -> Iterator[None]:
    """Around the work on inputs of a task: should the process die or hang in it, a single input is the suspect.

    Of several none is: the task is done again, and is then to take them one at a time (see `is_retry`).
    """
    _record["row"] = rows[0] if len(rows) == 1 else -1
    _record["began_ns"] = time.monotonic_ns()
    yield
    _record["began_ns"] = 0
    _record["row"] = -1
    _record["finished"] += len(rows)


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Around the reading of one input, inside `attending`: if it takes too long, `place` is to blame, and not the input.

    The time that is left for the input itself begins afterwards.
    """
    _record["began_ns"] = time.monotonic_ns()
    _record["reading"] = place.encode("utf-8", "backslashreplace")
    try:
        yield
    finally:
        _record["began_ns"] = time.monotonic_ns()
        _record["reading"] = b""


def is_retry() -> bool:
    """Whether a process has ended in the task at hand."""
    return bool(_record["deaths"])


def limit_memory(extra_bytes: int = 0) -> None:
    """Bounds what this worker may allocate from here on; beyond it allocations fail (MemoryError in Python).

    Called by a task once its tools are loaded, with what it keeps over what one input may need. Without effect in a process that is
    no worker, and after the first call.
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


def serve(pipe: int, records: int, index: int, parent: int, memory_bytes: int) -> None:
    """Runs tasks until the parent closes the pipe or dies; `pipe` and `records` are descriptors."""
    global _record, _memory_bytes
    with os.fdopen(records, "r+b") as memory:
        _record = np.memmap(memory, _RECORD, "r+")[index]
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
        _record["row"], _record["began_ns"], _record["finished"], _record["reading"] = -1, 0, 0, b""
        try:
            answer = (True, task(argument, condemned))
        except DeviceLostError:
            os.abort()  # the engine starts a new process, in which the GPU works again
        except AlexprepError as error:
            answer = (False, error)
        except BaseException as error:  # noqa: BLE001  (it is told where it can be handled, in words: not all can be sent)
            answer = (False, RuntimeError(f"{IN_A_WORKER}{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        try:
            connection.send(answer)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever the answer's own pickling raises; nothing has been sent)
            connection.send((False, RuntimeError(f"{IN_A_WORKER}{type(error).__name__}: {error}")))


def one_thread() -> None:
    """Keeps numpy's matrix products to one thread: parallel work here is by processes. (numpy must be loaded, and is.)"""
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def _reuse_memory() -> None:
    """Lets glibc's malloc keep the memory of an image for the next one: fresh pages for each cost 4 % of the time.

    pyarrow, which is imported later, takes its memory there too: the pages of a row group cost as much time as its reading.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 128 * 2**20)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
