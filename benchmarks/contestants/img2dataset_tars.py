"""img2dataset without its downloads: its own Resizer and tar writer (with its Parquet table), 1,000 images a tar, in a pool.

What it also does by default and here does not: EXIF as JSON, a sha256 of each input.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
from pathlib import Path
from typing import Any

TAR = 1000
_resizer: Any = None


def prepare(**form: Any) -> None:
    """Imports and makes what a worker needs."""
    global _resizer
    from img2dataset.resizer import Resizer  # type: ignore[import-not-found]

    form = {"encode_quality": 95} | form
    _resizer = Resizer(256, "center_crop", False, upscale_interpolation="cubic", downscale_interpolation="area", **form)


def pixels(paths: list[str], source: str, target: str) -> None:
    """Writes what would be encoded, as PATH.npy."""
    import cv2  # type: ignore[import-not-found]
    import numpy as np

    prepare(encode_format="png", encode_quality=1)
    for path in paths:
        place = Path(target) / f"{Path(path).relative_to(source)}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        encoded = _resizer(io.BytesIO(Path(path).read_bytes()))[0]
        np.save(place, cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1])


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


def main(source: str, target: str, processes: str, variant: str) -> None:
    """Converts the tree at `source`; with 0 processes, writes the pixels that would be encoded, as PATH.npy."""
    paths = sorted(str(path) for path in Path(source).rglob("*") if path.is_file())
    if processes == "0":
        return pixels(paths, source, target)
    tar = min(TAR, -(-len(paths) // (2 * int(processes))))  # so that all processes have work to the end
    jobs = [(number, paths[at : at + tar], target) for number, at in enumerate(range(0, len(paths), tar))]
    Path(target).mkdir(parents=True, exist_ok=True)
    if processes == "1":
        prepare()
        list(map(write, jobs))
        return None
    with multiprocessing.get_context("spawn").Pool(int(processes), prepare) as pool:
        pool.map(write, jobs)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
