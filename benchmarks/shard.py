"""Sharding beside the sum of its codec stages, on one core and on two.

python benchmarks/shard.py SOURCE [--save]      SOURCE: a tree of class folders, for example the ImageNet training set
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from common import in_turns, report

from alexprep.shards.build import build
from alexprep.shards.codec import Codec, Target
from alexprep.shards.engines import one_thread
from alexprep.shards.geometry import to_square
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.base import find_source


def main() -> None:
    """Times decode, resize and encode alone, the codec whole, and the command with 1 and 2 workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--limit", type=int, default=1000, help="images in the stages")
    parser.add_argument("--repeat", type=int, default=10, help="how often the commands see each image, as links")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    one_thread()
    source = find_source(arguments.source)
    target = Target()
    codec = Codec(target)
    encoded = [source.read(item.location) for item, _ in zip(source.inputs(), range(arguments.limit), strict=False)]
    streams = [(data, codec._parse(data)) for data in encoded]
    usable = [(data, stream) for data, stream in streams if stream is not None]
    resizes = [to_square(stream.height, stream.width, target.size, target.filter) for _, stream in usable]
    regions = [codec._decode(stream, resize.region) for (_, stream), resize in zip(usable, resizes, strict=True)]
    whole = [(resize, region) for resize, region in zip(resizes, regions, strict=True) if region is not None]
    squares = [resize(region) for resize, region in whole]

    def decode() -> int:
        for (data, _), resize in zip(usable, resizes, strict=True):
            codec._decode(codec._parse(data), resize.region)
        return len(usable)

    def resize_all() -> int:
        for resize, region in whole:
            resize(region)
        return len(usable)

    def encode() -> int:
        for square in squares:
            codec.encode(square)
        return len(usable)

    def convert() -> int:
        for data, _ in usable:
            codec.convert(data)
        return len(usable)

    rates = in_turns({"decode": decode, "resize": resize_all, "encode": encode, "codec": convert})
    stages = 1 / sum(1 / rates[name] for name in ("decode", "resize", "encode"))
    work = Path(tempfile.mkdtemp())
    _repeat(arguments.source, work / "source", arguments.repeat)
    commands: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(3):
        for workers, command_rates in commands.items():
            done = build(work / "source", work / f"{turn}-{workers}", ShardOptions(), workers)
            command_rates.append(done.inputs / done.seconds)
    shutil.rmtree(work)
    shards = {workers: statistics.median(command_rates) for workers, command_rates in commands.items()}
    figures = {
        "images in the stages": len(usable),
        "images in the commands": done.inputs,
        "decode of the region, images/s": rates["decode"],
        "resize (area), images/s": rates["resize"],
        "encode, images/s": rates["encode"],
        "sum of the stages, images/s": stages,
        "codec, images/s": rates["codec"],
        "codec / sum of the stages": rates["codec"] / stages,
        "command, 1 worker, start included, images/s": shards[1],
        "command, 2 workers, start included, images/s": shards[2],
        "command / sum of the stages": shards[1] / stages,
        "2 workers / 1 worker": shards[2] / shards[1],
    }
    report("shard", figures, arguments.save)


def _repeat(source: Path, target: Path, times: int) -> None:
    """A tree with every file of `source` several times, so that starting the workers weighs little."""
    for path in (path for path in source.rglob("*") if path.is_file()):
        folder = target / path.relative_to(source).parent
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(times):
            (folder / f"{n}-{path.name}").symlink_to(path.resolve())


if __name__ == "__main__":
    main()
