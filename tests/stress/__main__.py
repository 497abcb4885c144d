"""Long campaigns of faults: every run must end with the bytes of an undisturbed one, or say why not.

make stress                                       all campaigns
make stress SECONDS=600                           a seeded part of each, in about ten minutes together
python -m tests.stress [CAMPAIGN …] [--seconds N] [--photos FOLDER] [--seed N]

A campaign that lacks what it needs (strace, root for a tmpfs, Ray) is left out, with a word. FOLDER is a tree of class folders
with real photos; without it pictures are drawn. Prints what each campaign counted, ends with status 1 if a promise was broken.
The suite has short forms of all of these (tests/test_faults.py, tests/test_trainer.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.stress import shard_caches, shard_calls, shard_runs, training
from tests.stress.campaign import Campaign, draw_pictures, with_metadata


def lacks_strace() -> str:
    """Why calls cannot be led astray here; "" where they can."""
    return "" if shutil.which("strace") else "needs strace"


def lacks_root() -> str:
    """Why no small disk can be mounted here."""
    return "" if os.geteuid() == 0 and shutil.which("mount") else "needs root, to mount a tmpfs"


def lacks_ray() -> str:
    """Why there can be no cluster."""
    return "" if importlib.util.find_spec("ray") else "needs Ray"


def lacks_nothing() -> str:
    """All is there."""
    return ""


CAMPAIGNS: dict[str, tuple[Callable[[Campaign], None], Callable[[], str]]] = {
    "kill-at-calls": (shard_calls.kill_at_calls, lacks_strace),
    "kill-command-at-calls": (shard_calls.kill_command_at_calls, lacks_strace),
    "fail-at-calls": (shard_calls.fail_at_calls, lacks_strace),
    "kill-at-random": (shard_runs.kill_at_random, lacks_nothing),
    "full-disk": (shard_runs.full_disk, lacks_root),
    "predictions": (shard_runs.predictions, lacks_nothing),
    "several-writers": (shard_runs.several_writers, lacks_nothing),
    "bad-decoders": (shard_runs.bad_decoders, lacks_nothing),
    "lost-machines": (shard_runs.lost_machines, lacks_ray),
    "cache-kills": (shard_caches.kill_readers, lacks_nothing),
    "cache-full-disk": (shard_caches.full_disk, lacks_root),
    "cache-users": (shard_caches.users, lacks_root),
    "training-kills": (training.kill_ranks, lacks_nothing),
    "training-signals": (training.signals, lacks_nothing),
    "training-bad-ranks": (training.bad_ranks, lacks_nothing),
    "training-full-disk": (training.full_disk, lacks_root),
    "training-resume": (training.resume_anywhere, lacks_nothing),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=", ".join(CAMPAIGNS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all together; each does a round at least")
    parser.add_argument("--photos", type=Path, help="real photos")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = arguments.campaigns or list(CAMPAIGNS)
    if unknown := set(chosen) - set(CAMPAIGNS):
        parser.error(f"no such campaign: {', '.join(sorted(unknown))}; there are {', '.join(CAMPAIGNS)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # nothing here is large enough for two
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        photos = arguments.photos or with_metadata(draw_pictures(Path(folder) / "photos", 200, 400))
        figures = run(chosen, Path(folder), photos.resolve(), arguments.seed, arguments.seconds)
    print(json.dumps({"seed": arguments.seed, "campaigns": figures}))
    sys.exit(1 if any(counts["broken"] for counts in figures.values()) else 0)


def run(names: Sequence[str], folder: Path, photos: Path, seed: int, seconds: float) -> dict[str, dict[str, int]]:
    """Runs campaigns, each in a folder of its own; what is left of the time is shared by those that are still to come."""
    end, figures = time.monotonic() + seconds, {}
    for number, name in enumerate(names):
        function, lacks = CAMPAIGNS[name]
        if reason := lacks():
            print(f"{name}: left out, {reason}", flush=True)
            continue
        began = time.monotonic()
        print(f"{name}: {(function.__doc__ or '').splitlines()[0]}", flush=True)
        work = folder / name
        work.mkdir()
        campaign = Campaign(work, seed, (end - began) / (len(names) - number), photos)
        function(campaign)
        shutil.rmtree(work)
        counts = {**campaign.counts, "seconds": round(time.monotonic() - began), "broken": len(campaign.broken)}
        for key, value in counts.items():
            print(f"  {value:>8,}  {key}", flush=True)
        figures[name] = counts
    return figures


if __name__ == "__main__":
    main()
