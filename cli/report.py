"""`alexprep report`: one page that shows a dataset and what was trained on it, by `alexprep.train.report`."""

from __future__ import annotations

from pathlib import Path

import click

from alexprep.cli.options import json_option, local_data_option, on_command_line, patience_option, runs_option


@click.command(short_help="One page that shows data, statistics and runs.")
@click.argument("places", metavar="[DATA] [RUN]...", nargs=-1)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="report",
    show_default=True,
    help="The folder; an earlier report in it is replaced, and nothing else.",
)
@local_data_option
@runs_option
@patience_option
@json_option
def report(places: tuple[str, ...], out: Path, data: Path, runs: Path, as_json: bool) -> None:
    """Write OUT/report.html: DATA, its statistics and augmentation, and each RUN (a name in ./runs, or a folder) in tables and pictures.

    The page is whole in one file and asks no network for anything. No net is run for it: it shows what `alexprep eval --predictions` and
    `alexprep features` left, and says how to make what is not there. Without arguments: the run last active, and its data.

    \b
    Example: alexprep report alexprep-data alexnet alexnet-2
    """
    from alexprep.cli import output
    from alexprep.train.report.page import find_places, write_report

    chosen, found, notes = find_places(places, data, runs, on_command_line("data"))
    written = write_report(chosen, found, out, lambda words: click.echo(f"drawing: {words}", err=True), notes)
    for sentence in written.missing:
        click.echo(sentence, err=True)
    click.echo(f"Report in {written.path}")
    document = {
        "report": str(written.path),
        "data": None if chosen is None else str(chosen),
        "runs": list(map(str, found)),
        "missing": written.missing,
    }
    output.json_line(document, as_json)
