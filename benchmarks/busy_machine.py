"""What busy neighbours cost: `alexprep demo` alone and beside processes that burn CPU time; and the training's rate beside an older commit's.

    python benchmarks/busy_machine.py [--burners 4] [--rounds 3] [--tests] [--older COMMIT] [--save]

The machine should be idle otherwise; what runs besides at the start is among the figures. Turns alternate: alone, beside burners, alone, …; so do
those of the commits, which train `tiny` on the demo's pictures in processes of their own. --tests runs `make test` once each way as well, which
takes up to half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import command_line, report

from alexprep.shards.thread_waiting import others_running

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("shards", "pipeline", "train", "cli")
# Ends with the process that started it.
BURN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"


@contextlib.contextmanager
def burners(count: int) -> Iterator[None]:
    """Inside the block, so many processes burn CPU time."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BURN]))
            stack.callback(process.kill)
        yield


def seconds(command: list[str], places: Path) -> float:
    """How long a command takes whose packages are in a folder of links; its words are shown if it fails."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment(places), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.monotonic() - began


def environment(places: Path) -> dict[str, str]:
    """Of a process that imports alexprep from there, and whose threads wait as the commands choose."""
    chosen = ("OMP_", "GOMP_", "KMP_")
    return {k: v for k, v in os.environ.items() if not k.startswith(chosen)} | {"PYTHONPATH": str(places)}


def linked(sources: Path, places: Path) -> Path:
    """A folder from which alexprep is imported, whose packages lie in `sources`."""
    (places / "alexprep").mkdir(parents=True)
    for package in PACKAGES:
        (places / "alexprep" / package).symlink_to(sources / package)
    return places


def beside(command: list[str], places: Path, count: int, rounds: int) -> dict[str, Any]:
    """Medians of a command's seconds alone and beside burners."""
    alone, busy = [], []
    for _ in range(rounds):
        alone.append(seconds(command, places))
        with burners(count):
            busy.append(seconds(command, places))
    return {
        "alone, seconds": statistics.median(alone),
        f"beside {count}, seconds": statistics.median(busy),
        "ratio": statistics.median(busy) / statistics.median(alone),
    }


def rate(places: Path, data: Path, runs: Path, steps: int) -> float:
    """Images a second of a new training."""
    command = [
        sys.executable,
        "-m",
        "alexprep.cli",
        "train",
        "--recipe",
        "tiny",
        "--data",
        str(data),
        "--runs",
        str(runs),
    ]
    command += [
        "--batch-size",
        "32",
        "--steps",
        str(steps),
        "--epochs",
        "1000",
        "--json",
    ]  # older recipes had other batches
    words = subprocess.run(
        command, cwd=runs.parent, env=environment(places), capture_output=True, text=True, check=True
    )
    return float(json.loads(words.stdout.splitlines()[-1])["images_per_second"])


def beside_older(commit: str, here: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of both commits, in turns."""
    older, made = folder / "older", folder / "demo"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(older), commit], check=True, capture_output=True)
    try:
        there = linked(older, folder / "older-places")
        # The older commit's set: every release reads those of the ones before it.
        seconds([sys.executable, "-m", "alexprep.cli", "demo", "--out", str(made)], there)
        rates: dict[str, list[float]] = {"now": [], "older": []}
        for _ in range(arguments.rounds):
            for name, places in (("older", there), ("now", here)):
                runs = folder / f"runs-{name}"
                rates[name].append(rate(places, made / "alexprep-data", runs, arguments.steps))
    finally:
        subprocess.run([*git, "remove", "--force", str(older)], check=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    figures: dict[str, Any] = {f"training of tiny, {name}, images/s": value for name, value in medians.items()}
    return {"older commit": commit, **figures, "training of tiny, now over older": medians["now"] / medians["older"]}


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--burners", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of a training in a turn")
    parser.add_argument("--tests", action="store_true", help="make test too")
    parser.add_argument("--older", metavar="COMMIT", help="whose rate is measured beside this one's")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"threads of others at the start": others_running(), "rounds": arguments.rounds}
    with tempfile.TemporaryDirectory(prefix="busy-machine-") as name:
        folder = Path(name)
        here = linked(ROOT, folder / "places")
        demo = [sys.executable, "-m", "alexprep.cli", "demo", "--out", str(folder / "demo")]
        jobs = {"demo": (demo, arguments.rounds)}
        if arguments.tests:
            tests = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
            jobs["tests"] = (tests, 1)
        for job, (command, rounds) in jobs.items():
            found = beside(command, here, arguments.burners, rounds)
            figures |= {f"{job} {key}": value for key, value in found.items()}
            print(f"{job}: {found['ratio']:.2f} times as long beside {arguments.burners}", file=sys.stderr)
        if arguments.older:
            figures |= beside_older(arguments.older, here, folder, arguments)
    report("busy-machine", figures, arguments.save)


if __name__ == "__main__":
    main()
