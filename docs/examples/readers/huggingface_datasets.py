"""Hugging Face's datasets, by the card: `python docs/examples/readers/huggingface_datasets.py alexprep-data`."""

import sys

from datasets import load_dataset

splits = load_dataset(sys.argv[1])  # streaming=True reads the tars as they are, without a copy in the cache
train = splits["train"].rename_columns({"jpg": "image", "cls": "label"})
print(train.features["label"].names[train[0]["label"]], train[0]["image"].size, train[0].get("json"))
print(f"{len(train)} samples, and in other splits {sum(map(len, splits.values())) - len(train)}")
