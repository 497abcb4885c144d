"""alexprep's shards and two of its graph functions inside a DALI pipeline of one's own, with DALI's reader and an operator between.

    python docs/examples/own_pipeline.py alexprep-data

The draws are DALI's here; `Loader` is what makes them reproducible on any number of ranks.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode

from alexprep.pipeline import decode_crop, to_tensor


@pipeline_def(num_threads=2, exec_dynamic=True)
def jittered(shards: list[str], crop: int, device: str = "cpu") -> tuple[DataNode, DataNode]:
    """Random crops with random saturation, reflected by chance."""
    encoded, label = fn.readers.webdataset(  # type: ignore[misc]  # DALI's stub says None
        paths=shards,
        index_paths=[shard.removesuffix(".tar") + ".idx" for shard in shards],
        ext=["jpg", "cls"],
        random_shuffle=True,
        name="shards",
    )
    image = decode_crop(encoded, crop, fn.random.uniform(range=(0, 1)), fn.random.uniform(range=(0, 1)), device)
    image = fn.saturation(image, saturation=fn.random.uniform(range=(0.6, 1.4)))
    return to_tensor(image, fn.random.coin_flip(), [-124.0, -117.0, -104.0]), label


def main() -> None:
    """One epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    shards = [str(path) for path in sorted((options.data / "train").glob("*.tar"))]
    on = {"device": "cuda", "device_id": 0} if torch.cuda.is_available() else {"device": "cpu", "device_id": None}
    pipeline = jittered(shards, options.crop, batch_size=options.batch_size, **on)
    samples, classes = pipeline.reader_meta("shards")["epoch_size"], Counter[int]()
    for _ in range(-(-samples // options.batch_size)):  # the reader goes round: the next epoch fills the last batch
        images, labels = pipeline.run()
        batch = torch.utils.dlpack.from_dlpack(images.as_tensor())  # (N, 3, crop, crop), without a copy
        classes.update(int(labels.at(n).tobytes()) for n in range(len(labels)))  # KEY.cls holds ASCII digits
    print(f"{samples} samples, batches {tuple(batch.shape)}, {len(classes)} classes, mean {batch.mean().item():.1f}")


if __name__ == "__main__":
    main()
