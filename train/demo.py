"""Every stage on a small set that is drawn on the spot: pictures → shards → statistics → training → evaluation → report.

`make_photos` draws labelled, photo-like pictures, also for trying things out without a download. Nothing but the demo belongs here.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.worker_pool import cores
from alexprep.train.config import TrainConfig
from alexprep.train.evaluation import evaluate, evaluation_file, predictions_of, publish_evaluation
from alexprep.train.layer_outputs import write_outputs
from alexprep.train.prediction_table import write_predictions
from alexprep.train.report.page import write_report
from alexprep.train.run_dir import Place
from alexprep.train.trainer import train

Colour = tuple[int, int, int]
# Corners, and how far from the middle every second one lies: below 1 it is a star.
POLYGONS = {"square": (4, 1.0), "star": (10, 0.4), "triangle": (3, 1.0), "hexagram": (12, 0.75)}
SHAPES = ("bars", "checks", "disc", "ring", *POLYGONS)
_SIZE = 56
# What the recipe `tiny` is told: smaller crops than its own, and fewer epochs, so that all of it takes a third of a minute.
_CROP, _EPOCHS, _EVALUATE_EVERY = "augmentation.crop=48", 12, 2
_MARK = "made-by-alexprep-demo"


def run_demo(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every stage in `folder`, which is made, or emptied if an earlier demo made it; says what it does.

    Gives the training's summary, with chance_top1_error (percent), inputs, rejected, ten_view_top1_error (percent), and report: its path, or None
    where matplotlib or Jinja2, which it needs, are not installed. Of a training that a signal stopped, the summary alone, whose stopped_by names it.
    """
    start = time.monotonic()
    if folder.exists():
        if not (folder / _MARK).exists() and any(folder.iterdir()):
            raise AlexprepError(f"{folder} is not empty and was not made by a demo: name another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()
    photos, data, runs = folder / "photos", folder / "alexprep-data", folder / "runs"

    count = make_photos(photos)
    say(
        f"1. {count:,} pictures of {len(SHAPES)} classes in {photos}, five of them odd: grey, CMYK, PNG, truncated, empty"
    )

    done = convert(photos, data, ShardOptions(Target(size=_SIZE)), cores())
    refused = "; ".join(f"{count} of: {reason}" for reason, count in done.rejected.items())
    say(
        f"2. alexprep shard: {done.inputs:,} inputs = {done.written:,} written + {done.rejected.total()} rejected ({refused})"
    )
    say(f"   {_SIZE}-pixel shards in {data}, every input's fate in {data}/*/samples.parquet")

    found = rgb_statistics.pca_stats(data, "train", cores())
    rgb_statistics.publish_statistics(found, data, "train")
    deviations = "  ".join(f"{value:.1f}" for value in found.stdevs)
    say(
        f"3. alexprep pca-stats: principal standard deviations {deviations} grey levels; look at {data}/stats/mean_image.png"
    )

    with _one_thread():
        training = TrainConfig(
            data, recipe="tiny", settings=(_CROP,), epochs=_EPOCHS, evaluate_every=_EVALUATE_EVERY, runs=runs
        )
        summary = train(training)
    if summary["stopped_by"]:
        say("The demo ends here: run the same command again, for all of it from the beginning.")
        return summary
    chance = 100 * (1 - 1 / len(SHAPES))
    say(
        f"4. alexprep train --recipe tiny --set {_CROP} --epochs {_EPOCHS} --evaluate-every {_EVALUATE_EVERY}: {summary['steps']:,} steps in {summary['seconds']:.0f} s, "
        f"validation error {summary['val_top1_error']:.1f} % where chance is {chance:.1f} %"
    )
    say(f"   log and checkpoints in {summary['run']}")

    run = Path(summary["run"])
    ten = _evaluate(run)
    say(f"5. alexprep eval --views ten --predictions: {ten['top1_error']:.1f} % over ten views of each picture")

    for split in ("train", "val"):
        write_outputs(Place(run), split=split)
    page = _report(data, run, folder / "report", say)
    say(f"All of it took {time.monotonic() - start:.0f} s.")
    return summary | {
        "chance_top1_error": chance,
        "inputs": done.inputs,
        "rejected": done.rejected.total(),
        "ten_view_top1_error": ten["top1_error"],
        "report": page,
        "seconds": time.monotonic() - start,
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Inside the block torch computes with one thread: two are little faster at steps of eight images, and much slower beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _evaluate(run: Path) -> dict[str, Any]:
    """Over ten views, with the predictions that a report shows."""
    found = evaluate([Place(run)], views="ten")
    path = evaluation_file(found.document, run.parent).with_suffix(".parquet")
    write_predictions(predictions_of(found), path)
    found.document["predictions_file"] = str(path.resolve())
    publish_evaluation(found.document, run.parent)
    return found.document


def _report(data: Path, run: Path, out: Path, say: Callable[[str], None]) -> str | None:
    try:
        written = write_report(data, [run], out)
    except AlexprepError as error:
        say(f"6. alexprep report: {error}")
        return None
    say(f"6. alexprep features and report: {written.path}, open it in a browser")
    return str(written.path)


def make_photos(folder: Path, train: int = 100, val: int = 50, seed: int = 0) -> int:
    """Writes class folders, with `train` and `val` pictures a class, and five odd files as real collections have them.

    These are grey, CMYK, a PNG named .JPEG (all usable), truncated and empty (not). The folder becomes a SOURCE for `alexprep shard`.
    Gives the number of files.
    """
    pictures = [
        (folder / split / name / f"{name}_{n:04d}.JPEG", name)
        for split, count in (("train", train), ("val", val))
        for name in SHAPES
        for n in range(count)
    ]
    for place in {path.parent for path, _ in pictures}:
        place.mkdir(parents=True, exist_ok=True)

    def draw(number: int) -> None:
        path, name = pictures[number]
        photo(name, np.random.default_rng((seed, number))).save(path, "JPEG", quality=92)

    with ThreadPoolExecutor(cores()) as threads:  # Pillow and numpy let go of the lock
        list(threads.map(draw, range(len(pictures))))
    rng = np.random.default_rng((seed, len(pictures)))
    odd = folder / "train" / "disc"
    photo("disc", rng).convert("L").save(odd / "odd_grey.JPEG", "JPEG")
    photo("disc", rng).convert("CMYK").save(odd / "odd_cmyk.JPEG", "JPEG")
    photo("disc", rng).save(odd / "odd_png.JPEG", "PNG")
    buffer = io.BytesIO()
    photo("disc", rng).save(buffer, "JPEG")
    (odd / "odd_truncated.JPEG").write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    (odd / "odd_empty.JPEG").write_bytes(b"")
    return len(pictures) + 5


def photo(class_name: str, rng: np.random.Generator) -> Image.Image:
    """One RGB picture of 80 to 200 pixels a side: a shape of its class on a lit background, blurred and noisy.

    Colours, place, turn and size are drawn, so that only the shape tells the class.
    """
    width, height = (int(side) for side in rng.integers(80, 201, 2))
    background = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8) // 2 + int(rng.integers(0, 128))
    canvas = Image.fromarray(background).resize((width, height), Image.Resampling.BICUBIC)
    short = min(width, height)
    ground = background.mean(axis=(0, 1))
    colour = ground
    while np.abs(colour - ground).max() < 90:  # a shape must be seen
        colour = rng.integers(0, 256, 3)
    radius = short * rng.uniform(0.25, 0.38)
    x, y = (side / 2 + rng.uniform(-0.08, 0.08) * short for side in (width, height))
    red, green, blue = map(int, colour)
    _draw(canvas, class_name, x, y, radius, rng.uniform(0, 2 * math.pi), (red, green, blue))
    canvas = canvas.filter(ImageFilter.BoxBlur(float(rng.uniform(0, 1.5))))
    noisy = rng.standard_normal((height, width, 3), np.float32)
    noisy *= rng.uniform(2, 10)
    noisy += np.asarray(canvas)
    return Image.fromarray(np.clip(noisy, 0, 255, out=noisy).astype(np.uint8))


def _draw(canvas: Image.Image, class_name: str, x: float, y: float, radius: float, turn: float, colour: Colour) -> None:
    """Draws a shape around (x, y); lengths are in pixels."""
    draw = ImageDraw.Draw(canvas)
    around = (x - radius, y - radius, x + radius, y + radius)
    if class_name == "disc":
        draw.ellipse(around, fill=colour)
    elif class_name == "ring":
        draw.ellipse(around, outline=colour, width=max(2, int(radius / 3)))
    elif class_name == "bars":
        for n in (-1, 0, 1):
            middle = y + n * radius * 0.8
            draw.rectangle((x - radius, middle - radius / 5, x + radius, middle + radius / 5), fill=colour)
    elif class_name == "checks":
        side = radius / 2
        for row in range(4):
            for column in range(row % 2, 4, 2):
                left, top = x - radius + column * side, y - radius + row * side
                draw.rectangle((left, top, left + side, top + side), fill=colour)
    else:
        corners, inner = POLYGONS[class_name]
        points = []
        for n in range(corners):
            length = radius * (inner if n % 2 else 1.0)
            angle = turn + 2 * math.pi * n / corners
            points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        draw.polygon(points, fill=colour)
