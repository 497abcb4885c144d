"""The loader beside decoding alone, beside DALI's own reader, and beside Pillow in a torch DataLoader.

python benchmarks/loader.py DATA [--device cuda] [--threads N] [--save]      DATA: shards and statistics of 256-pixel images

All give a global batch of 128 crops of 224 x 224. "decode alone" is DALI's region decoder fed from memory, uint8 on its device.
"""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from common import in_turns, report
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from PIL import Image

from alexprep.pipeline import Augmentation, Loader
from alexprep.pipeline.graph import decode_crop
from alexprep.shards import stats
from alexprep.shards.engines import cores
from alexprep.shards.layout import read_dataset
from alexprep.shards.read import Samples

BATCH, SIDE, STEPS = 128, 224, 12


def main() -> None:
    """Times each contestant in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    data, device, threads = arguments.data, arguments.device, arguments.threads
    torch.set_num_threads(threads)
    plain = Augmentation(mean="channel", noise="none")
    full = Loader(data, batch_size=BATCH, device=device, threads=threads)
    rates = in_turns(
        {
            "decode": _decode_alone(data, device, threads),
            "full": _steps(full),
            "channel": _steps(Loader(data, batch_size=BATCH, augmentation=plain, device=device, threads=threads)),
            "half": _steps(Loader(data, batch_size=BATCH, device=device, threads=threads, dtype="float16")),
            "dali": _dali_reader(data, device, threads),
            "pillow": _pillow(data, threads),
        }
    )
    figures = {
        "images": full.samples,
        "threads": threads,
        "device": device,
        "decode of the crop alone, images/s": rates["decode"],
        "Loader, the paper's augmentation, float32, images/s": rates["full"],
        "Loader, the paper's augmentation, float16, images/s": rates["half"],
        "Loader, crop, mirror and channel means, float32, images/s": rates["channel"],
        "DALI's own reader, crop, mirror and channel means, images/s": rates["dali"],
        "Pillow in a DataLoader, the paper's augmentation, images/s": rates["pillow"],
        "full / decode alone": rates["full"] / rates["decode"],
        "full / Pillow in a DataLoader": rates["full"] / rates["pillow"],
    }
    report(f"loader-{device}-{threads}", figures, arguments.save)


def _steps(loader: Loader) -> Callable[[], int]:
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    def run() -> int:
        images = sum(len(batch.images) for batch in itertools.islice(batches, STEPS))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return images

    return run


def _decode_alone(data: Path, device: str, threads: int) -> Callable[[], int]:
    samples = Samples(data, "train")
    encoded = [np.array(samples.encoded(row)) for row in range(min(len(samples), 2000))]
    picks = itertools.cycle(range(len(encoded)))
    pipeline = Pipeline(BATCH, threads, 0 if device == "cuda" else None, prefetch_queue_depth=3)
    with pipeline:
        source = fn.external_source(source=lambda: [encoded[next(picks)] for _ in range(BATCH)])
        pipeline.set_outputs(decode_crop(source, SIDE, device=device))
    return _run(pipeline)


def _dali_reader(data: Path, device: str, threads: int) -> Callable[[], int]:
    tars = sorted(str(path) for path in (data / "train").glob("*.tar"))
    mean = stats.read(data, read_dataset(data)["digest"]).channel_means.tolist()
    pipeline = Pipeline(BATCH, threads, 0 if device == "cuda" else None, prefetch_queue_depth=3)
    with pipeline:
        indexes = [tar.removesuffix(".tar") + ".idx" for tar in tars]
        options: Any = {"index_paths": indexes, "ext": ["jpg", "cls"], "random_shuffle": True}
        encoded, label = cast("Any", fn.readers.webdataset(paths=tars, **options))
        x, y, mirror = fn.random.uniform(range=(0, 1)), fn.random.uniform(range=(0, 1)), fn.random.coin_flip()
        image = decode_crop(encoded, SIDE, x, y, device)
        pipeline.set_outputs(fn.crop_mirror_normalize(image, mirror=mirror, mean=mean, output_layout="CHW"), label)
    return _run(pipeline)


def _run(pipeline: Any) -> Callable[[], int]:
    def run() -> int:
        for _ in range(STEPS):
            pipeline.run()
        return BATCH * STEPS

    return run


class _PillowImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """What a careful user writes without DALI: Pillow, numpy, the paper's augmentation."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._samples = Samples(data, "train")
        found = stats.read(data, self._samples.dataset["digest"])
        self._mean = found.mean_HWC.astype(np.float32)
        self._axes = (found.eigenvectors * found.eigenvalues / 255).astype(np.float32)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = np.asarray(Image.open(io.BytesIO(self._samples.encoded(row).tobytes())))
        top, left = torch.randint(0, len(image) - SIDE + 1, (2,)).tolist()
        crop: NDArray[np.float32] = (
            image[top : top + SIDE, left : left + SIDE] - self._mean[top : top + SIDE, left : left + SIDE]
        )
        if torch.rand(()) < 0.5:
            crop = crop[:, ::-1]
        crop = crop + self._axes @ (0.1 * torch.randn(3)).numpy()
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), int(self._samples.labels[row])


def _pillow(data: Path, threads: int) -> Callable[[], int]:
    dataset = _PillowImages(data)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=threads, persistent_workers=True, drop_last=False
    )
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    def run() -> int:
        return sum(len(images) for images, _ in itertools.islice(batches, STEPS))

    return run


if __name__ == "__main__":
    main()
