"""Photos of today against exact and scaled decoding: what `alexprep shard --decode scaled` saves, and what it changes.

python benchmarks/large_photos.py PHOTOS [--photos 40] [--out FOLDER] [--save]      PHOTOS: a folder of JPEGs, as large as can be had

Each photo is enlarged to 2,000 pixels on its longer side (Lanczos, quality 90), which is a set for other programs too (--out). The two ways take
turns in one process; PSNR is that of the pixels, before they are encoded, against exact decoding, beside what JPEG of quality 95 itself changes.
"""

from __future__ import annotations

import io
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import command_line, report
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards.image_codec import Codec, Converted, Target

LONGER_SIDE, QUALITY = 2000, 90


def main() -> None:
    """Makes the photos and measures."""
    parser = command_line(__doc__)
    parser.add_argument("source", metavar="PHOTOS", type=Path)
    parser.add_argument("--photos", type=int, default=40, help="so many of the largest files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the large photos are kept too")
    arguments = parser.parse_args()
    photos = enlarge(arguments.source, arguments.out, arguments.photos)
    figures: dict[str, Any] = {"photos": len(photos), "bytes a photo": sum(map(len, photos)) // len(photos)}
    report("large_photos", figures | _times(photos, arguments.rounds) | _differences(photos), arguments.save)


def enlarge(source: Path, out: Path | None, count: int) -> list[bytes]:
    """Of the largest files below `source`, large photos; in two class folders of `out` too, where that is given."""
    files = [path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")]
    chosen = sorted(files, key=lambda path: (path.stat().st_size, path))[-count:]
    photos = [enlarged(path) for path in chosen]
    for number, (path, data) in enumerate(zip(chosen, photos, strict=True)):
        if out is not None:
            folder = out / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{path.stem}.jpg").write_bytes(data)
    return photos


def enlarged(path: Path) -> bytes:
    """A photo as a JPEG with this longer side."""
    image = Image.open(path).convert("RGB")
    scale = LONGER_SIDE / max(image.size)
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _times(photos: list[bytes], rounds: int) -> dict[str, float]:
    codecs = {"exact": Codec(Target()), "scaled": Codec(Target(decode="scaled"))}
    taken: dict[str, list[float]] = {name: [] for name in codecs}
    for number in range(rounds + 1):  # the first is not counted
        for name, codec in codecs.items():
            start = time.process_time()
            for data in photos:
                codec.convert(data)
            taken[name] += [1000 * (time.process_time() - start) / len(photos)] if number else []
    middle = {name: statistics.median(values) for name, values in taken.items()}
    figures = {f"{name}: CPU ms a photo": value for name, value in middle.items()}
    return figures | {"scaled / exact": middle["scaled"] / middle["exact"]}


def _differences(photos: list[bytes]) -> dict[str, str]:
    exact, scaled, stored = map(Codec, (Target(format="png"), Target(format="png", decode="scaled"), Target()))
    found: dict[str, list[float]] = {"scaled decoding": [], "JPEG 95 by itself": []}
    for data in photos:
        reference = _pixels(exact, data)
        for name, codec in zip(found, (scaled, stored), strict=True):
            found[name].append(psnr(_pixels(codec, data), reference))
    return {
        f"{name}: PSNR, dB, least, median, most": f"{min(values):.1f}, {statistics.median(values):.1f}, {max(values):.1f}"
        for name, values in found.items()
    }


def psnr(pixels: NDArray[Any], exact: NDArray[Any]) -> float:
    """Peak signal to noise, dB, of grey levels 0-255; 138 for none."""
    return float(10 * np.log10(255**2 / max(1e-9, np.square(np.subtract(pixels, exact, dtype=np.float64)).mean())))


def _pixels(codec: Codec, data: bytes) -> NDArray[np.float64]:
    converted = codec.convert(data)
    assert isinstance(converted, Converted), converted
    return np.asarray(Image.open(io.BytesIO(converted.data)), np.float64)


if __name__ == "__main__":
    main()
