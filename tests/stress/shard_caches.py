"""A cache of a store's shards whose processes are killed, whose disk is full, whose files are damaged, and which users share: no wrong byte is ever used."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from alexprep.shards.shard_cache import KEPT, UNFINISHED, ShardCache
from tests.stress.campaign import Campaign, exit_status, forked, said

SHARDS, BYTES = 24, 300_000
NO_LIMIT = 2**40
GROUP, USERS = 60_000, (60_001, 60_002)  # which need not be known to the system


@functools.cache
def shards() -> dict[str, bytes]:
    """What the store holds, by sha256."""
    contents = [random.Random(number).randbytes(BYTES) for number in range(SHARDS)]
    return {hashlib.sha256(content).hexdigest(): content for content in contents}


def read(folder: Path, limit: int, seed: int, seconds: float, offline: bool = False) -> None:
    """Reads all shards over and over, in an order of its own; what it is given that is not the shard is an AssertionError."""
    cache, chance, stop = ShardCache(folder, limit), random.Random(seed), threading.Event()
    end = time.monotonic() + seconds

    def download(digest: str) -> bytes:
        assert not offline, f"{digest} is not kept"
        time.sleep(chance.uniform(0, 0.01))
        return shards()[digest]

    while True:
        for digest in chance.sample(sorted(shards()), SHARDS):
            data = cache.get("store", digest, BYTES, functools.partial(download, digest), stop)
            assert data == shards()[digest], f"a wrong {digest}"
        if time.monotonic() > end:
            return


def kill_readers(campaign: Campaign) -> None:
    """Four processes share a cache; one or all are killed at a random moment, and others go on: right bytes, no lock, no more than the limit."""
    for number in campaign.rounds(100):
        folder, limit = campaign.work / str(number // 10), BYTES * (SHARDS if number // 10 % 2 else SHARDS // 2)
        readers = [_start(folder, limit, campaign.rng.randrange(2**30)) for _ in range(4)]
        _kill_some(campaign, readers)
        _expect(campaign, _start(folder, limit, number, 0), "a reader after a kill")  # one round over all shards
        _end(campaign, readers)
        _check(campaign, folder, limit)
        if campaign.rng.random() < 0.3:
            _damage(campaign, folder)


def users(campaign: Campaign) -> None:
    """Two users share a folder, whoever may write in it, whatever their umask; readers are killed: no run ends, and what may be shared is."""
    for folder in (campaign.work, campaign.work.parent):
        folder.chmod(0o711)
    for number in campaign.rounds(40):
        folder, mode = campaign.work / str(number), (0o1777, 0o2775, 0o755, 0o700)[number % 4]
        folder.mkdir()
        os.chown(folder, USERS[0], GROUP)
        folder.chmod(mode)
        umasks = [campaign.rng.choice((0o077, 0o022, 0o002)) for _ in USERS]
        users = list(zip(USERS, umasks, strict=True))
        readers = [_start(folder, NO_LIMIT, number, user=user) for user in users * 2]
        _kill_some(campaign, readers)
        for user in users:
            _expect(campaign, _start(folder, NO_LIMIT, number, 0, user=user), (oct(mode), user))
        _end(campaign, readers)
        _check(campaign, folder, NO_LIMIT)
        for user in users if mode != 0o700 else users[:1]:
            offline = _start(folder, NO_LIMIT, number, 0, user=user, offline=True)
            _expect(campaign, offline, (oct(mode), user, "without the store"))


def full_disk(campaign: Campaign) -> None:
    """The cache's disk has room for a few shards: the others pass through."""
    disk = campaign.work / "disk"
    disk.mkdir()
    for number in campaign.rounds(5):
        size = f"size={(2 + number) * 4096 * (BYTES // 4096)}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)
        try:
            readers = [_start(disk / "cache", NO_LIMIT, number * 4 + n, 0) for n in range(3)]
            for reader in readers:
                _expect(campaign, reader, "a reader on a full disk")
            _check(campaign, disk / "cache", NO_LIMIT)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def _start(
    folder: Path, limit: int, seed: int, seconds: float = 60, user: tuple[int, int] | None = None, offline: bool = False
) -> int:
    """A process that reads, as a user with a umask if one is given."""
    shards()  # once for all

    def work() -> None:
        logging.getLogger("alexprep").setLevel(logging.ERROR)
        if user is not None:
            os.setgroups([])
            os.setgid(GROUP)
            os.setuid(user[0])
            os.umask(user[1])
        read(folder, limit, seed, seconds, offline)

    return forked(work)


def _kill_some(campaign: Campaign, readers: Sequence[int]) -> None:
    """One or all, at a random moment."""
    time.sleep(campaign.rng.uniform(0, 0.3))
    for reader in readers if campaign.rng.random() < 0.5 else readers[:1]:
        os.kill(reader, signal.SIGKILL)
        campaign.counts["killed"] += 1


def _end(campaign: Campaign, readers: Sequence[int]) -> None:
    """Ends those that live, as all do that were not killed."""
    for reader in readers:
        os.kill(reader, signal.SIGKILL)
        found = exit_status(reader)
        campaign.promise(found == -signal.SIGKILL, "others went on", (found, said()))


def _expect(campaign: Campaign, reader: int, who: object) -> None:
    found = exit_status(reader)
    campaign.promise(found == 0, "read all shards, and rightly", (who, found, said()))


def _check(campaign: Campaign, folder: Path, limit: int) -> None:
    """What is kept is whole, within the limit, and nobody holds a lock."""
    kept = list(folder.glob(f"*{KEPT}"))
    damaged = [path for path in kept if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem]
    campaign.promise(not damaged, "all that was kept is whole", damaged)
    size = sum(path.stat().st_size for path in kept)
    campaign.promise(size <= limit, "kept within the limit", (size, limit))
    for path in folder.glob(f"*{UNFINISHED}"):
        with path.open("rb+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                free = False
        campaign.promise(free, "what a kill left is not locked", path)
    campaign.counts["shards found kept"] += len(kept)


def _damage(campaign: Campaign, folder: Path) -> None:
    """Cuts a kept shard, or changes a byte of it."""
    kept = sorted(folder.glob(f"*{KEPT}"))
    if not kept:
        return
    path = campaign.rng.choice(kept)
    with path.open("rb+") as file:
        if campaign.rng.random() < 0.5:
            os.truncate(path, campaign.rng.randrange(BYTES))
        else:
            at = campaign.rng.randrange(BYTES)
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
    campaign.counts["damaged"] += 1
