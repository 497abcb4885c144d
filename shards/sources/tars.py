"""Tars of class folders: one tar with [train|val|test/]CLASS/**/FILE, or a folder with train.tar, val.tar and so on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from alexprep.shards.dataset_format import PLAN
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.archive import ArchiveSource, Packed, each_once, packed_files
from alexprep.shards.sources.base import SPLITS, Input, class_name_of, split_folders, split_of
from alexprep.shards.sources.files import Files

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
