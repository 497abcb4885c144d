"""Sharding beside img2dataset, a Pillow pool and FFCV's writer, and beside the sum of its own stages, on the same photos.

python benchmarks/shard.py SOURCE [--inputs 3000] [--contestants alexprep,pillow,img2dataset,ffcv] [--save]

SOURCE: a tree of class folders, for example the ImageNet training set. Its files are linked as often as `--inputs` asks.
All make 256 x 256 JPEGs of quality 95, 4:2:0, with an area filter, except where contestants/ says otherwise, and take turns
with 1 and 2 processes. "whole" is from the command's start to its end; "steady" while its workers work; "a CPU second" counts
what all its processes used, and so bears a busy machine. Environments for the others are made below build/benchmarks when
they are first asked for.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import command_line, in_turns, report
from numpy.typing import NDArray
from processes import Environment, Missing, Run, interpreter, run

from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.resample import Resize, taps
from alexprep.shards.sources.base import Account
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.worker_pool import one_thread

PROCESSES = (1, 2)
NEEDS = {  # by the name of the script in contestants/
    "alexprep": ("alexprep_shard", Environment()),
    "pillow": ("pillow_pool", Environment()),
    "img2dataset": (  # it imports imghdr, which Python 3.13 no longer has
        "img2dataset_tars",
        Environment(("img2dataset", "opencv-python-headless<5", "setuptools<81"), python=(3, 12)),
    ),
    "ffcv": (
        "ffcv_beton",
        Environment(
            (
                *("setuptools<81", "wheel", "numba", "opencv-python-headless<5", "torch", "torchvision", "tqdm"),
                *("pandas", "pytorch_pfn_extras", "fastargs", "assertpy", "psutil", "terminaltables"),
            ),
            bare=("ffcv",),
            system=("opencv4", "libturbojpeg"),
            python=(3, 12),
        ),
    ),
}


def main() -> None:
    """Times the stages, then every contestant in turns."""
    parser = command_line(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--inputs", type=int, default=3000, help="images that each contestant sees")
    parser.add_argument("--limit", type=int, default=300, help="images in the stages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", default="alexprep,pillow,img2dataset,ffcv")
    parser.add_argument("--work", type=Path, help="a folder for links and output, below which everything is removed")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"inputs": arguments.inputs} | _stages(arguments.source, arguments.limit)
    pythons = {}
    for name in arguments.contestants.split(","):
        try:
            pythons[name] = interpreter(name, NEEDS[name][1])
        except Missing as reason:
            figures[f"{name}: left out"] = str(reason)
    runs: dict[tuple[str, int], list[Run]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        source = Path(work) / "source"
        repeated(arguments.source, source, arguments.inputs)
        for turn, name, processes in itertools.product(range(arguments.rounds), list(pythons), PROCESSES):
            if name not in pythons:
                continue
            target = Path(work) / f"{turn}-{name}-{processes}"
            try:
                runs.setdefault((name, processes), []).append(
                    run(pythons[name], NEEDS[name][0], source, target, processes)
                )
            except Missing as reason:
                figures[f"{name}: left out"] = str(reason)
                del pythons[name]
    report(
        "shard",
        figures | _compared({key: held for key, held in runs.items() if key[0] in pythons}, figures),
        arguments.save,
    )


def _compared(runs: dict[tuple[str, int], list[Run]], stages: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios that the goals are about."""
    figures: dict[str, Any] = {}
    middle = {
        key: {field: statistics.median(getattr(run, field) for run in held) for field in vars(held[0])}
        for key, held in runs.items()
    }
    for (name, processes), found in middle.items():
        label = f"{name}, {processes} process{'es' * (processes > 1)}"
        figures[f"{label}: whole, images/s"] = found["whole"]
        figures[f"{label}: steady, images/s"] = found["steady"]
        figures[f"{label}: images a CPU second"] = found["cpu"]
        figures[f"{label}: largest process, early / late / peak MB"] = " / ".join(
            f"{found[field]:.0f}" for field in ("early_mb", "late_mb", "peak_mb")
        )
    for name, processes in middle:
        ours = middle.get(("alexprep", processes))
        if ours and name != "alexprep":
            for field in ("whole", "steady", "cpu"):
                ratio = ours[field] / middle[name, processes][field]
                figures[f"alexprep / {name}, {processes} process{'es' * (processes > 1)}, {field}"] = ratio
    for name in dict(middle):
        if name[1] == 1 and (name[0], 2) in middle:
            for field in ("whole", "steady"):
                figures[f"{name[0]}: 2 processes / 1, {field}"] = middle[name[0], 2][field] / middle[name][field]
    if ("alexprep", 1) in middle:
        for field in ("whole", "steady"):
            figures[f"alexprep, 1 process, {field} / sum of the stages"] = (
                middle["alexprep", 1][field] / stages["stages: sum, images/s"]
            )
    return figures


def _stages(place: Path, limit: int) -> dict[str, Any]:
    """Decode, resize and encode alone, their sum, and the codec whole, on one core, from memory."""
    one_thread()
    source, codec, target = find_source(str(place)), Codec(Target()), Target()
    read = (source.read(item.location) for item in itertools.islice(source.inputs(Account()), limit))
    decoded = [(data, codec.decode(data)) for data in read if isinstance(data, bytes)]
    usable = [(data, pixels) for data, pixels in decoded if pixels is not None]
    whole: list[tuple[Resize, NDArray[np.uint8]]] = []
    for _, pixels in usable:
        height, width = pixels.shape[:2]
        square = target.resize(height, width)
        top, left, bottom, right = square.region
        whole.append((square, pixels[top:bottom, left:right]))
    squares = [resize(region) for resize, region in whole]

    def resize(fresh: bool) -> int:
        for resize, region in whole:
            if fresh:
                taps.cache_clear()
            resize(region)
        return len(whole)

    stages = {
        "decode": lambda: len([codec.decode(data) for data, _ in usable]),
        "resize (area), shapes seen before": lambda: resize(False),
        "encode": lambda: len([codec.encode(square) for square in squares]),
        "codec": lambda: len([codec.convert(data) for data, _ in usable]),
    }
    rates = in_turns(stages)
    total = 1 / sum(1 / rate for name, rate in rates.items() if name != "codec")
    rates |= in_turns(
        {"resize (area), each shape new": lambda: resize(True)}
    )  # by itself: it empties the others' cache
    figures: dict[str, Any] = {"stages: photos": len(usable)}
    figures |= {f"stages: {name}, images/s": rate for name, rate in rates.items()}
    return figures | {"stages: sum, images/s": total, "codec / sum of the stages": rates["codec"] / total}


def repeated(source: Path, target: Path, inputs: int) -> None:
    """A tree with links to the files of `source`, again and again until there are as many as `inputs`."""
    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    for number, path in zip(range(inputs), itertools.cycle(paths), strict=False):
        folder = target / path.relative_to(source).parent
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / f"{number // len(paths):06d}-{path.name}"
        try:
            os.link(path.resolve(), link)
        except OSError:  # another file system
            shutil.copyfile(path, link)


if __name__ == "__main__":
    main()
