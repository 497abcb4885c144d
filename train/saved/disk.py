"""A disk that is full or broken, in words."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import publish_bytes

FULL = (errno.ENOSPC, errno.EDQUOT)
GO_ON = "go on with --resume; checkpoints that were saved before are untouched"


@contextlib.contextmanager
def writing(path: Path, size: int | None = None, next_step: str = GO_ON) -> Iterator[None]:
    """Inside the block, a file of a run is written, or a folder is changed.

    Args:
        path: of the file or folder.
        size: bytes that it needs, if that is known.
        next_step: what the user can do when the cause of a failure is mended.

    Raises:
        AlexprepError: in place of `OSError`; it names the file, and where there is no room, the bytes needed and the bytes free.
    """
    try:
        yield
    except OSError as error:
        remedy = "mend that"
        if error.errno in FULL:
            needs = "" if size is None else f"it needs {size:,} bytes, "
            with contextlib.suppress(OSError):
                needs += f"{shutil.disk_usage(path.parent).free:,} are free, "
            remedy = f"{needs}make room"
        raise AlexprepError(
            f"{path} cannot be written ({error.strerror or error}): {remedy} and {next_step}"
        ) from error


def publish(path: Path, data: bytes, next_step: str = GO_ON) -> None:
    """Writes a file of a run, atomically and durably; makes its folder.

    Raises:
        AlexprepError: as `writing`; what was there before is untouched.
    """
    with writing(path, len(data), next_step):
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_bytes(path, data)
