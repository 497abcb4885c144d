"""A Loader for what wants torch's DataLoader: `python docs/examples/readers/torch_dataloader.py alexprep-data`."""

import sys

from torch.utils.data import DataLoader

from alexprep.pipeline import Loader

with Loader(sys.argv[1], batch_size=16, augmentation="none") as loader:
    batches = DataLoader(loader, batch_size=None)  # a Loader makes whole batches, in threads of its own: no workers
    seen = sum(len(labels) for images, labels, indices in batches)  # each such loop is an epoch
    print(f"{seen} samples in {len(batches)} batches")
