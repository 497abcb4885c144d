"""Tars of class folders: one tar with [train|val|test/]CLASS/**/FILE, or a folder with train.tar, val.tar and so on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import PLAN
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import SPLITS, Input, Location, Source, class_name_of, split_folders, split_of
from alexprep.shards.storage import Files
from alexprep.shards.tar_format import members

# -------------------- The files inside tars, listed by one scan of the headers and then read in place; nothing is unpacked.


_NO_FILE = -1  # as an offset: a link or a device, which has no bytes in the archive


class Packed(NamedTuple):
    """A file in an archive: its name there, and where its bytes are."""

    name: bytes
    location: Location


class ArchiveSource(Source):
    """A source whose inputs may lie in archives."""

    def read(self, location: Location) -> bytes | NDArray[np.uint8]:
        """See `Source`."""
        return read_packed(self.files, location)


def read_packed(files: Files, location: Location) -> bytes:
    """The bytes of a member; OSError where it has none, or the archive has become shorter."""
    if location.offset == _NO_FILE:
        raise OSError("a link or special file in an archive")
    data = files.read(location.path, location.offset, location.size)
    if 0 <= location.size != len(data):
        raise OSError("the archive is shorter than it was when it was listed")
    return data


def shown_name(name: bytes) -> bytes:
    """A member's name without what leads elsewhere; empty for a hidden one.

    Where it would lead to if it were unpacked does not matter here: "../x" and "/x" are x.

    >>> shown_name(b"./train//../a/1.jpg"), shown_name(b"train/.DS_Store"), shown_name(b"./")
    (b'train/a/1.jpg', b'', b'')
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")]
    return b"" if any(part.startswith(b".") for part in parts) else b"/".join(parts)


def packed_files(files: Files, path: bytes, within: Location | None = None, prefix: bytes = b"") -> Iterator[Packed]:
    """Every member that is no folder and has no hidden name, in the archive's order.

    Args:
        files: where the archive lies.
        path: the archive.
        within: the part of the file that is the archive, where it lies in another one.
        prefix: put before the names in the locations.

    Raises:
        AlexprepError: the archive is damaged; the place is named.
    """
    start, size = (0, files.size(path)) if within is None else (within.offset, within.size)
    name = files.display(path) + (f"/{within.member.decode('utf-8', 'backslashreplace')}" if within else "")
    with files.reading(path) as read:
        for member in members(read, size, name, start):
            clean = shown_name(member.name)
            if member.kind == "folder" or not clean:
                continue
            offset, length = (member.offset, member.size) if member.kind == "file" else (_NO_FILE, 0)
            yield Packed(clean, Location(path, prefix + clean, offset, length))


def each_once(files: Files, packed: Iterable[Packed]) -> Iterator[Packed]:
    """The same members. Of two with one name, programs that unpack keep the last and others read both: so none is taken.

    Raises:
        AlexprepError: a name occurs twice, also where one is written ./a and the other a; archive and member are named.
    """
    seen: set[bytes] = set()
    for file in packed:
        if file.name in seen:
            where = (
                f"{files.display(file.location.path)} holds {file.location.member.decode('utf-8', 'backslashreplace')}"
            )
            raise AlexprepError(
                f"{where} twice, which programs read differently: pack the archive anew, with each file once"
            )
        seen.add(file.name)
        yield file


# -------------------- Tars of class folders: one tar with [train|val|test/]CLASS/**/FILE, or a folder with train.tar, val.tar and so on.


# What lies beside the folders of many published sets, and is surely no image.
_is_paper = re.compile(
    rb"(readme|licen[cs]e|copying|.*\.(txt|md|csv|tsv|json|xml|html?|pdf|ya?ml))", re.IGNORECASE
).fullmatch

_Chain = tuple[bytes, ...]  # the names that lead to a file or folder


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
    def at(cls, files: Files, name: bytes) -> TarOfClassFolders | None:
        """The tar that is named, or those in the root."""
        entries = [] if name else files.entries()
        folders = [entry.name for entry in entries if entry.is_folder]
        if not all(_is_data_set(files, folder) for folder in folders):  # class folders, with some tars beside them
            return None
        beside = [entry.name for entry in entries if not entry.is_folder and b"devkit" not in entry.name]
        names = [name] if name else beside
        tars = [file for file in names if file.endswith((b".tar", b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz"))]
        return cls(files, tuple((split_of(tar), tar) for tar in tars), not name) if tars else None

    def inputs(self) -> Iterator[Input]:
        """By split, class and name, as from class folders.

        Raises:
            AlexprepError: an archive is damaged, holds a file twice, or one in no class folder.
        """
        found: list[tuple[str, bytes, Packed]] = []
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
        found.sort(key=lambda item: (item[0], item[1], item[2]))
        known: dict[str, bytes] = {}
        shown = self.files.display()
        for split, folder, file in found:
            yield Input(split, class_name_of(folder, known, shown), file.location)

    def covers(self, target: str) -> bool:
        """Whether a data set in `target` would hide the tars: in the root, or deeper than the folders that are passed over."""
        below = self.files.below(target) if self.listed else None
        split_s_own = below is not None and len(below) == 2 and below[1].decode("utf-8", "replace") in SPLITS.values()
        return below is not None and len(below) != 1 and not split_s_own

    def _in_classes(self, named: str, path: bytes) -> Iterator[tuple[str, bytes, Packed]]:
        """(split, class, file) of each file, by the rules of `ClassFolders`; `named` where no folder tells the split."""
        packed = list(each_once(self.files, packed_files(self.files, path)))
        parts = [tuple(file.name.split(b"/")) for file in packed]
        shown = self.files.display(path)
        holding = {part[:-1] for part in parts}
        skip = _wrapping(holding, parts, shown)
        folders = split_folders({chain[skip] for chain in holding if len(chain) > skip}, shown)
        for folder in folders.values():
            if not any(chain[skip] == folder for chain in holding if len(chain) > skip + 1):
                raise AlexprepError(
                    f"{shown} holds {folder.decode()}/, which means a split, without class folders in it: pack the images as "
                    f"{folder.decode()}/CLASS/IMAGE; where it is a class, pack all classes into one folder train/ or val/"
                )
        splits = {folder: split for split, folder in folders.items()}
        depth = skip + bool(splits)
        for part, file in zip(parts, packed, strict=True):
            if splits and (len(part) < skip + 2 or part[skip] not in splits):
                continue  # beside the splits' folders
            if len(part) > depth + 1:
                yield splits.get(part[skip], named), part[depth], file
            elif not _is_paper(part[-1]):
                where = f"{shown}/{file.name.decode('utf-8', 'backslashreplace')}"
                raise AlexprepError(f"{where} lies in no class folder: expected {self.expects}")


def _is_data_set(files: Files, folder: bytes) -> bool:
    """Whether a folder is what an earlier run made of these tars, where it lies among them."""
    return any(entry.name == PLAN.encode() for entry in files.entries(folder))


def _wrapping(holding: set[_Chain], files: list[_Chain], shown: str) -> int:
    """How many folders wrap the class folders or the splits, and tell nothing: a tar is often made of one, as CIFAR/train/….

    A split's folder does tell something, also where the tar holds no other split.

    Args:
        holding: the folders that hold files, each as the names that lead to it.
        files: the files, likewise.
        shown: the tar, for messages.
    """
    skip = 0
    while True:
        inside = [chain for chain in holding if len(chain) > skip]
        below = {chain[skip + 1] for chain in inside if len(chain) > skip + 1}
        if not below or len({chain[skip] for chain in inside}) != 1:
            return skip
        splits = split_folders(below, shown)
        if split_folders([inside[0][skip]], shown):
            wraps = len(splits) == len(below) and all(len(chain) > skip + 2 for chain in inside)
        else:
            wraps = bool(splits) or all(len(file) != skip + 2 or _is_paper(file[-1]) for file in files)
        if not wraps:
            return skip
        skip += 1
