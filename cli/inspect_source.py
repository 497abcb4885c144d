"""alexprep inspect"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alexprep.cli.options import check_picture, class_words_option, json_option, labels_option, source_options

if TYPE_CHECKING:
    from alexprep.shards.listing import ClassNames
    from alexprep.shards.sources.base import Choices


@click.command("inspect", short_help="What a source holds, before anything is done.")
@click.argument("source")
@source_options
@labels_option
@class_words_option
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Also draw a contact sheet: images of ten classes beside their names and labels.",
)
@json_option
def inspect_command(
    source: str,
    layout: str | None,
    choices: Choices,
    class_names: ClassNames | None,
    labels: str,
    class_words: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Show what `alexprep shard SOURCE` would do, without decoding or writing anything.

    The layout and why it is taken for one, splits, classes and how they are numbered, how many images each class has, a few
    files with their labels, what is passed over by which rule, and formats and sizes of a random sample of files. Give the
    options that `shard` is to have; a source that can be read in two ways ends with status 2 and the options that choose.

    \b
    Example: alexprep inspect /imagenet --picture classes.png
    """
    from alexprep.cli import output
    from alexprep.shards.inspection import inspect_source
    from alexprep.shards.listing import list_inputs
    from alexprep.shards.sources.layout_detection import find_source

    if picture is not None:
        check_picture(picture)
    listing = list_inputs(find_source(source, layout, choices), labels, class_names, class_words)
    found = inspect_source(listing)
    click.echo(found)
    if picture is not None:
        from alexprep.shards.contact_sheet import publish_contact_sheet

        publish_contact_sheet(listing, picture)
        click.echo(f"Contact sheet: {picture}")
    output.json_line({**found.as_json(), "picture": None if picture is None else str(picture)}, as_json)
