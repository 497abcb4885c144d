"""Keeps shards of stores in a folder on this disk, for all processes and runs of a host that are given that folder.

CACHE/SHA256.tar    a shard, by its recorded sha256, so that copies of a dataset share it
CACHE/SHA256.part   one that is being fetched; its lock is the kernel's, and ends with the process that holds it
CACHE/lock          held while room is counted

A shard appears under its name whole, by a rename, and each time it is read its sha256 is checked: what a kill, a power cut or another user
may have left is fetched anew. Whatever is wrong with the disk, the shards come from the store as without a cache.

What came first stays, and what has no room passes through. Since every epoch reads every shard once, that is as good as knowing what comes
next: a cache of 40 % of the set spares 40 % of each epoch's downloads, where one that makes room for the newest shard spares next to nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from alexprep.shards.errors import AlexprepError, whole_number
from alexprep.shards.patience import store_patience
from alexprep.shards.storage import open_regular

CACHE = "ALEXPREP_CACHE"  # environment variable: the folder; worker processes and ranks inherit it
CACHE_LIMIT = "ALEXPREP_CACHE_LIMIT"  # likewise: bytes
KEPT, UNFINISHED, LOCK = ".tar", ".part", "lock"
_POLL_SECONDS = 0.02  # between two looks at a shard that another process fetches
_log = logging.getLogger("alexprep")


def use_cache(folder: str | Path, limit: int | None = None) -> None:
    """Lets this process, and those that it starts from now on, keep shards in a folder; AlexprepError where there can be no such folder."""
    cache = ShardCache(folder, limit)
    os.environ[CACHE] = str(cache.folder)
    if limit is not None:
        os.environ[CACHE_LIMIT] = str(limit)


def chosen_cache() -> ShardCache | None:
    """What `use_cache`, or the environment, has chosen; None for no cache."""
    folder, limit = os.environ.get(CACHE), os.environ.get(CACHE_LIMIT)
    if not folder:
        return None
    return ShardCache(folder, bytes_of(limit) if limit else None)


def bytes_of(size: str) -> int:
    """A number of bytes from its text, in thousands, as disks are sold; AlexprepError where it is none.

    >>> bytes_of("500"), bytes_of("1.5 kB"), bytes_of("40GB")
    (500, 1500, 40000000000)
    """
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kMGT]?)B?", size)
    if found is None:
        raise AlexprepError(f"{size!r} is no size: say how much may be kept, such as 500MB or 40GB")
    return round(float(found[1]) * 1000.0 ** " kMGT".index(found[2] or " "))


class ShardCache:
    """A folder of shards on this disk. Threads may share it."""

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        """Makes the folder if need be; `limit` is of the bytes in it, None for those of the disk. AlexprepError where there can be no such folder."""
        if "://" in str(folder):
            raise AlexprepError(
                f"--cache {folder} is no folder on a disk: name one, where shards of a store can be kept"
            )
        self.folder = Path(folder).absolute()
        self.limit = None if limit is None else whole_number("cache_limit", limit, 0, 2**63 - 1)
        self._too_large: int | None = None  # bytes for which there was no room; there will not be more of it
        self._complained = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlexprepError(
                f"--cache {folder} cannot be made ({error.strerror}): name a folder that can be written"
            ) from None

    def get(self, name: str, sha256: str, size: int, download: Callable[[], bytes], stop: threading.Event) -> bytes:
        """A shard's bytes: kept ones, or what `download` gives, which are then kept if there is room and they are what they should be.

        Where another process or thread of this host is downloading the same shard, that is waited for, until `stop` is set.
        """
        data = self._kept(sha256, size)
        if data is None and not self._is_full_for(size):
            with self._mine(sha256, stop) as part:
                data = self._kept(sha256, size) if part else None  # another may have brought it
                if data is None and part and self._reserved(part, sha256, size):
                    data = download()
                    if hashlib.sha256(data).hexdigest() == sha256:
                        self._keep(part, sha256, data)
                    else:
                        _log.warning(
                            "%s is not as its dataset.json tells, and is not kept: see `alexprep verify`", name
                        )
        return download() if data is None else data

    def _is_full_for(self, size: int) -> bool:
        return self._too_large is not None and size >= self._too_large

    def _path(self, sha256: str, ending: str = KEPT) -> Path:
        return self.folder / f"{sha256}{ending}"

    def _kept(self, sha256: str, size: int) -> bytes | None:
        """A kept shard; None where there is none. A damaged one is removed, and makes room."""
        path = self._path(sha256)
        try:
            with open_regular(os.fsencode(path)) as file:
                data = file.read() if os.fstat(file.fileno()).st_size == size else b""
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        except FileNotFoundError:
            return None
        except OSError:
            pass
        with contextlib.suppress(OSError):
            path.unlink()
            self._too_large = None
        return None

    @contextlib.contextmanager
    def _mine(self, sha256: str, stop: threading.Event) -> Iterator[BinaryIO | None]:
        """The locked file in which a shard is to be made, removed at the end unless it was kept; None where there is none."""
        part = self._path(sha256, UNFINISHED)
        file = self._locked(part, sha256, stop)
        try:
            yield file
        finally:
            if file is not None:
                with contextlib.suppress(OSError):
                    if _is_at(file, part):
                        part.unlink()
                file.close()

    def _locked(self, part: Path, sha256: str, stop: threading.Event) -> BinaryIO | None:
        deadline = time.monotonic() + store_patience()
        while True:
            file: BinaryIO | None = None
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                file = os.fdopen(os.open(part, flags, 0o666), "r+b")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, part):  # else it was finished, or tidied away, in the instant before the lock
                    return file
            except BlockingIOError:
                if stop.wait(_POLL_SECONDS) or time.monotonic() > deadline:
                    _close(file)
                    return None
            except OSError as error:
                self._complain(error)
                _close(file)
                return None
            _close(file)

    def _reserved(self, part: BinaryIO, sha256: str, size: int) -> bool:
        """Whether there is room for a shard; it then counts already."""
        try:
            with open(self.folder / LOCK, "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self.limit is not None and self._bytes() + size > self.limit:
                    self._too_large = size
                    return False
                os.ftruncate(part.fileno(), size)
        except OSError as error:
            self._complain(error)
            return False
        return True

    def _bytes(self) -> int:
        """What the folder holds; what writers that were killed have left is removed."""
        total = 0
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                if entry.name.endswith(UNFINISHED) and _is_abandoned(entry.path):
                    os.unlink(entry.path)
                elif entry.name.endswith((KEPT, UNFINISHED)):
                    total += entry.stat(follow_symlinks=False).st_size
        return total

    def _keep(self, part: BinaryIO, sha256: str, data: bytes) -> None:
        try:
            part.write(data)
            part.flush()
            os.rename(self._path(sha256, UNFINISHED), self._path(sha256))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._too_large = len(data)
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            _log.warning(
                "%s takes no more shards (%s): those that are not in it come from the store each time",
                self.folder,
                error.strerror or error,
            )


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _is_abandoned(path: str) -> bool:
    """Whether nobody holds the lock of a file."""
    with open_regular(os.fsencode(path)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _close(file: BinaryIO | None) -> None:
    if file is not None:
        file.close()
