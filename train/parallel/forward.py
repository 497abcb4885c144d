"""Signals of a launcher, handed on to its ranks."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol


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
