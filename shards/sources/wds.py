"""Any webdataset: tars of KEY.jpg KEY.cls, in one folder, in split folders, or given by a brace pattern."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.shards.layout import DATASET
from alexprep.shards.sources.archive import ArchiveSource, packed_files
from alexprep.shards.sources.base import Input, Location, numbered_classes, split_of
from alexprep.shards.sources.files import Files

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
LABEL_EXTENSIONS = ("cls", "class", "label", "index", "json")  # in this order of preference
_JSON_LABELS = ("label", "cls", "class", "class_id")
_LOOK = 8  # members that are looked at to recognise a webdataset
_MAX_LABEL_BYTES = 2**20


class _Sample(NamedTuple):
    key: bytes
    parts: dict[str, Location]


@dataclass(frozen=True)
class Webdataset(ArchiveSource):
    """Other people's shards, or our own, to be sharded anew.

    Attributes:
        shards: (split, file), in ascending order.
        names: the class names by label, where a dataset.json tells them.
    """

    shards: tuple[tuple[str, bytes], ...] = ()
    names: tuple[str, ...] = ()
    layout = "webdataset"
    expects = "tars of KEY.jpg and KEY.cls, in SOURCE or in SOURCE/train and SOURCE/val"

    @classmethod
    def at(cls, files: Files, name: bytes) -> Webdataset | None:
        """The shards in the root and its split folders, or those that `name` (a tar, or a brace pattern) stands for."""
        if name:
            found = [(split_of(os.path.basename(path)) or "train", path) for path in braces(name)]
        else:
            found = list(_shards_below(files))
        if not found or not all(path.endswith(b".tar") for _, path in found):
            return None
        try:
            if not _is_webdataset(files, found[0][1]):
                return None
        except FileNotFoundError:
            raise AlexprepError(f"SOURCE {files.display(found[0][1])} does not exist") from None
        names: tuple[str, ...] = ()
        if not name and any(entry.name == DATASET.encode() for entry in files.entries()):
            names = tuple(json.loads(files.read(DATASET.encode())).get("classes", ()))
        return cls(files, tuple(sorted(found)), names)

    def inputs(self) -> Iterator[Input]:
        """Every sample in the order of the shards.

        Raises:
            AlexprepError: a shard is damaged, or a sample lacks its image or its label, or has two of them.
        """
        for split, path in self.shards:
            with self.files.reading(path) as read:
                for sample in samples_of(self.files, path):
                    yield Input(split, self._class(path, sample, read), self._image(path, sample))

    def classes(self, present: set[str]) -> list[str]:
        """The names of dataset.json; else the numbers up to the largest label; else the label texts, sorted."""
        if self.names:
            return list(self.names)
        numbers = [name for name in present if name.isdecimal()]
        if not numbers:
            return super().classes(present)
        if len(numbers) != len(present):
            odd = min(present - set(numbers))
            raise AlexprepError(f"{self.files.display()} has numbers as labels, but also {odd!r}: make them alike")
        return numbered_classes(present)

    def covers(self, target: str) -> bool:
        """Whether `target` lies in a folder of shards."""
        return any(self.files.covers(target, folder) for folder in {os.path.dirname(path) for _, path in self.shards})

    def _where(self, path: bytes, sample: _Sample) -> str:
        return f"{self.files.display(path)}: sample {sample.key.decode('utf-8', 'backslashreplace')}"

    def _image(self, path: bytes, sample: _Sample) -> Location:
        images = [extension for extension in sample.parts if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
        if len(images) != 1:
            raise AlexprepError(
                f"{self._where(path, sample)} has {len(images)} images among {', '.join(sample.parts)}, expected one"
            )
        return sample.parts[images[0]]

    def _class(self, path: bytes, sample: _Sample, read: Callable[[int, int], bytes]) -> str:
        extension = next((extension for extension in LABEL_EXTENSIONS if extension in sample.parts), None)
        if extension is None:
            raise AlexprepError(
                f"{self._where(path, sample)} has no label among {', '.join(sample.parts)}: expected one of "
                f"{', '.join(LABEL_EXTENSIONS)}"
            )
        _, _, offset, size = sample.parts[extension]
        if size > _MAX_LABEL_BYTES:
            raise AlexprepError(
                f"{self._where(path, sample)} has a label of {size:,} bytes: the limit is {_MAX_LABEL_BYTES:,}"
            )
        try:
            text = read(offset, size).decode("utf-8").strip()
            if extension == "json":
                document = json.loads(text)
                label = next(document[key] for key in _JSON_LABELS if key in document)
                if isinstance(label, list | dict):
                    raise AlexprepError(f"{self._where(path, sample)} has several labels: one is needed")
                text = str(label)
        except (ValueError, TypeError, StopIteration):
            raise AlexprepError(
                f"{self._where(path, sample)} has no label in its .{extension}: expected a number or a name"
                + (f" under {' or '.join(_JSON_LABELS)}" if extension == "json" else "")
            ) from None
        if text.lstrip("-").isdecimal():
            if not 0 <= int(text) < 2**20:
                raise AlexprepError(
                    f"{self._where(path, sample)} has the label {text}, not between 0 and {2**20 - 1:,}"
                )
            text = str(int(text))
        if not text:
            raise AlexprepError(f"{self._where(path, sample)} has an empty label")
        return self.names[int(text)] if text.isdecimal() and int(text) < len(self.names) else text


def samples_of(files: Files, path: bytes) -> Iterator[_Sample]:
    """The samples of one shard: neighbouring members whose names agree up to the first dot of the file name.

    Raises:
        AlexprepError: the archive is damaged; a key comes back after others, or has two parts of one name.
    """
    seen: set[bytes] = set()
    for key, group in itertools.groupby(packed_files(files, path), key=lambda packed: _split_name(packed.name)[0]):
        where = f"{files.display(path)}: sample {key.decode('utf-8', 'backslashreplace')}"
        if key in seen:
            raise AlexprepError(f"{where} is scattered: its parts must be neighbours, or readers see two samples")
        seen.add(key)
        parts: dict[str, Location] = {}
        for name, location in group:
            extension = _split_name(name)[1]
            if extension in parts:
                raise AlexprepError(f"{where} has two .{extension}: remove one")
            parts[extension] = location
        yield _Sample(key, parts)


def _split_name(name: bytes) -> tuple[bytes, str]:
    """webdataset's rule: the extension begins at the first dot of the file name, whatever folders come before."""
    folder, slash, file = name.rpartition(b"/")
    first, _, rest = file.partition(b".")
    return folder + slash + first, rest.decode("utf-8", "backslashreplace").lower()


def _shards_below(files: Files) -> Iterator[tuple[str, bytes]]:
    entries = files.entries()
    for entry in entries:
        if not entry.is_folder and entry.name.endswith(b".tar"):
            yield split_of(entry.name) or "train", entry.name
    for entry in entries:
        if entry.is_folder and (split := split_of(entry.name)):
            for below in files.entries(entry.name):
                if not below.is_folder and below.name.endswith(b".tar"):
                    yield split, os.path.join(entry.name, below.name)


def _is_webdataset(files: Files, path: bytes) -> bool:
    """Whether the first members form a sample."""
    parts: dict[bytes, set[str]] = {}
    try:
        for packed in itertools.islice(packed_files(files, path), _LOOK):
            key, extension = _split_name(packed.name)
            parts.setdefault(key, set()).add(extension)
    except AlexprepError:
        if not parts:  # a damaged first header: whatever reads it will say so
            return False
    return any(found & set(LABEL_EXTENSIONS) and len(found) > 1 for found in parts.values())


def braces(pattern: bytes) -> list[bytes]:
    """Expands {000..003} and {a,b}, as shells do.

    >>> braces(b"train-{08..10}.tar")
    [b'train-08.tar', b'train-09.tar', b'train-10.tar']
    """
    match = re.search(rb"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(rb"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        values = [b"%0*d" % (len(first), n) for n in range(int(first), min(int(last), int(first) + 10**6) + 1)]
    else:
        values = match[1].split(b",")
    return [one for value in values for one in braces(pattern[: match.start()] + value + pattern[match.end() :])]
