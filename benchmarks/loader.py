"""The loader beside FFCV, webdataset, torchvision, SPDL and DALI's own reader, and beside decoding alone: same images, same crops.

python benchmarks/loader.py DATA [--threads 1 2] [--contestants full,ffcv-jpg,...] [--device cuda] [--pin] [--save]

DATA: shards of 256-pixel JPEGs. Their first images, again and again until there are --images, become shards (with the very same
bytes), raw shards, files and, for FFCV, .beton files; all below build/benchmarks/loader-data, where they stay. Each contestant is
a process, in an environment of its own where it needs one; all live at the same time and take turns, in which the others sleep.
All give batches of 128 crops of 224 x 224, none pays for the end of an epoch, and a turn's first steps, which may have been made
ahead, are not counted. N threads: N of the contestant's workers, and N for OpenMP, BLAS, numba and OpenCV; --pin also holds each
contestant to N cores. What each does is told in the result, and in contestants/loader_*.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import command_line, report
from contestants.live import Live, Turn
from processes import ROOT, Environment, Missing, interpreter

from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.worker_pool import cores


@dataclass(frozen=True)
class Contestant:
    """Who takes part.

    Attributes:
        label: in the table.
        script: in contestants/.
        environment: its name below build/benchmarks; "" for that of alexprep itself.
        devices: on which it can work.
    """

    label: str
    script: str
    environment: str = ""
    devices: tuple[str, ...] = ("cpu",)


_BOTH = ("cpu", "cuda")
CONTESTANTS = {
    "full": Contestant("Loader, the paper's augmentation, channels last", "loader_alexprep", devices=_BOTH),
    "full-nchw": Contestant("Loader, the paper's augmentation, NCHW", "loader_alexprep", devices=_BOTH),
    "half": Contestant("Loader, the paper's augmentation, float16", "loader_alexprep", devices=_BOTH),
    "channel": Contestant("Loader, crop, mirror, channel means", "loader_alexprep", devices=_BOTH),
    "resized": Contestant(
        "Loader, random resized crops, channel means and deviations", "loader_alexprep", devices=_BOTH
    ),
    "uint8": Contestant("Loader, crop, mirror, uint8", "loader_alexprep", devices=_BOTH),
    "raw": Contestant("Loader, raw shards, crop, mirror, channel means", "loader_alexprep", devices=_BOTH),
    "decode": Contestant("decode of the crop alone (DALI)", "loader_dali", devices=_BOTH),
    "dali": Contestant("DALI's own reader", "loader_dali", devices=_BOTH),
    "ffcv-jpg": Contestant("FFCV, JPEG mode", "loader_ffcv", "ffcv"),
    "ffcv-jpg-nchw": Contestant("FFCV, JPEG mode, NCHW", "loader_ffcv", "ffcv"),
    "ffcv-raw": Contestant("FFCV, raw mode", "loader_ffcv", "ffcv"),
    "webdataset": Contestant("webdataset and Pillow in a DataLoader", "loader_webdataset"),
    "torchvision": Contestant("torchvision, files in a DataLoader", "loader_torchvision", "ffcv"),  # it is in there
    "spdl": Contestant("SPDL, files", "loader_spdl", "spdl"),
}
_PEERS = ("dali", "ffcv-jpg", "webdataset", "torchvision", "spdl")
CONTESTANTS |= {
    f"{name}-resized": replace(CONTESTANTS[name], label=f"{CONTESTANTS[name].label}, random resized crops")
    for name in _PEERS
}
ENVIRONMENTS = {
    "": Environment(),
    "ffcv": Environment(
        (
            *("setuptools<81", "wheel", "numba", "opencv-python-headless<5", "torch", "torchvision", "tqdm"),
            *("pandas", "pytorch_pfn_extras", "fastargs", "assertpy", "psutil", "terminaltables"),
        ),
        bare=("ffcv",),
        system=("opencv4", "libturbojpeg"),
        python=(3, 12),
    ),
    "spdl": Environment(("spdl", "numpy", f"torch=={version('torch').partition('+')[0]}")),
}
RATIOS = (
    *(("full", other) for other in (*_PEERS, "decode", "full-nchw")),
    *(("channel", other) for other in (*_PEERS, "decode")),
    *(("resized", other) for other in (*(f"{name}-resized" for name in _PEERS), "decode")),
    ("full-nchw", "ffcv-jpg-nchw"),
    ("raw", "ffcv-raw"),
    ("uint8", "decode"),
)


def main() -> None:
    """Has the contestants take turns, and reports."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="cpu", choices=_BOTH)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--images", type=int, default=2048, help="that each contestant sees in an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="batches that are timed in a turn")
    parser.add_argument("--skip", type=int, default=8, help="batches before them")
    parser.add_argument("--pin", action="store_true", help="hold each contestant to as many cores as threads")
    arguments = parser.parse_args()
    names = arguments.contestants.split(",")
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"no such contestant: {', '.join(sorted(unknown))}")
    folder = prepare(arguments.data, arguments.images)
    for threads in arguments.threads:
        figures: dict[str, Any] = {"images": arguments.images, "threads": threads, "device": arguments.device}
        figures |= {"rounds": arguments.rounds, "steps": arguments.steps, "pinned": arguments.pin}
        figures |= compare(names, folder, threads, arguments)
        pinned = "-pinned" if arguments.pin else ""
        report(f"loader-{arguments.device}-{threads}{pinned}", figures, arguments.save)


def compare(names: Iterable[str], folder: Path, threads: int, how: argparse.Namespace) -> dict[str, Any]:
    """The figures of these contestants."""
    alive: dict[str, Live] = {}
    turns: dict[str, list[Turn]] = {}
    about: dict[str, Any] = {}
    try:
        for name in names:
            try:
                alive[name] = _start(name, folder, threads, how)
                about |= {f"{name}: {key}": value for key, value in alive[name].about.items()}
            except Missing as reason:
                about[f"{name}: left out"] = str(reason)
        for number in range(how.rounds + 1):  # the first is not counted
            for name, live in list(alive.items()):
                try:
                    turn = live.turn(how.skip, how.steps if number else 1)
                    turns.setdefault(name, []).extend([turn] if number else [])
                except Missing as reason:
                    about[f"{name}: left out"] = str(reason)
                    del alive[name]
            print(f"{threads} threads: round {number} of {how.rounds}", file=sys.stderr)
    finally:
        for live in alive.values():
            live.close()
    return _table({name: turns[name] for name in alive}) | about


def _start(name: str, folder: Path, threads: int, how: argparse.Namespace) -> Live:
    contestant = CONTESTANTS[name]
    if how.device not in contestant.devices:
        raise Missing(f"works on {' and '.join(contestant.devices)} here")
    python = interpreter(contestant.environment, ENVIRONMENTS[contestant.environment])
    return Live(python, contestant.script, [str(folder), name, str(threads), how.device], threads, how.pin)


def _table(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians over the rounds, and their ratios."""
    figures: dict[str, Any] = {}
    middle: dict[str, Turn] = {}
    for name, held in turns.items():
        rates = sorted(turn.rate for turn in held)
        middle[name] = Turn(statistics.median(rates), statistics.median(turn.cpu for turn in held))
        label = CONTESTANTS[name].label
        figures[f"{label}: images/s"] = middle[name].rate
        figures[f"{label}: images/s, lowest and highest round"] = f"{rates[0]:,.0f}, {rates[-1]:,.0f}"
        figures[f"{label}: images a CPU second"] = middle[name].cpu
    for ours, other in RATIOS:
        if ours in middle and other in middle:
            figures[f"{ours} / {other}"] = middle[ours].rate / middle[other].rate
            figures[f"{ours} / {other}, a CPU second"] = middle[ours].cpu / middle[other].cpu
    return figures


def prepare(data: Path, images: int) -> Path:
    """The folder with jpg/, raw/, files/ and facts.json of `images` images of `data`, made if it is not there."""
    dataset = read_dataset(data)
    stored = dataset["image"]
    if (stored.get("size"), stored["format"]) != (256, "jpg"):
        raise SystemExit(f"{data} holds {stored['size']}-pixel {stored['format']}: this needs 256-pixel jpg")
    folder = ROOT / "build" / "benchmarks" / "loader-data" / f"{dataset['digest'][:12]}-{images}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        making = Path(work) / "made"
        samples = Samples(data, "train")
        for number in range(images):
            row = number % len(samples)
            place = making / "files" / dataset["classes"][samples.labels[row]] / f"{number:07d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(samples.encoded(row).tobytes())
        for name, target in {"jpg": Target(), "raw": Target(format="raw")}.items():
            done = convert(making / "files", making / name, ShardOptions(target), cores())
            if name == "jpg" and done.kept < images:
                raise SystemExit(
                    f"{data} has another form than `alexprep shard` makes by itself: its bytes would change"
                )
            found = rgb_statistics.pca_stats(making / name, "train", cores())
            rgb_statistics.publish_statistics(found, making / name, "train")
            (making / "facts.json").write_text(json.dumps({"mean": found.channel_means.tolist()}))
        os.rename(making, folder)
    return folder


if __name__ == "__main__":
    main()
