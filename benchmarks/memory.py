"""What the largest images that are let in cost a worker in memory.

    python benchmarks/memory.py [--save]

Images of just under the limit of their kind (alexprep.shards.image_codec) are made in sixteen forms, a wide one too. One process converts all of them, in several orders
(memory that one leaves behind must not decide about the next), under the same bound as a worker. Printed: how many are
accepted, and the peak resident memory of the process.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import command_line, report
from PIL import Image

from alexprep.shards import worker_pool
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import MAX_PIXELS
from alexprep.shards.worker_pool import IMAGE_BYTES

SIDE = int(MAX_PIXELS**0.5)
ORDERS = 3


def largest() -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of legal images, as large as they may be."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
    sheet = np.tile(tile, (-(-SIDE // 64), -(-SIDE // 64), 1))[:SIDE, :SIDE]
    rgb, cmyk = Image.fromarray(sheet[:, :, :3].copy()), Image.fromarray(sheet, "CMYK").crop((0, 0, 7745, 7745))
    alpha, smaller = rgb.crop((0, 0, 7745, 7745)).convert("RGBA"), rgb.crop((0, 0, 7400, 7400))
    for name, image, kind, options in (
        ("jpeg", rgb, "JPEG", {}),
        ("jpeg, 4:4:4", rgb, "JPEG", {"subsampling": 0}),
        ("jpeg, progressive", rgb, "JPEG", {"progressive": True}),
        ("jpeg, grey", rgb.convert("L"), "JPEG", {}),
        ("jpeg, CMYK", cmyk, "JPEG", {}),
        ("jpeg, CMYK, progressive", cmyk, "JPEG", {"progressive": True}),
        ("png", rgb, "PNG", {"compress_level": 1}),
        ("png, alpha", alpha, "PNG", {"compress_level": 1}),
        ("png, palette", rgb.convert("P"), "PNG", {"compress_level": 1}),
        ("gif", smaller.convert("P"), "GIF", {}),
        ("bmp", rgb, "BMP", {}),
        ("ppm", rgb, "PPM", {}),
        ("tiff", smaller, "TIFF", {}),
        ("tiff, CMYK", cmyk.crop((0, 0, 5800, 5800)), "TIFF", {}),
        ("tiff, 16 bits", Image.fromarray(np.zeros((5600, 5600), np.uint16)), "TIFF", {}),
        ("png, wide", rgb.crop((0, 0, SIDE, 1220)).resize((65_535, 1220)), "PNG", {"compress_level": 1}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        yield name, buffer.getvalue()


def convert(paths: list[str]) -> None:
    """In a process of its own: converts files as a worker does, and prints the refusals and the peak memory."""
    worker_pool.one_thread()
    worker_pool._reuse_memory()
    codec = Codec(Target())
    worker_pool._memory_bytes = IMAGE_BYTES
    worker_pool.limit_memory()
    refused = {}
    for path in paths:
        result = codec.convert(Path(path).read_bytes())
        if not isinstance(result, Converted):
            refused[Path(path).stem] = result.reason
    with open("/proc/self/status", encoding="ascii") as status:  # ru_maxrss would tell the parent's, if that was larger
        peak = next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM:"))
    print(json.dumps([refused, peak]))


def main() -> None:
    """Runs the benchmark."""
    parser = command_line(__doc__)
    parser.add_argument("--convert", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert is not None:
        convert(arguments.convert)
        return
    figures: dict[str, object] = {"pixels of the largest": SIDE * SIDE}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, data in largest():
            paths.append(Path(folder) / f"{name}.bin")
            paths[-1].write_bytes(data)
        for order in range(ORDERS):
            random.Random(order).shuffle(paths)
            command = [sys.executable, __file__, "--convert", *map(str, paths)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            refused, peak = json.loads(done.stdout.splitlines()[-1])
            figures[f"order {order}: accepted of {len(paths)}"] = len(paths) - len(refused)
            figures[f"order {order}: peak MiB"] = peak
            for name, reason in refused.items():
                figures[f"order {order}: {name}"] = reason
    report("memory", figures, arguments.save)


if __name__ == "__main__":
    main()
