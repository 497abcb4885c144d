"""Finished means renamed: files appear under their final name whole and on disk, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_MARK = ".tmp-"


@contextlib.contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to; it gets its name `path` only when the block ends without an exception.

    The order is: write under a temporary name in the same folder, fsync the file, rename, fsync the folder.
    After an exception the temporary file is removed and `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish_bytes(path: Path, data: bytes) -> None:
    """Writes `data` as the whole of `path`, atomically and durably."""
    with published(path) as file:
        file.write(data)


def publish_json(path: Path, document: Any, indent: int | None = 1) -> None:
    """Writes `document` as JSON with a final newline, atomically and durably; NaN and infinity are refused (ValueError)."""
    publish_bytes(path, (json.dumps(document, indent=indent, allow_nan=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Deletes what interrupted writers left in `folder` (not below it)."""
    for leftover in folder.glob(f".*{TEMPORARY_MARK}*"):
        leftover.unlink(missing_ok=True)


def digest_json(document: Any) -> str:
    """The sha256, in hex, of a document's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
