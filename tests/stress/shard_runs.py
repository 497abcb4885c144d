"""Faults to whole runs that make shards: random kills, full disks, several writers, decoders that misbehave, lost machines."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from alexprep.shards.conversion import convert, make_plan, predict
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.worker_pool import InProcessEngine, LocalEngine
from tests.stress.campaign import (
    OPTIONS,
    SMALL,
    Campaign,
    Fingerprint,
    command,
    convert_here,
    draw_pictures,
    exit_status,
    fingerprint,
    finish,
    forked,
    kill_group,
    load_modules,
    repeated,
    said,
    start,
    until,
)
from tests.stress.misbehaving import MISDEEDS, Misbehaving

IMAGE_SECONDS = 600  # far more than a sound image takes, also on a busy machine; those that hang seem to take more


def kill_at_random(campaign: Campaign) -> None:
    """Sets that are killed 1 to 5 times each until there were 300: the command alone, one worker alone, or all.

    Where the command lives on after a worker's death it must finish by itself; otherwise the same command is run again.
    """
    rng, counts, out = campaign.rng, campaign.counts, campaign.work / "out"
    words = command(campaign.photos, out, "--shard-samples", "16", "--workers", "2")
    assert finish(start(words))[0] == 0
    shards = len(list(out.glob("*/*-*.json")))
    reference, inputs = fingerprint(out), _inputs_in_ledgers(out)
    shutil.rmtree(out)
    for _ in campaign.rounds(10**6):
        if counts["kills"] >= 300:
            break
        process = start(words)
        for _ in range(rng.randint(1, 5)):
            goal = rng.randint(0, shards - 1)  # finished shards to wait for; 0: somewhere in the start
            until(lambda: len(list(out.glob("*/*-*.json"))) >= goal or process.poll() is not None)  # noqa: B023
            time.sleep(rng.uniform(0, 0.1 if goal else 1.0))
            workers = _children(process.pid)
            kind = rng.choice(["the command", "a worker", "the group"])
            if process.poll() is not None or (kind == "a worker" and not workers):
                continue  # done already, or its workers have not begun
            counts["kills"] += 1
            counts[f"kills of {kind}"] += 1
            if kind == "a worker":
                os.kill(rng.choice(workers), signal.SIGKILL)
                continue
            if kind == "the command":
                process.kill()
                process.communicate()
            else:
                kill_group(process)
            counts["kills of command or group in mid-work"] += not (out / "dataset.json").exists()
            if out.exists():
                campaign.no_partial_files(out, reference)
            process = start(words)
        status, line = finish(process)
        campaign.promise(status == 0 and fingerprint(out) == reference, "sets equal in every file", (status, line))
        campaign.promise(_inputs_in_ledgers(out) == inputs, "sets with every input once")
        shutil.rmtree(out)


def _children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    with contextlib.suppress(OSError):
        return [int(word) for word in path.read_text().split()]
    return []


def _ledgers(out: Path) -> list[dict[str, Any]]:
    return [row for table in sorted(out.glob("*/samples.parquet")) for row in pq.read_table(table).to_pylist()]


def _inputs_in_ledgers(out: Path) -> list[str]:
    return sorted(row["source"] for row in _ledgers(out))


def full_disk(campaign: Campaign) -> None:
    """tmpfs too small from the beginning, or that another program fills meanwhile; then there is room."""
    rng, disk = campaign.rng, campaign.work / "disk"
    source, out = repeated(campaign.photos, campaign.work / "source", 1 if campaign.hurried else 2), disk / "out"
    words = command(source, out, "--shard-samples", "32", "--workers", "2")
    assert finish(start(command(source, campaign.work / "whole", *words[-4:])))[0] == 0
    reference, size = fingerprint(campaign.work / "whole"), _bytes(campaign.work / "whole")
    disk.mkdir()
    for number in campaign.rounds(16):
        filled_meanwhile = number % 4 == 1
        share = 2.0 if filled_meanwhile else rng.choice([0.002, rng.uniform(0.01, 0.9), rng.uniform(0.9, 1.0)])
        room = max(1, int(share * size) // 4096) * 4096  # 0 would be no bound
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], check=True)
        try:
            process = start(words)
            if filled_meanwhile:
                until(lambda: list(out.glob("*/*-*.json")) or process.poll() is not None)  # noqa: B023
                _fill(disk / "other")
            status, line = finish(process)
            predicted = "inputs will need about" in line
            campaign.counts["said how much is needed, before any work"] += predicted
            told = status == 1 and (predicted or ("No space left on device" in line and str(out) in line))
            campaign.promise(told, "stopped with one line that says so", (share, status, line))
            if out.exists():
                campaign.no_partial_files(out, reference)
            (disk / "other").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(disk)], check=True)
            status, line = finish(start(words))
            campaign.promise(status == 0 and fingerprint(out) == reference, "with room: equal in every file", line)
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def _fill(path: Path) -> None:
    """Takes all the room that is left."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def predictions(campaign: Campaign) -> None:
    """The room that is said to be needed before the work, over what the finished folder takes."""
    forms = [(4, Target(256)), (4, Target(128)), (4, Target(64, quality=75)), (12, Target(256, quality=60))]
    for times, target in campaign.some([*forms, (1, Target(256)), (1, Target(96, format="png"))]):
        times = min(times, 2) if campaign.hurried else times
        place = campaign.work / f"{times}-{target.size}-{target.quality}"
        out, options = place / "out", ShardOptions(target)
        source = find_source(str(repeated(campaign.photos, place / "source", times)))
        plan = make_plan(source, options, out)
        missing = list(plan.each_shard())
        predicted = predict(source, functools.partial(Codec, target), missing, plan.table(), InProcessEngine())
        before = _bytes(out)
        report = convert(source, out, options, 2)
        ratio = predicted / (_bytes(out) - before)
        print(f"{report.inputs:,} photos of {target.size} pixels, {target.format} {target.quality}: {ratio:.3f}")
        campaign.promise(0.9 < ratio < 1.1, "predictions within a tenth of the size", (target, ratio))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def several_writers(campaign: Campaign) -> None:
    """2 to 8 at once in one folder; in a third of the rounds some have other options.

    A quarter of the rounds use the command, the others forked processes without workers, which meet more often.
    """
    rng, out = campaign.rng, campaign.work / "out"
    source = draw_pictures(campaign.work / "source", 40)
    sizes = {"8": OPTIONS, "7": ShardOptions(OPTIONS.target, shard_samples=7)}
    references: dict[str, Fingerprint] = {}
    load_modules(source, out)
    for name, options in sizes.items():
        assert exit_status(forked(lambda options=options: convert_here(source, out, options))) == 0, said()  # type: ignore[misc]
        references[name] = fingerprint(out)
        shutil.rmtree(out)
    for turn in campaign.rounds(100):
        names = ["8" if turn % 3 else rng.choice("87") for _ in range(rng.randint(2, 8))]
        if turn % 4 != 3:
            gate = campaign.work / "gate"
            gate.unlink(missing_ok=True)
            children = [forked(functools.partial(_once_there, gate, source, out, sizes[name])) for name in names]
            gate.touch()
            states = [exit_status(child) for child in children]
            refusals = [said()] if 1 in states else []
        else:
            words = [command(source, out, *SMALL[:3], name, *SMALL[4:]) for name in names]
            results = [finish(process) for process in [start(word) for word in words]]
            states = [status for status, _ in results]
            refusals = [line for status, line in results if status]
        won = {name for name, status in zip(names, states, strict=True) if status == 0}
        good = len(won) == 1 and states == [0 if name in won else 1 for name in names]
        good &= all("was begun differently" in line for line in refusals)
        campaign.counts["writers"] += len(names)
        campaign.counts["writers refused"] += states.count(1)
        campaign.promise(good, "rounds in which those with the first's options succeed, the others not", refusals)
        same = len(won) == 1 and fingerprint(out) == references[next(iter(won))]
        campaign.promise(same, "rounds with the bytes of a single writer", (names, states))
        shutil.rmtree(out)


def _once_there(gate: Path, source: Path, out: Path, options: ShardOptions) -> None:
    until(gate.exists)
    convert(source, out, options, InProcessEngine())


def bad_decoders(campaign: Campaign) -> None:
    """20 of 1,000 images, or 8 of 200, end or stall the process that decodes them; the shards are as if these were empty files."""
    work = campaign.work
    count, bad = (200, 8) if campaign.hurried else (1000, 20)
    source = draw_pictures(work / "source", count)
    shutil.copytree(source, work / "empty")
    images = sorted(path.relative_to(source) for path in source.rglob("*.jpg") if path.stat().st_size > 100)
    chosen = dict(zip(campaign.rng.sample(images, bad), itertools.cycle(MISDEEDS)))
    for path, word in chosen.items():
        with open(source / path, "ab") as file:
            file.write(word.encode().rjust(8, b"."))
        (work / "empty" / path).write_bytes(b"")
    options = ShardOptions(Target(size=64), shard_samples=64)
    engine = LocalEngine(2, image_seconds=IMAGE_SECONDS, image_bytes=300 * 2**20)
    convert(source, work / "out", options, engine, make_codec=Misbehaving)
    convert(work / "empty", work / "without", options, 2)
    reasons = {row["source"]: row["reason"] for row in _ledgers(work / "out") if row["status"] == "rejected"}
    for path, word in chosen.items():
        expected = MISDEEDS[word].format(IMAGE_SECONDS)
        campaign.promise(reasons.get(str(path)) == expected, "rejected with the right reason", (path, word))
    campaign.promise(len(reasons) == bad + 2, "no other reject but the two files that are no images", reasons)
    tars = [{path.name: path.read_bytes() for path in (work / name).glob("*/*.tar")} for name in ("out", "without")]
    campaign.promise(tars[0] == tars[1], "tars equal to those of the set with empty files")
    digests = [read_dataset(work / name)["digest"] for name in ("out", "without")]
    campaign.promise(digests[0] == digests[1], "digests equal to that of the set with empty files")


def lost_machines(campaign: Campaign) -> None:
    """A Ray cluster of two nodes; in each of ten runs two or three workers and one node are killed, and a node comes."""
    os.environ |= {  # Ray on the loopback interface alone, and its workers with the house at hand
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    from ray.cluster_utils import Cluster

    from alexprep.shards.ray_runner import RayEngine

    options, nodes, out = ShardOptions(shard_samples=32), 2, campaign.work / "out"
    source = repeated(campaign.photos, campaign.work / "source", 2 if campaign.hurried else 4)
    inputs = convert(source, campaign.work / "reference", options, nodes).inputs
    reference = fingerprint(campaign.work / "reference")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in campaign.rounds(10):
            while len(cluster.worker_nodes) < nodes:
                cluster.add_node(num_cpus=1)
            arguments = (cluster, out, -(-inputs // 32), campaign.rng, campaign.counts)
            killer = threading.Thread(target=_kill_machines, args=arguments, daemon=True)
            killer.start()
            convert(source, out, options, RayEngine(cluster.address))
            killer.join()
            campaign.promise(fingerprint(out) == reference, "runs with the local engine's bytes, every file")
            shutil.rmtree(out)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def _kill_machines(cluster: Any, out: Path, shards: int, rng: random.Random, counts: dict[str, int]) -> None:
    """Kills when so many shards are finished, up to nine tenths of them."""
    moments = sorted(rng.sample(range(1, shards * 9 // 10), rng.randint(3, 4)))
    node_at = rng.choice(moments)
    for moment in moments:
        until(lambda: len(list(out.glob("*/*-*.json"))) >= moment)  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        if moment == node_at:
            cluster.remove_node(rng.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
            counts["nodes killed"] += 1
        elif workers := _ray_workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
                counts["workers killed"] += 1


def _ray_workers() -> list[int]:
    """Ray's processes at work: they are called after their task."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::_in_ray_worker"):
                found.append(int(folder.name))
    return sorted(found)
