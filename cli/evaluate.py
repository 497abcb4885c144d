"""`alexprep eval`: the errors of trained networks, printed and written; they are computed in `alexprep.train.evaluation`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alexprep.cli.options import (
    AT_LEAST_1,
    device_option,
    folder,
    json_option,
    precision_option,
    store_options,
    threads_option,
    trained_run_options,
    views_option,
)

if TYPE_CHECKING:
    from alexprep.train.evaluation import ClassError, Evaluation, Scores
    from alexprep.train.precision import Precision

SHOWN = 10  # classes at either end of the table
ON_SCREEN = ""  # what --classes without a file gives
BESIDE = ""  # what --predictions without a file gives


@click.command("eval", short_help="Errors of trained networks, one by one and averaged.")
@click.argument("nets", metavar="[RUN | RUN@STEP | RUN@best]...", nargs=-1)
@views_option
@click.option("--split", help="The split to evaluate on.  [default: val, or test]")
@click.option(
    "--data",
    type=folder,
    metavar="FOLDER",
    help="The data set.  [default: the one they were trained on]",
)
@click.option(
    "--weights", default="equal", show_default=True, help="Of several nets: equal, search, or numbers: 2,1,1."
)
@click.option("--weights-from", metavar="SPLIT", help="Where search looks.  [default: the evaluated split]")
@click.option(
    "--classes",
    metavar="[FILE.csv]",
    is_flag=False,
    flag_value=ON_SCREEN,
    help="Errors by class: the best and worst printed, or all of them in a file.",
)
@click.option(
    "--predictions",
    metavar="[FILE]",
    is_flag=False,
    flag_value=BESIDE,
    help="Each image's five best classes with probabilities, in a .csv or .parquet file; without FILE beside the result.",
)
@click.option("--submission", type=click.Path(path_type=Path, dir_okay=False), help="Write ILSVRC's file of guesses.")
@trained_run_options
@click.option("--batch-size", type=AT_LEAST_1, default=128, show_default=True, help="Crops at a time.")
@precision_option
@threads_option
@store_options
@device_option
@json_option
def evaluate(
    nets: tuple[str, ...],
    weights: str,
    classes: str | None,
    predictions: str | None,
    submission: Path | None,
    runs: Path,
    precision: Precision | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate the newest checkpoint of RUN, a name in ./runs, that of STEP, or the one of the lowest validation error; the run last active
    by default.

    Prints top-1 and top-5 error and cross-entropy; --views ten averages the softmax over the paper's ten views, --views two over
    the centre and its reflection. Several nets are evaluated one by one and as the mean of their softmax outputs. The result is also written beside the runs, as eval-….json.

    \b
    Example: alexprep eval alexnet alexnet-2 alexnet-3 --views ten
    """
    from alexprep.cli import output
    from alexprep.train import evaluation
    from alexprep.train.ensemble import parse_weights
    from alexprep.train.evaluation import check_submission
    from alexprep.train.run_dir import place_named

    _check_files(classes, predictions, submission)
    with output.progress("evaluating") as progress:
        found = evaluation.evaluate(
            [place_named(runs, text) for text in nets or [None]],
            weights=parse_weights(weights),
            precision=precision or "fp32",  # also of nets that were trained in another
            progress=progress,
            check=check_submission if submission else None,
            **options,
        )
    document = found.document
    for sentence in [*document["skipped"], *document["notes"]]:
        click.echo(sentence, err=True)
    _print(document)
    try:
        if classes is not None:
            if document["samples"]:
                _classes(classes, found, document)
            else:
                click.echo("None of the images has a label: there are no errors by class to show.", err=True)
        if predictions is not None:
            _write_predictions(predictions, found, runs)
        if submission:
            _submit(submission, found.scores, document)
    finally:  # hours of work are not lost to a disk that one of the files finds full
        _publish(document, runs)
    output.json_line(document, as_json)


def _check_files(classes: str | None, predictions: str | None, submission: Path | None) -> None:
    """Refuses files that could not be written in the end, before the work begins."""
    from alexprep.shards.errors import AlexprepError
    from alexprep.train.prediction_table import check_table_file

    if predictions:
        check_table_file(Path(predictions))
    if classes and not classes.endswith(".csv"):
        raise AlexprepError(
            f"--classes {classes}: name a file that ends in .csv; to print the classes of the run {classes}, put --classes last"
        )
    for path in (Path(classes) if classes else None, submission):
        if path and not path.parent.is_dir():
            raise AlexprepError(f"{path} cannot be written: there is no folder {path.parent}")
        if path and path.is_dir():
            raise AlexprepError(f"{path} is a folder: name a file in it")


def _print(document: dict[str, Any]) -> None:
    from alexprep.cli import output

    nets, images = document["nets"], document["images"]
    whose = f"{nets[0]['run']} after step {nets[0]['step']}" if len(nets) == 1 else f"{len(nets)} nets"
    title = f"{whose}, {images:,} images of {document['split']!r} in {document['data']}"
    labelled = [] if document["samples"] == images else [("with a label", f"{document['samples']:,}")]
    waited = 100 * document["data_wait_ms"] / (document["data_wait_ms"] + document["step_ms"])
    if len(nets) > 1:
        _print_nets(title, document)
        title = "All as one, the mean of their softmax outputs"
    output.table(
        title,
        [
            *labelled,
            ("top-1 error", _error(document, "top1")),
            ("top-5 error", _error(document, "top5")),
            ("cross-entropy", "unknown" if document["loss"] is None else f"{document['loss']:.4f} nats"),
            ("views", document["views"]),
            ("speed", f"{document['images_per_second']:,.0f} images/s, {waited:.0f} % of the time waiting for data"),
            ("seconds", f"{document['seconds']:.1f} on {document['device']}"),
        ],
    )
    if document["weights"] == "search":
        where = document["weights_from"]
        same = ", the very images that are measured: the error is flattered, see --weights-from"
        click.echo(f"Weights chosen on {where!r}{same if where == document['split'] else ''}.")


def _print_nets(title: str, document: dict[str, Any]) -> None:
    click.echo(title)
    names = [f"{Path(net['run']).name}@{net['step']}" for net in document["nets"]]
    width = max(len("net"), *map(len, names))
    click.echo(f"  {'net':<{width}}  weight  top-1 error  top-5 error  cross-entropy")
    for name, net in zip(names, document["nets"], strict=True):
        errors = [
            f"{value:.2f} %" if value is not None else "unknown" for value in (net["top1_error"], net["top5_error"])
        ]
        loss = "unknown" if net["loss"] is None else f"{net['loss']:.4f} nats"
        click.echo(f"  {name:<{width}}  {net['weight']:6.3f}  {errors[0]:>11}  {errors[1]:>11}  {loss:>13}")


def _error(document: dict[str, Any], which: str) -> str:
    if document[f"{which}_error"] is None:
        return "unknown: no image has a label"
    return f"{document[f'{which}_error']:.2f} % (standard error {document[f'{which}_standard_error']:.2f})"


def _classes(file: str, found: Evaluation, document: dict[str, Any]) -> None:
    """Prints the best and worst classes, or writes all; the most confused pairs are printed either way."""
    from alexprep.shards.storage import publish_bytes
    from alexprep.train.evaluation import class_csv, ranked

    table = found.scores.by_class(found.classes)
    if file:
        publish_bytes(Path(file), class_csv(table))
        document["classes_file"] = file
        click.echo(f"Errors of {len(table):,} classes in {file}")
    else:
        _print_classes(ranked(table), found.shown_names)
    pairs = found.scores.confusions(found.classes, SHOWN)
    shown = dict(zip(found.classes, found.shown_names, strict=True))
    if pairs:
        click.echo("Most often taken for another class")
        for pair in pairs:
            click.echo(f"  {shown[pair['true']]} for {shown[pair['guessed']]}: {pair['times']:,} of {pair['images']:,}")
    document["confusions"] = pairs


def _print_classes(rows: list[ClassError], names: list[str]) -> None:
    parts = [("All classes", rows)]
    if len(rows) > 2 * SHOWN:
        parts = [(f"Best {SHOWN} classes", rows[:SHOWN]), (f"Worst {SHOWN} classes", rows[: -SHOWN - 1 : -1])]
    width = max(len(names[row.label]) for _, part in parts for row in part)
    for heading, part in parts:
        click.echo(f"{heading:<{width + 2}}  images  top-1 error  top-5 error")
        for row in part:
            click.echo(
                f"  {names[row.label]:<{width}}  {row.images:>6,}  {row.top1_error:>9.2f} %  {row.top5_error:>9.2f} %"
            )


def _write_predictions(file: str, found: Evaluation, runs: Path) -> None:
    """Writes the table of predictions where it was asked for, and notes it in the document, where a report finds it."""
    from alexprep.train.evaluation import evaluation_file, predictions_of
    from alexprep.train.prediction_table import write_predictions

    path = Path(file) if file else evaluation_file(found.document, runs).with_suffix(".parquet")
    write_predictions(predictions_of(found), path)
    found.document["predictions_file"] = str(path.resolve())
    click.echo(f"Predictions of {found.document['images']:,} images in {path}")


def _submit(path: Path, scores: Scores, document: dict[str, Any]) -> None:
    from alexprep.shards.storage import folder_at, publish_bytes
    from alexprep.train.evaluation import make_submission

    content, images, missing = make_submission(folder_at(document["data"]), document["split"], scores.best, scores.rows)
    publish_bytes(path, content)
    document["submission_file"] = str(path)
    click.echo(f"{len(images):,} lines in {path}, from {Path(images[0]).name} to {Path(images[-1]).name}")
    if missing:
        click.echo(
            f"{len(missing):,} images could not be read when the set was made, among them {missing[0]}: their lines are "
            "1 2 3 4 5",
            err=True,
        )


def _publish(document: dict[str, Any], runs: Path) -> None:
    """Writes the result; someone else's runs, which cannot be written to, can still be evaluated."""
    from alexprep.shards.errors import AlexprepError
    from alexprep.train.evaluation import publish_evaluation

    try:
        path = publish_evaluation(document, runs)
    except (OSError, AlexprepError) as error:
        words = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        click.echo(f"The result was not written ({words}).", err=True)
        return
    document["result_file"] = str(path)
    click.echo(f"Written to {path}")
