"""Keeps shards of stores in a folder on this disk, for all processes and runs of a host that are given that folder.

CACHE/SHA256.tar    a shard, by its recorded sha256, so that copies of a dataset share it
CACHE/SHA256.part   one that is being fetched; its lock is the kernel's, and ends with the process that holds it
CACHE/lock          held while room is counted, and at each rename, lest a shard be counted under neither name

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
from io import FileIO
from pathlib import Path

from alexprep.shards.errors import AlexprepError, whole_number
from alexprep.shards.patience import store_patience
from alexprep.shards.storage import open_regular

CACHE = "ALEXPREP_CACHE"  # environment variable: the folder; worker processes and ranks inherit it
CACHE_LIMIT = "ALEXPREP_CACHE_LIMIT"  # likewise: bytes
KEPT, UNFINISHED, LOCK = ".tar", ".part", "lock"
_POLL_SECONDS = 0.02  # between two looks at a shard that another process fetches
_COUNTING_SECONDS = 10.0  # that room may be counted by others, which takes milliseconds unless one of them was stopped
_log = logging.getLogger("alexprep")


def use_cache(folder: str | Path, limit: int | None = None) -> None:
    """Lets this process, and those that it starts from now on, keep shards in a folder; AlexprepError where there can be no such folder."""
    cache = ShardCache(folder, limit)
    os.environ[CACHE] = str(cache.folder)
    if limit is not None:
        os.environ[CACHE_LIMIT] = str(limit)


def check_limit(folder: object, limit: int | None) -> None:
    """Raises AlexprepError where a limit is given for no folder."""
    if limit is not None and folder is None:
        raise AlexprepError(
            f"--cache-limit {limit} has no effect without --cache: name the folder with --cache FOLDER, or leave the limit out"
        )


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
        if not str(folder):  # an unset variable of a shell; it would be the folder of the caller's own files
            raise AlexprepError("--cache has an empty name: name a folder, . for this one")
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
                if data is None and part and self._reserved(part, size):
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
        except (FileNotFoundError, PermissionError):
            return None
        except OSError:
            pass
        with contextlib.suppress(OSError):
            path.unlink()
            self._too_large = None
        return None

    @contextlib.contextmanager
    def _mine(self, sha256: str, stop: threading.Event) -> Iterator[FileIO | None]:
        """The locked file in which a shard is to be made, removed at the end unless it was kept; None where there is none."""
        part = self._path(sha256, UNFINISHED)
        file = self._locked(part, stop)
        try:
            yield file
        finally:
            if file is not None:
                with contextlib.suppress(OSError):
                    if _is_at(file, part):
                        part.unlink()
                _close(file)

    def _locked(self, part: Path, stop: threading.Event) -> FileIO | None:
        deadline = time.monotonic() + store_patience()
        while True:
            file: FileIO | None = None
            try:
                file, is_new = self._opened(part)
                if not _lock(file, deadline, stop):
                    _close(file)
                    return None
                if _is_at(file, part):  # else it was finished, or tidied away, before the lock
                    if is_new or os.fstat(file.fileno()).st_uid == os.geteuid():
                        return file
                    part.unlink()  # of a user whose process is gone; not everywhere could it be written and renamed
            except OSError as error:
                self._complain(error)
                _close(file)
                return None
            _close(file)

    def _opened(self, path: Path) -> tuple[FileIO, bool]:
        """A file to be locked, and whether it is new; whoever may write in the folder may write to a new one."""
        while True:
            try:
                file = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                with contextlib.suppress(OSError):
                    os.fchmod(file.fileno(), self.folder.stat().st_mode & 0o666)
                return file, True
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):  # it was finished, or tidied away, meanwhile
                    try:
                        return _open(path, os.O_RDWR), False  # NFS gives an exclusive lock on nothing else
                    except PermissionError:
                        return _open(path, os.O_RDONLY), False

    @contextlib.contextmanager
    def _counting(self) -> Iterator[bool]:
        """Inside, nobody else counts what the folder holds, or renames what counts; False where another one does for too long."""
        lock, _ = self._opened(self.folder / LOCK)
        try:
            yield _lock(lock, time.monotonic() + _COUNTING_SECONDS, threading.Event())
        finally:
            _close(lock)

    def _reserved(self, part: FileIO, size: int) -> bool:
        """Whether there is room for a shard; it then counts already."""
        try:
            with self._counting() as alone:
                os.ftruncate(part.fileno(), 0)
                if not alone:
                    return False
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
            kept = entry.name.endswith(KEPT) or (entry.name.endswith(UNFINISHED) and not _removed(Path(entry.path)))
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size if kept else 0
        return total

    def _keep(self, part: FileIO, sha256: str, data: bytes) -> None:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[part.write(rest) :]
            with self._counting() as alone:
                if alone:
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


def _open(path: Path, flags: int) -> FileIO:
    """A file without a buffer, which could not be emptied onto a full disk; never what a link leads to, nor one that waits for a writer."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    return FileIO(descriptor, "rb" if flags == os.O_RDONLY else "r+b")


def _lock(file: FileIO, deadline: float, stop: threading.Event) -> bool:
    """Waits for a file's lock; False where the wait is to stop, or is over."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if stop.wait(_POLL_SECONDS) or time.monotonic() > deadline:
                return False


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _removed(part: Path) -> bool:
    """Removes what a process that is gone has left; False where one lives and holds its lock, and where it cannot be removed."""
    try:
        with _open(part, os.O_RDWR) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, part):
                part.unlink()  # under the lock, so that who waits for it sees that it is gone
    except OSError:
        return False
    return True


def _close(file: FileIO | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open as well
        with contextlib.suppress(OSError):  # what a network file system tells only now
            file.close()
