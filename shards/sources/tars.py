"""Files inside tars, read in place; and tars of class folders as a source.

That is one tar with [train|val|test/]CLASS/**/FILE, or a folder with train.tar, val.tar and so on. Archives are listed by one scan
of their headers, and nothing is unpacked. What a header means is told in `tar_format`; tars of samples are in `wds`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError, AmbiguousSourceError, counted
from alexprep.shards.sources.base import HIDDEN, NO_CHOICES, SPLITS, Account, Choices, Input, Location, Source, split_of
from alexprep.shards.sources.folder_reading import Reading, flat_question, read_folders, shares_few
from alexprep.shards.sources.foreign_formats import image_folder
from alexprep.shards.sources.picture_names import is_picture
from alexprep.shards.sources.published import check_unlisted
from alexprep.shards.sources.split_folders import inputs_of, metadata_of
from alexprep.shards.sources.tree import pass_over_rest, read_tree, tree_of
from alexprep.shards.storage import Files, as_text
from alexprep.shards.tar_format import members

NO_FILE = -1  # as an offset: a link or a device, which has no bytes in the archive


def plain_name(name: bytes) -> bytes:
    """A member's name without what leads elsewhere; empty for a hidden one.

    >>> plain_name(b"./train//../a/1.jpg"), plain_name(b"train/.DS_Store"), plain_name(b"./")
    (b'train/a/1.jpg', b'', b'')
    """
    clean = clean_name(name)
    return b"" if is_hidden(clean) else clean


def clean_name(name: bytes) -> bytes:
    """A member's name without what leads elsewhere: where it would lead to if it were unpacked, "../x" and "/x", does not matter here.

    >>> clean_name(b"./train//../a/1.jpg"), clean_name(b"./")
    (b'train/a/1.jpg', b'')
    """
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b".", b".."))


def is_hidden(clean: bytes) -> bool:
    """Whether a member's name without empty parts, or one of the folders in it, begins with a dot."""
    return clean.startswith(b".") or b"/." in clean


def packed_files(
    files: Files, path: bytes, within: Location | None = None, *, hidden: bool = False
) -> Iterator[Location]:
    """Every member that is no folder, in the archive's order; those with a hidden name only where `hidden` says so.

    Where an archive in that archive is meant (`within`), its name there goes before the names of its members.
    """
    start, size = (0, files.size(path)) if within is None else (within.offset, within.size)
    prefix = b"" if within is None else within.member + b"/"
    name = files.display(path) + (f"/{as_text(within.member)}" if within else "")
    with files.reading(path) as read:
        for member in members(read, size, name, start):
            clean = clean_name(member.name)
            if member.kind == "folder" or not clean or (not hidden and is_hidden(clean)):
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

    def packed(self, path: bytes, account: Account, within: Location | None = None) -> Iterator[Location]:
        """As `packed_files`, each counted as found; hidden ones are passed over."""
        for location in self.each_once(path, within):
            account.found += 1
            if is_hidden(location.member.removeprefix(within.member if within else b"").lstrip(b"/")):
                account.pass_over(HIDDEN, f"{self.files.display(path)}/{as_text(location.member)}")
            else:
                yield location

    def each_once(self, path: bytes, within: Location | None = None) -> Iterator[Location]:
        """As `packed_files`, with hidden ones. Of two files with one name, programs that unpack keep the last, others read both: none is taken.

        That is an AlexprepError, also where one is written ./a and the other a.
        """
        seen: set[bytes] = set()
        for location in packed_files(self.files, path, within, hidden=True):
            if location.member in seen:
                raise AlexprepError(
                    f"{self.files.display(path)} holds {as_text(location.member)} twice, which programs read "
                    "differently: pack the archive anew, with each file once"
                )
            seen.add(location.member)
            yield location


@dataclass(frozen=True)
class PackedClassFolders(ArchiveSource):
    """Class folders as they are, packed.

    Attributes:
        archives: (the split that the file's name stands for, or None; the file).
    """

    archives: tuple[tuple[str | None, bytes], ...] = ()

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, class and name, as from class folders."""
        found: list[Input] = []
        known: dict[str, bytes] = {}
        for named, path in self.archives:
            found += self._in_classes(named or "train", path, known, account)
        if not found:
            raise AlexprepError(
                f"{self.files.display(self.archives[0][1])} holds no images: expected {self.expects}; pack it anew, or "
                "download it again"
            )
        if len(self.archives) > 1:
            unnamed_all = all(named is None for named, _ in self.archives)
            if any(named is None for named, _ in self.archives) and not (self.choices.unlabelled and unnamed_all):
                unnamed = next(path for named, path in self.archives if named is None)
                raise AlexprepError(
                    f"{self.files.display(unnamed)} names no split, and there are {len(self.archives)} archives: name one as "
                    f"SOURCE, or name them train.{self.layout}, val.{self.layout} and test.{self.layout}"
                )
            if self.choices == NO_CHOICES:
                self._check_shared(found)
            found.sort(key=lambda item: (item.split, item.class_name.encode(), item.location.member, item.location))
        yield from found
        if self.whole:
            pass_over_rest(self.files, {path for _, path in self.archives}, account)

    def _check_shared(self, found: list[Input]) -> None:
        """Asks where the tar of train and another share few class names, as folders do."""
        classes: dict[str, set[str]] = {}
        for split, class_name, *_ in found:
            classes.setdefault(split, set()).add(class_name)
        train = classes.get("train", set())
        for split, names in classes.items():
            if shares_few(train, names):
                raise AmbiguousSourceError(
                    f"SOURCE {self.files.display()}: only {len(names & train):,} of the {counted(len(names), 'class name')} of {split} are "
                    f"among those of train ({min(names - train)!r} is not).",
                    [
                        (
                            "--class-depth 1",
                            "this is so: the classes of all tars are numbered together; or name one tar as SOURCE",
                        )
                    ],
                )

    def covers(self, target: str) -> bool:
        """Whether a data set in `target` would hide the archives: in the root, or deeper than the folders that are passed over."""
        below = self.files.below(target) if self.whole else None
        if below is None or len(below) == 1:
            return False
        return len(below) != 2 or below[1].decode("utf-8", "replace") not in SPLITS.values()

    def _in_classes(self, named: str, path: bytes, known: dict[str, bytes], account: Account) -> Iterator[Input]:
        """The inputs in one archive, by the rules of `ClassFolders`; `named` is the split where no folder tells one."""
        shown = self.files.display(path)
        where = {location.member: location for location in self.each_once(path)}
        tree = tree_of(where, shown)
        if self.choices == NO_CHOICES:
            check_unlisted(tree.root, shown)
            flat = not any(folder.count for folder in tree.root.folders)
            if flat and named != "test" and any(map(is_picture, tree.root.pictures)) and not image_folder(tree.root):
                raise flat_question(tree.root, shown)
        if not tree.root.count:
            reading = Reading([])
        else:
            reading = read_folders(tree.root, shown, lambda *_: None, self.choices, named)
        account.warnings += reading.warnings
        for split, class_name, member, beside in inputs_of(reading.splits, tree, account, shown, known):
            image = where[member]
            yield Input(split, class_name, image, metadata_of(beside, image, where.__getitem__) if beside else b"")


@dataclass(frozen=True)
class TarOfClassFolders(PackedClassFolders):
    """Class folders in tars, which are not compressed."""

    layout = "tar"
    expects = "a tar of CLASS/IMAGE or train/CLASS/IMAGE, or a folder with train.tar and val.tar"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the tar that is named, or those in the root."""
        endings = (b".tar", b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz")
        archives = archives_at(files, name, endings)
        return cls(files, archives, choices=choices, whole=not name) if archives else None


def archives_at(files: Files, name: bytes, endings: tuple[bytes, ...]) -> tuple[tuple[str | None, bytes], ...]:
    """The archive that is named, or those in the root if there are no pictures in folders beside them, each with its split."""
    names = [name] if name else [file for file in files.file_names() if b"devkit" not in file]
    archives = tuple((split_of(file), file) for file in names if file.lower().endswith(endings))
    if archives and not name and any(folder.count for folder in read_tree(files).root.folders):
        return ()
    return archives
