"""What a source is: a list of inputs in a fixed order, each of which can be read on its own.

A new source is a new module beside this one, with a subclass of `Source` and a line in `LAYOUTS`. It needs three things:

1. `at`: recognises its own form by evidence that fits nothing else, and returns the source, or None;
2. `inputs`: lists every image once, in an order that any two listings share;
3. `read`: gives one of them, as encoded bytes or as pixels; by default the bytes at the input's location.

`classes`, `covers` and `resident_bytes` are overridden where the defaults do not hold. Turning images into shards is no matter
of a source: see `conversion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.ground_truth import find_meta_mat
from alexprep.shards.storage import Files, as_text

# What people call their splits, and what they are called in a data set.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
# The class name of images whose class nobody tells (the test images of ILSVRC 2012); their label is -1.
UNLABELLED = ""


class Location(NamedTuple):
    """Where a source finds one input.

    Attributes:
        path: the file, below the source's root.
        member: its name inside that file; empty where the input is the whole file.
        offset: of the input's first byte in the file (after decompression, where it is gzipped).
        size: its bytes; -1 for all to the end.
    """

    path: bytes
    member: bytes = b""
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        """For ledgers and messages; bytes that are not UTF-8 are written as escapes."""
        return as_text(b"/".join(part for part in (self.path, self.member) if part))


class Input(NamedTuple):
    """One image to be converted: the split and class it belongs to, and where its source finds it."""

    split: str
    class_name: str
    location: Location


@dataclass(frozen=True)
class Source:
    """A place that images come from; one subclass a layout. It is sent to worker processes, so it holds no open file.

    Attributes:
        files: where its files lie.
        layout: the name for `--layout`, recorded in the plan.
        expects: what this layout looks like, for messages.
    """

    files: Files
    layout: ClassVar[str]
    expects: ClassVar[str]

    @classmethod
    def at(cls, files: Files, name: bytes) -> Source | None:
        """The source of this layout in the root of `files`, or that the file `name` there is or stands for; None for none.

        What is of this layout, and damaged, incomplete, or to be understood in two ways, is an AlexprepError.
        """
        raise NotImplementedError

    def inputs(self) -> Iterator[Input]:
        """Every input once, in an order that any two listings share: by split, class, and then name, as bytes.

        Where the source is damaged, or its labels make no sense, an AlexprepError names the place.
        """
        raise NotImplementedError

    def read(self, location: Location) -> bytes | NDArray[np.uint8]:
        """One input: its encoded bytes, or its pixels, uint8 (H, W, 3) RGB or (H, W) grey; OSError where it cannot be had."""
        return self.files.read(location.path, location.offset, location.size)

    def classes(self, present: set[str]) -> list[str]:
        """The class names by label, by this source's own numbering; those `present` sorted as bytes where it has none."""
        return sorted(present, key=str.encode)

    def covers(self, target: str) -> bool:
        """Whether files written below `target`, a path or URL, would become inputs."""
        return False

    def resident_bytes(self) -> int:
        """Memory that reading keeps in each worker."""
        return 0

    def year(self) -> str:
        """Of ILSVRC's images, as "2012", whose devkit is meant; empty where nothing tells it."""
        return ""

    def devkit(self) -> tuple[str, bytes] | None:
        """The name and content of a devkit's meta.mat, where there is one beside the images."""
        return find_meta_mat(self.files, self.year())


def numbered_classes(present: set[str]) -> list[str]:
    """The names "0" to the highest of `present`, all of which are numbers, in numeric order."""
    return [str(label) for label in range(1 + max(map(int, present), default=-1))]


def class_name_of(folder: bytes, known: dict[str, bytes], place: str) -> str:
    """The name of a class folder as text, added to those that are `known`; bytes that are not UTF-8 are written as escapes.

    Another folder that has that name already, written out as such escapes, is an AlexprepError.
    """
    name = as_text(folder)
    if known.setdefault(name, folder) != folder:
        raise AlexprepError(
            f"{place} holds the folders {known[name]!r} and {folder!r}, both the class {name}: rename one"
        )
    return name


def split_folders(folders: Iterable[bytes], place: str) -> dict[str, bytes]:
    """The folder of each split, where there are any; what else lies beside them in `place` is then none of the data."""
    found: dict[str, bytes] = {}
    for folder in sorted(folders):
        split = SPLITS.get(folder.decode("utf-8", "replace").lower())
        if split is None:
            continue
        if split in found:
            both = f"{found[split].decode()} and {folder.decode()}"
            raise AlexprepError(f"SOURCE {place} holds {both}, which both mean {split!r}: move one of them away")
        found[split] = folder
    return found


def split_of(name: bytes) -> str | None:
    """The split that a folder or file named so stands for, by the one word of its name that means a split.

    >>> split_of(b"validation"), split_of(b"imagenet-train-000012.tar"), split_of(b"pictures")
    ('val', 'train', None)
    """
    words = re.split(r"[^a-z]+", name.decode("utf-8", "replace").lower())
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 else None
