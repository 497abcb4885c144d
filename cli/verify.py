"""alexprep verify"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alexprep.cli.options import (
    data_folder,
    engine_options,
    json_option,
    on_command_line,
    patience_option,
    source_options,
)

if TYPE_CHECKING:
    from alexprep.shards.listing import ClassNames
    from alexprep.shards.sources.base import Choices
    from alexprep.shards.verification import Problem
    from alexprep.shards.worker_pool import Engine

DAMAGED = 3  # exit status; 1 is an error, 2 a wrong argument
_SHOWN = 20


@click.command("verify", short_help="Check every byte of a data set.")
@data_folder
@click.option("--decode", is_flag=True, help="Also decode every image.")
@click.option("--repair", "repair_source", metavar="SOURCE", help="Make damaged shards again from SOURCE.")
@source_options
@engine_options
@patience_option
@json_option
def verify(
    data: Path,
    decode: bool,
    repair_source: str | None,
    layout: str | None,
    choices: Choices,
    class_names: ClassNames | None,
    engine: Engine,
    as_json: bool,
) -> None:
    """Check DATA against its plan and the checksums that were recorded when it was written.

    Finds changed bits, cuts, missing, swapped, doubled and foreign files, stale indexes and edited labels, and names the
    shard and the member. SOURCE is read as DATA records it was; the options that say what it is go before. Exit status: 0 all is sound, 3 something is damaged, 1 it could not be checked.

    \b
    Example: alexprep verify /data/imagenet-256 --repair /imagenet
    """
    from rich.filesize import decimal

    from alexprep.cli import output
    from alexprep.shards.verification import repair, source_of
    from alexprep.shards.verification import verify as check

    given = [
        name
        for name in ("layout", "split_folders", "class_depth", "columns", "unlabelled", "class_names")
        if on_command_line(name)
    ]
    if given and repair_source is None:
        raise click.UsageError(f"--{given[0].replace('_', '-')} says what SOURCE is: it needs --repair SOURCE.")
    checking = functools.partial(output.progress, "verifying", "images" if decode else "shards")
    with checking() as show:
        found = check(data, engine, decode, show)
    problems, repaired = found.problems, 0
    if problems and repair_source is not None:
        _show(problems)
        with output.progress("repairing") as show:
            source = source_of(data, repair_source, layout, choices)
            repaired = repair(data, source, problems, engine, show, class_names).made_inputs
        with checking() as show:
            found = check(data, engine, decode, show)
    _show(found.problems)
    rows = [("shards", f"{found.shards:,}"), ("sound images", f"{found.samples:,}"), ("read", decimal(found.bytes))]
    rows += [("made again", f"{repaired:,} inputs")] if repair_source is not None else []
    rows += [("problems", f"{len(found.problems):,}"), ("this run", f"{found.seconds:.1f} s")]
    output.table(f"{data} is {'damaged' if found.problems else 'sound'}.", rows)
    output.json_line(
        {
            "sound": not found.problems,
            "shards": found.shards,
            "samples": found.samples,
            "problems": [problem._asdict() for problem in found.problems],
            "repaired_inputs": repaired,
            "seconds": round(found.seconds, 3),
            "data": str(data),
        },
        as_json,
    )
    if found.problems:
        click.get_current_context().exit(DAMAGED)


def _show(problems: list[Problem]) -> None:
    for problem in problems[:_SHOWN]:
        click.echo(str(problem), err=True)
    if len(problems) > _SHOWN:
        click.echo(f"… and {len(problems) - _SHOWN:,} more (--json lists all)", err=True)
