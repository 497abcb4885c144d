"""FFCV's Loader over a .beton of the same images, in its JPEG or its raw mode, with its float normalise on the CPU.

It has no plain random crop: its RandomResizedCrop decoder with an area of exactly (224 / 256)² and ratio 1 always takes 224 x 224
pixels, and its resize (OpenCV's) of those to 224 x 224 is a copy. Its JPEG decoder decodes the whole image, with libjpeg-turbo's
fast, less exact DCT. In JPEG mode FFCV encodes the decoded pixels again: quality 95, 4:2:0, OpenCV's encoder.
Its batches lie in a few buffers that it writes again. Numba compiles before the first batch, which no turn counts.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from contestants.serve import BATCH, RATIO, SCALE, SIDE, STORED, serve

EPOCH_BATCHES = 2048  # the rows again and again: an FFCV epoch starts anew, and a real one is long
_THEN = "random crop, mirror, NormalizeImage with the channel means; float32; a true permutation"
WORK = {
    "ffcv-jpg": f"whole image decoded (fast DCT), {_THEN}",
    "ffcv-jpg-nchw": f"whole image decoded (fast DCT), {_THEN}; ToTorchImage(channels_last=False)",
    "ffcv-raw": f"stored pixels: {_THEN}",
    "ffcv-jpg-resized": (
        "whole image decoded (fast DCT), window of 8 to 100 % resized by OpenCV's area, mirror, NormalizeImage; float32; a true permutation"
    ),
}


class Photos:
    """The JPEG files as Pillow decodes them, with a label."""

    def __init__(self, folder: Path) -> None:
        """Lists the files."""
        self.paths = sorted(folder.rglob("*.jpg"))

    def __len__(self) -> int:
        """How many there are."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """RGB pixels, uint8 (256, 256, 3), and a label."""
        from PIL import Image

        return np.asarray(Image.open(self.paths[index]).convert("RGB")), index % 1000


def write(folder: Path, mode: str) -> Path:
    """The .beton, made if it is not there."""
    from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found]
    from ffcv.writer import DatasetWriter  # type: ignore[import-not-found]

    beton = folder / f"{mode}.beton"
    if not beton.exists():
        fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=95), "label": IntField()}
        temporary = f"{beton}.{os.getpid()}"
        DatasetWriter(temporary, fields, num_workers=2).from_indexed_dataset(Photos(folder / "files"))
        os.replace(temporary, beton)
    return beton


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns with one mode."""
    from ffcv.fields.decoders import (  # type: ignore[import-not-found]
        IntDecoder,
        RandomResizedCropRGBImageDecoder,
    )
    from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found]
    from ffcv.transforms import (  # type: ignore[import-not-found]
        NormalizeImage,
        RandomHorizontalFlip,
        ToTensor,
        ToTorchImage,
    )

    beton = write(Path(folder), variant.split("-")[1])
    mean = np.array(json.loads((Path(folder) / "facts.json").read_text())["mean"])
    area = (SIDE / STORED) ** 2
    scale, ratio = (SCALE, RATIO) if variant.endswith("resized") else ((area, area), (1.0, 1.0))
    image = [
        RandomResizedCropRGBImageDecoder((SIDE, SIDE), scale=scale, ratio=ratio),
        RandomHorizontalFlip(),
        NormalizeImage(mean, np.ones(3), np.float32),
        ToTensor(),
        ToTorchImage(channels_last=not variant.endswith("nchw")),
    ]
    rows = len(Photos(Path(folder) / "files"))
    loader = Loader(
        str(beton),
        batch_size=BATCH,
        num_workers=int(threads),
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        indices=np.tile(np.arange(rows, dtype=np.uint64), -(-EPOCH_BATCHES * BATCH // rows)),
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    serve(lambda: next(batches)[0], WORK[variant], ("ffcv", "numba", "torch"))


if __name__ == "__main__":
    main(*sys.argv[1:])
