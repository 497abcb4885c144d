"""webdataset's own reader of the same shards, Pillow and numpy, in a torch DataLoader: what a careful user writes without DALI."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from contestants.serve import BATCH, SIDE, random_window, serve
from numpy.typing import NDArray
from PIL import Image

WORK = (
    "whole image decoded by Pillow, random crop (resized, if that is asked for), mirror, channel means by numpy in one pass; float32; "
    "shards drawn with replacement, shuffled in a buffer of 1,000 a worker"
)


class Augment:
    """Bytes in, pixels out."""

    def __init__(self, mean: list[float], resized: bool) -> None:
        """Keeps what is subtracted, one value for each of a crop's: numpy is ten times slower where it must repeat three."""
        self.mean = np.tile(np.array(mean, np.float32), (SIDE, SIDE, 1))
        self.resized = resized

    def __call__(self, sample: dict[str, Any]) -> tuple[NDArray[np.float32], int]:
        """A sample: float32 (224, 224, 3) and its label."""
        image = Image.open(io.BytesIO(sample["jpg"]))
        if self.resized:
            left, top, width, height = random_window()
            crop = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
        else:
            left, top = random.randint(0, image.width - SIDE), random.randint(0, image.height - SIDE)
            crop = image.crop((left, top, left + SIDE, top + SIDE))
        if random.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.subtract(np.asarray(crop), self.mean, dtype=np.float32), int(sample["cls"])


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns."""
    tars = sorted(str(path) for path in (Path(folder) / "jpg" / "train").glob("*.tar"))
    mean = json.loads((Path(folder) / "facts.json").read_text())["mean"]
    dataset = (
        wds.WebDataset(tars, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .map(Augment(mean, variant.endswith("resized")))
    )
    # The worker that made the samples also puts them together, in memory that the other process shares.
    batches = iter(torch.utils.data.DataLoader(dataset, BATCH, num_workers=int(threads)))
    serve(lambda: next(batches)[0].permute(0, 3, 1, 2), WORK, ("webdataset", "pillow", "torch", "numpy"))


if __name__ == "__main__":
    main(*sys.argv[1:])
