"""DALI without alexprep's Loader: its own tar reader, and its decoder alone, fed from memory."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from contestants.serve import BATCH, RATIO, SCALE, SIDE, serve
from nvidia.dali import Pipeline, fn, types

from alexprep.pipeline.dali_ops import decode_crop
from alexprep.shards import rgb_statistics
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.sample_reader import Samples


def decode_alone(data: Path, device: str) -> list[Any]:
    """The centre crop's pixels, as they come."""
    samples = Samples(data, "train")
    encoded = [np.array(samples.encoded(row)) for row in range(len(samples))]
    picks = itertools.cycle(range(len(encoded)))
    source = fn.external_source(source=lambda: [encoded[next(picks)] for _ in range(BATCH)])
    return [decode_crop(source, SIDE, device=device)]


def tar_reader(data: Path, device: str, resized: bool = False) -> list[Any]:
    """Images and labels from the shards."""
    tars = sorted(str(path) for path in (data / "train").glob("*.tar"))
    indexes = [tar.removesuffix(".tar") + ".idx" for tar in tars]
    mean = rgb_statistics.read_statistics(data, read_dataset(data)["digest"]).channel_means.tolist()
    options: Any = {"index_paths": indexes, "ext": ["jpg", "cls"], "random_shuffle": True, "initial_fill": 1024}
    encoded, label = cast("Any", fn.readers.webdataset(paths=tars, **options))
    form: Any = {"dtype": types.FLOAT, "output_layout": "HWC"}
    if resized:
        decoder = "cpu" if device == "cpu" else "mixed"
        window = fn.decoders.image_random_crop(
            encoded, device=decoder, random_area=SCALE, random_aspect_ratio=RATIO, output_type=types.RGB
        )
        image, form["std"] = (
            fn.resize(window, size=SIDE, mode="stretch", interp_type=types.INTERP_LINEAR),
            [58.4, 57.1, 57.4],
        )
    else:
        x, y = fn.random.uniform(range=(0, 1)), fn.random.uniform(range=(0, 1))
        image = decode_crop(encoded, SIDE, x, y, device)
    return [fn.crop_mirror_normalize(image, mirror=fn.random.coin_flip(), mean=mean, **form), label]


VARIANTS: dict[str, tuple[Callable[[Path, str], list[Any]], str]] = {
    "decode": (decode_alone, "centre crop decoded from memory, nothing else; uint8, no order"),
    "dali": (
        tar_reader,
        "DALI's reader of tars: crop decoded, mirror, channel means; float32; shuffled in a buffer of 1,024",
    ),
    "dali-resized": (
        functools.partial(tar_reader, resized=True),
        "DALI's reader of tars: window of 8 to 100 % decoded, resized, mirror, means, deviations; float32; shuffled in a buffer of 1,024",
    ),
}


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns with one variant."""
    make, work = VARIANTS[variant]
    pipeline: Any = Pipeline(BATCH, int(threads), 0 if device == "cuda" else None, prefetch_queue_depth=3)
    with pipeline:
        pipeline.set_outputs(*make(Path(folder) / "jpg", device))

    def step() -> Any:
        images = pipeline.run()[0]
        if variant == "decode":
            return images
        return torch.utils.dlpack.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    serve(step, work, ("nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12"), finish)


if __name__ == "__main__":
    main(*sys.argv[1:])
