"""fsspec's store in memory, memory://, made to fail as a test tells it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from alexprep.shards import patience

Fault = Callable[[str, bytes], bytes]  # (path, what the store holds) → what it sends, or an error


class FailingStore:
    """Whole files go through `fault`, if there is one, and are counted by their paths."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of the memory store's own reading."""
        self.fault: Fault | None = None
        self.asked: Counter[str] = Counter()
        lock, cat_file = threading.Lock(), MemoryFileSystem.cat_file

        def failing(system: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> bytes:
            with lock:
                self.asked[path] += 1
            data, fault = bytes(cat_file(system, path, *arguments, **options)), self.fault
            return data if fault is None else fault(path, data)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingStore]:
    """The store, sound at first; patience is a second, and pauses are of milliseconds.

    Nothing is under way at its beginning and its end: what a loader asked for that is closed would be counted in the next test.
    """
    wait_for_fetches()
    hurry(monkeypatch, 1)
    store = FailingStore(monkeypatch)
    yield store
    store.fault = None
    wait_for_fetches()


def wait_for_fetches() -> None:
    """Until no thread fetches any more."""
    deadline = time.monotonic() + 60
    while any(thread.name in ("alexprep-fetch", "alexprep-ask") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hurry(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.1) -> None:
    """Patience for so long, with pauses of milliseconds."""
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv(patience.VARIABLE, str(seconds))
