"""ILSVRC 2010 and 2012 as downloaded: train is a tar with one tar a synset, val and test are flat tars. And ImageNet-21k's tars.

As Kaggle packs it, see `folders`; how the devkit tells the classes of val, see `ground_truth`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import NO_CHOICES, UNLABELLED, Account, Choices, Input, Source, class_name_of
from alexprep.shards.sources.folder_names import is_wordnet_id
from alexprep.shards.sources.ground_truth import find_ground_truth, year_of
from alexprep.shards.sources.published_lists import may_hold
from alexprep.shards.sources.tars import ArchiveSource
from alexprep.shards.sources.tree import pass_over_rest
from alexprep.shards.storage import Files, as_text

_NAME = re.compile(rb"ILSVRC(20\d\d)_(?:img|images)_(train|val|test)(?:_v\d+)?\.tar")
_SYNSET_TAR = re.compile(rb"n\d{8}\.tar").fullmatch
# The MD5s that the organisers publish for 2012 (as torchvision's ImageNet class and many scripts quote them).
PUBLISHED_MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
    "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
}


@dataclass(frozen=True)
class IlsvrcArchives(ArchiveSource):
    """The original archives, read in place.

    Attributes:
        archives: (split, file) in ascending order of the split.
    """

    archives: tuple[tuple[str, bytes], ...] = ()
    layout = "ilsvrc"
    expects = "a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or one of the tars"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the archives in the root, or the one that is named. Refused: two for one split."""
        found: dict[str, bytes] = {}
        for file in [name] if name else files.file_names():
            match = _NAME.fullmatch(file)
            if match is None:
                continue
            split = match[2].decode()
            if split in found:
                raise AlexprepError(
                    f"{files.display()} holds {found[split].decode()} and {file.decode()}, both for {split!r}: "
                    "name one of them as SOURCE, or move one away"
                )
            found[split] = file
        return cls(files, tuple(sorted(found.items())), whole=not name) if found else None

    def inputs(self, account: Account) -> Iterator[Input]:
        """As from class folders: by split, class and name. Test images have classes only where a ground truth tells them."""
        origins: list[str] = []
        for split, path in self.archives:
            yield from self._train(path, account) if split == "train" else self._flat(split, path, account, origins)
        if self.whole:
            names = self.files.file_names() if origins else []
            read = {name for name in names if any(origin.startswith(self.files.display(name)) for origin in origins)}
            pass_over_rest(self.files, {path for _, path in self.archives}, account, lists=read)

    def year(self) -> str:
        """As the archives' names tell it."""
        return year_of(path for _, path in self.archives)

    def _train(self, path: bytes, account: Account) -> Iterator[Input]:
        known: dict[str, bytes] = {}
        for file, synset in sorted((os.path.basename(synset.member), synset) for synset in self.packed(path, account)):
            account.found -= 1  # it counts by its members
            class_folder, _, end = file.rpartition(b".")
            if end != b"tar" or synset.offset < 0:
                raise AlexprepError(
                    f"{self.files.display(path)} holds {as_text(synset.member)}, expected one "
                    "SYNSET.tar a class: for a tar of class folders use --layout tar"
                )
            class_name = class_name_of(class_folder, known, self.files.display(path))
            for location in sorted(self.packed(path, account, synset)):
                yield Input("train", class_name, location)

    def _flat(self, split: str, path: bytes, account: Account, origins: list[str]) -> Iterator[Input]:
        where = {location.member: location for location in sorted(self.packed(path, account))}
        year = year_of([path])
        truth = find_ground_truth(self.files, split, list(where), year=year)
        if truth is None and split != "test":
            raise AlexprepError(
                f"nothing beside {self.files.display(path)} tells the classes of its images: put the devkit of {year} "
                "(as ILSVRC2012_devkit_t12.tar.gz), or its ground truth and meta.mat, there"
            )
        if truth is None:
            yield from (Input(split, UNLABELLED, location) for location in where.values())
            return
        origins.append(truth.origin)
        for class_name, name in truth.sorted(where):
            yield Input(split, class_name, where[name])


@dataclass(frozen=True)
class SynsetTars(ArchiveSource):
    """A tar a synset, named by its WordNet ID: ImageNet-21k (winter21), or ILSVRC's train archive unpacked once.

    Attributes:
        folder: that holds the tars, below the root.
    """

    folder: bytes = b""
    layout = "synset-tars"
    expects = "a folder of tars named by WordNet IDs, as n01440764.tar"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`. Refused: some synsets as tars, and others as folders."""
        for folder, names in () if name else may_hold(files):
            tars, unpacked = sorted(filter(_SYNSET_TAR, names)), min(filter(is_wordnet_id, names), default=None)
            if not tars:
                continue
            if unpacked is not None:
                raise AlexprepError(
                    f"SOURCE {files.display(folder)} holds synsets as tars ({as_text(tars[0])}) and as folders ({as_text(unpacked)}): "
                    "unpack all of them, or move the folders away"
                )
            return cls(files, folder, whole=True)
        return None

    def inputs(self, account: Account) -> Iterator[Input]:
        """By synset, then by name."""
        tars = [os.path.join(self.folder, name) for name in self.files.file_names(self.folder) if _SYNSET_TAR(name)]
        for path in tars:
            class_name = as_text(os.path.basename(path)[: -len(b".tar")])
            for location in sorted(self.packed(path, account)):
                yield Input("train", class_name, location)
        pass_over_rest(self.files, set(tars), account)


def check_archives(files: Files, wanted: dict[str, str] = PUBLISHED_MD5) -> list[str]:
    """Compares the archives in the root with the published MD5s; returns the names of those that agree.

    Where one differs, or there is none with a published MD5, that is an AlexprepError.
    """
    checked = []
    for entry in files.entries():
        name = entry.name.decode("utf-8", "replace")
        if name not in wanted:
            continue
        digest, total = hashlib.md5(usedforsecurity=False), files.size(entry.name)
        with files.reading(entry.name) as read:
            for offset in range(0, total, 2**22):
                digest.update(read(offset, min(2**22, total - offset)))
        if digest.hexdigest() != wanted[name]:
            raise AlexprepError(
                f"{files.display(entry.name)} has the MD5 {digest.hexdigest()}, the published one is {wanted[name]}: "
                "download it again"
            )
        checked.append(name)
    if not checked:
        raise AlexprepError(f"--check-archive: {files.display()} holds none of {', '.join(wanted)}")
    return checked
