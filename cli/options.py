"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

DEFAULT_DATA = "alexprep-data"

data_option = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_DATA,
    envvar="ALEXPREP_DATA",
    show_default=True,
    show_envvar=True,
    help="The data set's folder.",
)

workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=None, help="Worker processes.  [default: one a core]"
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document as the last line of stdout."
)
