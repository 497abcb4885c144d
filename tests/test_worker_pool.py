"""Worker processes: what reaches them and what does not. Inputs that end them are in test_faults.py."""

from __future__ import annotations

import contextlib
import math
import signal
import time

import pytest

from alexprep.shards.errors import AlexprepError
from alexprep.shards.worker_pool import LocalEngine, WorkerPool


def _echo(argument: int, condemned: object) -> int:
    return argument


def _unpicklable(argument: int, condemned: object) -> object:
    return lambda: argument


def test_an_answer_that_cannot_be_sent_is_told() -> None:
    """The worker lives on: its end would be told as a lack of memory."""
    told = pytest.raises(RuntimeError, match=r"in a worker: .*_unpicklable")
    with contextlib.closing(WorkerPool(LocalEngine(1), 1)) as crew, told:
        list(crew.run(_unpicklable, [1], lambda finished: None))


def test_ctrl_c_never_reaches_a_worker(capfd: pytest.CaptureFixture[str]) -> None:
    """Not even one that has not yet imported what it needs, when its own words would be a traceback."""
    with contextlib.closing(WorkerPool(LocalEngine(2), 2)) as crew:
        for _ in range(20):
            for worker in crew._workers:
                worker.process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert [worker.process.poll() for worker in crew._workers] == [None, None]
        assert sorted(crew.run(_echo, [1, 2, 3], lambda finished: None)) == [1, 2, 3]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_seconds_that_are_none_are_refused(seconds: float) -> None:
    with pytest.raises(AlexprepError, match=r"--image-seconds .* is not above 0"):
        LocalEngine(1, image_seconds=seconds)
