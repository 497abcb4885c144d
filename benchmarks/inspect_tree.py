"""Time and memory of looking at a large tree of class folders, and of `shard`'s start-up on it: listing and plan.

python benchmarks/inspect_tree.py [--files 1280000 --classes 1000] [--tree FOLDER] [--against CHECKOUT] [--rounds 5] [--save]

The tree is made in a temporary folder, unless one is named: train and, a twenty-fifth of it, val; all files of a class are hard
links of one small JPEG, which to a listing are files like any other. CHECKOUT is another working copy, with its `make build/types`
made: it takes turns. Each measurement is a process of its own. Start-up is CPU time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import command_line, report
from PIL import Image

ROOT = Path(__file__).parents[1]
_START_UP = """
import sys, time
from pathlib import Path
from alexprep.shards.conversion import make_plan
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.layout_detection import find_source
begin = time.process_time()
plan = make_plan(find_source(sys.argv[1]), ShardOptions(), Path(sys.argv[2]))
print(plan.inputs, time.process_time() - begin)
"""


def make_tree(root: Path, files: int, classes: int) -> None:
    """Writes the tree."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG")
    for number in range(files):
        name = f"n{10_000_000 + 7 * (number * classes // files)}"
        folder = root / ("val" if number % 26 == 25 else "train") / name
        first = root / "train" / name / f"{name}_first.JPEG"
        if not first.parent.exists():
            for split in ("train", "val"):
                (root / split / name).mkdir(parents=True)
            first.write_bytes(buffer.getvalue())
        else:
            os.link(first, folder / f"{name}_{number}.JPEG")


@contextlib.contextmanager
def tree_of(arguments: argparse.Namespace) -> Iterator[Path]:
    """The tree that is named, or one that is made and removed again."""
    if arguments.tree is not None:
        yield arguments.tree
        return
    work = Path(tempfile.mkdtemp())
    try:
        make_tree(work / "tree", arguments.files, arguments.classes)
        yield work / "tree"
    finally:
        shutil.rmtree(work)


def measured(checkout: Path, *command: str) -> tuple[float, float, float, str]:
    """A Python command's seconds, CPU seconds, peak memory in MB, and the last line that it printed."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "build" / "types")}
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, lines[-1]


def main() -> None:
    """Inspects and plans in turns."""
    parser = command_line(__doc__)
    parser.add_argument("--files", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tree", type=Path, help="a tree of class folders that is there")
    parser.add_argument("--against", type=Path, help="another working copy")
    arguments = parser.parse_args()
    checkouts = {"start-up, CPU s": ROOT} | (
        {"start-up of the other, CPU s": arguments.against} if arguments.against else {}
    )
    start_up: dict[str, list[float]] = {name: [] for name in checkouts}
    inspections = []
    with tree_of(arguments) as tree:
        for number in range(arguments.rounds + 1):  # the first warms the page cache, and is not counted
            for name, checkout in checkouts.items():
                with tempfile.TemporaryDirectory() as out:
                    *_, line = measured(checkout, "-c", _START_UP, str(tree), f"{out}/data")
                start_up[name] += [float(line.split()[1])] if number else []
            found = measured(ROOT, "-m", "alexprep.cli", "inspect", str(tree), "--json")
            inspections += [found] if number else []
    document = json.loads(inspections[0][-1])
    figures = {
        "files": document["found"],
        "classes": len(document["classes"]),
        "inspect, s": statistics.median(found[0] for found in inspections),
        "inspect, CPU s": statistics.median(found[1] for found in inspections),
        "inspect, peak memory, MB": max(found[2] for found in inspections),
        **{name: statistics.median(seconds) for name, seconds in start_up.items()},
    }
    if arguments.against:
        here, other = start_up.values()
        figures["start-up against the other, each round"] = ", ".join(
            f"{a / b:.3f}" for a, b in zip(here, other, strict=True)
        )
        figures["start-up against the other, medians"] = statistics.median(here) / statistics.median(other)
    report("inspect_tree", figures, arguments.save)


if __name__ == "__main__":
    main()
