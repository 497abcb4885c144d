"""The machine a training runs on: how it keeps memory, that there is enough, and requests to stop."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch

from alexprep.shards.errors import AlexprepError

# -------------------- Signals of a launcher, handed on to its ranks.


def stop_signals() -> tuple[signal.Signals, ...]:
    """What asks a training to stop: SIGHUP too, which a closing terminal sends, unless it is ignored, as under nohup."""
    asked = signal.SIGTERM, signal.SIGINT
    return asked if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*asked, signal.SIGHUP)


class Process(Protocol):
    """What is needed of a `subprocess.Popen`."""

    def send_signal(self, sig: int) -> None:
        """Sends a signal, unless the process has ended."""

    def kill(self) -> None:
        """Ends it."""


class Forwarded:
    """Inside the block, the first SIGTERM, SIGINT or SIGHUP goes to every rank; a second ends them and has its usual effect.

    A second SIGHUP has none: a terminal that closes sends several.
    Signals can be caught in the main thread only; elsewhere nothing is forwarded.
    """

    def __init__(self, processes: Sequence[Process]) -> None:
        """To processes that may still be added."""
        self.processes = processes
        self.sent: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Forwarded:
        """Begins to catch."""
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Puts the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, codes: Sequence[int | None]) -> None:
        """Has the signal's usual effect here if a rank died of the one that was handed on, before it could listen."""
        if self.sent is not None and -self.sent in codes:
            self._usual(self.sent)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.sent is not None:
            if number != signal.SIGHUP:
                self._usual(self.sent)
            return
        self.sent = signal.Signals(number)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _usual(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.kill()
        signal.signal(number, self._previous[number])
        signal.raise_signal(number)


# -------------------- The machine a training runs on: how it keeps memory, that there is enough, and requests to stop.


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


class Stopped(Exception):
    """Work was left because a signal asked for it."""


class StopRequest:
    """Whether SIGTERM, SIGINT or SIGHUP arrived: the first only sets `signal`, a second one has its usual effect.

    A second SIGHUP has none: a terminal that closes sends several, of which the last would end the process while it saves.
    Signals can be caught in the main thread only; elsewhere nothing is ever requested.
    """

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self.signal: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catches signals inside the block."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.getsignal(number) for number in stop_signals()}

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number)
            for caught, handler in previous.items():
                signal.signal(caught, signal.SIG_IGN if caught == signal.SIGHUP else handler)

        for number in previous:
            signal.signal(number, remember)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Inside the block, a GPU that is out of memory becomes a sentence.

    Raises:
        AlexprepError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AlexprepError(f"{str(error).splitlines()[0]} Take a smaller --batch-size, or --precision bf16") from error


def keep_freed_memory() -> bool:
    """Tells glibc's malloc not to hand freed memory back to the system; true if it agreed.

    A training step frees and asks for the same gigabyte of activations again; each time the system must clear fresh pages.
    Keeping them makes an AlexNet step on two cores 1.3 times as fast, with channels last 3 times. The process keeps its peak size.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
