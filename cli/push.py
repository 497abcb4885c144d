"""alexprep push"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alexprep.cli.options import engine_options, json_option, local_folder, patience_option

if TYPE_CHECKING:
    from alexprep.shards.worker_pool import Engine


@click.command(short_help="A data set to the Hugging Face hub.")
@click.argument("data", type=local_folder)
@click.argument("repository", metavar="hf://datasets/USER/NAME")
@click.option(
    "--public/--private",
    default=False,
    show_default=True,
    help="Who may read a repository that is made: everybody, or whom you let. One that is there stays as it is.",
)
@engine_options
@patience_option
@json_option
def push(data: Path, repository: str, public: bool, engine: Engine, as_json: bool) -> None:
    """Put DATA on the Hugging Face hub: checked first, shards before what describes them, and nothing twice.

    After an interruption the same command goes on. The token is that of `hf auth login`, or $HF_TOKEN. A repository that holds anything but
    an earlier push of the same data set is refused; of its README.md yours is kept.

    \b
    Example: alexprep push /data/imagenet-256 hf://datasets/USER/imagenet-256
    """
    from rich.filesize import decimal

    from alexprep.cli import output
    from alexprep.shards import hub

    found = hub.push(data, repository, engine, public, output.progress)
    for name in found.kept:
        click.echo(f"{name} of the repository is another than this data set's, and is kept.")
    output.table(
        f"{data} is at {found.url}.",
        [
            ("files", f"{found.files:,}"),
            ("sent now", f"{found.sent:,}, {decimal(found.bytes)}"),
            ("may be read by", "whom its owner lets" if found.private else "everybody"),
            ("this run", f"{found.seconds:.1f} s"),
        ],
    )
    output.json_line(asdict(found), as_json)
