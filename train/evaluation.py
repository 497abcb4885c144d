"""The errors of a run's checkpoint, or of several nets as one, on a split."""

from __future__ import annotations

import functools
import io
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.loader_settings import Tuning, tuning_for
from alexprep.shards.dataset_format import LEDGER, read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import ILSVRC_ID
from alexprep.shards.storage import digest_json, publish_json
from alexprep.train.config import DECODING
from alexprep.train.data import data_facts
from alexprep.train.ensemble import OpenSplit, Passes, Progress, Scores, Weights, shares
from alexprep.train.metrics import TOP, Pace
from alexprep.train.precision import Precision, check_precision
from alexprep.train.predictions import EvaluationViews, Net, check_classes, data_of, open_net
from alexprep.train.run_dir import Place
from alexprep.train.runtime import keep_freed_memory

# -------------------- A submission in the form of ILSVRC: a line an image in the order of the file names, five ILSVRC IDs, the best guess first.


class Submission(NamedTuple):
    """A file's content and what to say of it."""

    content: bytes
    lines: int
    first: str  # file name of the first line's image
    last: str
    missing: list[str]  # images without a prediction, whose lines are a placeholder


def check(data: Path, split: str) -> None:
    """Makes sure that labels are ILSVRC IDs less 1, that the split is whole, and its names are all different, before hours of work.

    Raises:
        AlexprepError: they are not, it is not, or its ledger cannot be read.
    """
    dataset = read_dataset(data)
    if dataset["labels"] != ILSVRC_ID:
        raise AlexprepError(
            f"--submission needs labels that are ILSVRC IDs less 1, those of {data} are {dataset['labels']!r}: shard with "
            f"`--labels {ILSVRC_ID}`, and train on that"
        )
    if len(dataset["classes"]) < TOP:
        raise AlexprepError(f"--submission needs {TOP} guesses an image, {data} has {len(dataset['classes'])} classes")
    if dataset["options"]["limit"] is not None:
        raise AlexprepError(
            f"--submission needs every image of {split!r}, {data} was made with --limit {dataset['options']['limit']}"
        )
    names, _ = _ledger(data, split)
    _in_order(data, split, names)


def submission(data: Path, split: str, best: NDArray[np.int32], rows: NDArray[np.int64]) -> Submission:
    """The submission for a split; file names come from its ledger.

    Args:
        data: the data set's folder.
        split: of it.
        best: (N, 5), labels, the best guess first.
        rows: (N,), the rows of the split's index that they belong to.

    Raises:
        AlexprepError: the ledger cannot be read, does not go with the predictions, or has two images of one name.
    """
    names, written = _ledger(data, split)
    places = np.flatnonzero(written)
    if len(rows) != len(places) or not np.array_equal(np.sort(rows), np.arange(len(places))):
        raise AlexprepError(
            f"{data / split / LEDGER} lists {len(places)} images, {len(rows)} were predicted: run `alexprep verify`"
        )
    guesses = np.tile(np.arange(TOP, dtype=np.int64), (len(names), 1))  # 1 2 3 4 5 where an image was rejected
    guesses[places[rows]] = best
    order = _in_order(data, split, names)
    content = "".join(" ".join(map(str, row)) + "\n" for row in (guesses[order] + 1).tolist())
    missing = [names[place] for place in order if not written[place]]
    first, last = (PurePosixPath(names[order[place]]).name for place in (0, -1))
    return Submission(content.encode(), len(order), first, last, missing)


def _in_order(data: Path, split: str, names: list[str]) -> list[int]:
    """The places of the images in the order of their file names.

    Raises:
        AlexprepError: two have the same.
    """
    files = [PurePosixPath(name).name for name in names]
    order = sorted(range(len(files)), key=files.__getitem__)
    for one, other in itertools.pairwise(order):
        if files[one] == files[other]:
            raise AlexprepError(
                f"{data} has two images named {files[one]} in {split!r} ({names[one]}, {names[other]}): a submission is in the "
                "order of the names, so each must be there once"
            )
    return order


def _ledger(data: Path, split: str) -> tuple[list[str], NDArray[np.bool_]]:
    """The source of every input, in the order of the index, and whether it became a sample."""
    path = data / split / LEDGER
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()), columns=["source", "status"])
    except (OSError, pa.ArrowInvalid) as error:
        raise AlexprepError(f"{path} cannot be read ({error}): run the same `alexprep shard` again") from None
    written = np.array([status == "written" for status in table["status"].to_pylist()], np.bool_)
    return table["source"].to_pylist(), written


# -------------------- The errors of a run's checkpoint, or of several nets as one, on a split.


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
