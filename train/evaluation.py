"""Evaluates trained networks on a split: each checkpoint by itself, and several as one; and writes ILSVRC's submission file.

The error that a training measures of itself, epoch after epoch, is `alexprep.train.metrics`; searching weights for several nets is
`alexprep.train.ensemble`.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.loader import Loader
from alexprep.pipeline.loader_settings import Tuning, tuning_for
from alexprep.shards.any_dataset import common_size, dataset_facts, is_tars
from alexprep.shards.dataset_format import LEDGER, read_dataset, sample_key, shown_classes
from alexprep.shards.errors import AlexprepError
from alexprep.shards.listing import ILSVRC_ID
from alexprep.shards.storage import digest_json, folder_at, publish_json
from alexprep.train.config import DECODING
from alexprep.train.data import data_facts
from alexprep.train.ensemble import Weights, WeightSearch, mixture, shares
from alexprep.train.metrics import TOP, StepTimer, image_errors, mean_errors
from alexprep.train.precision import Precision, check_precision, float32_kernels, memory
from alexprep.train.prediction_table import PredictionTable
from alexprep.train.predictions import (
    EvaluationViews,
    GrowingArray,
    Net,
    Predicted,
    check_classes,
    data_of,
    images_at_once,
    open_net,
    predictions,
)
from alexprep.train.run_dir import Place
from alexprep.train.signals_and_memory import keep_freed_memory


@dataclass(frozen=True)
class Evaluation:
    """Holds what an evaluation found."""

    document: dict[str, Any]  # JSON values; see `evaluate`
    scores: Scores  # of the ensemble, image by image
    classes: list[str]  # their names, by label
    shown_names: list[str]  # the same as people read them, with words where dataset.json has any


def evaluate_run(run: Path, step: int | None = None, **options: Any) -> dict[str, Any]:
    """Evaluates one checkpoint of the run in a folder, the newest valid one by default: the document of `evaluate`, which takes `options`."""
    return evaluate([Place(run, step)], **options).document


def evaluate(
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
    progress: Callable[[int, int], None] | None = None,
    open_loader: Callable[..., Any] | None = None,
    check: Callable[[Path, str], None] | None = None,
    recipe: str | None = None,
    model: str | None = None,
) -> Evaluation:
    """Evaluates trained networks, each by itself and all as one: the weighted mean of their softmax outputs.

    Every net sees the images as its own recipe cuts them, less the mean of the data that it was trained on; softmax and
    averages are float64. All nets go through the split together, and of their outputs only the batch at hand is in memory.

    Args:
        places: at least one.
        data: the data set; the one they were trained on by default.
        split: "val" or else "test" by default.
        views: one centre crop; or the mean of the softmax over two views, the centre and its reflection, or over ten: corners and centre,
            mirrored and not (section 4.1).
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
    facts, dataset = data_facts(data), dataset_facts(data)
    notes = [note for net in nets if (note := check_classes(net, data, dataset))]
    for net in nets:
        net.recipe.check_sides(facts.sides)
    split = split or facts.evaluation_split or next(iter(facts.unlabelled), None)
    if split is None:
        raise AlexprepError(f"{data} has no val or test split: name another with --split")
    if check is not None:
        check(data, split)
    means = [mean_of(net, dataset, notes) for net in nets]
    open_loader = open_loader or functools.partial(Loader, tuning=tuning_of(nets, data, where))
    shown = {"views": views, "order": "sequential", "device": str(where), "memory_format": memory(where).memory_format}
    images = images_at_once(batch_size, views)
    open_split = functools.partial(open_loader, data, batch_size=images, threads=threads, **shown)
    timer = StepTimer()

    def go_through(split: str, use: Callable[[Predicted], None]) -> None:
        found = predictions(nets, means, functools.partial(open_split, split), precision, timer, progress, images)
        with torch.inference_mode(), float32_kernels(precision), contextlib.closing(found):
            for predicted in found:
                use(predicted)

    def place_of(net: Net) -> dict[str, Any]:
        return {"run": str(net.run), "step": net.step, "epochs": net.epochs}

    whole, single, used = _scores(len(nets), go_through, split, fixed, weights_from or split)
    document = {
        **(place_of(nets[0]) if len(nets) == 1 else {}),
        "nets": [
            {**place_of(net), "recipe": net.recipe.name, "weight": weight, **scores.summary()}
            for net, weight, scores in zip(nets, used, single, strict=True)
        ],
        "data": str(data.absolute()),
        "data_digest": facts.digest,
        "split": split,
        "views": views,
        "weights": weights if isinstance(weights, str) else "given",
        "weights_from": (weights_from or split) if weights == "search" else None,
        "samples": int((whole.labels >= 0).sum()),
        "images": whole.images,
        **whole.summary(),
        "precision": precision,
        **timer.since(StepTimer()),
        "seconds": time.monotonic() - began,
        "device": str(where),
        "notes": notes,
        "skipped": [sentence for net in nets for sentence in net.skipped],
    }
    return Evaluation(document, whole, dataset["classes"], shown_classes(dataset))


def publish_evaluation(document: dict[str, Any], runs: Path) -> Path:
    """Writes the document of an evaluation to its file, and returns that."""
    path = evaluation_file(document, runs)
    publish_json(path, document)
    return path


def evaluation_file(document: dict[str, Any], runs: Path) -> Path:
    """Where an evaluation is written: in the run's folder, or for several nets beside the runs, eval-SPLIT-VIEWS-DIGEST.json.

    The digest is of nets, data, weights and precision, so the same evaluation has the same name.
    """
    nets = [(net["run"], net["step"], net["weight"]) for net in document["nets"]]
    asked = [nets, document["data_digest"], document["weights"], document["weights_from"]]
    if document["precision"] != "fp32":
        asked.append(document["precision"])
    digest = digest_json(asked)[:8]
    folder = folder_at(document["run"]) if "run" in document else runs
    return folder / f"eval-{document['split']}-{document['views']}-{digest}.json"


def _scores(
    nets: int,
    go_through: Callable[[str, Callable[[Predicted], None]], None],
    split: str,
    fixed: list[float] | None,
    weights_from: str,
) -> tuple[Scores, list[Scores], list[float]]:
    """Scores of all nets as one and of each, and the weights: those that are fixed, or the best ones on a split.

    Where that is the evaluated split, one pass does for both: predictions wait for the weights in a file without a name, as float32, whose
    rounding is 6e-8 of a log-probability: 1.4 GB for 7 nets on 50,000 images of ImageNet.
    """
    search, whole = WeightSearch(), Scores()
    single = [Scores() for _ in range(nets)]
    if fixed is None and weights_from != split:
        go_through(weights_from, search.add)
        fixed = search.best_weights()
    with tempfile.TemporaryFile() as waiting:

        def measure(predicted: Predicted) -> None:
            for number, scores in enumerate(single):
                scores.add(predicted._replace(logs=predicted.logs[:, number]))
            if fixed is None:
                _append(waiting, predicted.logs.float().cpu().numpy())
                search.add(predicted)
            else:
                whole.add(predicted._replace(logs=mixture(predicted.logs, fixed)))

        go_through(split, measure)
        if not single[0].images:
            raise AlexprepError("there is no image to evaluate on: name another --split")
        if fixed is None:
            fixed = search.best_weights()
            logs = np.memmap(waiting, np.float32, "c").reshape(single[0].images, nets, -1)
            everything = Predicted(*map(torch.from_numpy, (logs, single[0].labels, single[0].rows)))
            for batch in zip(*(torch.split(tensor, 128) for tensor in everything), strict=True):
                part = Predicted(*batch)
                whole.add(part._replace(logs=mixture(part.logs.double(), fixed)))
    return whole, single, fixed


def _append(file: IO[bytes], logs: NDArray[np.float32]) -> None:
    try:
        file.write(logs.tobytes())
        file.flush()
    except OSError as error:
        raise AlexprepError(
            f"predictions cannot be kept in {tempfile.gettempdir()} ({error.strerror}): point TMPDIR at a disk with more "
            "room, or find the weights on another split with --weights-from"
        ) from None


def _fixed_weights(weights: Weights, weights_from: str | None, nets: int) -> list[float] | None:
    """The weights if they need no search."""
    if weights == "search":
        if nets < 2:
            raise AlexprepError("--weights search needs several nets: name more runs, or checkpoints as RUN@STEP")
        return None
    if weights_from is not None:
        raise AlexprepError("--weights-from is the split for --weights search: give both")
    return shares([1.0] * nets if isinstance(weights, str) else weights, nets)


def tuning_of(nets: list[Net], data: Path, device: torch.device) -> Tuning:
    """The loader's settings for this machine, but decoding where the nets' trainings did, which shows in a grey level here and there."""
    tuning = tuning_for(data, str(device))
    decoding = [{name: net.options[name] for name in DECODING if name in net.options} for net in nets]
    return replace(tuning, **decoding[0]) if all(one == decoding[0] for one in decoding) else tuning


def mean_of(net: Net, dataset: dict[str, Any], notes: list[str]) -> Path | None:
    """Whose statistics a net is shown images by, if not the evaluated data set's: those of its training."""
    if not net.recipe.augmentation.needs_statistics:
        return None
    if given := net.options.get("statistics"):
        return Path(given)
    if net.data_digest == dataset["digest"]:
        return None
    trained = net.training_data()
    if trained is not None and common_size(trained["image"]) == common_size(dataset["image"]):
        return net.data
    notes.append(f"{net.name} is shown the images less their own mean: that of its training data cannot be had")
    return None


class ClassError(NamedTuple):
    """A class and its errors, percent; None where it has no image."""

    label: int
    name: str
    images: int
    top1_error: float | None
    top5_error: float | None


class Scores:
    """Collects the errors and best guesses of each image, batch by batch, on the CPU: 100 bytes an image."""

    def __init__(self, guesses: int = TOP) -> None:
        """No image yet; `guesses` is how many best classes there are of each."""
        self._errors = GrowingArray(np.float64, 3)  # see `image_errors`
        self._labels = GrowingArray(np.int64)
        self._rows = GrowingArray(np.int64)
        self._best = GrowingArray(np.int32, guesses)
        self._probabilities = GrowingArray(np.float64, guesses)

    def add(self, predicted: Predicted) -> None:
        """Takes in a batch, whose `logs` are of one net, or of several as one: float64 (N, classes)."""
        self._errors.add(image_errors(predicted.logs, predicted.labels).T)
        self._labels.add(predicted.labels)
        self._rows.add(predicted.rows)
        best = _best(predicted.logs)
        self._best.add(best)
        self._probabilities.add(predicted.logs.gather(1, best).exp())

    @property
    def images(self) -> int:
        """Images seen, with or without a label."""
        return len(self._labels)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,); -1 where unknown."""
        return self._labels.array

    @property
    def rows(self) -> NDArray[np.int64]:
        """(N,): rows of the split's index."""
        return self._rows.array

    @property
    def best(self) -> NDArray[np.int32]:
        """(N, 5), or fewer where there are fewer classes: the best classes, best first; among equals the lower label first."""
        return self._best.array

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(N, 5), or fewer: of the best classes."""
        return self._probabilities.array

    @property
    def label_probabilities(self) -> NDArray[np.float64]:
        """(N,): what the labels are given; NaN where they are unknown."""
        given: NDArray[np.float64] = np.exp(-self._errors.array[:, 0])
        return given

    def table(self, keys: Sequence[str], sources: Sequence[str], classes: Sequence[str]) -> PredictionTable:
        """The predictions in the order of `rows`; what images are called and where they come from is given by row."""
        order = np.argsort(self.rows, kind="stable")
        chosen = self.rows[order].tolist()
        return PredictionTable(
            [keys[row] for row in chosen],
            [sources[row] for row in chosen],
            self.labels[order],
            self.label_probabilities[order],
            self.best[order],
            self.probabilities[order],
            list(classes),
        )

    def summary(self) -> dict[str, float | None]:
        """top1_error, top5_error (percent), loss (nats), and top1_standard_error, top5_standard_error (points: of the mean over such images).

        All None where no image has a label.
        """
        names = ("top1_error", "top5_error", "loss", "top1_standard_error", "top5_standard_error")
        errors = torch.from_numpy(self._errors.array.T.copy())
        known = errors[:, ~errors[0].isnan()]
        count = known.shape[1]
        if not count:
            return dict.fromkeys(names)
        means = mean_errors(known)
        spread = 100 * (known[1:].std(dim=1, correction=0) / math.sqrt(count))
        return dict(zip(names, [*(means[name] for name in names[:3]), *spread.tolist()], strict=True))

    def by_class(self, names: list[str]) -> list[ClassError]:
        """Every class, by label, with the errors of its images."""
        known = self.labels >= 0
        labels, errors_of = self.labels[known], self._errors.array[known]
        counts = np.bincount(labels, minlength=len(names))
        credits = [np.bincount(labels, column, minlength=len(names)) for column in errors_of.T[1:]]
        table = []
        for label, (name, images) in enumerate(zip(names, counts.tolist(), strict=True)):
            errors = [100 * (1 - float(total[label]) / images) if images else None for total in credits]
            table.append(ClassError(label, name, images, *errors))
        return table

    def confusions(self, names: list[str], most: int = 10) -> list[dict[str, Any]]:
        """The pairs of classes that are taken for one another most often: true, guessed, times, and images of the true class."""
        labels, guesses = self.labels, self.best[:, 0].astype(np.int64)
        wrong = (labels >= 0) & (guesses != labels)
        pairs, times = np.unique(labels[wrong] * len(names) + guesses[wrong], return_counts=True)
        order = np.argsort(-times, kind="stable")[:most]
        counts = np.bincount(labels[labels >= 0], minlength=len(names))
        return [
            {"true": names[true], "guessed": names[guess], "times": int(n), "images": int(counts[true])}
            for true, guess, n in zip(*np.divmod(pairs[order], len(names)), times[order], strict=True)
        ]


def _best(logs: torch.Tensor) -> torch.Tensor:
    """The best classes of each image, at most five, int64; of equal ones the lower label first, which `topk` alone does not promise."""
    count = min(TOP, logs.shape[1])
    values, classes = logs.topk(count, dim=1)
    ties = (values[:, 1:] == values[:, :-1]).any(dim=1)
    ties |= torch.count_nonzero(logs >= values[:, -1:], dim=1) > count
    classes[ties] = logs[ties].argsort(dim=1, descending=True, stable=True)[:, :count]
    return classes


def ranked(table: list[ClassError]) -> list[ClassError]:
    """Sorts the classes that have images: lowest top-1 error first, then lowest top-5 error, then label."""
    return sorted((row for row in table if row.images), key=lambda row: (row.top1_error, row.top5_error, row.label))


def class_csv(table: list[ClassError]) -> bytes:
    """Writes the table as CSV with a header: label, class, images, top1_error, top5_error (percent, empty where there is no image)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "class", "images", "top1_error", "top5_error"])
    for row in table:
        errors = ["" if error is None else f"{error:.4f}" for error in row[3:]]
        writer.writerow([*row[:3], *errors])
    return text.getvalue().encode()


def check_submission(data: Path, split: str) -> None:
    """Makes sure that labels are ILSVRC IDs less 1, that the split is whole, and its names are all different, before hours of work."""
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


def make_submission(
    data: Path, split: str, best: NDArray[np.int32], rows: NDArray[np.int64]
) -> tuple[bytes, list[str], list[str]]:
    """Makes the submission for a split of the data set in a folder; file names come from its ledger.

    Labels (N, 5), the best guess first, and the rows (N,) of the split's index that they belong to -> the file's content; the images of
    its lines; those of them without a prediction, whose lines are a placeholder.
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
    return content.encode(), [names[place] for place in order], missing


def predictions_of(found: Evaluation) -> PredictionTable:
    """What an evaluation's nets, as one, say of each sample: a row a sample, with its key and where it came from.

    Raises AlexprepError where the ledger is missing or damaged.
    """
    data, split = folder_at(found.document["data"]), found.document["split"]
    keys, sources = sample_names(data, split)
    if len(found.scores.rows) and int(found.scores.rows.max()) >= len(keys):
        raise AlexprepError(
            f"{data / split / LEDGER} lists {len(keys)} images, more were predicted: run `alexprep verify`"
        )
    return found.scores.table(keys, sources, found.classes)


def sample_names(data: Path, split: str) -> tuple[list[str], list[str]]:
    """The key and the source of every sample of a split, by row of its index."""
    sources, written = _ledger(data, split)
    places = np.flatnonzero(written).tolist()
    return [sample_key(place) for place in places], [sources[place] for place in places]


def _in_order(data: Path, split: str, names: list[str]) -> list[int]:
    """The places of the images in the order of their file names, which must all be different."""
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
    if is_tars(data):
        raise AlexprepError(
            f"{data} is no data set of `alexprep shard`, so there are no keys and sources of its images to write"
        )
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()), columns=["source", "status"])
    except (OSError, pa.ArrowInvalid) as error:
        raise AlexprepError(f"{path} cannot be read ({error}): run the same `alexprep shard` again") from None
    written = np.array([status == "written" for status in table["status"].to_pylist()], np.bool_)
    return table["source"].to_pylist(), written
