"""fsspec's store in memory, memory://, as a process that is killed leaves it: one operation is its last."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

from fsspec.implementations.memory import MemoryFileSystem

OPERATIONS = ("pipe_file", "cat_file", "rm_file", "makedirs", "ls", "info")


class Killed(BaseException):
    """The process ends here."""


@contextlib.contextmanager
def dying(after: int | None = None, torn: bool = False) -> Iterator[list[str]]:
    """Inside the block, the store takes so many operations; whoever wants one more is dead, also if it tries again. Gives their names.

    With `torn` the one that was too much, if it writes, leaves the first half, as in a store that is no object store.
    """
    done: list[str] = []
    lock = threading.Lock()

    def last(name: str) -> Any:
        do = getattr(MemoryFileSystem, name)

        def operation(system: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
            with lock:
                done.append(name)
                if after is not None and len(done) > after:
                    if torn and name == "pipe_file" and len(done) == after + 1:
                        do(system, path, arguments[0][: len(arguments[0]) // 2])
                    raise Killed
                return do(system, path, *arguments, **options)

        return operation

    with contextlib.ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(MemoryFileSystem, name, last(name)))
        yield done
