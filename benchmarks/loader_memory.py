"""Whether a Loader's memory stays flat over 10,000 batches, and over 10,000 images that cannot be decoded.

python benchmarks/loader_memory.py DATA [--batches 10000] [--save]      DATA: shards and statistics of 256-pixel images
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import command_line, report

from alexprep.pipeline import Loader
from alexprep.shards.sample_reader import Samples

BATCH = 8


def main() -> None:
    """Measures a sound set and one in which every tenth image is damaged."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batches", type=int, default=10_000)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"batches": arguments.batches, "batch size": BATCH}
    figures |= _watch("sound", arguments.data, arguments.batches)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "data"
        shutil.copytree(arguments.data, copy)
        _spoil(copy)
        figures |= _watch("a tenth damaged", copy, arguments.batches)
    report("loader_memory", figures, arguments.save)


def _watch(name: str, data: Path, batches: int) -> dict[str, Any]:
    marks = {batches // 20: "5 %", batches // 2: "50 %", batches: "100 %"}
    found: dict[str, Any] = {}
    with Loader(data, batch_size=BATCH, on_bad="skip", memory_format="channels_last") as loader:
        endless = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
        for n, _ in enumerate(itertools.islice(endless, batches), 1):
            if n in marks:
                gc.collect()
                found[f"{name}: MiB after {marks[n]}"] = _resident_mib()
        found[f"{name}: images left out"] = loader.skipped
    return found


def _spoil(data: Path) -> None:
    samples = Samples(data, "train")
    for row in range(0, len(samples), 10):
        record = samples.index[row]
        with (data / "train" / f"train-{record['shard']:06d}.tar").open("r+b") as file:
            file.seek(int(record["offset"]))
            file.write(bytes(int(record["size"])))


def _resident_mib() -> float:
    """Of this process's own memory: not of files that are mapped, whose pages the system takes back when it needs them."""
    resident, mapped = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - mapped) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
