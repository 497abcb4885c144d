"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

FC = TypeVar("FC", bound=Callable[..., Any] | click.Command)


def data_folder_option(name: str, text: str) -> Callable[[FC], FC]:
    """An option for the data set's folder, with its default and environment variable."""
    return click.option(
        name,
        type=click.Path(path_type=Path, file_okay=False),
        default="alexprep-data",
        envvar="ALEXPREP_DATA",
        show_default=True,
        show_envvar=True,
        help=text,
    )


data_option = data_folder_option("--data", "The data set's folder.")

runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs",
    show_default=True,
    help="Folder of runs.",
)

threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads for decoding.  [default: one a core]"
)

device_option = click.option("--device", help="cpu or cuda.  [default: cuda where there is a GPU]")

workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=None, help="Worker processes.  [default: one a core]"
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document as the last line of stdout."
)
