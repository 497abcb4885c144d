"""Tars of class folders: one tar with [train|val|test/]CLASS/**/FILE, or a folder with train.tar, val.tar and so on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from alexprep.shards.errors import AlexprepError
from alexprep.shards.layout import PLAN
from alexprep.shards.sources.archive import ArchiveSource, Packed, packed_files
from alexprep.shards.sources.base import SPLITS, Input, split_of
from alexprep.shards.sources.files import Files


@dataclass(frozen=True)
class TarOfClassFolders(ArchiveSource):
    """Class folders as they are, packed.

    Attributes:
        archives: (the split that the file's name stands for, or None; the file).
    """

    archives: tuple[tuple[str | None, bytes], ...] = ()
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
        return cls(files, tuple((split_of(tar), tar) for tar in tars)) if tars else None

    def inputs(self) -> Iterator[Input]:
        """By split, class and name, as from class folders.

        Raises:
            AlexprepError: an archive is damaged, or a file lies in no class folder.
        """
        found: list[tuple[str, bytes, Packed]] = []
        for named, path in self.archives:
            packed = list(packed_files(self.files, path))
            parts = [tuple(file.name.split(b"/")) for file in packed]
            skip = _common_folders(parts)
            split_names = {part[skip] for part in parts if len(part) > skip + 2}
            with_splits = _are_splits(split_names)
            for part, file in zip(parts, packed, strict=True):
                depth = skip + with_splits
                if len(part) < depth + 2:
                    where = f"{self.files.display(path)}/{file.name.decode('utf-8', 'backslashreplace')}"
                    raise AlexprepError(f"{where} lies in no class folder: expected {self.expects}")
                split = SPLITS[part[skip].decode().lower()] if with_splits else named or "train"
                found.append((split, part[depth], file))
        if len(self.archives) > 1 and any(named is None for named, _ in self.archives):
            unnamed = next(path for named, path in self.archives if named is None)
            raise AlexprepError(
                f"{self.files.display(unnamed)} names no split, and there are {len(self.archives)} tars: name one tar as "
                "SOURCE, or name them train.tar, val.tar and test.tar"
            )
        found.sort(key=lambda item: (item[0], item[1], item[2]))
        for split, class_name, file in found:
            yield Input(split, class_name.decode("utf-8", "backslashreplace"), file.location)


def _is_data_set(files: Files, folder: bytes) -> bool:
    """Whether a folder is what an earlier run made of these tars, where it lies among them."""
    return any(entry.name == PLAN.encode() for entry in files.entries(folder))


def _common_folders(parts: list[tuple[bytes, ...]]) -> int:
    """How many folders all names begin with, which tell nothing: a tar is often made of one folder, as CIFAR/train/….

    A split's folder does tell something, also where the tar holds no other split.
    """
    skip = 0
    while parts and all(len(part) > skip + 2 for part in parts) and len({part[skip] for part in parts}) == 1:
        below = {part[skip + 1] if len(part) > skip + 3 else b"" for part in parts}
        if _are_splits({parts[0][skip]}) and not _are_splits(below):
            break
        skip += 1
    return skip


def _are_splits(names: set[bytes]) -> bool:
    """Whether there are names, and each stands for a split."""
    return bool(names) and {name.decode("utf-8", "replace").lower() for name in names} <= SPLITS.keys()
