"""`alexprep predict`: the best classes of photos, by `alexprep.train.classifier`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alexprep.cli.options import (
    AT_LEAST_1,
    check_picture,
    device_option,
    json_option,
    patience_option,
    picture_option,
    precision_option,
    threads_option,
    trained_data_option,
    trained_run_options,
    views_option,
)

if TYPE_CHECKING:
    from alexprep.train.classifier import Classified
    from alexprep.train.precision import Precision


@click.command(short_help="The best classes of photos.")
@click.argument("run")
@click.argument("photos", metavar="FILE...", nargs=-1, required=True)
@views_option
@trained_data_option
@click.option("--csv", "as_csv", is_flag=True, help="Print the table as CSV, with all digits.")
@click.option(
    "--predictions",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the table to a .csv or .parquet file, as `alexprep eval --predictions` does.",
)
@picture_option
@trained_run_options
@click.option("--batch-size", type=AT_LEAST_1, default=128, show_default=True, help="Crops at a time.")
@precision_option
@threads_option
@patience_option
@device_option
@json_option
def predict(
    run: str,
    photos: tuple[str, ...],
    runs: Path,
    precision: Precision | None,
    as_csv: bool,
    predictions: Path | None,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Print the five best classes of each FILE: a photo, a folder, a tar, or - for a photo on stdin.

    RUN is a name in ./runs, or RUN@STEP. A photo is brought to the form of the data set's images, as `alexprep shard` would: so a photo,
    the shard's member that was made of it, and `alexprep eval` have the same probabilities to the last digit.

    \b
    Example: alexprep predict alexnet cat.jpg holidays/
    """
    from alexprep.cli import output
    from alexprep.shards.contact_sheet import publish_picture
    from alexprep.train.classifier import Classifier, check_refused, draw_predictions
    from alexprep.train.prediction_table import check_table_file, write_predictions
    from alexprep.train.run_dir import place_named

    if as_csv and as_json:
        raise click.UsageError("--csv and --json are both given: give one.")
    if predictions is not None:
        check_table_file(predictions)
    if picture is not None:
        check_picture(picture)
    with (
        Classifier(place_named(runs, run), precision=precision or "fp32", **options) as classifier,
        output.progress("classifying", "photos") as progress,
    ):
        found = classifier.predict(photos, progress=progress)
    for sentence in [*classifier.notes, *(f"{name}: {reason}" for name, reason in found.refused)]:
        click.echo(sentence, err=True)
    check_refused(found)
    if predictions is not None:
        write_predictions(found.table, predictions)
        click.echo(f"{len(found.table):,} rows in {predictions}", err=as_csv)
    if picture is not None:
        publish_picture(draw_predictions(found, classifier.short_names), picture)
        click.echo(f"Contact sheet: {picture}", err=as_csv)
    if as_csv:
        click.echo(found.table.as_csv(), nl=False)
    elif not as_json:
        _print(found, classifier.shown_names)
    document = {
        "run": str(classifier.net.run),
        "step": classifier.net.step,
        "data": str(classifier.data),
        "views": classifier.views,
        "photos": len(found.table) + len(found.refused),
        "predictions": found.table.as_json(),
        "refused": [{"key": name, "reason": reason} for name, reason in found.refused],
        "notes": classifier.notes,
    }
    output.json_line(document, as_json)


def _print(found: Classified, names: list[str]) -> None:
    width = max((len(names[label]) for label in set(found.table.best.flat)), default=0)
    for row in found.table.as_json():
        click.echo(row["key"])
        for guess in row["best"]:
            click.echo(f"  {names[guess['label']]:<{width}}  {100 * guess['probability']:6.2f} %")
