"""torchvision's transforms over our shards, without DALI: `python docs/examples/readers/torchvision_transforms.py alexprep-data`."""

import sys

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from alexprep.pipeline import webdataset_pipeline

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
steps = [v2.RandomResizedCrop(48, antialias=True), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()]
transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
samples = webdataset_pipeline(sys.argv[1], "train", image="torch", transform=transform, seed=1)
for epoch in range(2):
    samples.set_epoch(epoch)
    batches = [images for images, labels, keys in DataLoader(samples, batch_size=16)]  # num_workers=8 for a large set
print(f"{sum(map(len, batches))} samples in {len(batches)} batches of {tuple(batches[0].shape[1:])}")
