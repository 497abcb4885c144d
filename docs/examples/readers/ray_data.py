"""Ray Data: `python docs/examples/readers/ray_data.py alexprep-data`."""

import sys
from pathlib import Path

import ray

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
shards = [str(path.absolute()) for path in sorted(Path(sys.argv[1]).glob("train/*.tar"))]
rows = ray.data.read_webdataset(shards, suffixes=["jpg", "png", "cls"])  # columns: pixels (H, W, 3), label, __key__
labels = [row["cls"] for row in rows.iter_rows()]
print(f"{len(labels)} samples of {len(set(labels))} classes")
ray.shutdown()
