"""Ray Data: `python docs/examples/readers/ray_data.py alexprep-data`."""

import sys
from pathlib import Path

import ray

ray.init(log_to_driver=False)  # a cluster's address may stand in RAY_ADDRESS
shards = [str(path.absolute()) for path in sorted(Path(sys.argv[1]).glob("train/*.tar"))]
rows = ray.data.read_webdataset(shards, suffixes=["jpg", "png", "cls"])  # columns: pixels (H, W, 3), label, __key__
labels = [row["cls"] for row in rows.iter_rows()]
print(f"{len(labels)} samples of {len(set(labels))} classes")
ray.shutdown()
