"""A source listed as the command line lists it, options and all, without a conversion."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from alexprep.cli.options import source_options
from alexprep.shards.listing import Listing, list_inputs
from alexprep.shards.sources.layout_detection import find_source


@click.command()
@source_options
def _options(**given: object) -> dict[str, object]:
    return given


def listed(place: Path | str, options: str = "") -> Listing:
    """What is listed of SOURCE with these options, as a shell would split them."""
    given = _options.main(shlex.split(options), standalone_mode=False)
    return list_inputs(find_source(str(place), given["layout"], given["choices"]), class_names=given["class_names"])
