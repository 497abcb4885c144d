"""Faults to whole runs: random kills, full disks, other writers, decoders that misbehave."""

from __future__ import annotations

import collections
import functools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from faults_common import (
    OPTIONS,
    SMALL,
    Fingerprint,
    build_here,
    command,
    ended,
    fingerprint,
    finish,
    forked,
    kill_group,
    repeated,
    said,
    small_set,
    start,
    until,
    warm,
    wrong,
)

from alexprep.shards.conversion import convert, make_plan, predict
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.detection import find_source
from alexprep.shards.worker_pool import InProcessEngine


def random_kills(work: Path, rng: random.Random, kills: int, photos: Path) -> dict[str, Any]:
    """Sets that are killed 1 to 5 times each until there were `kills`: the command alone, one worker alone, or all.

    Where the command lives on after a worker's death it must finish by itself; otherwise the same command is run again.
    """
    source, out = photos, work / "out"
    words = command(source, out, "--shard-samples", "16", "--workers", "2")
    assert finish(start(words))[0] == 0
    shards = len(list(out.glob("*/*-*.json")))
    reference = fingerprint(out)
    inputs = _accounted(out)
    shutil.rmtree(out)
    counts: collections.Counter[str] = collections.Counter()
    while counts["kills"] < kills:
        counts["sets"] += 1
        process = start(words)
        for _ in range(rng.randint(1, 5)):
            goal = rng.randint(0, shards - 1)  # finished shards to wait for; 0: somewhere in the start
            until(lambda: len(list(out.glob("*/*-*.json"))) >= goal or process.poll() is not None)  # noqa: B023
            time.sleep(rng.uniform(0, 0.1 if goal else 1.0))
            workers = _children(process.pid)
            kind = rng.choice(["parent", "worker", "group"])
            if process.poll() is not None or (kind == "worker" and not workers):
                continue  # done already, or its workers have not begun
            counts["kills"] += 1
            counts[kind] += 1
            if kind == "worker":
                os.kill(rng.choice(workers), signal.SIGKILL)
                continue
            if kind == "parent":
                process.kill()
                process.communicate(timeout=60)
            else:
                kill_group(process)
            counts["unfinished"] += not (out / "dataset.json").exists()
            counts["partial"] += len(wrong(out, reference))
            process = start(words)
        status, _ = finish(process)
        counts["failed"] += status != 0
        equal = status == 0 and fingerprint(out) == reference
        counts["equal"] += equal
        counts["lost or doubled"] += 0 if equal else abs(inputs - _accounted(out))
        shutil.rmtree(out)
    return {
        "inputs": inputs,
        "sets": counts["sets"],
        "kills": counts["kills"],
        "of the command alone": counts["parent"],
        "of a worker alone": counts["worker"],
        "of the group": counts["group"],
        "kills of command or group in mid-work": counts["unfinished"],
        "partial files under a final name": counts["partial"],
        "last runs that failed": counts["failed"],
        "sets equal in every file": counts["equal"],
        "inputs lost or doubled": counts["lost or doubled"],
    }


def _children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def _accounted(out: Path) -> int:
    """The different inputs in all ledgers."""
    tables = [pq.read_table(table, columns=["source"]) for table in out.glob("*/samples.parquet")]
    return len({source for table in tables for source in table.column("source").to_pylist()})


def full_disk(work: Path, rng: random.Random, disks: int, photos: Path) -> dict[str, Any]:
    """tmpfs too small from the beginning, or that another program fills meanwhile; then with room; and the prediction."""
    source, disk = repeated(photos, work / "source", 2), work / "disk"
    disk.mkdir()
    out = disk / "out"
    words = command(source, out, "--shard-samples", "32", "--workers", "2")
    assert finish(start(command(source, work / "whole", "--shard-samples", "32", "--workers", "2")))[0] == 0
    reference = fingerprint(work / "whole")
    size = _bytes(work / "whole")
    counts: collections.Counter[str] = collections.Counter()
    for number in range(disks + 4):
        filled_meanwhile = number >= disks
        share = 2.0 if filled_meanwhile else rng.choice([0.002, rng.uniform(0.01, 0.9), rng.uniform(0.9, 1.0)])
        room = int(share * size) // 4096 * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], check=True)
        try:
            process = start(words)
            if filled_meanwhile:
                until(lambda: list(out.glob("*/*-*.json")) or process.poll() is not None)  # noqa: B023
                _fill(disk / "other")
            status, line = finish(process)
            counts["stopped"] += status == 1
            counts["predicted"] += "inputs will need about" in line
            counts["no space left"] += "No space left on device" in line and str(out) in line
            print(f"{share:.3f} of {size:,} bytes: {status} {line}")
            counts["partial"] += len(wrong(out, reference)) if out.exists() else 0
            (disk / "other").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
            status, line = finish(start(words))
            counts["equal"] += status == 0 and fingerprint(out) == reference
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return {
        "disks too small": disks,
        "disks that another program filled meanwhile": 4,
        "stopped with exit status 1": counts["stopped"],
        "said how much is needed, before any work": counts["predicted"],
        "said that no space is left, and where": counts["no space left"],
        "partial files under a final name": counts["partial"],
        "with room: equal in every file": counts["equal"],
        **_predictions(photos, work),
    }


def _fill(path: Path) -> None:
    """Takes all the room that is left."""
    try:
        with path.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass


def _predictions(photos: Path, work: Path) -> dict[str, Any]:
    """What `alexprep.shards.conversion.predict` says, over what the finished folder takes."""
    figures: dict[str, Any] = {}
    forms = [(4, Target(256)), (4, Target(128)), (4, Target(64, quality=75)), (12, Target(256, quality=60))]
    for times, target in [*forms, (1, Target(256)), (1, Target(96, format="png"))]:
        place = work / f"{times}-{target.size}"
        source, out, options = find_source(str(repeated(photos, place, times))), place / "out", ShardOptions(target)
        plan = make_plan(source, options, out)
        missing = plan.shards()
        said_bytes = predict(source, functools.partial(Codec, target), missing, plan.table(), InProcessEngine())
        before = _bytes(out)
        report = convert(source, out, options, 2)
        name = f"prediction / size, {report.inputs:,} photos of {target.size} pixels, {target.format} {target.quality}"
        figures[name] = said_bytes / (_bytes(out) - before)
    return figures


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def writers(work: Path, rng: random.Random, rounds: int) -> dict[str, Any]:
    """2 to 8 at once in one folder; in a third of the rounds some have other options. A quarter of the rounds use the command,
    the others forked processes without workers, which meet more often."""
    source, out = small_set(work / "source"), work / "out"
    sizes = {"8": OPTIONS, "7": ShardOptions(OPTIONS.target, shard_samples=7)}
    references: dict[str, Fingerprint] = {}
    warm(source, out)
    for name, options in sizes.items():
        assert ended(forked(lambda options=options: build_here(source, out, options))) == 0, said()  # type: ignore[misc]
        references[name] = fingerprint(out)
        shutil.rmtree(out)
    counts: collections.Counter[str] = collections.Counter()
    for turn in range(rounds):
        names = ["8" if turn % 3 else rng.choice("87") for _ in range(rng.randint(2, 8))]
        counts["writers"] += len(names)
        states: list[int] = []
        if turn % 4:
            gate = work / "gate"
            gate.unlink(missing_ok=True)
            children = [forked(functools.partial(_behind, gate, source, out, sizes[name])) for name in names]
            gate.touch()
            states = [ended(child) for child in children]
            refusals = [said()] if 1 in states else []
        else:
            words = [command(source, out, *SMALL[:3], name, *SMALL[4:]) for name in names]
            results = [finish(process) for process in [start(word) for word in words]]
            states = [status for status, _ in results]
            refusals = [line for status, line in results if status]
        won = {name for name, status in zip(names, states, strict=True) if status == 0}
        good = len(won) == 1 and all(
            status == (0 if name in won else 1) for name, status in zip(names, states, strict=True)
        )
        good &= all("was begun differently" in line for line in refusals)
        same = len(won) == 1 and fingerprint(out) == references[next(iter(won))]
        counts["rounds"] += 1
        counts["mixed"] += len(set(names)) > 1
        counts["good"] += good
        counts["equal"] += same
        counts["refused"] += sum(status == 1 for status in states)
        if not (good and same):
            print(names, states, refusals)
        shutil.rmtree(out)
    return {
        "rounds": counts["rounds"],
        "writers": counts["writers"],
        "rounds with different options": counts["mixed"],
        "writers refused": counts["refused"],
        "rounds in which all with the first's options succeed, and the others are refused": counts["good"],
        "rounds with the bytes of a single writer, every file": counts["equal"],
    }


def _behind(gate: Path, source: Path, out: Path, options: ShardOptions) -> None:
    until(gate.exists, 20)
    convert(source, out, options, InProcessEngine())
