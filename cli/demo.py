"""`alexprep demo`: every stage on pictures drawn on the spot, by `alexprep.train.demo`."""

from __future__ import annotations

from pathlib import Path

import click

from alexprep.cli.options import json_option


@click.command(short_help="Every stage, on pictures drawn on the spot.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="demo",
    show_default=True,
    help="Where everything goes; an earlier demo there is replaced.",
)
@json_option
def demo(out: Path, as_json: bool) -> None:
    """Run every stage on pictures drawn on the spot, and report on it: some 20 seconds on two cores, no download.

    \b
    Example: alexprep demo --out /tmp/demo
    """
    from alexprep.cli import output
    from alexprep.train.demo import run_demo

    summary = run_demo(out, click.echo)
    output.json_line(summary, as_json)
    output.leave_if_stopped(summary["stopped_by"])
