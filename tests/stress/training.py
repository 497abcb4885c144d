"""Faults while two ranks train a network: kills, signals, ranks that hang or fail, full disks, and a start from every checkpoint."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alexprep.shards.storage import is_temporary
from alexprep.train import run_dir
from alexprep.train.launch import launch_ranks
from tests.stress import training_job
from tests.stress.campaign import Campaign
from tests.stress.training_runs import EVERY, Runs, curve, ranks_of, send


def resume_anywhere(campaign: Campaign) -> None:
    """A checkpoint of every step, each gone on with to the end, on two ranks and on one."""
    steps = 44
    runs = Runs(campaign, steps, checkpoint_steps=1, keep=steps)
    (sha256, right), whole = runs.reference, _weights(runs.whole)
    order = [1, *campaign.rng.sample(range(2, steps), steps - 2)]  # the first tells the samples of all
    samples: dict[int, list[int]] = {}
    for number in campaign.rounds(2 * len(order) // 5 + 2):
        ranks, chosen = 2 - number % 2, order[number // 2 * 5 :][:5]
        arguments: dict[str, Any] = {
            "options": runs.options,
            "whole": str(runs.whole),
            "folder": str(campaign.work / "resumed"),
        }
        arguments |= {"steps": steps, "chosen": chosen}
        found = launch_ranks(f"{training_job.__file__}:from_each_step", ranks, arguments, device="cpu")[0]
        samples = samples or found[0]["samples"]
        for each in found:
            curve_of, expected = curve(Path(each["run"])), {step: samples[step] for step in each["samples"]}
            campaign.promise(
                each["samples"] == expected, f"on {ranks}: the same samples in the same order", each["run"]
            )
            if ranks == 2:
                equal = each["sha256"] == sha256 and curve_of == right
                campaign.promise(equal, "on 2: equal in weights, losses and errors to the bit", each["run"])
                continue
            losses = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(curve_of, right, strict=True))
            pairs = [(weight, _weights(Path(each["run"]))[name]) for name, weight in whole.items()]
            moved = max(float((got - weight).abs().max() / weight.abs().max()) for weight, got in pairs)
            close = losses < 1e-4 and moved < 1e-4
            campaign.promise(close, "on 1: losses and weights equal to rounding", (each["run"], losses, moved))


def _weights(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / run_dir.CHECKPOINTS).glob("*.safetensors"))
    return {name: value for name, value in load_file(newest).items() if name.startswith("weight.")}


def kill_ranks(campaign: Campaign) -> None:
    """SIGKILL to a rank, to both, to the command, at random moments and in mid-save, also to runs that go on after one."""
    rng, runs = campaign.rng, Runs(campaign)
    for _ in campaign.rounds(100):
        process = runs.start()
        target, moment = rng.choice(["rank 0", "rank 1", "both", "command"]), rng.choice(["start", "step", "save"])
        if not runs.wait_for(process, moment):
            done = runs.finished(runs.end(process, {}))
            campaign.promise(done, "unharmed runs that ended")
            continue
        ranks = ranks_of(process.pid)
        wanted = {"rank 0": [0], "rank 1": [1], "both": [0, 1], "command": []}[target]
        if not set(wanted) <= ranks.keys():
            target, wanted = "command", []
        campaign.counts[f"kills of {target}"] += 1
        campaign.counts["kills with a file being written"] += any(map(is_temporary, runs.files()))
        for pid in [ranks[rank] for rank in wanted] or [process.pid]:
            send(pid, signal.SIGKILL)
        end = runs.end(process, ranks)
        if target != "command" and end.status:
            campaign.promise("was killed by SIGKILL" in end.words, "kills of ranks that the command told", end.words)
    runs.finish()
    campaign.promise(runs.most_lost <= EVERY, "no more steps lost than between checkpoints", runs.most_lost)


def bad_ranks(campaign: Campaign) -> None:
    """A rank that is stopped, hangs, raises, leaves, or has no memory, ten times each."""
    words = {
        "SIGSTOP": "is stopped (SIGSTOP)",
        "a loader that hangs": "still running: ",
        "an exception": "ValueError: a bad day",
        "sys.exit": "SystemExit: 3",
        "os._exit": "ended with exit status 3",
        "no more memory (RLIMIT_AS)": "memory",
        "killed for memory (cgroup)": "was killed by SIGKILL",
    }
    runs, note = Runs(campaign), campaign.work / "note"
    kinds = [kind for kind in words if "cgroup" not in kind or training_job.CGROUP.exists()]
    for kind in campaign.some(kinds * 10):
        note.unlink(missing_ok=True)
        while True:
            step = runs.saved() + campaign.rng.randint(1, 8)
            process = runs.start(kind=kind, rank=campaign.rng.randrange(2), step=step, note=str(note))
            end = runs.end(process, runs.ranks_once_there(process))
            if note.exists() or not runs.finished(end):
                break  # else the run was done before the step of the fault
        for group in training_job.CGROUP.glob("alexprep-faults-*"):
            group.rmdir()
        campaign.promise(words[kind] in end.words and end.status != 0, f"told: {kind}", end.words)
    runs.finish()


def signals(campaign: Campaign) -> None:
    """SIGTERM and Ctrl-C to the command at random moments, some of them twice, as a scheduler and a terminal send them."""
    rng, runs = campaign.rng, Runs(campaign)
    for _ in campaign.rounds(50):
        process = runs.start()
        number, twice = rng.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT]), rng.random() < 0.2
        if runs.wait_for(process, rng.choice(["start", "step", "step", "save"])):
            ranks = ranks_of(process.pid)
            send(process.pid, number)
            if twice:
                time.sleep(rng.uniform(0, 0.2))
                send(process.pid, number)
            end = runs.end(process, ranks)
        else:
            end = runs.end(process, {})
        if end.status == 0:  # it came behind the last step
            runs.finished(end)
            continue
        kind = f"{number.name}{' twice' if twice else ''}"
        campaign.counts[kind] += 1
        campaign.promise(end.status in (128 + number, -number), "exit statuses that are the signal's", end.status)
        campaign.promise(twice or not end.lost, "stops that lost no step by one signal", (kind, end.lost))
    runs.finish()
    campaign.promise(runs.most_lost <= EVERY, "no more steps lost than between checkpoints", runs.most_lost)


def full_disk(campaign: Campaign) -> None:
    """A tmpfs too small for the checkpoints; then it has room."""
    rng, disk, runs = campaign.rng, campaign.work / "disk", Runs(campaign)
    disk.mkdir()
    bytes_needed = sum(path.stat().st_size for path in runs.whole.rglob("*") if path.is_file())
    for _ in campaign.rounds(10):
        room = int(bytes_needed * rng.choice([0.0, rng.uniform(0, 1.3)])) // 4096 * 4096 + 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], check=True)
        try:
            runs.run = disk / "runs" / "small"
            process = runs.start()
            end = runs.end(process, runs.ranks_once_there(process))
            if end.status != 0:
                told = "No space left on device" in end.words and str(disk) in end.words and "bytes" in end.words
                told &= "Traceback" not in end.words
                campaign.promise(told, "told with the file and the bytes", (room, end.words))
            subprocess.run(["mount", "-o", f"remount,size={4 * bytes_needed}", str(disk)], check=True)
            runs.finish() if end.status else runs.finished(end)
        finally:
            runs.run = runs.whole
            subprocess.run(["umount", str(disk)], check=True)
