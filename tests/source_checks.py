"""What tests of sources share: finding one, listing it, and being refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sample_reader import Samples
from alexprep.shards.sources.base import Account, Input, Source
from alexprep.shards.sources.layout_detection import find_source

FORMATS: dict[str, Literal[0, 1, 2]] = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


def write_tar(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], form: str = "gnu") -> Path:
    """Writes a tar with these members; the content b"link" makes a link, and NAME/ a folder. In a pax tar all have long headers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.mtime = 1.5 if form == "pax" else 1
            if content == b"link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            elif name.endswith("/"):
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def found(place: Path, layout: str) -> Source:
    """The source that is found by looking, which must have this layout."""
    source = find_source(str(place))
    assert source.layout == layout
    return source


def listed(source: Source) -> list[Input]:
    """The inputs, which must come in the order of their bytes, each once, and twice alike."""
    inputs = list(source.inputs(Account()))
    assert inputs == list(source.inputs(Account())) == sorted(inputs)
    assert len({i.location for i in inputs}) == len(inputs)
    return inputs


def fails(place: Path, words: str, layout: str | None = None) -> None:
    """Finding or listing must raise an error with these words and the place."""
    with pytest.raises(AlexprepError) as error:
        list(find_source(str(place), layout).inputs(Account()))
    assert words in str(error.value), error.value
    assert str(place if place.is_dir() else place.parent) in str(error.value)


def write(path: Path, data: bytes) -> Path:
    """Writes a file, gzipped if its name says so."""
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """With one bit changed."""
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def make_idx(tar: Path, version: str = "v1.2") -> Path:
    """The index that DALI's tool writes; for v1.1, what it wrote once."""
    from wds2idx import IndexCreator

    path = tar.with_suffix(".idx")
    creator = IndexCreator(str(tar), str(path), verbose=False)
    creator.create_index()
    creator.close()
    if version == "v1.1":
        lines = [line.split(" ") for line in path.read_text().splitlines()[1:]]
        text = (" ".join(field for n, field in enumerate(line) if n % 4 != 3) for line in lines)
        path.write_text("\n".join([f"v1.1 {len(lines)}", *text, ""]))
    return path


def pictures(folder: Path) -> dict[str, Counter[tuple[str, str]]]:
    """How often each split has a picture, by its pixels and its class's name."""
    dataset = read_dataset(folder)
    names, found = [*dataset["classes"], ""], {}  # -1 is the last one
    for split in dataset["splits"]:
        samples = Samples(folder, split)
        found[split] = Counter(
            (
                hashlib.sha256(Image.open(io.BytesIO(samples.encoded(n).tobytes())).tobytes()).hexdigest(),
                names[int(samples.labels[n])],
            )
            for n in range(len(samples))
        )
    return found


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.tar"))}
