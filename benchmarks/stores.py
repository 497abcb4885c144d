"""How fast and how patiently a Loader reads from a store: an S3 server of moto's behind a proxy that counts, delays and fails.

python benchmarks/stores.py DATA [--moto PYTHON] [--older FOLDER] [--save]

DATA: shards and statistics, some 150 MB. It needs s3fs, and moto with its server, which may be in an environment of its own whose Python
--moto names. --older is another checkout's build/types, whose Loader takes turns with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import command_line, report

BATCH = 64
BUCKET = "s3://bucket/set"
FAR = {"latency": 0.03, "rate": 20e6}
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
CACHED_SHARE = 0.4
AWAY_SECONDS = (10, 60)


def main() -> None:
    """Measures everything, or, as a process of its own, one Loader."""
    if "--measure" in sys.argv:
        print(json.dumps(measure(json.loads(sys.argv[-1]))))
        return
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--moto", default=sys.executable)
    parser.add_argument("--older", type=Path)
    parser.add_argument("--only", default="speed,cache,ranks,faults", help="which parts, with commas")
    arguments = parser.parse_args()
    os.environ.update(CREDENTIALS)
    figures: dict[str, Any] = {}
    with served(arguments.data, arguments.moto) as store:
        figures["MB of the set"] = round(store.bytes / 1e6, 1)
        for part in arguments.only.split(","):
            for name, found in PARTS[part](store, arguments):
                figures[name] = found
                print(f"{name}: {found}", file=sys.stderr, flush=True)
    report("stores", figures, arguments.save)


class Store:
    """The server, and the proxy by which Loaders see it."""

    def __init__(self, data: Path, server: int, proxy: subprocess.Popen[str]) -> None:
        import s3fs

        assert proxy.stdout is not None
        self.data, self._proxy = data, proxy
        self.url = f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        direct = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{server}")
        direct.mkdir("bucket")
        direct.put(str(data), BUCKET, recursive=True)
        seen = s3fs.S3FileSystem(endpoint_url=self.url)
        for path in seen.find("bucket"):  # which the proxy keeps: no figure has the server's own speed in it
            seen.cat_file(path)
        self.bytes = sum(path.stat().st_size for path in (data / "train").glob("*.tar"))

    def behave(self, **behaviour: Any) -> dict[str, int]:
        """Sets how the proxy behaves; what it counted before."""
        assert self._proxy.stdin is not None and self._proxy.stdout is not None
        self._proxy.stdin.write(json.dumps(behaviour) + "\n")
        self._proxy.stdin.flush()
        counted: dict[str, int] = json.loads(self._proxy.stdout.readline())
        return counted

    def loaded(self, types: Path | None = None, **job: Any) -> dict[str, Any]:
        """What `measure` finds in a process of its own, and what the proxy counted meanwhile."""
        with self.loading(types, **job) as process:
            pass
        return self.outcome(process)

    @contextlib.contextmanager
    def loading(self, types: Path | None = None, **job: Any) -> Iterator[subprocess.Popen[str]]:
        """The process, which is waited for at the end of the block."""
        self.behave()
        job = {"data": BUCKET, "order": "blocks", **job}
        environment = {**os.environ, "AWS_ENDPOINT_URL": self.url}
        if types is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(types), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--measure", json.dumps(job)]
        it = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        yield it
        it.wait()

    def outcome(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """What a process found, or its last words."""
        assert process.stdout is not None and process.stderr is not None
        lines, said = process.stdout.read().splitlines(), process.stderr.read().splitlines()
        counted = self.behave()
        found = json.loads(lines[-1]) if process.wait() == 0 else {"ended": said[-1] if said else "silently"}
        waiting = [line for line in said if "waiting for" in line or "answers after" in line]
        return {**found, "sets fetched": round(counted["sent"] / self.bytes, 2), "said": waiting[:1] + waiting[1:][-1:]}


@contextlib.contextmanager
def served(data: Path, python: str) -> Iterator[Store]:
    """The store, holding the data."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [python, "-c", "from moto.server import main; import sys; main(sys.argv[1:])", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    proxy = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "store_proxy.py", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield Store(data, port, proxy)
    finally:
        for process in (proxy, server):
            process.kill()
            process.wait()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """A Loader's epochs: of each the first batch, the longest wait and the CPU time, seconds, and images/s; and a resume in the middle of one."""
    import torch

    from alexprep.pipeline import Loader

    torch.set_num_threads(1)
    epochs, resume, sums = job.pop("epochs", 2), job.pop("resume", False), 0
    loader = Loader(batch_size=BATCH, augmentation="paper", memory_format="channels_last", threads=1, seed=1, **job)
    found: dict[str, Any] = {"first": [], "rate": [], "wait": [], "cpu": []}
    for _ in range(epochs):
        used = time.process_time()
        began = last = time.perf_counter()
        waits, images = [], 0
        for batch in loader:
            waits.append(time.perf_counter() - last)
            sums = (sums * 1_000_003 + int(batch.indices.sum()) * 31 + int(batch.labels.sum())) % 2**61
            images += len(batch.labels)
            last = time.perf_counter()
        found["cpu"].append(round(time.process_time() - used, 1))
        found["first"].append(round(waits[0], 2))
        found["wait"].append(round(max(waits[1:]), 2))
        found["rate"].append(round(images / (last - began)))
    found["order"] = sums
    if resume:
        loader.load_state_dict(loader.state_dict() | {"epoch": 5, "step": len(loader) // 2})
        began = time.perf_counter()
        next(iter(loader))
        found["resume"] = round(time.perf_counter() - began, 2)
    loader.close()
    return found


Parts = Iterator[tuple[str, Any]]


def speed(store: Store, arguments: argparse.Namespace) -> Parts:
    """The disk, and the store near and far; in turns with another checkout where one is named."""
    versions = {"": None} | ({", older": arguments.older} if arguments.older else {})
    for name, types in versions.items():
        yield f"disk{name}", store.loaded(types, data=str(store.data))
    for words, behaviour in (("near", {"latency": 0, "rate": 0}), ("30 ms, 20 MB/s a connection", FAR)):
        for name, types in versions.items():
            store.behave(**behaviour)
            yield f"{words}{name}", store.loaded(types, resume=True)
    store.behave(latency=0, rate=0)


def cache(store: Store, arguments: argparse.Namespace) -> Parts:
    """Far away, with a cache for all and for a part of the set."""
    store.behave(**FAR)
    for words, share in (("all", 1.0), (f"{CACHED_SHARE:.0%}", CACHED_SHARE)):
        with tempfile.TemporaryDirectory() as folder:
            job: dict[str, Any] = {"cache": folder, "cache_limit": int(share * store.bytes)}
            for number in ("first", "second"):
                yield f"cache of {words}, {number} run of an epoch", store.loaded(epochs=1, **job)
    store.behave(latency=0, rate=0)


def ranks(store: Store, arguments: argparse.Namespace) -> Parts:
    """Two ranks of this host, three epochs, without a cache and with one."""
    for words, options in (("no cache", {}), ("a cache", {"cache": tempfile.mkdtemp()})):
        store.behave()
        jobs: list[dict[str, Any]] = [{"rank": rank, "world_size": 2, "epochs": 3, **options} for rank in range(2)]
        with contextlib.ExitStack() as both:
            processes = [both.enter_context(store.loading(**job)) for job in jobs]
        first, second = (store.outcome(process) for process in processes)
        fetched = first["sets fetched"] + second["sets fetched"]
        yield (
            f"two ranks, three epochs, {words}",
            {"rates": [first.get("rate"), second.get("rate")], "sets fetched": fetched},
        )
        shutil.rmtree(options.get("cache", ""), ignore_errors=True)


def faults(store: Store, arguments: argparse.Namespace) -> Parts:
    """Failing, cut and hanging requests, and a store that is away: by s3 and by http, which must give the same order."""
    http = f"{store.url}/bucket/set"
    for protocol, data in (("s3", BUCKET), ("http", http)):
        for words, behaviour in (
            ("sound", {}),
            ("5 % fail", {"failing": 0.05}),
            ("5 % are cut", {"cut": 0.05}),
            ("2 % hang", {"hanging": 0.02}),
        ):
            store.behave(failing=0, cut=0, hanging=0)
            store.behave(**behaviour)
            yield f"{protocol}, {words}", store.loaded(data=data)
        store.behave(failing=0, cut=0, hanging=0)
        for seconds in AWAY_SECONDS:
            with store.loading(data=data, epochs=3) as process:
                time.sleep(5)
                store.behave(away=True)
                threading.Timer(seconds, lambda: store.behave(away=False)).start()
            yield f"{protocol}, away for {seconds} s", store.outcome(process)


PARTS = {"speed": speed, "cache": cache, "ranks": ranks, "faults": faults}


if __name__ == "__main__":
    main()
