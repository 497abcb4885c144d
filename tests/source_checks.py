"""What tests of sources share: finding one, listing it, and being refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Input, Source
from alexprep.shards.sources.detection import find_source


def found(place: Path, layout: str) -> Source:
    """The source that is found by looking, which must have this layout."""
    source = find_source(str(place))
    assert source.layout == layout
    return source


def listed(source: Source) -> list[Input]:
    """The inputs, which must come in the order of their bytes, each once, and twice alike."""
    inputs = list(source.inputs())
    assert inputs == list(source.inputs()) == sorted(inputs)
    assert len({i.location for i in inputs}) == len(inputs)
    return inputs


def fails(place: Path, words: str, layout: str | None = None) -> None:
    """Finding or listing must raise an error with these words and the place."""
    with pytest.raises(AlexprepError) as error:
        list(find_source(str(place), layout).inputs())
    assert words in str(error.value), error.value
    assert str(place if place.is_dir() else place.parent) in str(error.value)


def write(path: Path, data: bytes) -> Path:
    """Writes a file, gzipped if its name says so."""
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path
