"""Shards that are kept on a disk: whole or not at all, checked each time, one download a host, within the limit."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from alexprep.shards import shard_cache
from alexprep.shards.errors import AlexprepError
from alexprep.shards.shard_cache import ShardCache, bytes_of, chosen_cache, use_cache

NEVER = threading.Event()
SHARDS = [bytes([number]) * 1000 for number in range(1, 9)]


def digest(shard: bytes) -> str:
    return hashlib.sha256(shard).hexdigest()


class Store:
    """Counts what is downloaded."""

    def __init__(self, sent: bytes | None = None) -> None:
        self.downloads, self._sent, self._lock = 0, sent, threading.Lock()

    def get(self, cache: ShardCache, shard: bytes) -> bytes:
        return cache.get("store/shard.tar", digest(shard), len(shard), lambda: self._download(shard), NEVER)

    def _download(self, shard: bytes) -> bytes:
        with self._lock:
            self.downloads += 1
        return shard if self._sent is None else self._sent


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {shard_cache.LOCK}


def test_a_shard_is_downloaded_once_by_all(tmp_path: Path) -> None:
    """Threads of several caches over one folder stand for processes: their locks are as separate."""
    store, caches = Store(), [ShardCache(tmp_path) for _ in range(4)]
    jobs = [(cache, shard) for cache in caches for shard in SHARDS]
    random.Random(3).shuffle(jobs)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda job: store.get(*job), jobs))
    assert found == [shard for _, shard in jobs] and store.downloads == len(SHARDS)
    assert names(tmp_path) == {f"{digest(shard)}.tar" for shard in SHARDS}


def test_what_came_first_stays_within_the_limit(tmp_path: Path) -> None:
    store, caches = Store(), [ShardCache(tmp_path, 3999) for _ in range(3)]
    for _ in range(2):
        for cache in caches:
            assert [store.get(cache, shard) for shard in SHARDS] == SHARDS
    assert names(tmp_path) == {f"{digest(shard)}.tar" for shard in SHARDS[:3]}
    assert store.downloads == 3 + 6 * 5
    small = b"small"
    assert store.get(caches[0], small) == small and f"{digest(small)}.tar" in names(tmp_path)  # it still fits


@pytest.mark.parametrize("damage", [b"", b"\0" * 1000, SHARDS[1], b"x" * 1001, None])
def test_a_damaged_file_is_never_used_and_made_anew(damage: bytes | None, tmp_path: Path) -> None:
    store, cache = Store(), ShardCache(tmp_path, 1000)
    path = tmp_path / f"{digest(SHARDS[0])}.tar"
    if damage is None:
        os.mkfifo(path)  # opening it to read would wait for ever
    else:
        path.write_bytes(damage)
    assert store.get(cache, SHARDS[0]) == SHARDS[0] == path.read_bytes()
    assert store.get(cache, SHARDS[0]) == SHARDS[0] and store.downloads == 1


def test_what_is_not_what_was_recorded_passes_through_and_is_not_kept(tmp_path: Path, caplog: Any) -> None:
    store, cache = Store(sent=b"another"), ShardCache(tmp_path)
    assert store.get(cache, SHARDS[0]) == b"another" and names(tmp_path) == set()
    assert "store/shard.tar is not as its dataset.json tells" in caplog.text


def test_what_a_killed_process_left_is_no_lock_and_takes_no_room(tmp_path: Path) -> None:
    store, cache = Store(), ShardCache(tmp_path, 2000)
    for shard in SHARDS[:3]:
        (tmp_path / f"{digest(shard)}.part").write_bytes(b"half")
    assert store.get(cache, SHARDS[0]) == SHARDS[0] and store.get(cache, SHARDS[5]) == SHARDS[5]
    assert names(tmp_path) == {f"{digest(shard)}.tar" for shard in (SHARDS[0], SHARDS[5])}


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)

    def fail() -> bytes:
        raise AlexprepError("away")

    with pytest.raises(AlexprepError, match="away"):
        cache.get("x", digest(SHARDS[0]), 1000, fail, NEVER)
    assert names(tmp_path) == set()
    assert Store().get(cache, SHARDS[0]) == SHARDS[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_nothing_costs_no_shard(code: int, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    store, cache = Store(), ShardCache(tmp_path)
    assert store.get(cache, SHARDS[0]) == SHARDS[0]
    failing = {errno.ENOSPC: "ftruncate", errno.EIO: "rename", errno.EROFS: "open"}[code]
    real = getattr(os, failing)

    def fail(path: Any, *arguments: Any, **options: Any) -> Any:
        if failing == "open" and not str(path).endswith(".part'") and not str(path).endswith(".part"):
            return real(path, *arguments, **options)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, failing, fail)
    for _ in range(2):
        assert [store.get(cache, shard) for shard in SHARDS[:3]] == SHARDS[:3]
    assert store.downloads == 1 + 2 * 2 and names(tmp_path) == {f"{digest(SHARDS[0])}.tar"}
    assert caplog.text.count("takes no more shards") == 1 and os.strerror(code) in caplog.text


def test_a_disk_that_is_full_in_the_middle_of_a_shard(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    """By the kernel's bound on a file's size."""
    store, cache = Store(), ShardCache(tmp_path)
    monkeypatch.setattr(os, "ftruncate", lambda descriptor, size: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert store.get(cache, SHARDS[0]) == SHARDS[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == set() and "takes no more shards" in caplog.text
    assert store.get(cache, SHARDS[0]) == SHARDS[0] and names(tmp_path) == {f"{digest(SHARDS[0])}.tar"}


def test_who_may_write_in_the_folder_may_write_its_files(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        for mode, expected in ((0o777, 0o666), (0o770, 0o660), (0o755, 0o644), (0o700, 0o600)):
            folder = tmp_path / oct(mode)
            folder.mkdir()
            folder.chmod(mode)
            Store().get(ShardCache(folder), SHARDS[0])
            assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {expected}
    finally:
        os.umask(before)


def test_files_of_another_user(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    """A lock that may only be read, what a killed process of theirs has left, and a kept shard that may not even be read."""
    store, cache, real = Store(), ShardCache(tmp_path), os.open
    theirs = {shard_cache.LOCK: os.O_RDONLY, f"{digest(SHARDS[0])}.part": os.O_RDWR, f"{digest(SHARDS[1])}.tar": -1}
    for name in theirs:
        (tmp_path / name).write_bytes(b"half")

    def opened(path: Any, flags: int, *arguments: Any) -> int:
        allowed = theirs.get(os.path.basename(os.fsdecode(path)))
        if allowed is not None and not flags & os.O_EXCL and flags & os.O_ACCMODE not in (allowed, os.O_RDONLY):
            raise PermissionError(errno.EACCES, "Permission denied")
        if allowed == -1:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *arguments)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "geteuid", lambda: -1)
    assert store.get(cache, SHARDS[0]) == SHARDS[0] and store.get(cache, SHARDS[1]) == SHARDS[1]
    assert names(tmp_path) == {f"{digest(shard)}.tar" for shard in SHARDS[:2]} and not caplog.records
    assert store.get(cache, SHARDS[0]) == SHARDS[0] and store.downloads == 2


def test_what_is_left_is_removed_under_its_lock(tmp_path: Path, monkeypatch: Any) -> None:
    """Else another process might take it for its own in the instant between, and lose it."""
    left, held = tmp_path / f"{digest(SHARDS[1])}.part", []
    left.write_bytes(b"half")
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == left:
            with open(path, "rb+") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(path)
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    store, cache = Store(), ShardCache(tmp_path, 1000)
    assert store.get(cache, SHARDS[0]) == SHARDS[0] and held == [left] and not left.exists()


def test_a_shard_keeps_its_name_while_another_counts(tmp_path: Path) -> None:
    """Else it might be counted under neither name, and the limit exceeded."""
    store, cache, goes_on = Store(), ShardCache(tmp_path), threading.Event()
    part, lock = tmp_path / f"{digest(SHARDS[0])}.part", tmp_path / shard_cache.LOCK

    def download() -> bytes:
        assert goes_on.wait(60)
        return store._download(SHARDS[0])

    with ThreadPoolExecutor(1) as thread:
        getting = thread.submit(cache.get, "x", digest(SHARDS[0]), 1000, download, NEVER)
        while not (part.exists() and part.stat().st_size):
            assert not getting.done()
        with lock.open("rb+") as counting:
            fcntl.flock(counting, fcntl.LOCK_EX)
            goes_on.set()
            assert not NEVER.wait(0.1) and names(tmp_path) == {part.name}
        assert getting.result(60) == SHARDS[0] and names(tmp_path) == {f"{digest(SHARDS[0])}.tar"}


def test_a_process_forked_meanwhile_holds_no_lock(tmp_path: Path) -> None:
    store, cache, children = Store(), ShardCache(tmp_path, 10_000), []
    real = cache._bytes

    def forking() -> int:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)
        return real()

    cache._bytes = forking  # type: ignore[method-assign]
    try:
        assert store.get(cache, SHARDS[0]) == SHARDS[0]
        with (tmp_path / shard_cache.LOCK).open("rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_waiting_for_another_ends_when_it_is_to_stop(tmp_path: Path) -> None:
    store, cache, stop = Store(), ShardCache(tmp_path), threading.Event()
    part = tmp_path / f"{digest(SHARDS[0])}.part"
    with open(part, "wb") as other, ThreadPoolExecutor(1) as thread:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = thread.submit(cache.get, "x", digest(SHARDS[0]), 1000, lambda: store._download(SHARDS[0]), stop)
        assert not stop.wait(0.1) and not waiting.done()
        stop.set()
        assert waiting.result(60) == SHARDS[0] and part.exists()


def test_the_folder_and_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (shard_cache.CACHE, shard_cache.CACHE_LIMIT):
        monkeypatch.setenv(name, "")
    assert chosen_cache() is None
    use_cache(tmp_path / "deep/cache", bytes_of("1.5kB"))
    found = chosen_cache()
    assert found is not None and (found.folder, found.limit) == (tmp_path / "deep/cache", 1500)
    (tmp_path / "file").write_bytes(b"")
    for place, words in ((tmp_path / "file", "cannot be made"), ("s3://bucket/cache", "is no folder on a disk")):
        with pytest.raises(AlexprepError, match=words):
            ShardCache(place)
    for size in ("", "-1", "1e9", "GB", "5 PB", "nan"):
        with pytest.raises(AlexprepError, match="is no size"):
            bytes_of(size)


def test_an_empty_name_is_no_folder() -> None:
    """An unset variable of a shell must not make a cache of the folder where the command is run."""
    with pytest.raises(AlexprepError, match=r"--cache has an empty name: name a folder, \. for this one"):
        ShardCache("")
