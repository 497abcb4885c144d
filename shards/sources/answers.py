"""What a store's answers mean: which failures are the file's own, and which are those of the way to it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from alexprep.shards.errors import AlexprepError

_ABSENT = (404, 410)  # HTTP: not found, gone
Answer = TypeVar("Answer")


def asked(ask: Callable[[], Answer], where: str) -> Answer:
    """What a store answers. Errors name `where`: errno ENOENT if there is no such file, ECOMM if nothing is said of it."""
    try:
        return ask()
    except (PermissionError, IsADirectoryError, NotADirectoryError, MemoryError, AlexprepError):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
        if getattr(cause, "status", None) in _ABSENT or (isinstance(error, FileNotFoundError) and _is_absent(error)):
            raise FileNotFoundError(errno.ENOENT, "not found", where) from error
        raise OSError(errno.ECOMM, f"{type(cause).__name__}: {cause}", where) from error


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether the store says that there is no such file. fsspec's http calls whatever goes wrong so, and tells the cause."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return cause is None or _is_absent(cause)
    status = getattr(cause, "status", None)  # aiohttp's; what has a response has been looked into, as by s3fs
    return status in _ABSENT if status is not None else getattr(cause, "response", None) is not None
