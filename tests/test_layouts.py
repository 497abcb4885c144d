"""Sets as people download them: each is read with the labels that its publisher's rule gives, or there is a question or a refusal."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click
import pytest

from alexprep.cli.options import source_options
from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.listing import Listing, list_inputs
from alexprep.shards.sources.layout_detection import find_source
from tests.support.layouts import MINIATURES, Rows

ROOT = Path(__file__).parents[1]


@click.command()
@source_options
def _options(**given: object) -> dict[str, object]:
    return given


def listed(place: Path, options: str = "") -> Listing:
    """What is listed with these options of the command line."""
    given = _options.main(shlex.split(options), standalone_mode=False)
    return list_inputs(find_source(str(place), given["layout"], given["choices"]), class_names=given["class_names"])


def rows_of(listing: Listing) -> Rows:
    """Split, class and label of each path, as the miniatures have them."""
    rows: Rows = {}
    for split, table in listing.splits.items():
        for row in table.to_pylist():
            path = os.fsdecode(b"/".join(filter(None, (row["path"], row["member"]))))
            assert path not in rows
            rows[path] = (split, listing.names[row["class"]], int(listing.label_of[row["class"]]))
    return rows


@pytest.mark.parametrize("name", MINIATURES)
def test_a_layout_is_read_right_or_asked_about(name: str, tmp_path: Path) -> None:
    made = MINIATURES[name]()
    place = made.write(tmp_path)
    if made.rows is not None:
        listing = listed(place)
        assert (listing.source.layout, rows_of(listing)) == (made.layout, made.rows)
        said = "\n".join(listing.account.warnings)
        for words in made.words:
            assert words in said
    else:
        with pytest.raises(AlexprepError) as raised:
            listed(place)
        assert isinstance(raised.value, AmbiguousSourceError) == bool(made.ways), raised.value
        assert str(place) in str(raised.value)
        for words in made.words:
            assert words in str(raised.value)
        printed = [what for what, _ in getattr(raised.value, "ways", ())]
        assert set(made.ways) <= set(printed)
        for way in printed:
            rows = chosen(place, way)
            if way in made.ways:
                assert rows == made.ways[way], way


def chosen(place: Path, way: str, before: str = "") -> Rows:
    """What a way that a question prints leads to; where it is another question, the first of its ways is taken too."""
    if way.startswith("SOURCE "):
        return rows_of(listed(Path(way.removeprefix("SOURCE "))))
    try:
        return rows_of(listed(place, f"{before} {way}"))
    except AmbiguousSourceError as error:
        assert before.count("--") < 3, error
        return chosen(place, error.ways[0][0], f"{before} {way}")
