"""Fetches whole shards from a store ahead of their use, in threads of its own.

Which shards come next is known to `alexprep.pipeline.read_ahead`; samples are cut out of them by `sample_reader`, and what was fetched may be
kept on a disk by `shard_cache`.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import StoreError
from alexprep.shards.patience import answer_seconds, patiently, whole_file
from alexprep.shards.shard_cache import ShardCache

FETCHES = 16  # shards on their way at the same time; `storage.CONNECTIONS` are not fewer
_RECENT = 16  # downloads by which the next one is judged
_SLOWER = 10  # times as long as the median of these it may take,
_AT_LEAST = 5.0  # seconds, and so long in any case
_CUT = 3  # times that a shard may come shorter than it is recorded


class RemoteShard(NamedTuple):
    """A shard in a store, with what its dataset says of it."""

    path: Path  # a `StorePath`
    bytes: int | None = None
    sha256: str | None = None


class ShardFetcher:
    """Whole shards by their numbers, held in memory while they are wanted.

    A download that fails is asked again as long as the patience lasts; then `get` raises, and the next `get` begins anew: no failure
    stays. To be used by one thread.

    Attributes:
        cache: where shards are kept on a disk; None for nowhere.
    """

    def __init__(self, shards: Mapping[int, RemoteShard]) -> None:
        """Nothing is fetched yet."""
        self.cache: ShardCache | None = None
        self._shards = shards
        self._held: OrderedDict[int, Future[NDArray[np.uint8]]] = OrderedDict()
        self._wanted: Sequence[int] = ()
        self._queue, self._process = _Queue(), os.getpid()

    def __del__(self) -> None:
        """Ends what is under way; in a forked process there is nothing, and a lock may be as the fork found it."""
        if getattr(self, "_process", None) == os.getpid():
            self._queue.close()

    def want(self, shards: Sequence[int]) -> None:
        """Says which shards are to be held from now on, in the order in which they will be needed. Returns at once."""
        self._wanted = shards
        for shard in self._held.keys() - set(shards):
            self._drop(shard)
        for shard in shards:
            self._future(shard)

    def get(self, shard: int) -> NDArray[np.uint8]:
        """All bytes of a shard, uint8 (bytes,), waited for; AlexprepError where it cannot be had."""
        future = self._future(shard, first=True)
        if shard not in self._wanted:  # one such besides what is wanted
            for other in [each for each in self._held if each not in self._wanted and each != shard]:
                self._drop(other)
        try:
            return future.result()
        except BaseException:
            if future.done():  # and not a Ctrl-C while it was waited for
                self._held.pop(shard, None)  # the next one to ask tries again
            raise

    def close(self) -> None:
        """Ends what is under way; what is fetched already stays the caller's. The fetcher can be used again."""
        self._queue.close()
        self._held.clear()
        self._wanted, self._queue = (), _Queue()

    def _drop(self, shard: int) -> None:
        self._held.pop(shard).cancel()

    def _future(self, shard: int, first: bool = False) -> Future[NDArray[np.uint8]]:
        """The shard on its way; asked anew where it failed, and `first` of all that wait."""
        future = self._held.get(shard)
        if future is not None and not first and future.done() and future.exception() is not None:
            future = None
        if future is None:
            future = self._held[shard] = Future()
            self._queue.add(_Job(self._shards[shard], self.cache, future), first)
        elif first and not future.running() and not future.done():
            self._queue.hurry(future)
        return future


class _Job(NamedTuple):
    shard: RemoteShard
    cache: ShardCache | None
    future: Future[NDArray[np.uint8]]


class _Queue:
    """Downloads that wait, and the threads that take them; a thread without work ends."""

    def __init__(self) -> None:
        self._waiting: deque[_Job] = deque()
        self._threads = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._pace = _Pace()

    def add(self, job: _Job, first: bool) -> None:
        with self._lock:
            (self._waiting.appendleft if first else self._waiting.append)(job)
            if self._threads == FETCHES:
                return
            self._threads += 1
        # No pool of the library's: their threads keep a process from ending while a store is away.
        threading.Thread(target=self._work, name="alexprep-fetch", daemon=True).start()

    def hurry(self, future: Future[Any]) -> None:
        """Moves what is needed now in front of all that wait."""
        with self._lock:
            jobs = sorted(self._waiting, key=lambda job: job.future is not future)
            self._waiting = deque(jobs)

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            for job in self._waiting:
                job.future.cancel()
            self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                shard, cache, future = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._fetched(shard, cache))
            except BaseException as error:  # noqa: BLE001  (raised where the shard is needed)
                future.set_exception(error)

    def _fetched(self, shard: RemoteShard, cache: ShardCache | None) -> NDArray[np.uint8]:
        def download() -> bytes:
            if self._closed.is_set():  # while the cache waited for another process
                raise CancelledError
            return self._download(shard)

        if cache is None or shard.bytes is None or shard.sha256 is None:
            return np.frombuffer(download(), np.uint8)
        return np.frombuffer(cache.get(str(shard.path), shard.sha256, shard.bytes, download, self._closed), np.uint8)

    def _download(self, shard: RemoteShard) -> bytes:
        path: Any = shard.path
        name, came = str(path), []

        def ask() -> bytes:
            data = whole_file(path.fs, path.path)
            came.append(len(data))
            if shard.bytes is not None and len(data) < shard.bytes and len(came) < _CUT:
                raise OSError(f"{len(data):,} of {shard.bytes:,} bytes came")
            return data

        began = time.monotonic()
        try:
            data = patiently(ask, name, self._closed, lambda: self._pace.allowed(shard.bytes))
        except OSError as error:
            absent = isinstance(error, FileNotFoundError)
            again = "`alexprep verify` tells more" if absent else "see to the network and the permissions, then go on"
            raise StoreError(f"{name} cannot be read ({error.strerror or error}): {again}") from None
        self._pace.took(time.monotonic() - began, len(data))
        return data


class _Pace:
    """How long downloads take, by which one that hangs is told."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds a byte

    def took(self, seconds: float, size: int) -> None:
        self._recent.append(seconds / max(1, size))

    def allowed(self, size: int | None) -> float:
        """Seconds that a download of so many bytes may take before it is asked for again."""
        recent = list(self._recent)
        if size is None or len(recent) < _RECENT // 2:
            return answer_seconds(size or 0)
        return max(_AT_LEAST, _SLOWER * statistics.median(recent) * size)
