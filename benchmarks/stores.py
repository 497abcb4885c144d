"""How fast and how patiently sets are read from a store: an S3 server of moto's behind a proxy that counts, delays and fails.

python benchmarks/stores.py DATA [--moto PYTHON] [--older FOLDER] [--streaming PYTHON] [--litdata PYTHON] [--only PARTS] [--save]

DATA: shards and statistics, some 150 MB. It needs s3fs, and moto with its server, which may be in an environment of its own whose Python
--moto names. --older is another checkout's build/types; --streaming and --litdata are the Pythons of environments with MosaicML Streaming and
LitData. All that are named take turns. Prints the table as Markdown.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from common import command_line, report

from alexprep.pipeline.sampler import Order

HERE = Path(__file__).parent
STREAMS = "streams" in get_args(Order)  # the order in which each rank reads shards of its own
BATCH = 64
ROUNDS = 2
FAR = {"latency": 0.03, "rate": 20e6}
NEAR = {"latency": 0, "rate": 0}
SOUND = {"failing": 0, "cut": 0, "hanging": 0}
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
CACHED_SHARE = 0.4
AWAY_SECONDS = (10, 60)
RANKS = (1, 2, 4)
DEADLINE = 150.0  # seconds for one process
PEERS_DEADLINE = 40.0  # seconds for one whose cache is smaller than the set

DISK = "the disk"

Rows = dict[str, dict[str, Any]]  # what is measured → who → figure
Taken = dict[str, dict[str, Any]]  # in one round: who → what `store_reader.py` found


class Reader(NamedTuple):
    """Who reads."""

    name: str
    library: str  # of `store_reader.py`
    python: str = sys.executable
    types: Path | None = None  # an older checkout's build/types


class Reading:
    """A process that reads, see `store_reader.py`; killed at its deadline."""

    def __init__(self, who: Reader, url: str, job: dict[str, Any]) -> None:
        """Starts it."""
        environment = {**os.environ, "AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url}
        if who.types is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(who.types), os.environ.get("PYTHONPATH", "")])
        if who.python != sys.executable:
            environment.pop("PYTHONPATH", None)
        command = [who.python, str(HERE / "store_reader.py"), who.library, json.dumps({"batch": BATCH, **job})]
        self._told: dict[str, Any] = {}  # last
        pipe, self._deadline = subprocess.PIPE, float(job.get("deadline", DEADLINE))
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._timer = threading.Timer(self._deadline, self._process.kill)
        self._timer.start()

    def wait_for(self, event: str) -> None:
        """Until it tells of that, or has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._told = json.loads(line)
                if event in self._told:
                    return

    def go_on(self) -> None:
        """Lets it go on after its first batch, where the job has "hold"."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(file=self._process.stdin, flush=True)

    def found(self) -> dict[str, Any]:
        """What it found at the end, or "ended": by what kind of error."""
        assert self._process.stdout is not None
        self.wait_for("at the end")
        self._process.wait()
        self._timer.cancel()
        if self._process.returncode == 0:
            return self._told
        killed = self._process.returncode == -signal.SIGKILL
        return {
            "ended": f"did not end within {self._deadline:.0f} s" if killed else f"status {self._process.returncode}"
        }


class Store:
    """The server, and the proxy by which readers see it."""

    def __init__(self, data: Path, readers: list[Reader], server: int, proxy: subprocess.Popen[str]) -> None:
        """Puts the set into it, in the form of each library."""
        import s3fs

        assert proxy.stdout is not None
        self.data, self._proxy = data, proxy
        self.url = f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        self.bytes: dict[str, int] = {}
        direct = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{server}")
        direct.mkdir("bucket")
        for who in {reader.library: reader for reader in readers}.values():
            with tempfile.TemporaryDirectory() as folder:
                made = data
                if who.library != "alexprep":
                    made = Path(folder, who.library)
                    command = [who.python, str(HERE / "store_reader.py"), who.library, str(data / "train"), str(made)]
                    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
                    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                direct.put(str(made), f"bucket/{who.library}", recursive=True)
                shards = (made / "train").glob("*.tar") if made == data else made.rglob("*.*")
                self.bytes[who.library] = sum(path.stat().st_size for path in shards)
        seen = s3fs.S3FileSystem(endpoint_url=self.url)
        for path in seen.find("bucket"):  # which the proxy keeps: no figure has the server's own speed in it
            seen.cat_file(path)

    def behave(self, **behaviour: Any) -> int:
        """Sets how the proxy behaves; the bytes that it sent before."""
        assert self._proxy.stdin is not None and self._proxy.stdout is not None
        print(json.dumps(behaviour), file=self._proxy.stdin, flush=True)
        return int(json.loads(self._proxy.stdout.readline())["sent"])

    def start(self, who: Reader, **job: Any) -> Reading:
        """A process that reads two epochs, unless the job says otherwise."""
        order = "streams" if STREAMS and who.types is None else "blocks"
        usual = {"data": f"s3://bucket/{who.library}", "epochs": 2, "order": order}
        return Reading(who, self.url, usual | job)

    def read(self, who: Reader, ranks: int = 1, **job: Any) -> dict[str, Any]:
        """What it finds, and "sets": how many times the set was fetched meanwhile. Of several ranks what the first finds, or who failed."""
        self.behave()
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            if who.library != "alexprep":
                job = {"cache": f"{folder}/cache", **job}
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            jobs = [job if ranks == 1 else job | {"rank": rank, "world_size": ranks} for rank in range(ranks)]
            readings = [self.start(who, **each) for each in jobs]
            for reading in readings:
                reading.wait_for("read")
            sets = round(self.behave() / self.bytes[who.library], 2)
            all_found = [reading.found() for reading in readings]
        failed = [found for found in all_found if "ended" in found]
        return (failed or all_found)[0] | {"sets": sets}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def served(data: Path, readers: list[Reader], python: str) -> Iterator[Store]:
    """The store, holding the data."""
    port = free_port()
    server = subprocess.Popen(
        [python, "-c", "from moto.server import main; import sys; main(sys.argv[1:])", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    proxy = subprocess.Popen(
        [sys.executable, HERE / "store_proxy.py", str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield Store(data, readers, port, proxy)
    finally:
        for process in (proxy, server):
            process.kill()
            process.wait()


def speed(store: Store, readers: list[Reader], rows: Rows) -> None:
    """The disk, the store near and far, in turns; rates also as shares of the disk's in the same round."""
    ours, disk = readers[0], readers[0]._replace(name=DISK)
    rounds: list[Taken] = []
    for _ in range(ROUNDS):
        taken: Taken = {DISK: store.read(ours, data=str(store.data), resume=True, decode=True)}
        for who in readers:
            peer = who.library != "alexprep"  # which decodes slower, and is seen once
            if peer and rounds:
                continue
            if not peer:
                taken[f"near {who.name}"] = store.read(who, epochs=1, decode=True)
            store.behave(**FAR)
            taken[who.name] = store.read(who, resume=True, decode=True)
            store.behave(**NEAR)
        rounds.append(taken)
    for who in readers:
        add(rows, "no latency: images/s, × the disk's", who, median(rounds, beside(f"near {who.name}", 0)))
    far = "30 ms, 20 MB/s: "
    for who in (disk, *readers):
        for words, figure in FIGURES.items():
            add(rows, far + words, who, median(rounds, functools.partial(figure, who.name)))
        if who.library == "alexprep":
            for epoch, words in enumerate(("images/s, × the disk's", "images/s of the second epoch, × the disk's")):
                add(rows, far + words, who, median(rounds, beside(who.name, epoch)))
        add(rows, far + "ended", who, rounds[0][who.name].get("ended"))
    same = all(taken[ours.name].get("order") == taken[DISK]["order"] for taken in rounds)
    add(rows, far + "batches", ours, "those of the disk" if same else "OTHERS")


FIGURES: dict[str, Callable[[str, Taken], float]] = {
    "opening the set, s": lambda name, taken: taken[name]["opening"],
    "first batch, s": lambda name, taken: taken[name]["first"],
    "longest wait for any other, s": lambda name, taken: taken[name]["wait"],
    "resume in mid-epoch: first batch, s": lambda name, taken: taken[name]["resume"],
    "images/s": lambda name, taken: taken[name]["rates"][0],
    "images/s of the second epoch": lambda name, taken: taken[name]["rates"][1],
    "CPU time of two epochs, s": lambda name, taken: taken[name]["cpu"],
    "bytes of two epochs, × the set": lambda name, taken: taken[name]["sets"],
}


def beside(name: str, epoch: int) -> Callable[[Taken], float]:
    """A rate as a share of the disk's."""
    return lambda taken: float(taken[name]["rates"][epoch] / taken[DISK]["rates"][epoch])


def median(rounds: list[Taken], figure: Callable[[Taken], float]) -> float | None:
    """Of the rounds that have it; None where none does."""
    values = []
    for taken in rounds:
        with contextlib.suppress(LookupError):
            values.append(figure(taken))
    return round(statistics.median(values), 2) if values else None


def add(rows: Rows, row: str, who: Reader, figure: Any) -> None:
    """Takes a figure down."""
    if figure is not None:
        rows.setdefault(row, {})[who.name] = figure
        print(f"{row}: {who.name} {figure}", file=sys.stderr, flush=True)


def cache(store: Store, readers: list[Reader], rows: Rows) -> None:
    """With a cache for a part of the set. The first of three epochs has to fetch all of it once; what is more, the others did."""
    for who in readers:
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {
                "cache": f"{folder}/cache",
                "cache_limit": int(CACHED_SHARE * store.bytes[who.library]),
            }
            if who.types is None:
                if who.library != "alexprep":
                    options["deadline"] = PEERS_DEADLINE  # one of them fetches each shard for each sample
                found = store.read(who, epochs=3, **options)
                figure = (
                    f"{found['sets']} × and {found['ended']}" if "ended" in found else round((found["sets"] - 1) / 2, 2)
                )
                add(rows, f"cache of {CACHED_SHARE:.0%}: bytes of a later epoch, × the set", who, figure)


def ranks(store: Store, readers: list[Reader], rows: Rows) -> None:
    """Several ranks of this host, two epochs, without a cache and with one; in the order that gives ranks shards of their own, where there is one."""
    for who in readers:
        kinds: dict[str, dict[str, Any]] = {"no cache": {}, "a cache": {"cached": True}}
        if who.library != "alexprep":
            kinds = {"a cache": {}}  # they have no other way
        elif who.types is not None:
            kinds = {"no cache": {}}
        elif STREAMS:
            kinds['no cache, order "streams"'] = {"order": "streams"}
        for words, options in kinds.items():
            for count in RANKS if who is readers[0] else (2,):
                with tempfile.TemporaryDirectory() as folder:
                    given = {"cache": folder} if options.get("cached") else {}
                    found = store.read(who, count, **{"order": "blocks"} | options | given)
                row = f"{count} rank{'s' * (count > 1)}, {words}: bytes of two epochs, × the set"
                add(rows, row, who, found.get("ended", found["sets"]))


def faults(store: Store, readers: list[Reader], rows: Rows) -> None:
    """Failing, cut and hanging requests, and a store that is away: by s3 and by http, which must give the same order."""
    ours = readers[0]
    blocks: dict[str, Any] = {"order": "blocks"}  # which older versions know too
    order = store.read(ours, data=str(store.data), **blocks)["order"]
    http = {f"{who.name}, http": who for who in readers if who.library == "alexprep"}
    ways: list[tuple[str, Reader, dict[str, Any]]] = [(who.name, who, blocks) for who in readers]
    ways += [(name, who, {**blocks, "data": f"{store.url}/bucket/alexprep"}) for name, who in http.items()]

    def told(found: dict[str, Any], who: Reader) -> str:
        if "ended" in found:
            return f"ended after {found.get('after', '?')} s: {found['ended']}"
        same = found["order"] == order if who.library == "alexprep" else True
        return f"{'all batches' if same else 'OTHER BATCHES'}, longest wait {found['wait']:.1f} s"

    for words, behaviour in (
        ("5 % fail", {"failing": 0.05}),
        ("5 % are cut", {"cut": 0.05}),
        ("2 % hang", {"hanging": 0.02}),
    ):
        for name, who, options in ways:
            if words == "5 % fail" or who is ours:
                store.behave(**SOUND | behaviour)
                add(rows, words, who._replace(name=name), told(store.read(who, **options), who))
    store.behave(**SOUND)
    for seconds in AWAY_SECONDS:
        with tempfile.TemporaryDirectory() as folder:
            readings = []
            for number, (name, who, options) in enumerate(ways):
                kept = {} if who.library == "alexprep" else {"cache": f"{folder}/{number}"}
                readings.append((name, who, store.start(who, hold=True, **options, **kept)))
            for _, _, reading in readings:
                reading.wait_for("begun")
            store.behave(away=True)
            threading.Timer(seconds, lambda: store.behave(away=False)).start()
            for _, _, reading in readings:
                reading.go_on()
            for name, who, reading in readings:
                add(rows, f"away for {seconds} s", who._replace(name=name), told(reading.found(), who))


PARTS = {"speed": speed, "cache": cache, "ranks": ranks, "faults": faults}


def table(rows: Rows, names: list[str]) -> str:
    """The figures in Markdown."""
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, figures in rows.items():
        lines.append(f"| {row} | " + " | ".join(str(figures.get(name, "–")) for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures all parts, or those that are named."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--moto", default=sys.executable)
    parser.add_argument("--older", type=Path)
    parser.add_argument("--streaming")
    parser.add_argument("--litdata")
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, with commas")
    arguments = parser.parse_args()
    os.environ.update(CREDENTIALS)
    readers = [Reader("alexprep", "alexprep")]
    if arguments.older is not None:
        readers.append(Reader("alexprep before", "alexprep", types=arguments.older))
    readers += [
        Reader(name, name, getattr(arguments, name)) for name in ("streaming", "litdata") if getattr(arguments, name)
    ]
    rows: Rows = {}
    began = time.monotonic()
    with served(arguments.data, readers, arguments.moto) as store:
        rows["MB of the set"] = {who.name: round(store.bytes[who.library] / 1e6, 1) for who in readers}
        for part in arguments.only.split(","):
            PARTS[part](store, readers, rows)
    rows["seconds in all"] = {"alexprep": round(time.monotonic() - began)}
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    print(table(rows, names))
    report("stores", rows, arguments.save)


if __name__ == "__main__":
    main()
