"""SPDL: its pipeline of threads and its FFmpeg decoder over the same JPEG files, put together as its image examples are.

Each image has a filter graph of its own, which crops, mirrors and converts to RGB; a batch is then one buffer, from which torch
subtracts the channel means. FFmpeg takes the corner of a crop of a 4:2:0 picture at even pixels.
SPDL wants the system's FFmpeg, 4 to 9, as shared libraries with libavdevice (Debian 12: libavdevice59).
"""

from __future__ import annotations

import ctypes.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contestants.serve import BATCH, SIDE, STORED, random_window, serve

AHEAD = 2  # batches
WORK = (
    "whole image decoded by FFmpeg, random crop at even pixels (resized, if that is asked for), mirror, RGB in its filter graph, channel means by torch; "
    "float32; a true permutation"
)


def paths(folder: Path) -> Iterator[str]:
    """The files in an order of their own each epoch, for ever."""
    found = sorted(str(path) for path in folder.rglob("*.jpg"))
    while True:
        random.shuffle(found)
        yield from found


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns."""
    if not ctypes.util.find_library("avdevice"):
        sys.exit("SPDL needs the shared libraries of FFmpeg, libavdevice among them")
    import spdl.io  # type: ignore[import-not-found]
    import torch
    from spdl.pipeline import PipelineBuilder  # type: ignore[import-not-found]

    # One value for each of a crop's: torch is faster so than where it must repeat three.
    mean = torch.tensor(json.loads((Path(folder) / "facts.json").read_text())["mean"]).tile(SIDE, SIDE, 1)

    def decode(path: str) -> Any:
        mirror = ",hflip" if random.random() < 0.5 else ""
        if variant.endswith("resized"):
            left, top, width, height = random_window()
            steps = f"crop={width}:{height}:{left}:{top},scale={SIDE}:{SIDE}:flags=bilinear{mirror},format=rgb24"
        else:
            left, top = random.randint(0, STORED - SIDE), random.randint(0, STORED - SIDE)
            steps = f"crop={SIDE}:{SIDE}:{left}:{top}{mirror},format=rgb24"
        return spdl.io.decode_packets(spdl.io.demux_image(path), filter_desc=steps)

    def load(batch: list[str]) -> torch.Tensor:
        pixels: torch.Tensor = spdl.io.to_torch(spdl.io.convert_frames([decode(path) for path in batch]))
        return pixels.float().sub_(mean).permute(0, 3, 1, 2)

    builder = PipelineBuilder().add_source(paths(Path(folder) / "files")).aggregate(BATCH)
    pipeline = builder.pipe(load, concurrency=int(threads)).add_sink(AHEAD).build(num_threads=int(threads))
    with pipeline.auto_stop():
        batches = iter(pipeline)
        serve(lambda: next(batches), WORK, ("spdl-io", "torch"))


if __name__ == "__main__":
    main(*sys.argv[1:])
