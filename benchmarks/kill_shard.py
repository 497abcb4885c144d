"""Kills `alexprep shard` at random moments; every rerun must end with the bytes of an undisturbed run.

python benchmarks/kill_shard.py SOURCE [--rounds 20] [--save]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import report


def main() -> None:
    """Each round: a fresh folder, one to three kills at random moments, then a run to the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    work = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "alexprep.cli", "shard", str(arguments.source), "--shard-samples", "16", "--out"]
    subprocess.run([*command, str(work / "reference")], check=True, capture_output=True)
    shards = len(list((work / "reference").glob("*/*-*.json")))
    reference = _fingerprint(work / "reference")
    kills, unfinished, equal = 0, 0, 0
    for _ in range(arguments.rounds):
        out = work / "out"
        for _ in range(rng.randint(1, 3)):
            process = subprocess.Popen(
                [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            goal = rng.randint(0, shards)  # finished shards to wait for; 0: somewhere in the start
            while process.poll() is None and len(list(out.glob("*/*-*.json"))) < goal:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1 if goal else 0.6))
            group = rng.random() < 0.5  # the whole group, or the parent alone: its workers must notice
            os.killpg(process.pid, signal.SIGKILL) if group else os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
            kills += 1
            unfinished += not (out / "dataset.json").exists()
        subprocess.run([*command, str(out)], check=True, capture_output=True)
        equal += _fingerprint(out) == reference
        shutil.rmtree(out)
    shutil.rmtree(work)
    figures = {
        "rounds": arguments.rounds,
        "kills": kills,
        "kills that left the set unfinished": unfinished,
        "rounds that ended with the reference's bytes, every file": equal,
        "seed": arguments.seed,
    }
    report("kill_shard", figures, arguments.save)
    sys.exit(0 if equal == arguments.rounds else 1)


def _fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
