"""The whole road on a small set: pictures → shards → statistics → training → evaluation."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import build
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.worker_pool import cores
from alexprep.train.config import TrainConfig
from alexprep.train.evaluation.run import evaluate_run
from alexprep.train.photos import SHAPES, make_photos
from alexprep.train.trainer import train

_SIZE = 64
_MARK = "made-by-alexprep-demo"


def run_demo(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every stage in `folder`, from scratch.

    Args:
        folder: made; an earlier demo's is emptied first.
        say: called with each line for the user.

    Returns:
        The training's summary, with chance_top1_error (percent), inputs, rejected, and ten_view_top1_error (percent).

    Raises:
        AlexprepError: `folder` holds something that is not an earlier demo.
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

    done = build(photos, data, ShardOptions(Target(size=_SIZE)), cores())
    refused = "; ".join(f"{count} of: {reason}" for reason, count in done.rejected.items())
    say(
        f"2. alexprep shard: {done.inputs:,} inputs = {done.written:,} written + {done.rejected.total()} rejected ({refused})"
    )
    say(f"   {_SIZE}-pixel shards in {data}, every input's fate in {data}/*/samples.parquet")

    found = rgb_statistics.compute(data, "train", cores())
    rgb_statistics.publish(found, data, "train")
    deviations = "  ".join(f"{value:.1f}" for value in found.stdevs)
    say(
        f"3. alexprep pca-stats: principal standard deviations {deviations} grey levels; look at {data}/stats/mean_image.png"
    )

    summary = train(TrainConfig(data=data, recipe="tiny", runs=runs))
    chance = 100 * (1 - 1 / len(SHAPES))
    say(
        f"4. alexprep train --recipe tiny: {summary['steps']:,} steps in {summary['seconds']:.0f} s, "
        f"validation error {summary['val_top1_error']:.1f} % where chance is {chance:.1f} %"
    )
    say(f"   log and checkpoints in {summary['run']}")

    ten = evaluate_run(Path(summary["run"]), views="ten")
    say(f"5. alexprep eval --views ten: {ten['top1_error']:.1f} % over ten views of each picture")
    say(f"All of it took {time.monotonic() - start:.0f} s.")
    return summary | {
        "chance_top1_error": chance,
        "inputs": done.inputs,
        "rejected": done.rejected.total(),
        "ten_view_top1_error": ten["top1_error"],
        "seconds": time.monotonic() - start,
    }
