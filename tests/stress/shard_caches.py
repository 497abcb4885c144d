"""A cache of a store's shards whose processes are killed, whose disk is full, and whose files are damaged: no wrong byte is ever used."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from alexprep.shards.shard_cache import KEPT, UNFINISHED
from tests.stress.campaign import Campaign

SHARDS, BYTES = 24, 300_000
# Reads all shards over and over, in an order of its own; what it is given that is not the shard, it says with status 3.
READER = f"""
import hashlib, random, sys, threading, time
from alexprep.shards.shard_cache import ShardCache
folder, limit, seed, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
shards = [random.Random(n).randbytes({BYTES}) for n in range({SHARDS})]
digests = [hashlib.sha256(shard).hexdigest() for shard in shards]
cache, chance, stop = ShardCache(folder, limit), random.Random(seed), threading.Event()
def download(n):
    time.sleep(chance.uniform(0, 0.01))
    return shards[n]
print("ready", flush=True)
end = time.monotonic() + seconds
while True:
    for n in chance.sample(range(len(shards)), len(shards)):
        if cache.get("store", digests[n], len(shards[n]), lambda: download(n), stop) != shards[n]:
            sys.exit(3)
    if time.monotonic() > end:
        break
"""


def kill_readers(campaign: Campaign) -> None:
    """Four processes share a cache; one or all are killed at a random moment, and others go on: right bytes, no lock, no more than the limit."""
    for number in campaign.rounds(100):
        folder, limit = campaign.work / str(number // 10), BYTES * (SHARDS if number // 10 % 2 else SHARDS // 2)
        readers = [_start(folder, limit, campaign.rng.randrange(2**30), 60) for _ in range(4)]
        time.sleep(campaign.rng.uniform(0, 0.3))
        for reader in readers if campaign.rng.random() < 0.5 else readers[:1]:
            reader.send_signal(signal.SIGKILL)
            campaign.counts["killed"] += 1
        _expect(campaign, _start(folder, limit, number, 0), "a reader after a kill")  # one round over all shards
        for reader in readers:
            found = reader.poll()
            campaign.promise(found in (None, -signal.SIGKILL), "others went on", (number, found))
            reader.kill()
            reader.wait()
        _check(campaign, folder, limit)
        if campaign.rng.random() < 0.3:
            _damage(campaign, folder)


def full_disk(campaign: Campaign) -> None:
    """The cache's disk has room for a few shards: the others pass through."""
    disk = campaign.work / "disk"
    disk.mkdir()
    for number in campaign.rounds(5):
        size = f"size={(2 + number) * 4096 * (BYTES // 4096)}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)
        try:
            readers = [_start(disk / "cache", 2**40, number * 4 + n, 0) for n in range(3)]
            for reader in readers:
                _expect(campaign, reader, "a reader on a full disk")
            _check(campaign, disk / "cache", 2**40)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def _start(folder: Path, limit: int, seed: int, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", READER, str(folder), str(limit), str(seed), str(seconds)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert reader.stdout is not None
    reader.stdout.readline()
    return reader


def _expect(campaign: Campaign, reader: subprocess.Popen[bytes], who: str) -> None:
    try:
        found = reader.wait(120)
    except subprocess.TimeoutExpired:
        reader.kill()
        found = reader.wait()
    campaign.promise(found == 0, "read all shards, and rightly", (who, found))


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
