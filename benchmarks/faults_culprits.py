"""A decoder that crashes, hangs or eats memory at some of many inputs."""

from __future__ import annotations

import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from faults_common import small_set

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.worker_pool import LocalEngine

# What is appended to an image, and how its end is told.
MISDEEDS = {
    "segv": "ends the process that reads it (SIGSEGV)",
    "abort": "ends the process that reads it (SIGABRT)",
    "hang": "takes more than 5 s",
    "hoard": "needs more memory than a worker may have",
    "malloc": "ends the process that reads it (SIGABRT)",
}


def culprits(work: Path, rng: random.Random, count: int) -> dict[str, Any]:
    """`count` of 1,000 images end the process; the shards must be those of a set in which these images are empty files."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # workers inherit it
    from planted import Planted  # type: ignore[import-not-found]

    source = small_set(work / "source", 1000)
    shutil.copytree(source, work / "empty")
    images = sorted(path.relative_to(source) for path in source.rglob("*.jpg") if path.stat().st_size > 100)
    chosen = {path: list(MISDEEDS)[n % len(MISDEEDS)] for n, path in enumerate(rng.sample(images, count))}
    for path, word in chosen.items():
        with open(source / path, "ab") as file:
            file.write(word.encode().rjust(8, b"."))
        (work / "empty" / path).write_bytes(b"")
    options = ShardOptions(Target(size=64), shard_samples=64)
    start = time.monotonic()
    convert(source, work / "out", options, LocalEngine(2, image_seconds=5, image_bytes=300 * 2**20), make_codec=Planted)
    seconds = time.monotonic() - start
    convert(work / "empty", work / "without", options, 2)
    rows = [row for table in (work / "out").glob("*/samples.parquet") for row in pq.read_table(table).to_pylist()]
    reasons = {row["source"]: row["reason"] for row in rows if row["status"] == "rejected"}
    expected = {str(path): MISDEEDS[word] for path, word in chosen.items()}
    other = {name: reason for name, reason in reasons.items() if name not in expected}
    for name, reason in expected.items():
        if reasons.get(name) != reason:
            print(f"{name}: {reason!r} expected, {reasons.get(name)!r} found")
    tars = [{path.name: path.read_bytes() for path in (work / name).glob("*/*.tar")} for name in ("out", "without")]
    return {
        "inputs": len(rows),
        "inputs that crash, hang or eat memory": count,
        "rejected with the right reason": sum(reasons.get(name) == reason for name, reason in expected.items()),
        "rejected besides: files that are no images": len(other),
        "written": sum(row["status"] == "written" for row in rows),
        "tars equal to those of a set where these inputs are empty": sum(
            tars[0].get(name) == content for name, content in tars[1].items()
        ),
        "tars": len(tars[1]),
        "digests equal": read_dataset(work / "out")["digest"] == read_dataset(work / "without")["digest"],
        "seconds": seconds,
    }
