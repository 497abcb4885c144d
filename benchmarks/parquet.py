"""Parquet of pictures beside class folders of the same pictures: CPU time of `alexprep shard`, in turns, and its memory.

    python benchmarks/parquet.py DATA [--split train] [--inputs 50000] [--rounds 3] [--save]    DATA: a dataset of JPEGs that `alexprep shard` made

The pictures are those of a split. They are written as class folders, and as Hugging Face writes them, in row groups of 1,000 (its default),
sorted by class. CPU time is of the command and its workers, start-up included; memory is the largest process's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import command_line, report

from alexprep.shards import Samples


def make(data: Path, split: str, count: int, folders: Path, table: Path) -> int:
    """Writes both forms of the first `count` samples; returns how many there are."""
    samples = Samples(data, split)
    labels = np.asarray(samples.labels[:count])
    names = samples.dataset["classes"]
    for name in names:
        (folders / "train" / name).mkdir(parents=True)
    rows = []
    for index in np.argsort(labels, kind="stable").tolist():
        image, label = samples.encoded(index).tobytes(), int(labels[index])
        (folders / "train" / names[label] / f"{index:06d}.jpg").write_bytes(image)
        rows.append({"image": {"bytes": image, "path": f"{index:06d}.jpg"}, "label": names[label]})
    table.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=1000)
    return len(rows)


def shard(source: Path, out: Path) -> tuple[float, float]:
    """CPU seconds and MiB of memory of one `alexprep shard`, which encodes each picture anew."""
    command = [sys.executable, "-m", "alexprep.cli", "shard", str(source), "--out", str(out), "--size", "32"]
    process = subprocess.Popen([*command, "--reencode", "always"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Measures and reports."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--inputs", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sources = {"folders": place / "folders", "parquet": place / "parquet"}
        inputs = make(
            options.data, options.split, options.inputs, sources["folders"], sources["parquet"] / "data/train-0.parquet"
        )
        seconds: dict[str, list[float]] = {form: [] for form in sources}
        memory = dict.fromkeys(sources, 0.0)
        for turn in range(options.rounds):
            for form in sorted(sources, reverse=bool(turn % 2)):
                used, held = shard(sources[form], place / f"{form}-{turn}")
                seconds[form].append(round(used, 2))
                memory[form] = max(memory[form], round(held, 1))
    median = {form: statistics.median(times) for form, times in seconds.items()}
    found = {
        "inputs": inputs,
        "cpu_seconds": seconds,
        "largest_process_mib": memory,
        "speed_of_parquet_to_folders": round(median["folders"] / median["parquet"], 3),
    }
    report("parquet", found, options.save)


if __name__ == "__main__":
    main()
