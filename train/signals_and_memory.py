"""The process that a training runs in: requests to stop, by signals, its memory, and names for what it does at a time.

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
from typing import Any

import torch
from torch.autograd.profiler import record_function

from alexprep.shards.errors import AlexprepError

recording = False  # set by `Trace` alone
_NOTHING = contextlib.nullcontext()

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


class Stopped(Exception):
    """Work was left because a signal asked for it."""


class StoppedAtOnce(BaseException):
    """Work was left in its middle because a signal asked for it; no `Exception`, so that libraries do not take it for their own."""


class StopRequest:
    """Whether SIGTERM, SIGINT or SIGHUP arrived: the first only sets `signal` and is handed on, a second has its usual effect.

    A second SIGHUP has none: a terminal that closes sends several, of which the last would end the process while it saves. The first
    has none either where it is ignored, as under nohup. Signals can be caught in the main thread only; elsewhere nothing is requested.
    """

    def __init__(self, hand_on: Callable[[int], None] = lambda number: None) -> None:
        """Nothing is requested yet; `hand_on` is called with the first signal."""
        self._hand_on = hand_on
        self.signal: signal.Signals | None = None
        self._at_once = False
        self._usual: dict[signal.Signals, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catches signals inside the block."""
        if threading.current_thread() is threading.main_thread():
            self._usual = {
                number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            }
        if self._usual.get(signal.SIGHUP) == signal.SIG_IGN:
            del self._usual[signal.SIGHUP]
        for number in self._usual:
            signal.signal(number, self._request)
        try:
            yield self
        finally:
            for number, handler in self._usual.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def heard_at_once(self) -> Iterator[None]:
        """Raises `StoppedAtOnce` where a first signal came, or as soon as it comes inside the block: for work of minutes that never looks at `signal`."""
        if self.signal is not None:
            raise StoppedAtOnce
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def take_effect(self) -> None:
        """Has the usual effect of the signal that was received, which the process may not outlive."""
        assert self.signal is not None
        signal.signal(self.signal, self._usual[self.signal])
        signal.raise_signal(self.signal)

    def check(self, codes: Sequence[int | None]) -> None:
        """Has the signal's usual effect here if a process died of it (exit code -signal), before it could listen itself."""
        if self.signal is not None and -self.signal in codes:
            self.take_effect()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for caught, handler in self._usual.items():
            signal.signal(caught, signal.SIG_IGN if caught == signal.SIGHUP else handler)
        self._hand_on(number)
        if self._at_once:
            raise StoppedAtOnce


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Inside the block, a GPU that is out of memory becomes a sentence."""
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


def span(name: str) -> contextlib.AbstractContextManager[object]:
    """Opens a named range in the trace; while none is recorded it does nothing, at the cost of a call.

    >>> with span("forward") as nothing:
    ...     print(nothing)
    None
    """
    return record_function(name) if recording else _NOTHING
