"""The other side of serve.py: starts a contestant in an environment of its own, and gives it its turns."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import CONTESTANTS, Missing, tree

_LOOKS, _LOOK_SECONDS = 5, 0.04  # that find nothing at work, one after the other: then it is at rest
_TICK = os.sysconf("SC_CLK_TCK")
# Libraries take the number of their threads from these when they are loaded: OpenMP (torch), BLAS, numba (FFCV).
_THREADS = ("OMP", "MKL", "OPENBLAS", "NUMBA", "NUMEXPR")


@dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        rate: images/s.
        cpu: images a second of processor time, of all the contestant's processes; from rest to rest, so that what was made
            ahead counts neither for it nor against it.
    """

    rate: float
    cpu: float


class Live:
    """A contestant that stays alive and works only in its turns; contestants/serve.py is its other side.

    Attributes:
        about: what it said when it was ready: "work", "versions", "delivers".
    """

    def __init__(
        self, python: str, script: str, words: list[str], threads: int, pin: bool, seconds: float = 600
    ) -> None:
        """Starts contestants/SCRIPT.py, `threads` for its libraries, and waits until it is ready.

        Raises:
            Missing: it ended, or was not ready in time.
        """
        told = dict.fromkeys((f"{name}_NUM_THREADS" for name in _THREADS), str(threads))
        told["OPENCV_FOR_THREADS_NUM"] = str(threads)
        self._open = contextlib.ExitStack()
        self._log = Path(self._open.enter_context(tempfile.TemporaryDirectory())) / "log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"contestants.{script}", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | told,
                cwd=CONTESTANTS.parent,
            )
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            self._open.enter_context(stream)
        if pin:
            os.sched_setaffinity(self._process.pid, sorted(os.sched_getaffinity(0))[:threads])
        self.about = self._answer(seconds)

    def turn(self, skip: int, steps: int, seconds: float = 600) -> Turn:
        """Has `steps` batches made and timed, after `skip` uncounted ones that use up what was made ahead.

        Raises:
            Missing: it ended, did not answer in time, or never rests.
        """
        before = self._at_rest()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"skip": skip, "steps": steps}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is in the log
        said = self._answer(seconds)
        return Turn(said["images"] / said["seconds"], said["all"] / (self._at_rest() - before))

    def close(self) -> None:
        """Ends it."""
        processes = tree(self._process.pid)
        with contextlib.suppress(BrokenPipeError):
            self._open.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            for pid in reversed(processes):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()

    def _answer(self, seconds: float) -> dict[str, Any]:
        """Its next line that is an answer."""
        assert self._process.stdout is not None
        line = b""
        while not line.startswith(b"{"):
            waiting, _, _ = select.select([self._process.stdout], [], [], seconds)
            line = self._process.stdout.readline() if waiting else b""
            if not line:
                last = (self._log.read_text().strip().splitlines() or ["it ended without a word"])[-1]
                reason = f"failed: {last}" if waiting else f"did not answer within {seconds:g} s"
                self.close()
                raise Missing(reason)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _at_rest(self, seconds: float = 60) -> float:
        """Processor seconds that it has used, once it waits: its queues are full.

        A thread that the machine has no time for is runnable, and so not at rest, however little it has done of late.
        """
        end = time.monotonic() + seconds
        looks = 0
        while looks < _LOOKS:
            if time.monotonic() > end:
                self.close()
                raise Missing("works on between its turns, and so would slow the others")
            time.sleep(_LOOK_SECONDS)
            looks = 0 if self._working() else looks + 1
        return self._processor()

    def _working(self) -> bool:
        """Whether any thread of its processes runs, could run, or waits for a disk."""
        for pid in tree(self._process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for task in os.listdir(f"/proc/{pid}/task"):
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        if _stat(f"/proc/{pid}/task/{task}/stat")[0] in "RD":
                            return True
        return False

    def _processor(self) -> float:
        """Processor seconds of its processes, and of those of them that have ended."""
        ticks = 0
        for pid in tree(self._process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                ticks += sum(map(int, _stat(f"/proc/{pid}/stat")[11:15]))
        return ticks / _TICK


def _stat(file: str) -> list[str]:
    """What the system tells of a process or thread: its state, and then numbers, of which the eleventh on are its processor time."""
    return Path(file).read_text().rpartition(")")[2].split()
