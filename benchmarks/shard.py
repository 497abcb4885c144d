"""Sharding beside img2dataset and loops of Pillow, OpenCV, simplejpeg and vips, on the same photos, and on larger ones.

python benchmarks/shard.py SOURCE [--inputs 600] [--large 120] [--rounds 5] [--processes 1] [--contestants alexprep,vips,...] [--save]

SOURCE: a tree of class folders, for example the ImageNet training set. Its files are linked as often as --inputs asks; the larger ones are
made of its 40 largest by benchmarks/large_photos.py. All make 256 x 256 JPEGs of quality 95, 4:2:0. Each runs as a command with few photos
and with many more, all in turns: the difference is what a photo takes, the rest is start-up. Of processor time, of all of a contestant's
processes, so that a busy machine changes little. PSNR is that of the pixels before they are encoded, to exact decoding and the exact filter
(area; for vips Lanczos). A ratio is the median over the rounds of the ratios within a round. Environments for the others are made below
build/benchmarks when they are first asked for.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import command_line, in_turns, report
from large_photos import enlarge, psnr
from numpy.typing import NDArray
from processes import Environment, Missing, Run, interpreter, run

from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.resample import Resize, taps
from alexprep.shards.sources.base import Account
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.worker_pool import one_thread

FEW = 20  # photos of which the start-up is known
OURS = ("alexprep", "alexprep-scaled")  # the second is --decode scaled
ENVIRONMENTS = {  # by the name of the script in contestants/
    "alexprep_shard": Environment(),
    "img2dataset_tars": Environment(  # it imports imghdr, which Python 3.13 no longer has
        ("img2dataset", "opencv-python-headless<5", "setuptools<81"), python=(3, 12)
    ),
    "resizers": Environment(("opencv-python-headless", "pillow", "pyvips[binary]", "simplejpeg")),
}
CONTESTANTS = {"alexprep": "alexprep_shard", "alexprep-scaled": "alexprep_shard", "img2dataset": "img2dataset_tars"}
CONTESTANTS |= dict.fromkeys(("pillow", "opencv", "simplejpeg", "vips"), "resizers")


def main() -> None:
    """Times the stages, then every contestant in turns."""
    parser = command_line(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--inputs", type=int, default=600, help="photos that each contestant sees")
    parser.add_argument("--large", type=int, default=120, help="larger photos that each sees; 0 for none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--work", type=Path, help="a folder for links and output, below which everything is removed")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in ("inputs", "large", "rounds", "processes")}
    figures |= _stages(arguments.source)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        sets = {"photos": (arguments.source, arguments.inputs)}
        if arguments.large:
            sets["large photos"] = (Path(work) / "large", arguments.large)
            enlarge(arguments.source, Path(work) / "large", 40)
        for name, (source, inputs) in sets.items():
            place = Path(work) / name.replace(" ", "-")
            figures |= {f"{name}: {key}": value for key, value in compared(source, inputs, place, arguments).items()}
    report("shard", figures, arguments.save)


def compared(source: Path, inputs: int, work: Path, how: argparse.Namespace) -> dict[str, Any]:
    """The figures of one set of photos."""
    figures: dict[str, Any] = {}
    costs: dict[str, list[tuple[float, float]]] = {}  # a photo's CPU ms, and CPU seconds of start-up
    for kind, count in (("distinct", 0), ("few", FEW), ("many", FEW + inputs)):
        repeated(source, work / f"{kind}-source", count)
    exact = {name: _pixels(f"alexprep-{name}", work) for name in ("area", "lanczos")}
    left = how.contestants.split(",")
    for name in list(left):
        try:
            found = _pixels(name, work)
        except Missing as reason:
            figures[f"{name}: left out"] = str(reason)
            left.remove(name)
            continue
        of = exact["lanczos" if name == "vips" else "area"]
        values = [psnr(pixels, of[path]) for path, pixels in found.items()]
        figures[f"{name}: PSNR to the exact filter, dB, median and least"] = (
            f"{statistics.median(values):.1f}, {min(values):.1f}"
        )
    for turn, name in itertools.product(range(how.rounds), left):
        taken = {kind: _timed(name, work, kind, how.processes) for kind in ("few", "many")}
        each = (taken["many"].cpu - taken["few"].cpu) / inputs
        costs.setdefault(name, []).append((1000 * each, taken["few"].cpu - FEW * each))
        print(f"round {turn + 1} of {how.rounds}: {name} {1000 * each:.2f} ms a photo", file=sys.stderr)
    for name, held in costs.items():
        figures[f"{name}: CPU ms a photo"] = statistics.median(each for each, _ in held)
        figures[f"{name}: lowest and highest"] = f"{min(held)[0]:.2f}, {max(held)[0]:.2f}"
        figures[f"{name}: start-up, CPU s"] = statistics.median(start for _, start in held)
    for ours, other in itertools.product((name for name in OURS if name in costs), costs):
        if other not in OURS:
            ratios = [theirs / mine for (mine, _), (theirs, _) in zip(costs[ours], costs[other], strict=True)]
            figures[f"{ours} is faster than {other} by"] = statistics.median(ratios)
    return figures


def _pixels(name: str, work: Path) -> dict[str, NDArray[np.uint8]]:
    """What a contestant makes of each photo before it is encoded."""
    made = work / "pixels"
    _contestant(name, work / "distinct-source", made, 0)
    found = {str(path.relative_to(made)): np.load(path) for path in made.rglob("*.npy")}
    shutil.rmtree(made)
    return found


def _timed(name: str, work: Path, kind: str, processes: int) -> Run:
    try:
        return _contestant(name, work / f"{kind}-source", work / "made", processes)
    finally:
        shutil.rmtree(work / "made", ignore_errors=True)


def _contestant(name: str, source: Path, target: Path, processes: int) -> Run:
    script = CONTESTANTS.get(name, "alexprep_shard")
    return run(interpreter(script, ENVIRONMENTS[script]), script, source, target, processes, name)


def _stages(place: Path, limit: int = 300) -> dict[str, Any]:
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
    """A tree with links to the files of `source`, again and again until there are as many as `inputs`; to each once for 0."""
    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    for number, path in zip(range(inputs or len(paths)), itertools.cycle(paths), strict=False):
        folder = target / path.relative_to(source).parent
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / f"{number // len(paths):06d}-{path.name}"
        try:
            os.link(path.resolve(), link)
        except OSError:  # another file system
            shutil.copyfile(path, link)


if __name__ == "__main__":
    main()
