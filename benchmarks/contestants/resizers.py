"""Loops as people write them, each photo read, decoded, resized, cut and encoded by one library or two, and saved as a file.

All make 256 x 256 JPEGs of quality 95, 4:2:0: by the area under each pixel, vips by Lanczos.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE, QUALITY = 256, 95
Pixels = NDArray[np.uint8]


def scaled(width: int, height: int) -> tuple[int, int]:
    """Width and height with `SIZE` for the shorter side."""
    scale = SIZE / min(width, height)
    return max(SIZE, round(width * scale)), max(SIZE, round(height * scale))


def corner(width: int, height: int) -> tuple[int, int]:
    """Left column and top row of the centre."""
    return (width - SIZE) // 2, (height - SIZE) // 2


def by_pillow(data: bytes) -> Any:
    """Decoded to no less than twice what is wanted ("draft"), as Pillow's own `thumbnail` does, and by its box filter."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    size = scaled(*image.size)
    smooth = Image.Resampling.BOX if min(image.size) > SIZE else Image.Resampling.BICUBIC
    image.draft(None, (2 * size[0], 2 * size[1]))
    left, top = corner(*size)
    return image.convert("RGB").resize(size, smooth).crop((left, top, left + SIZE, top + SIZE))


def pillow_bytes(image: Any) -> bytes:
    """A Pillow image as a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def _cut(pixels: Pixels) -> Pixels:
    import cv2  # type: ignore[import-not-found]

    height, width = pixels.shape[:2]
    size = scaled(width, height)
    left, top = corner(*size)
    smooth = cv2.INTER_AREA if min(height, width) > SIZE else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, size, interpolation=smooth)[top : top + SIZE, left : left + SIZE], np.uint8)


def by_opencv(data: bytes) -> Pixels:
    """BGR, by OpenCV alone."""
    import cv2

    kind = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return _cut(np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), kind), np.uint8))


def opencv_bytes(pixels: Pixels) -> bytes:
    """BGR as a JPEG."""
    import cv2

    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])


def by_simplejpeg(data: bytes) -> Pixels:
    """RGB, decoded by simplejpeg and resized by OpenCV."""
    import simplejpeg

    return _cut(simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False))


def simplejpeg_bytes(pixels: Pixels) -> bytes:
    """RGB as a JPEG."""
    import simplejpeg

    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, colorsubsampling="420")
    return encoded


def by_vips(data: bytes) -> Any:
    """`thumbnail`, which decodes to no less than twice what is wanted."""
    import pyvips  # type: ignore[import-not-found]

    image = pyvips.Image.thumbnail_buffer(data, SIZE, height=SIZE, crop="centre", no_rotate=True)
    return image if image.bands == 3 else image.colourspace("srgb")


def vips_bytes(image: Any) -> bytes:
    """A vips image as a JPEG."""
    encoded: bytes = image.jpegsave_buffer(Q=QUALITY, subsample_mode="on", strip=True)
    return encoded


VARIANTS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes], Callable[[Any], Pixels]]] = {
    "pillow": (by_pillow, pillow_bytes, np.asarray),
    "opencv": (by_opencv, opencv_bytes, lambda pixels: pixels[:, :, ::-1]),
    "simplejpeg": (by_simplejpeg, simplejpeg_bytes, np.asarray),
    "vips": (by_vips, vips_bytes, lambda image: image.numpy()),
}


def one_thread() -> None:
    """Keeps OpenCV to one thread, where it is there."""
    import cv2

    cv2.setNumThreads(0)


def convert(job: tuple[str, str, str]) -> None:
    """One photo, from a path to a path."""
    source, target, variant = job
    pixels, encoded, _ = VARIANTS[variant]
    Path(target).write_bytes(encoded(pixels(Path(source).read_bytes())))


def main(source: str, target: str, processes: str, variant: str) -> None:
    """Converts the tree at `source`; with 0 processes, writes the pixels that would be encoded, as PATH.npy."""
    jobs = []
    for path in sorted(path for path in Path(source).rglob("*") if path.is_file()):
        place = Path(target) / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        jobs.append((str(path), str(place), variant))
    one_thread()
    if processes == "0":
        pixels, _, plain = VARIANTS[variant]
        for photo, made, _ in jobs:
            np.save(f"{made}.npy", plain(pixels(Path(photo).read_bytes())))
    elif processes == "1":
        for job in jobs:
            convert(job)
    else:
        with multiprocessing.get_context("spawn").Pool(int(processes), one_thread) as pool:
            pool.map(convert, jobs, chunksize=16)


if __name__ == "__main__":
    main(*sys.argv[1:])
