"""The error of a run's newest checkpoint on a split."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, Literal

from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint, runs
from alexprep.train.config import recipe_of
from alexprep.train.data import OpenLoader, data_facts, examples, layout_for, memory_format
from alexprep.train.evaluate import evaluate
from alexprep.train.host import choose_device, keep_freed_memory
from alexprep.train.state import load_weights


def evaluate_run(
    run: Path,
    *,
    data: Path | None = None,
    split: str | None = None,
    views: Literal["centre", "ten"] = "centre",
    batch_size: int = 128,
    threads: int | None = None,
    device: str | None = None,
    open_loader: OpenLoader = Loader,
) -> dict[str, Any]:
    """Evaluates a run.

    Args:
        run: its folder.
        data: the data set; the one it was trained on by default.
        split: "val" or else "test" by default.
        views: one centre crop, or the mean of the softmax over ten views: corners and centre, mirrored and not (section 4.1).
        batch_size: images at a time; with ten views a tenth of it. It does not change the result beyond rounding.
        threads: for decoding; the loader decides by default.
        device: "cpu" or "cuda"; the GPU if there is one by default.
        open_loader: opens a split; `alexprep.pipeline.loader.Loader` or something with its behaviour.

    Returns:
        run, step, epochs, data, split, views, samples, top1_error and top5_error (percent), loss (nats), seconds, device, and
        skipped: a sentence for every damaged checkpoint that is newer than the one used.

    Raises:
        AlexprepError: the run has no valid checkpoint, or the data has other classes or no such split.
    """
    where = choose_device(device)
    if where.type == "cpu":
        keep_freed_memory()
    config = runs.read_config(run)
    saved, skipped = checkpoint.newest(run / runs.CHECKPOINTS)
    if saved is None:
        raise AlexprepError(f"{run} has no valid checkpoint: {'; '.join(skipped) or 'none was saved yet'}")
    data = data or Path(config["data"])
    facts = data_facts(data)
    classes = saved.facts["identity"]["classes"]
    if facts.classes != classes:
        raise AlexprepError(
            f"{data} has {facts.classes} classes, {run} was trained on {classes}: name its data with --data"
        )
    split = split or facts.evaluation_split
    if split is None:
        raise AlexprepError(f"{data} has no val or test split: name another with --split")
    recipe = recipe_of(config["options"])
    recipe.check_size(facts.size)
    if changes := checkpoint.differences(saved.facts["identity"]["recipe"], recipe.describe()):
        raise AlexprepError(f"recipe {recipe.name} has changed since {run} was trained: {'; '.join(changes)}")

    network = recipe.make_network(classes, seed=0)
    load_weights(network, saved)
    network.to(device=where, memory_format=memory_format(where))  # type: ignore[call-overload]
    began = time.monotonic()
    loader = open_loader(
        data,
        split,
        batch_size=batch_size if views == "centre" else max(1, batch_size // 10),
        augmentation=recipe.augmentation,
        views=views,
        order="sequential",
        device=str(where),
        layout=layout_for(where),
        threads=threads,
    )
    with contextlib.closing(loader):
        figures = evaluate(network, examples(loader, layout_for(where)))
    return {
        "run": str(run),
        "step": saved.step,
        "epochs": saved.facts["position"]["epoch"],
        "data": str(data),
        "split": split,
        "views": views,
        **figures,
        "seconds": time.monotonic() - began,
        "device": str(where),
        "skipped": skipped,
    }
