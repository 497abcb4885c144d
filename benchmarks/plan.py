"""Time and memory of planning a set of any size, with inputs that exist by name only.

python benchmarks/plan.py [--inputs 15000000 --classes 22000] [--save]
"""

from __future__ import annotations

import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import command_line, report

from alexprep.shards.conversion import make_plan
from alexprep.shards.dataset_format import PLAN, PLAN_TABLE
from alexprep.shards.plan import Plan, ShardOptions
from alexprep.shards.sources.base import Account, Input, Location, Source
from alexprep.shards.storage import LocalFiles


@dataclass(frozen=True)
class Invented(Source):
    """Inputs named as ImageNet's files are, n01440764/n01440764_10026.JPEG, the same number in every class."""

    count: int = 0
    class_count: int = 1
    layout = "invented"
    expects = "nothing"

    def inputs(self, account: Account) -> Iterator[Input]:
        """By class, then by number."""
        account.found += self.count
        for number in range(self.count):
            name = f"n{10_000_000 + 7 * (number * self.class_count // self.count)}"
            yield Input("train", name, Location(f"{name}/{name}_{number}.JPEG".encode()))


def main() -> None:
    """Plans once, then opens the plan and reads row groups as workers do."""
    parser = command_line(__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1_000)
    arguments = parser.parse_args()
    source = Invented(LocalFiles(b"/nowhere"), arguments.inputs, arguments.classes)
    before = _peak_megabytes()
    start = time.perf_counter()
    for _ in source.inputs(Account()):
        pass
    inventing = time.perf_counter() - start
    work = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        plan = make_plan(source, ShardOptions(), work)
        seconds = time.perf_counter() - start
        peak = _peak_megabytes()
        start = time.perf_counter()
        table = Plan(work, {}).table()
        opening = time.perf_counter() - start
        groups = len(list(plan.each_shard()))
        reading = []
        for group in range(0, groups, max(1, groups // 50)):
            start = time.perf_counter()
            table.read_row_group(group)
            reading.append(time.perf_counter() - start)
        figures = {
            "inputs": arguments.inputs,
            "classes": len(plan.document["classes"]),
            "shards": groups,
            "plan, s": seconds,
            "of which inventing the names, s": inventing,
            "inputs/s": arguments.inputs / seconds,
            "peak memory, MB": peak,
            "of which the program, MB": before,
            f"{PLAN}, bytes": (work / PLAN).stat().st_size,
            f"{PLAN_TABLE}, bytes": (work / PLAN_TABLE).stat().st_size,
            "opening the plan, ms": 1000 * opening,
            "one row group, ms": 1000 * statistics.median(reading),
        }
    finally:
        shutil.rmtree(work)
    report("plan", figures, arguments.save)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
