"""Files inside tars, read in place; and tars of class folders as a source.

That is one tar with [train|val|test/]CLASS/**/FILE, or a folder with train.tar, val.tar and so on. Archives are listed by one scan
of their headers, and nothing is unpacked. What a header means is told in `tar_format`; tars of samples are in `wds`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import PLAN
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import (
    NO_CHOICES,
    SPLITS,
    Account,
    Choices,
    Input,
    Location,
    Source,
    class_name_of,
    split_folders,
    split_of,
)
from alexprep.shards.storage import Files, as_text
from alexprep.shards.tar_format import members

# What lies beside the folders of many published sets, and is surely no image.
_is_paper = re.compile(
    rb"(readme|licen[cs]e|copying|.*\.(txt|md|csv|tsv|json|xml|html?|pdf|ya?ml))", re.IGNORECASE
).fullmatch
NO_FILE = -1  # as an offset: a link or a device, which has no bytes in the archive
_Names = tuple[bytes, ...]  # that lead to a file or folder


def plain_name(name: bytes) -> bytes:
    """A member's name without what leads elsewhere; empty for a hidden one.

    Where it would lead to if it were unpacked does not matter here: "../x" and "/x" are x.

    >>> plain_name(b"./train//../a/1.jpg"), plain_name(b"train/.DS_Store"), plain_name(b"./")
    (b'train/a/1.jpg', b'', b'')
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")]
    return b"" if any(part.startswith(b".") for part in parts) else b"/".join(parts)


def packed_files(files: Files, path: bytes, within: Location | None = None) -> Iterator[Location]:
    """Every member that is no folder and has no hidden name, in the archive's order.

    Where an archive in that archive is meant (`within`), its name there goes before the names of its members.
    """
    start, size = (0, files.size(path)) if within is None else (within.offset, within.size)
    prefix = b"" if within is None else within.member + b"/"
    name = files.display(path) + (f"/{as_text(within.member)}" if within else "")
    with files.reading(path) as read:
        for member in members(read, size, name, start):
            clean = plain_name(member.name)
            if member.kind == "folder" or not clean:
                continue
            offset, length = (member.offset, member.size) if member.kind == "file" else (NO_FILE, 0)
            yield Location(path, prefix + clean, offset, length)


class ArchiveSource(Source):
    """A source whose inputs may lie in archives."""

    def read(self, location: Location) -> bytes | NDArray[np.uint8]:
        """The bytes of a member; OSError where it has none, or the archive has become shorter."""
        if location.offset == NO_FILE:
            raise OSError("a link or special file in an archive")
        data = self.files.read(location.path, location.offset, location.size)
        if 0 <= location.size != len(data):
            raise OSError("the archive is shorter than it was when it was listed")
        return data

    def packed(self, path: bytes, within: Location | None = None) -> Iterator[Location]:
        """As `packed_files`. Of two files with one name, programs that unpack keep the last, others read both: none is taken.

        That is an AlexprepError, also where one is written ./a and the other a.
        """
        seen: set[bytes] = set()
        for location in packed_files(self.files, path, within):
            if location.member in seen:
                raise AlexprepError(
                    f"{self.files.display(path)} holds {as_text(location.member)} twice, which programs read "
                    "differently: pack the archive anew, with each file once"
                )
            seen.add(location.member)
            yield location


@dataclass(frozen=True)
class TarOfClassFolders(ArchiveSource):
    """Class folders as they are, packed.

    Attributes:
        archives: (the split that the file's name stands for, or None; the file).
        listed: whether they are all that the root holds, rather than one that was named.
    """

    archives: tuple[tuple[str | None, bytes], ...] = ()
    listed: bool = False
    layout = "tar"
    expects = "a tar of CLASS/IMAGE or train/CLASS/IMAGE, or a folder with train.tar and val.tar"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the tar that is named, or those in the root."""
        # A folder is what an earlier run made of the tars, or there are class folders, with some tars beside them.
        if not name and not all(PLAN.encode() in files.file_names(folder) for folder in files.folder_names()):
            return None
        names = [name] if name else [file for file in files.file_names() if b"devkit" not in file]
        tars = [file for file in names if file.endswith((b".tar", b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz"))]
        return cls(files, tuple((split_of(tar), tar) for tar in tars), not name) if tars else None

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, class and name, as from class folders."""
        found: list[tuple[str, bytes, Location]] = []
        for named, path in self.archives:
            found += self._in_classes(named or "train", path)
        if not found:
            raise AlexprepError(
                f"{self.files.display(self.archives[0][1])} holds no images: expected {self.expects}; pack it anew, or "
                "download it again"
            )
        if len(self.archives) > 1 and any(named is None for named, _ in self.archives):
            unnamed = next(path for named, path in self.archives if named is None)
            raise AlexprepError(
                f"{self.files.display(unnamed)} names no split, and there are {len(self.archives)} tars: name one tar as "
                "SOURCE, or name them train.tar, val.tar and test.tar"
            )
        found.sort(key=lambda item: (item[0], item[1], item[2].member, item[2]))
        known: dict[str, bytes] = {}
        shown = self.files.display()
        for split, folder, location in found:
            yield Input(split, class_name_of(folder, known, shown), location)

    def covers(self, target: str) -> bool:
        """Whether a data set in `target` would hide the tars: in the root, or deeper than the folders that are passed over."""
        below = self.files.below(target) if self.listed else None
        if below is None or len(below) == 1:
            return False
        return len(below) != 2 or below[1].decode("utf-8", "replace") not in SPLITS.values()

    def _in_classes(self, named: str, path: bytes) -> Iterator[tuple[str, bytes, Location]]:
        """(split, class, place) of each file, by the rules of `ClassFolders`; `named` where no folder tells the split."""
        packed = list(self.packed(path))
        parts = [tuple(location.member.split(b"/")) for location in packed]
        shown = self.files.display(path)
        folders_with_files = {part[:-1] for part in parts}
        skip = _wrapping(folders_with_files, parts, shown)
        folders = split_folders({names[skip] for names in folders_with_files if len(names) > skip}, shown)
        for folder in folders.values():
            if not any(names[skip] == folder for names in folders_with_files if len(names) > skip + 1):
                raise AlexprepError(
                    f"{shown} holds {folder.decode()}/, which means a split, without class folders in it: pack the images as "
                    f"{folder.decode()}/CLASS/IMAGE; where it is a class, pack all classes into one folder train/ or val/"
                )
        splits = {folder: split for split, folder in folders.items()}
        depth = skip + bool(splits)
        for part, location in zip(parts, packed, strict=True):
            if splits and (len(part) < skip + 2 or part[skip] not in splits):
                continue  # beside the splits' folders
            if len(part) > depth + 1:
                yield splits.get(part[skip], named), part[depth], location
            elif not _is_paper(part[-1]):
                raise AlexprepError(
                    f"{shown}/{as_text(location.member)} lies in no class folder: expected {self.expects}"
                )


def _wrapping(folders_with_files: set[_Names], files: list[_Names], shown: str) -> int:
    """How many folders wrap the class folders or the splits, and tell nothing: a tar is often made of one, as CIFAR/train/….

    A split's folder does tell something, also where the tar holds no other split.
    """
    skip = 0
    while True:
        inside = [names for names in folders_with_files if len(names) > skip]
        below = {names[skip + 1] for names in inside if len(names) > skip + 1}
        if not below or len({names[skip] for names in inside}) != 1:
            return skip
        splits = split_folders(below, shown)
        if split_folders([inside[0][skip]], shown):
            wraps = len(splits) == len(below) and all(len(names) > skip + 2 for names in inside)
        else:
            wraps = bool(splits) or all(len(file) != skip + 2 or _is_paper(file[-1]) for file in files)
        if not wraps:
            return skip
        skip += 1
