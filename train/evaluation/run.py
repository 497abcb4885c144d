"""The errors of a run's checkpoint, or of several nets as one, on a split."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.loader_settings import Tuning, tuning_for
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import digest_json, publish_json
from alexprep.train.config import DECODING
from alexprep.train.data import data_facts
from alexprep.train.ensemble import Weights, shares
from alexprep.train.evaluation.nets import Net, check_classes, data_of, open_net
from alexprep.train.evaluation.passes import OpenSplit, Passes, Progress
from alexprep.train.evaluation.scores import Scores
from alexprep.train.evaluation.sums import Pace
from alexprep.train.precision import Precision, check_precision
from alexprep.train.predictions import EvaluationViews
from alexprep.train.runtime import keep_freed_memory
from alexprep.train.saved.places import Place


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        document: JSON values; see `evaluate_nets`.
        scores: of the ensemble, image by image, with the best guesses.
        classes: their names, by label.
    """

    document: dict[str, Any]
    scores: Scores
    classes: list[str]


def evaluate_run(run: Path, step: int | None = None, **options: Any) -> dict[str, Any]:
    """Evaluates one checkpoint of a run.

    Args:
        run: its folder.
        step: of the checkpoint; None for the newest valid one.
        options: of `evaluate_nets`.

    Returns:
        The document of `evaluate_nets`, with run, step and epochs.

    Raises:
        AlexprepError: as there.
    """
    return evaluate_nets([Place(run, step)], **options).document


def evaluate_nets(
    places: Sequence[Place],
    *,
    data: Path | None = None,
    split: str | None = None,
    views: EvaluationViews = "centre",
    weights: Weights = "equal",
    weights_from: str | None = None,
    batch_size: int = 128,
    precision: Precision = "fp32",
    threads: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    open_loader: OpenSplit | None = None,
    check: Callable[[Path, str], None] | None = None,
    recipe: str | None = None,
    model: str | None = None,
) -> Evaluation:
    """Evaluates nets, each by itself and all as one: the weighted mean of their softmax outputs.

    Every net sees the images as its own recipe cuts them, less the mean of the data that it was trained on; softmax and
    averages are float64. All nets go through the split together, and of their outputs only the batch at hand is in memory.

    Args:
        places: at least one.
        data: the data set; the one they were trained on by default.
        split: "val" or else "test" by default.
        views: one centre crop, or the mean of the softmax over ten views: corners and centre, mirrored and not (section 4.1).
        weights: "equal"; a number a net; or "search", see `alexprep.train.ensemble`.
        weights_from: the split for "search"; the evaluated one by default, which flatters the ensemble.
        batch_size: crops at a time. It does not change the result beyond rounding.
        precision: that the networks compute in, whatever they were trained in; see `alexprep.train.precision`.
        threads: for decoding; as `alexprep tune` found, or one a core, by default.
        device: "cpu" or "cuda"; the GPU if there is one by default.
        progress: called with images done and images in all.
        open_loader: opens a split, as `alexprep.pipeline.loader.Loader` does; by default that, with the settings for this machine.
        check: called with data and split, when both are known and before any image is read.
        recipe: where the recipe file of nets that have one is now; where it was by default.
        model: likewise the file of nets of the user's own.

    Returns:
        document: nets (a list of run, step, epochs, recipe, weight and the errors of each), data, data_digest, split, views, weights
        ("equal", "given" or "search"), weights_from, samples (images with a label), images, the errors of all nets as one: top1_error and
        top5_error (percent), loss (nats), top1_standard_error and top5_standard_error (points); precision, images_per_second,
        data_wait_ms and step_ms (a batch), seconds, device, notes, and skipped: a sentence for every damaged checkpoint that is newer than
        the one used. For one net also run, step and epochs. Errors are None where no image has a label.

    Raises:
        AlexprepError: a checkpoint is missing or damaged; the nets do not go together or with the data; there is no such split.
    """
    where = choose_device(device)
    check_precision(precision, where)
    if where.type == "cpu":
        keep_freed_memory()
    began = time.monotonic()
    fixed = _fixed_weights(weights, weights_from, len(places))
    nets = [open_net(place, where, recipe, model) for place in places]
    if len({(net.run, net.step) for net in nets}) < len(nets):
        raise AlexprepError(f"{', '.join(net.name for net in nets)}: one net is named twice")
    data = data or data_of(nets)
    facts, dataset = data_facts(data), read_dataset(data)
    notes = [note for net in nets if (note := check_classes(net, data, dataset))]
    for net in nets:
        net.recipe.check_size(facts.size)
    split = split or facts.evaluation_split or next(iter(facts.unlabelled), None)
    if split is None:
        raise AlexprepError(f"{data} has no val or test split: name another with --split")
    if check is not None:
        check(data, split)
    means = [_mean_of(net, dataset, notes) for net in nets]
    open_loader = open_loader or functools.partial(Loader, tuning=_tuning(nets, data, where))

    passes = Passes(nets, means, data, views, batch_size, threads, where, precision, open_loader, progress)
    whole, single, used = passes.scores(split, fixed, weights_from or split)
    document = {
        **_one(nets),
        "nets": [_describe(*each) for each in zip(nets, used, single, strict=True)],
        "data": str(data),
        "data_digest": facts.digest,
        "split": split,
        "views": views,
        "weights": weights if isinstance(weights, str) else "given",
        "weights_from": (weights_from or split) if weights == "search" else None,
        "samples": int((whole.labels >= 0).sum()),
        "images": whole.images,
        **whole.summary(),
        "precision": precision,
        **passes.pace.since(Pace()),
        "seconds": time.monotonic() - began,
        "device": str(where),
        "notes": notes,
        "skipped": [sentence for net in nets for sentence in net.skipped],
    }
    return Evaluation(document, whole, dataset["classes"])


def publish(document: dict[str, Any], runs: Path) -> Path:
    """Writes the document of an evaluation: into the run's folder, or for several nets beside the runs.

    Returns:
        The file, eval-SPLIT-VIEWS-DIGEST.json; the digest is of nets, data, weights and precision, so the same evaluation has the same name.
    """
    nets = [(net["run"], net["step"], net["weight"]) for net in document["nets"]]
    asked = [nets, document["data_digest"], document["weights"], document["weights_from"]]
    if document["precision"] != "fp32":
        asked.append(document["precision"])
    digest = digest_json(asked)[:8]
    folder = Path(document["run"]) if "run" in document else runs
    path = folder / f"eval-{document['split']}-{document['views']}-{digest}.json"
    publish_json(path, document)
    return path


def _fixed_weights(weights: Weights, weights_from: str | None, nets: int) -> list[float] | None:
    """The weights if they need no search."""
    if weights == "search":
        if nets < 2:
            raise AlexprepError("--weights search needs several nets: name more runs, or checkpoints as RUN@STEP")
        return None
    if weights_from is not None:
        raise AlexprepError("--weights-from is the split for --weights search: give both")
    return shares([1.0] * nets if isinstance(weights, str) else weights, nets)


def _tuning(nets: list[Net], data: Path, device: torch.device) -> Tuning:
    """The loader's settings for this machine, but decoding where the nets' trainings did, which shows in a grey level here and there."""
    tuning = tuning_for(data, str(device))
    decoding = [{name: net.options[name] for name in DECODING if name in net.options} for net in nets]
    return replace(tuning, **decoding[0]) if all(one == decoding[0] for one in decoding) else tuning


def _mean_of(net: Net, dataset: dict[str, Any], notes: list[str]) -> Path | None:
    """The data set whose mean image a net is shown images without, if not the evaluated one: that of its training."""
    if net.data_digest == dataset["digest"] or not net.recipe.augmentation.needs_statistics:
        return None
    trained = net.training_data()
    if trained is not None and trained["image"]["size"] == dataset["image"]["size"]:
        return net.data
    notes.append(f"{net.name} is shown the images less their own mean: that of its training data cannot be had")
    return None


def _one(nets: list[Net]) -> dict[str, Any]:
    return {"run": str(nets[0].run), "step": nets[0].step, "epochs": nets[0].epochs} if len(nets) == 1 else {}


def _describe(net: Net, weight: float, scores: Scores) -> dict[str, Any]:
    about = {"run": str(net.run), "step": net.step, "epochs": net.epochs, "recipe": net.recipe.name, "weight": weight}
    return about | scores.summary()
