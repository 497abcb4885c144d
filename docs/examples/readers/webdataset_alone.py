"""webdataset without alexprep: `python docs/examples/readers/webdataset_alone.py alexprep-data`."""

import sys
from pathlib import Path

import webdataset
from torch.utils.data import DataLoader

shards = [str(path) for path in sorted(Path(sys.argv[1]).glob("train/*.tar"))]
samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=1).shuffle(1000).decode("torchrgb")
pairs = samples.to_tuple("jpg;png", "cls", "json", missing_is_error=False)  # images are float32 (3, H, W), 0 to 1
batches = DataLoader(pairs, batch_size=16, collate_fn=lambda rows: list(zip(*rows, strict=True)))
seen = [(len(labels), captions) for images, labels, captions in batches]
print(f"{sum(count for count, _ in seen)} samples in {len(seen)} batches")
