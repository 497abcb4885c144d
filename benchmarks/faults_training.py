"""Faults while two ranks train a network: every run must end with the bits of an undisturbed one, or say why not.

python benchmarks/faults_training.py [MODE …] [--share X] [--save]

resume      from a checkpoint at every step, on two ranks and on one
kills       SIGKILL to a rank, to both, to the command, at random moments and in mid-save
culprits    a rank that is stopped, hangs, raises, leaves, or has no memory
signals     SIGTERM and Ctrl-C at random moments, some of them twice
full-disk   disks that are too small for the checkpoints (root, for tmpfs)

Without modes all are run; with modes, the results keep the figures of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults_training_job
import torch
from common import RESULTS, report
from faults_training_field import Field, curve
from faults_training_harm import STEPS, Figures, common_figures, culprits, kills, signals
from safetensors.torch import load_file

from alexprep.train import run_dir
from alexprep.train.launch import launch_ranks


def resume(work: Path, rng: random.Random, steps: int) -> Figures:
    """Grain's rule: a checkpoint of every step, each gone on with to the end."""
    field = Field(work, rng, steps)
    field.options |= {"checkpoint_steps": 1, "keep": steps}
    field.finish()
    whole = field.run.parent / f"run-{len(list(field.run.parent.iterdir())) - 1}"
    sha256, right = field.reference
    rows: dict[int, list[dict[str, Any]]] = {}
    for ranks in (2, 1):
        arguments = {"options": field.options, "whole": str(whole), "folder": str(work / "resumed"), "steps": steps}
        rows[ranks] = launch_ranks(f"{faults_training_job.__file__}:from_every_step", ranks, arguments, device="cpu")[0]
    reference = _weights(whole)
    samples = rows[2][0]["samples"]
    curves = {ranks: [curve(Path(row["run"])) for row in found] for ranks, found in rows.items()}
    apart = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for c in curves[1] for a, b in zip(c, right, strict=True)]
    moved = [
        float((_weights(Path(row["run"]))[name] - weight).abs().max() / weight.abs().max())
        for row in rows[1]
        for name, weight in reference.items()
    ]
    return {
        "checkpoints, one of every step but the last": len(rows[2]),
        "two ranks: final weights equal to the bit": sum(row["sha256"] == sha256 for row in rows[2]),
        "two ranks: log equal in every loss and error": sum(found == right for found in curves[2]),
        "one rank: the same samples in the same order": sum(
            row["samples"] == {step: ids for step, ids in samples.items() if step in row["samples"]} for row in rows[1]
        ),
        "one rank: largest relative difference of a loss": f"{max(apart):.1e}",
        "one rank: largest difference of final weights, over their largest value": f"{max(moved):.1e}",
    }


def _weights(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / run_dir.CHECKPOINTS).glob("*.safetensors"))
    return {name: value for name, value in load_file(newest).items() if name.startswith("weight.")}


def full_disk(work: Path, rng: random.Random, rounds: int) -> Figures:
    """A tmpfs too small for the run; then it has room."""
    field = Field(work, rng, STEPS)
    disk = work / "disk"
    lost: list[int] = []
    disk.mkdir()
    bytes_needed = sum(path.stat().st_size for path in (work / "runs" / "whole").rglob("*") if path.is_file())
    while len(lost) < rounds:
        room = int(bytes_needed * rng.choice([0.0, rng.uniform(0, 1.3)])) // 4096 * 4096 + 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], check=True)
        try:
            field.run = disk / "runs" / "small"
            process = field.start()
            end = field.end(process, field.ranks_once_there(process), time.monotonic())
            if end.status != 0:
                told = "No space left on device" in end.words and str(disk) in end.words and "bytes" in end.words
                field.counts["not told"] += not told or "Traceback" in end.words
                lost.append(end.lost)
                print(room, end.status, end.lost, end.words.splitlines()[-1], flush=True)
            subprocess.run(["mount", "-o", f"remount,size={4 * bytes_needed}", str(disk)], check=True)
            field.finish() if end.status else field.finished(end)
        finally:
            field.run = work / "runs" / "whole"
            subprocess.run(["umount", str(disk)], check=True)
    return {
        "disks too small": len(lost),
        "not told with the file and the bytes": field.counts["not told"],
        "steps lost, at most": max(lost),
        **common_figures(field, []),
    }


MODES: dict[str, tuple[int, Callable[[Path, random.Random, int], Figures]]] = {
    "resume": (44, resume),
    "kills": (100, kills),
    "culprits": (10, culprits),
    "signals": (50, signals),
    "full-disk": (10, full_disk),
}


def main() -> None:
    """Runs the modes, each in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="MODE", default=[])
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # nothing here is large enough for two
    chosen = arguments.modes or list(MODES)
    results = RESULTS / "faults-training.json"
    figures: Figures = json.loads(results.read_text())["figures"] if results.exists() and arguments.modes else {}
    figures = {name: value for name, value in figures.items() if name.partition(":")[0] not in chosen}
    for mode in chosen:
        rounds, function = MODES[mode]
        work = Path(tempfile.mkdtemp(prefix="faults-training-"))
        began = time.monotonic()
        try:
            found = function(work, random.Random(arguments.seed), max(2, round(rounds * arguments.share)))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        figures |= {f"{mode}: {name}": value for name, value in found.items()}
        figures[f"{mode}: minutes"] = (time.monotonic() - began) / 60
        figures[f"{mode}: seed"] = arguments.seed
        report("faults-training", figures, arguments.save)


if __name__ == "__main__":
    main()
