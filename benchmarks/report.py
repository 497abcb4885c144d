"""A report of a large dataset: time, memory, size of the page, and how quickly it sorts in a browser.

    python benchmarks/report.py [--rows 1280000 --classes 1000] [--out FOLDER] [--save]

The ledger is made up, with sizes as ImageNet has them; the shards are a few real ones, which contact sheets are made of. The report is a process of
its own. The browser is Debian's Chromium; without one its figures are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import command_line, report

ROOT = Path(__file__).parents[1]
SAMPLES = 200  # that lie in shards
REPORT = """
import json, resource, sys, time
from pathlib import Path
begun = time.monotonic()
from alexprep.train.report.page import write_report
written = write_report(Path(sys.argv[1]), [], Path(sys.argv[2]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([time.monotonic() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6, written.missing]))
"""
TABLE = "document.querySelector('#data input[type=search]').closest('div').querySelector('table')"
SORTED = (1, 2, 1, 0)  # columns, one after the other


def make(folder: Path, rows: int, classes: int) -> None:
    """Writes the dataset: real shards of a few samples, then a ledger, an index and counts of very many."""
    from PIL import Image

    from alexprep.shards import ShardOptions, Target, convert, find_source, pca_stats, publish_statistics

    rng = np.random.default_rng(0)
    photos, data = folder / "photos", folder / "data"
    for n in range(SAMPLES):
        path = photos / "train" / f"n{10_000_000 + n % classes}" / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(path, quality=90)
    convert(find_source(str(photos)), data, ShardOptions(Target(size=64)), 1)
    publish_statistics(pca_stats(data, "train", 1), data, "train")
    labels = np.sort(rng.integers(0, classes, rows)).astype(np.int32)
    rejected = rng.random(rows) < 1e-4
    ledger = pq.read_table(data / "train" / "samples.parquet")
    made: dict[str, Any] = {
        "key": [f"{n:08d}" for n in range(rows)],
        "shard": np.arange(rows) // 1280,
        "label": labels,
        "source": [f"train/n{10_000_000 + label}/n{label}_{n}.JPEG" for n, label in enumerate(labels.tolist())],
        "width": np.clip(rng.lognormal(6.1, 0.3, rows), 20, 9000).astype(int),
        "height": np.clip(rng.lognormal(6.0, 0.3, rows), 20, 9000).astype(int),
        "status": np.where(rejected, "rejected", "written"),
        "reason": [f"cut after {n} bytes" if left else None for n, left in enumerate(rejected.tolist())],
        "kept": ~rejected,
    }
    columns = [
        pa.array(made[field.name], field.type) if field.name in made else pa.nulls(rows, field.type)
        for field in ledger.schema
    ]
    pq.write_table(pa.table(columns, schema=ledger.schema), data / "train" / "samples.parquet")
    index = np.load(data / "train" / "index.npy")
    large = np.resize(index, int((~rejected).sum()))
    large["label"] = labels[~rejected]
    large.sort(order=["shard", "offset"])
    np.save(data / "train" / "index.npy", large)
    document = json.loads((data / "dataset.json").read_bytes())
    document["classes"] = [f"n{10_000_000 + label}" for label in range(classes)]
    document["words"] = [f"made-up creature {label}, another name" for label in range(classes)]
    document["splits"]["train"] |= {"inputs": rows, "samples": len(large), "rejected": int(rejected.sum())}
    (data / "dataset.json").write_text(json.dumps(document))


def browsed(page: Path, profile: Path) -> dict[str, Any]:
    """How long the page takes to sort its table of classes, and to scroll to its end, layout included: CPU time of the page's thread."""
    sys.path.insert(0, str(ROOT))
    from tests.support.browser import CHROMIUM, Browser

    if CHROMIUM is None:
        return {}
    with Browser(profile) as browser:
        browser.open(page)
        browser.call("Performance.enable", timeDomain="threadTicks")

        def milliseconds(script: str) -> float:
            def used() -> float:
                metrics = browser.call("Performance.getMetrics")["metrics"]
                return 1000 * float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))

            before = used()
            browser.evaluate(f"{script}; {TABLE}.getBoundingClientRect().height")
            browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            return used() - before

        sorts = [milliseconds(f"{TABLE}.tHead.querySelectorAll('button')[{column}].click()") for column in SORTED]
        end = f"{TABLE}.closest('.scroll').scrollTop = 1e9"
        return {"slowest sort, ms": max(sorts), "scrolling to the end of the table, ms": milliseconds(end)}


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="keep the report here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, given.rows, given.classes)
        out = given.out or folder / "report"
        command = [sys.executable, "-c", REPORT, str(folder / "data"), str(out)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, cpu, memory, missing = json.loads(done.stdout.splitlines()[-1])
        figures: dict[str, Any] = {
            "rows": given.rows,
            "classes": given.classes,
            "seconds": seconds,
            "CPU seconds": cpu,
            "largest memory, GB": memory,
            "page, MB": (out / "report.html").stat().st_size / 1e6,
            "sentences on what is missing": len(missing),
        }
        figures |= browsed(out / "report.html", folder / "profile")
    report("report", figures, given.save)


if __name__ == "__main__":
    main()
