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

_REST_SECONDS = 0.3
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

    def _at_rest(self, seconds: float = 20) -> float:
        """Processor seconds that it has used, once it uses next to none: its queues are full."""
        end = time.monotonic() + seconds
        before, now = -1.0, self._processor()
        while now - before > 0.1 * _REST_SECONDS:
            if time.monotonic() > end:
                self.close()
                raise Missing("works on between its turns, and so would slow the others")
            time.sleep(_REST_SECONDS)
            before, now = now, self._processor()
        return now

    def _processor(self) -> float:
        """Processor seconds of its processes, and of those of them that have ended."""
        ticks = 0
        for pid in tree(self._process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
        return ticks / _TICK
