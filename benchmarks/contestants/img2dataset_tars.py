"""img2dataset without its downloads: its own Resizer and tar writer (with its Parquet table), 1,000 images a tar, in a pool.

What it also does by default and here does not: EXIF as JSON, a sha256 of each input.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

TAR = 1000
_resizer: Any = None


def prepare() -> None:
    """Imports and makes what a worker needs."""
    global _resizer
    from img2dataset.resizer import Resizer  # type: ignore[import-not-found]

    _resizer = Resizer(
        256, "center_crop", False, upscale_interpolation="cubic", downscale_interpolation="area", encode_quality=95
    )


def write(job: tuple[int, list[str], str]) -> int:
    """One tar; returns how many images are in it."""
    import pyarrow as pa
    from img2dataset.writer import WebDatasetSampleWriter  # type: ignore[import-not-found]

    number, paths, target = job
    names = ("width", "height", "original_width", "original_height")
    schema = pa.schema([("key", pa.string()), ("status", pa.string()), *((name, pa.int32()) for name in names)])
    writer = WebDatasetSampleWriter(number, target, False, 5, schema, "jpg")
    for place, path in enumerate(paths):
        encoded, *sizes, error = _resizer(io.BytesIO(Path(path).read_bytes()))
        assert error is None, error
        key = f"{number:05d}{place:04d}"
        meta = {"key": key, "status": "success", **dict(zip(names, sizes, strict=True))}
        writer.write(encoded, key, None, meta)
    writer.close()
    return len(paths)


def main(source: str, target: str, processes: str) -> None:
    """Converts the tree at `source` and prints what it took."""
    paths = sorted(str(path) for path in Path(source).rglob("*") if path.is_file())
    tar = min(TAR, -(-len(paths) // (2 * int(processes))))  # so that all processes have work to the end
    jobs = [(number, paths[at : at + tar], target) for number, at in enumerate(range(0, len(paths), tar))]
    Path(target).mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(int(processes), prepare) as pool:
        pool.map(abs, range(int(processes) * 4), chunksize=1)  # until the workers are there
        start = time.perf_counter()
        images = sum(pool.imap_unordered(write, jobs))
        print(json.dumps({"images": images, "steady": images / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
