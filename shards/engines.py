"""Runs independent tasks, one a shard, in worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from alexprep.shards.errors import AlexprepError

Result = TypeVar("Result")
_POLL_SECONDS = 0.2

# Set in each worker: the count of finished inputs that all workers share.
_finished: Any = None


def tick() -> None:
    """Counts one finished input, from inside a task."""
    if _finished is not None:
        with _finished.get_lock():
            _finished.value += 1


def cores() -> int:
    """The processor cores that this process may use (not those that the machine has)."""
    return len(os.sched_getaffinity(0))


def run_local(
    task: Callable[[Any], Result],
    arguments: Sequence[Any],
    workers: int,
    progress: Callable[[int], None] = lambda finished: None,
) -> Iterator[Result]:
    """Runs task(argument) for each argument in `workers` processes; yields results as they come, in any order.

    `task` and the arguments must be importable and picklable: workers are spawned, never forked, since the parent may
    hold threads. A worker leaves when its parent dies. Ctrl-C and exceptions end all workers at once.

    Args:
        task: a module-level function; calls `tick` once an input.
        arguments: one a task.
        workers: processes, at least 1.
        progress: called a few times a second with the number of finished inputs.

    Raises:
        AlexprepError: from the task; or a worker was killed.
    """
    if workers < 1:
        raise AlexprepError(f"--workers {workers} is less than 1")
    context = multiprocessing.get_context("spawn")
    finished = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        min(workers, max(1, len(arguments))), context, initializer=_start_worker, initargs=(os.getpid(), finished)
    )
    try:
        pending = {pool.submit(task, argument) for argument in arguments}
        while pending:
            done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            progress(finished.value)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise AlexprepError(
            "a worker process was killed (out of memory, or a decoder crashed): run the same command again, "
            "with fewer --workers if memory is short; finished shards are kept"
        ) from None
    finally:
        _end(pool)


def _end(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        with contextlib.suppress(Exception):  # it may have left already
            process.terminate()
    for process in processes:
        process.join(timeout=10)


def _start_worker(parent: int, finished: Any) -> None:
    global _finished
    _finished = finished
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    # Decoders written in C report every bad image on descriptor 2; the ledger has the reason. Python's own words go on.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    one_thread()


def one_thread() -> None:
    """Keeps numpy's matrix products to one thread: parallel work here is by processes."""
    import numpy  # noqa: F401  (its BLAS must be loaded before it can be limited)
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
