"""Class folders: ROOT/{train,val,test}/CLASS/**/FILE, or one tree ROOT/CLASS/**/FILE, which becomes the split "train"."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import SPLITS, UNLABELLED, Input, Location, Source, class_name_of, split_folders
from alexprep.shards.sources.ground_truth import Truth, find_meta_mat, find_truth, year_of
from alexprep.shards.storage import Files, LocalFiles

# -------------------- Class folders: ROOT/{train,val,test}/CLASS/**/FILE, or one tree ROOT/CLASS/**/FILE, which becomes the split "train".


@dataclass(frozen=True)
class ClassFolders(Source):
    """A tree of class folders. Names that begin with a dot are passed over: they are never images.

    Attributes:
        splits: (split, folder below the root, truth) in ascending order of the split; the truth gives the classes of a
            folder that has no class folders.
    """

    splits: tuple[tuple[str, bytes, Truth | None], ...] = ()
    layout = "folders"
    expects = "SOURCE/CLASS/IMAGE, or SOURCE/train/CLASS/IMAGE and SOURCE/val/CLASS/IMAGE"

    @classmethod
    def at(cls, files: Files, name: bytes) -> ClassFolders | None:
        """The class folders below the root.

        Raises:
            AlexprepError: two folders stand for one split, or the images of one have no classes.
        """
        folders = [] if name else [entry.name for entry in files.entries() if entry.is_folder]
        named = split_folders(folders, files.display())
        if named:
            return cls(
                files,
                tuple(
                    (split, named[split], _truth(files, split, named[split], named.get("train")))
                    for split in sorted(named)
                ),
            )
        return cls(files, (("train", b"", None),)) if folders else None

    def inputs(self) -> Iterator[Input]:
        """Every file below a class folder that is not hidden, of whatever kind; what is no image is rejected later."""
        known: dict[str, bytes] = {}
        for split, folder, truth in self.splits:
            if truth is not None:
                names = [entry.name for entry in self.files.entries(folder) if not entry.is_folder]
                for class_name, name in truth.sorted(names):
                    yield Input(split, class_name, Location(os.path.join(folder, name)))
                continue
            for entry in self.files.entries(folder):
                if entry.is_folder:
                    class_name = class_name_of(entry.name, known, self.files.display())
                    for path in self.files.walk(os.path.join(folder, entry.name)):
                        yield Input(split, class_name, Location(path))

    def covers(self, target: str) -> bool:
        """Whether `target` lies in a split's folder, or in one that would be taken for it."""
        below = self.files.below(target)
        if below and below[0].decode("utf-8", "replace").lower() in SPLITS:
            return True
        return any(self.files.below(target, folder) is not None for _, folder, _ in self.splits)

    def year(self) -> str:
        """As some of the images' names tell it."""
        return year_of(name for _, folder, _ in self.splits for name in self._some(folder))

    def devkit(self) -> tuple[str, bytes] | None:
        """Also beside the root, where people unpack it."""
        found = super().devkit()
        if found is None and isinstance(self.files, LocalFiles):
            found = find_meta_mat(LocalFiles(os.path.dirname(self.files.root)), self.year())
        return found

    def _some(self, folder: bytes) -> list[bytes]:
        """Names of images: those in a flat folder, or those in the first class folder."""
        entries = self.files.entries(folder)
        first = next((entry.name for entry in entries if entry.is_folder), None)
        below = entries if first is None else self.files.entries(os.path.join(folder, first))
        return [entry.name for entry in below]


def _truth(files: Files, split: str, folder: bytes, train: bytes | None) -> Truth | None:
    """None where `folder` holds class folders; otherwise what tells the classes of its images."""
    entries = files.entries(folder)
    if any(entry.is_folder for entry in entries):
        return None
    train_classes = (
        [entry.name.decode("utf-8", "backslashreplace") for entry in files.entries(train) if entry.is_folder]
        if train
        else None
    )
    truth = find_truth(files, split, [entry.name for entry in entries], train_classes)
    if truth is None:
        flat = files.display(folder)
        raise AlexprepError(
            f"{flat} holds no class folders, and nothing beside it tells the classes of its images: sort them into "
            f"{flat}/CLASS/IMAGE, put a ground truth into SOURCE (LOC_{split}_solution.csv, {split}.txt, or the devkit), "
            "or move it away"
        )
    return truth


# -------------------- Kaggle's ImageNet: ILSVRC/Data/CLS-LOC/{train/WNID,val,test} with LOC_val_solution.csv beside ILSVRC.


_IMAGES = b"ILSVRC/Data/CLS-LOC"


@dataclass(frozen=True)
class Kaggle(Source):
    """The unpacked download of the competition imagenet-object-localization-challenge."""

    layout = "kaggle"
    expects = "a folder with ILSVRC/Data/CLS-LOC and LOC_val_solution.csv"

    @classmethod
    def at(cls, files: Files, name: bytes) -> Kaggle | None:
        """The download in the root."""
        return cls(files) if not name and files.entries(_IMAGES) else None

    def inputs(self) -> Iterator[Input]:
        """As from class folders: by split, class and name. The test images have no classes."""
        present = {entry.name for entry in self.files.entries(_IMAGES) if entry.is_folder}
        if b"test" in present:
            for name in self._flat(b"test"):
                yield Input("test", UNLABELLED, Location(os.path.join(_IMAGES, b"test", name)))
        if b"train" in present:
            known: dict[str, bytes] = {}
            for entry in self.files.entries(_IMAGES + b"/train"):
                if entry.is_folder:
                    class_name = class_name_of(entry.name, known, self.files.display())
                    for path in self.files.walk(os.path.join(_IMAGES, b"train", entry.name)):
                        yield Input("train", class_name, Location(path))
        if b"val" in present:
            names = self._flat(b"val")
            truth = find_truth(self.files, "val", names, year=self.year())
            if truth is None:
                raise AlexprepError(
                    f"{self.files.display()} has no LOC_val_solution.csv, which tells the classes of the val images: "
                    "download it from the same page"
                )
            for class_name, name in truth.sorted(names):
                yield Input("val", class_name, Location(os.path.join(_IMAGES, b"val", name)))

    def year(self) -> str:
        """The competition has the images of 2012."""
        return "2012"

    def covers(self, target: str) -> bool:
        """Whether `target` lies among the images."""
        return self.files.below(target, _IMAGES) is not None

    def _flat(self, split: bytes) -> list[bytes]:
        return [entry.name for entry in self.files.entries(os.path.join(_IMAGES, split)) if not entry.is_folder]
