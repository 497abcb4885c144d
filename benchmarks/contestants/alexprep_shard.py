"""alexprep: `build`, as `alexprep shard` runs it. The steady time begins when the first images are finished."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from alexprep.shards.conversion import convert
from alexprep.shards.plan import ShardOptions


def main(source: str, target: str, processes: str) -> None:
    """Shards the tree at `source` and prints what it took."""
    seen: list[tuple[float, int]] = []

    def progress(finished: int, total: int) -> None:
        if finished and (not seen or finished > seen[-1][1]):
            seen.append((time.perf_counter(), finished))

    done = convert(source, Path(target), ShardOptions(), int(processes), progress)
    (begin, first), (end, last) = seen[0], seen[-1]
    print(json.dumps({"images": done.written, "steady": (last - first) / (end - begin)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
