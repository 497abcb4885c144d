"""timm's own webdataset reader, which finds the shards by _info.json: `python docs/examples/readers/timm_reader.py alexprep-data`."""

import sys

from timm.data import create_dataset, create_loader

# The same from timm's train.py: --dataset wds/alexprep --data-dir alexprep-data --train-split train --val-split val
options = {"split": "val", "is_training": False, "batch_size": 16}
dataset = create_dataset("wds/alexprep", root=sys.argv[1], **options)
batches = create_loader(dataset, (3, 48, 48), 16, num_workers=1, use_prefetcher=False, persistent_workers=False)
seen = [(images, labels) for images, labels in batches]  # float32 (N, 3, 48, 48), int64 (N,)
print(f"{sum(len(labels) for _, labels in seen)} samples in {len(seen)} batches of {tuple(seen[0][0].shape[1:])}")
