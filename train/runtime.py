"""The process that a training runs in: requests to stop, by signals, and how it keeps memory and runs out of it.

What is done about a request is decided in `alexprep.train.trainer`; ranks are started in `alexprep.train.launch`.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

import torch

from alexprep.shards.errors import AlexprepError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
Handlers = dict[signal.Signals, Any]


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
        previous: Handlers = {}

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number)
            for caught, handler in previous.items():
                signal.signal(caught, signal.SIG_IGN if caught == signal.SIGHUP else handler)

        with _catching(remember, previous):
            yield self


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
        self._previous: Handlers = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Forwarded:
        """Begins to catch."""
        self._stack.enter_context(_catching(self._forward, self._previous))
        return self

    def __exit__(self, *error: object) -> None:
        """Puts the former handlers back."""
        self._stack.close()

    def check(self, codes: Sequence[int | None]) -> None:
        """Has the signal's usual effect here if a rank died of the one that was handed on, before it could listen."""
        if self.sent is not None and -self.sent in codes:
            self._usual_effect(self.sent)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.sent is not None:
            if number != signal.SIGHUP:
                self._usual_effect(self.sent)
            return
        self.sent = signal.Signals(number)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _usual_effect(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.kill()
        signal.signal(number, self._previous[number])
        signal.raise_signal(number)


@contextlib.contextmanager
def _catching(handler: Callable[[int, FrameType | None], None], previous: Handlers) -> Iterator[None]:
    """Inside the block, signals that ask for a stop go to `handler`; `previous` is filled with who had them before.

    SIGHUP, which a closing terminal sends, is one of them unless it is ignored, as under nohup.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.getsignal(number)
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


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
