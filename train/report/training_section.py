"""The part of a report on trainings: log.jsonl of each run drawn over one another, and what `eval --predictions` left of the first."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.contact_sheet import SheetRow, cell_of, lay_out
from alexprep.shards.dataset_format import read_dataset, read_index, read_json, short_classes, shown_classes
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sample_reader import Samples
from alexprep.shards.storage import folder_at, modified
from alexprep.train.prediction_table import PredictionTable, read_predictions
from alexprep.train.report.blocks import LINES, STYLES, Block, Picture, Plot, Section, Table, Words, plot, thinned
from alexprep.train.run_dir import LOG, command, read_config, resuming

WORST = 200  # images listed, and the first of them shown
_SHOWN, _PER_ROW = 30, 10
_MOST_CLASSES = 60  # of a confusion matrix that can be read
_EVALUATION = "eval-*.json"


@dataclass(frozen=True)
class Log:
    """What log.jsonl has of a run."""

    run: Path
    steps: list[dict[str, Any]]  # records of kind "steps"
    epochs: list[dict[str, Any]]  # of kind "epoch"
    batch_size: int

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The epochs with an evaluation."""
        return [record for record in self.epochs if record["val"]]

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch of the lowest top-1 error, the first of equals."""
        return min(self.evaluated, key=lambda record: float(record["val"]["top1_error"]), default=None)


def training_section(data: Path | None, runs: Sequence[Path]) -> Section:
    """The section of some runs; only the first one's predictions are shown, with the images of `data` where they are of it."""
    section = Section("training", "Training")
    if not runs:
        section.blocks.append(
            Words("There is no run: name one, `alexprep report RUN`, or train one with `alexprep train`.", True)
        )
        return section
    logs: list[Log] = []
    for run in runs:
        section.add(lambda run=run: _read(run, logs), f"log of {run.name}")  # type: ignore[misc]
    if logs:
        section.add(lambda: [_summary(logs)], "table of the runs")
        section.add(lambda: _curves(logs), "plot of the training")
    section.add(lambda: _predictions(data, runs[0]), f"table of predictions of {runs[0].name}")
    return section


def read_log(run: Path) -> Log:
    """Reads a run's log, its last line perhaps cut short. Raises AlexprepError where there is none, or it has no record."""
    config = read_config(run)
    path = run / LOG
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise AlexprepError(f"{path} cannot be read ({error.strerror}): the run has logged nothing yet") from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"kind", "step", "epoch"} <= record.keys():
            records.append(record)
    steps, epochs = ([record for record in records if record["kind"] == kind] for kind in ("steps", "epoch"))
    if not steps and not epochs:
        raise AlexprepError(
            f"{path} has no record yet: train on with `{shlex.join(['alexprep', 'train', *resuming(run)])}`"
        )
    return Log(
        run, steps, epochs, int(config["options"].get("batch_size") or config["identity"]["recipe"]["batch_size"])
    )


@dataclass(frozen=True)
class Predictions:
    """The newest evaluation of a run that has its predictions: its document, the table, where the data are, and their dataset.json."""

    document: dict[str, Any]
    table: PredictionTable
    data: Path
    dataset: dict[str, Any]


def newest_predictions(data: Path | None, run: Path) -> Predictions:
    """Finds them. The data are `data` where these are the evaluated ones, wherever they lay then.

    Raises AlexprepError, with the command that makes them, where there is none.
    """
    files = sorted(run.glob(_EVALUATION), key=modified, reverse=True)
    for path in files:
        document = read_json(path, "evaluate again")
        if "predictions_file" in document:
            named = folder_at(document["predictions_file"])
            beside = path.with_name(named.name)  # goes first: the run may have been moved
            where = data_with(document["data_digest"], data, folder_at(document["data"]))
            dataset = read_dataset(where)
            table = read_predictions(beside if beside.exists() else named, dataset["classes"])
            return Predictions(document, table, where, dataset)
    raise AlexprepError(f"{run} has no predictions: make them with {command('eval', run, '--predictions')}")


def data_with(digest: str, data: Path | None, recorded: Path) -> Path:
    """Where the data of a digest are: `data` if these are they, otherwise the place that was recorded."""
    with contextlib.suppress(AlexprepError):
        if data is not None and read_dataset(data)["digest"] == digest:
            return data
    return recorded


def _read(run: Path, logs: list[Log]) -> list[Block]:
    logs.append(read_log(run))
    return []


def _summary(logs: Sequence[Log]) -> Table:
    rows: list[list[Any]] = []
    for log in logs:
        config, best = read_config(log.run), log.best
        last, step = (log.epochs or log.steps)[-1], max(record["step"] for record in [*log.epochs, *log.steps])
        options = config["options"]
        recipe = str(options["recipe"]).rpartition("/")[2]  # of a file, its name alone
        row = [log.run.name, recipe, log.batch_size, int(step), len(log.epochs), float(last["loss"])]
        row += [best["epoch"] + 1, best["val"]["top1_error"], best["val"]["top5_error"]] if best else [None] * 3
        rows.append([*row, sum(float(record["seconds"]) for record in log.epochs) / 60])
    columns = [
        "run",
        "recipe",
        "batch",
        "steps",
        "epochs",
        "training loss",
        "best epoch",
        "its top-1 error, %",
        "top-5, %",
        "minutes",
    ]
    return Table("Runs", columns, rows, formats={"training loss": ".4f"})


def _curves(logs: Sequence[Log]) -> Iterator[Plot]:
    if any(log.epochs for log in logs):
        yield _progress(logs, "errors", "epochs", lambda log, record: float(record["epoch"] + 1))
        most = max(record["step"] * log.batch_size for log in logs for record in log.epochs)
        unit, words = (1e6, "millions") if most >= 2e6 else (1e3, "thousands")
        yield _progress(
            logs, "images_seen", f"images seen, {words}", lambda log, record: record["step"] * log.batch_size / unit
        )
    yield _curve("learning_rate", logs, "learning rate", lambda log: _of(log.steps or log.epochs, "lr"), log_scale=True)
    if any(log.steps for log in logs):
        yield _curve("speed", logs, "images/s", lambda log: _of(log.steps, "images_per_second"))
        yield _curve("data_wait", logs, "waiting for data, % of a step", _waiting)


Points = tuple[NDArray[np.float64], NDArray[np.float64]]


def _of(records: Sequence[dict[str, Any]], name: str) -> Points:
    """Values by step."""
    return np.array([record["step"] for record in records], float), np.array(
        [record[name] for record in records], float
    )


def _waiting(log: Log) -> Points:
    steps, wait = _of(log.steps, "data_wait_ms")
    return steps, 100 * wait / np.maximum(1e-9, wait + _of(log.steps, "step_ms")[1])


_PANELS = {"loss": "loss, nats", "top1_error": "top-1 error, %", "top5_error": "top-5 error, %"}


def _progress(logs: Sequence[Log], name: str, along: str, place: Callable[[Log, dict[str, Any]], float]) -> Plot:
    """Loss, top-1 and top-5 error after each epoch, training dashed, the best epoch marked; `place` is how far a record is along."""

    def draw(figure: Any) -> None:
        for axes, which in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
            for n, log in enumerate(logs):
                colour, run = LINES[n % len(LINES)], log.run.name
                x = [place(log, record) for record in log.epochs]
                y = [record[which] for record in log.epochs]
                axes.plot(x, y, color=colour, linestyle="--", linewidth=1, label=f"{run}, training")
                x = [place(log, record) for record in log.evaluated]
                y = [record["val"][which] for record in log.evaluated]
                axes.plot(x, y, color=colour, linewidth=1.8, label=f"{run}, validation")
                if log.best is not None:
                    best = place(log, log.best), log.best["val"][which]
                    axes.plot(*best, "o", color=colour, markersize=7, fillstyle="none")
            axes.set(xlabel=along, ylabel=_PANELS[which], ylim=(0, None))
            axes.locator_params(axis="x", nbins=5)  # whose labels have room
        figure.axes[0].legend()

    best = "; ".join(
        f"{log.run.name} {log.best['val']['top1_error']:.2f} % after epoch {log.best['epoch'] + 1}"
        for log in logs
        if log.best
    )
    names = ", ".join(log.run.name for log in logs)
    words = f"Loss and errors against {along}: {names}, training dashed. Lowest validation error (circle): {best or 'none was measured'}."
    return plot(name, words, words, draw, (9.6, 3.4))


def _curve(
    name: str,
    logs: Sequence[Log],
    what: str,
    points: Callable[[Log], Points],
    log_scale: bool = False,
) -> Plot:
    """Something against steps."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for n, log in enumerate(logs):
            x, y = points(log)
            shown = thinned(x)
            style = STYLES[n % len(STYLES)]
            axes.plot(x[shown], y[shown], color=LINES[n % len(LINES)], linestyle=style, label=log.run.name)
        axes.set(xlabel="steps", ylabel=what)
        if log_scale and all((points(log)[1] > 0).all() for log in logs):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
        axes.legend()

    words = f"{what[0].upper()}{what[1:]} against steps: {', '.join(log.run.name for log in logs)}."
    return plot(name, words, words, draw, (4.7, 3.4))


def _predictions(data: Path | None, run: Path) -> list[Block]:
    found = newest_predictions(data, run)
    document, table, dataset = found.document, found.table, found.dataset
    known = table.labels >= 0
    where = f"{len(table):,} images of {document['split']!r}, {document['views']} view{'s' if document['views'] != 'centre' else ''}"
    if not known.any():
        return [Words(f"Of {where} none has a label: there is nothing to compare with.")]
    error = f"top-1 error {document['top1_error']:.2f} %, top-5 error {document['top5_error']:.2f} %"
    blocks: list[Block] = [Words(f"{run.name} after step {document['step']}, {where}: {error}.")]
    wrong = known & (table.best[:, 0] != table.labels)
    blocks += _confusions(table, dataset, known, wrong)
    return [*blocks, *_worst(found, run)]


def _confusions(
    table: PredictionTable, dataset: dict[str, Any], known: NDArray[np.bool_], wrong: NDArray[np.bool_]
) -> list[Block]:
    names, short, count = shown_classes(dataset), short_classes(dataset), len(table.classes)
    labels, guesses = table.labels[known], table.best[known, 0].astype(np.int64)
    images = np.bincount(labels, minlength=count)
    failed = np.bincount(table.labels[wrong], minlength=count)
    rows: list[list[Any]] = [
        [n, names[n], int(images[n]), 100 * float(failed[n]) / int(images[n])] for n in range(count) if images[n]
    ]
    rows.sort(key=lambda row: -row[3])
    blocks: list[Block] = [
        Table("Classes by error: the worst first", ["label", "class", "images", "top-1 error, %"], rows, search=True)
    ]
    pairs, times = np.unique(table.labels[wrong] * count + table.best[wrong, 0], return_counts=True)
    order = np.argsort(-times, kind="stable")[:50]
    taken = [
        [names[true], names[guess], int(n), int(images[true])]
        for true, guess, n in zip(*np.divmod(pairs[order], count), times[order], strict=True)
    ]
    blocks.append(Table("Most often taken for another class", ["class", "taken for", "times", "of images"], taken))
    if count <= _MOST_CLASSES:
        matrix = np.zeros((count, count))
        np.add.at(matrix, (labels, guesses), 1)
        shares = 100 * matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            drawn = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", interpolation="nearest")
            small = 8 if count <= 30 else 5
            axes.set_xticks(range(count), short, rotation=90, fontsize=small)
            axes.set_yticks(range(count), short, fontsize=small)
            axes.set(xlabel="best guess", ylabel="label")
            axes.grid(False)
            figure.colorbar(drawn, label="% of the class")

        words = f"Confusion matrix of {count} classes: a row is a label, a column a best guess, in % of the row."
        side = 4.5 if count <= 12 else 6.8
        blocks.append(plot("confusion", words, words, draw, (side + 1, side)))
    return blocks


def worst_predicted(table: PredictionTable, most: int = WORST) -> list[int]:
    """The rows of a table whose label is given the least, at most so many, the least first."""
    given = np.where(table.labels >= 0, table.label_probabilities, np.inf)
    return [n for n in np.argsort(given, kind="stable")[:most].tolist() if table.labels[n] >= 0]


def _worst(found: Predictions, run: Path) -> list[Block]:
    """Images whose label is given the least: often it is the label that is wrong."""
    document, table, data, names = found.document, found.table, found.data, shown_classes(found.dataset)
    order = worst_predicted(table)
    rows = [
        [
            rank,
            table.keys[n],
            table.sources[n],
            names[table.labels[n]],
            float(table.label_probabilities[n]),
            names[table.best[n, 0]],
            float(table.probabilities[n, 0]),
        ]
        for rank, n in enumerate(order, 1)
    ]
    columns = ["rank", "key", "source", "label", "its probability", "best guess", "probability"]
    formats = {"its probability": ".3g", "probability": ".4f"}
    caption = f"Worst predicted images: the {len(rows)} whose label is given the least; often the label is wrong"
    blocks: list[Block] = [Table(caption, columns, rows, search=True, formats=formats)]
    samples = Samples(data, document["split"])
    if len(samples) != len(table) or not np.array_equal(read_index(data, document["split"])["label"], table.labels):
        raise AlexprepError(
            f"{data} has changed since the predictions were made: make them again with {command('eval', run, '--predictions')}"
        )
    sheet = []
    for at in range(0, min(_SHOWN, len(order)), _PER_ROW):
        part = order[at : at + _PER_ROW]
        sheet.append(
            SheetRow(f"{at + 1} to {at + len(part)}", "", [[cell_of(samples.encoded(n).tobytes()) for n in part]])
        )
    words = f"The {min(_SHOWN, len(order))} worst predicted images, in the order of the table."
    return [Picture("worst", words, words, np.asarray(lay_out([document["split"]], sheet))), *blocks]
