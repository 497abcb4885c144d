"""Faults while shards are made: every run must end with the bytes of an undisturbed one, or say why not.

python benchmarks/faults.py MODE [--photos FOLDER] [--save]

syscalls   SIGKILL at every file-system call
errors     ENOSPC, EIO, EDQUOT, EINTR at every file-system call
random     SIGKILL at random moments to the command, to a worker, to all
full-disk  disks that are too small, and the prediction of the room needed (root, for tmpfs)
writers    several at once in one folder
culprits   a decoder that crashes, hangs and eats memory

syscalls and errors need strace. FOLDER is a tree of class folders with real photos, for random and full-disk.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults_calls
import faults_culprits
import faults_runs
from common import report

# The default number of rounds, and what there is to count: see the functions.
MODES: dict[str, tuple[int, Callable[..., dict[str, Any]]]] = {
    "syscalls": (80, faults_calls.syscalls),
    "errors": (1, faults_calls.errors),
    "random": (300, faults_runs.random_kills),
    "full-disk": (12, faults_runs.full_disk),
    "writers": (100, faults_runs.writers),
    "culprits": (20, faults_culprits.culprits),
}


def main() -> None:
    """Runs one mode in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--photos", type=Path, help="real photos")
    parser.add_argument("--rounds", type=int, help="kills, disks, rounds, culprits; calls of the whole command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    rounds, mode = MODES[arguments.mode]
    photos = [arguments.photos] if arguments.mode in ("random", "full-disk") else []
    if photos == [None]:
        parser.error(f"{arguments.mode} needs --photos FOLDER")
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    rng = random.Random(arguments.seed)
    try:
        figures = mode(work, rng, arguments.rounds or rounds, *photos)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(f"faults-{arguments.mode}", {**figures, "seed": arguments.seed}, arguments.save)


if __name__ == "__main__":
    main()
