"""Shards on a Ray cluster whose workers and nodes are killed at random; every run must end with the local engine's bytes.

python benchmarks/ray_faults.py SOURCE [--runs 10] [--save]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import report

from alexprep.shards.conversion import convert
from alexprep.shards.plan import ShardOptions
from alexprep.shards.ray_runner import RayEngine
from alexprep.shards.worker_pool import Progress, Result, Task

OPTIONS = ShardOptions(shard_samples=32)
NODES = 2


@dataclass(frozen=True)
class Counting:
    """A Ray engine that writes a byte to `log` whenever a task begins, and knows how many there are."""

    engine: RayEngine
    log: Path

    def run(self, task: Task[Result], arguments: Sequence[Any], progress: Progress) -> Iterator[Result]:
        """See `Engine`."""
        import ray_faults  # by its name, under which the workers know it

        self.log.with_suffix(".tasks").write_text(str(len(arguments)))
        return self.engine.run(functools.partial(ray_faults.counted, self.log, task), arguments, progress)


def counted(log: Path, task: Task[Result], argument: Any, condemned: Mapping[int, str]) -> Result:
    """The task, noted."""
    with open(log, "ab") as file:
        file.write(b".")
    return task(argument, condemned)


def main() -> None:
    """Each run: a fresh folder, two or three workers and one node killed at random moments, a new node before the next run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=12, help="how often each image is seen, as links")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    # Ray on the loopback interface alone, and its workers with this module at hand.
    os.environ |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    from ray.cluster_utils import Cluster

    rng = random.Random(arguments.seed)
    work = Path(tempfile.mkdtemp())
    images = _repeat(arguments.source, work / "source", arguments.repeat)
    undisturbed = convert(work / "source", work / "reference", OPTIONS, NODES)
    reference = _fingerprint(work / "reference")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(NODES):
        cluster.add_node(num_cpus=1)
    tasks = attempts = equal = 0
    kills = {"worker": 0, "node": 0}
    seconds = []
    for _ in range(arguments.runs):
        out, log = work / "out", work / "log"
        engine = Counting(RayEngine(cluster.address), log)
        disturber = threading.Thread(target=_disturb, args=(cluster, out, undisturbed.inputs, rng, kills), daemon=True)
        disturber.start()
        seconds.append(convert(work / "source", out, OPTIONS, engine).seconds)
        disturber.join(timeout=60)
        while len(cluster.worker_nodes) < NODES:
            cluster.add_node(num_cpus=1)
        tasks += int(log.with_suffix(".tasks").read_text())
        attempts += log.stat().st_size
        equal += _fingerprint(out) == reference
        shutil.rmtree(out)
        log.unlink()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    shutil.rmtree(work)
    figures = {
        "runs": arguments.runs,
        "images a run": images,
        "workers killed": kills["worker"],
        "nodes killed": kills["node"],
        "tasks": tasks,
        "attempts at tasks": attempts,
        "runs with the local engine's bytes, every file": equal,
        "local engine, undisturbed, s": undisturbed.seconds,
        "Ray, disturbed, mean s a run": sum(seconds) / len(seconds),
        "seed": arguments.seed,
    }
    report("ray_faults", figures, arguments.save)
    sys.exit(0 if equal == arguments.runs else 1)


def _disturb(cluster: Any, out: Path, inputs: int, rng: random.Random, kills: dict[str, int]) -> None:
    """Kills when so many shards are finished, up to nine tenths of them."""
    shards = -(-inputs // 32)
    moments = sorted(rng.sample(range(1, shards * 9 // 10), rng.randint(3, 4)))
    node_at = rng.choice(moments)
    deadline = time.monotonic() + 300
    for moment in moments:
        while len(list(out.glob("*/*-*.json"))) < moment and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        if moment == node_at:
            cluster.remove_node(rng.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
            kills["node"] += 1
        elif workers := _workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                kills["worker"] += 1


def _workers() -> list[int]:
    """Ray's processes at work: they are called after their task."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::_in_ray_worker"):
                found.append(int(folder.name))
    return sorted(found)


def _repeat(source: Path, target: Path, times: int) -> int:
    """A tree with every file of `source` several times; returns how many files."""
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in files:
        folder = target / path.relative_to(source).parent
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(times):
            (folder / f"{n}-{path.name}").symlink_to(path.resolve())
    return len(files) * times


def _fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
