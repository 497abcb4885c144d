"""Pillow in a process pool, as people write it: open, box filter (the area under each pixel), centre crop, save as a file."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path

from PIL import Image

SIZE = 256


def convert(job: tuple[str, str]) -> None:
    """One image, from a path to a path."""
    source, target = job
    with Image.open(source) as image:
        pixels = image.convert("RGB")
    scale = SIZE / min(pixels.size)
    width, height = (max(SIZE, round(side * scale)) for side in pixels.size)
    smooth = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    pixels = pixels.resize((width, height), smooth)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    pixels.crop((left, top, left + SIZE, top + SIZE)).save(target, "JPEG", quality=95, subsampling="4:2:0")


def main(source: str, target: str, processes: str) -> None:
    """Converts the tree at `source` and prints what it took."""
    paths = sorted(path for path in Path(source).rglob("*") if path.is_file())
    jobs = [(str(path), str(Path(target) / path.relative_to(source).with_suffix(".jpg"))) for path in paths]
    for folder in {Path(place).parent for _, place in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(int(processes)) as pool:
        pool.map(abs, range(int(processes) * 4), chunksize=1)  # until the workers are there
        start = time.perf_counter()
        for _ in pool.imap_unordered(convert, jobs, chunksize=16):
            pass
        print(json.dumps({"images": len(jobs), "steady": len(jobs) / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
