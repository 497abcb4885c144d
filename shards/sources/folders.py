"""Class folders: ROOT/{train,val,test}/CLASS/**/FILE, or one tree ROOT/CLASS/**/FILE, which becomes the split "train".

Also as Kaggle packs ImageNet. Tars of such folders are in `tars`; the lists that tell the classes of a flat `val` in `ground_truth`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import (
    NO_CHOICES,
    SPLITS,
    UNLABELLED,
    Account,
    Choices,
    Input,
    Location,
    Source,
    class_name_of,
    split_folders,
)
from alexprep.shards.sources.ground_truth import GroundTruth, find_ground_truth, find_meta_mat, year_of
from alexprep.shards.storage import Files, LocalFiles, as_text

_KAGGLE_IMAGES = b"ILSVRC/Data/CLS-LOC"


@dataclass(frozen=True)
class ClassFolders(Source):
    """A tree of class folders. Names that begin with a dot are passed over: they are never images.

    Attributes:
        splits: (split, folder below the root, ground truth) in ascending order of the split; the ground truth gives the
            classes of a folder that has no class folders.
    """

    splits: tuple[tuple[str, bytes, GroundTruth | None], ...] = ()
    layout = "folders"
    expects = "SOURCE/CLASS/IMAGE, or SOURCE/train/CLASS/IMAGE and SOURCE/val/CLASS/IMAGE"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`. Refused: two folders for one split, and a split's folder whose images have no classes."""
        folders = [] if name else files.folder_names()
        named = split_folders(folders, files.display())
        splits = [
            (split, folder, _ground_truth(files, split, folder, named.get("train")))
            for split, folder in sorted(named.items())
        ]
        return cls(files, tuple(splits or [("train", b"", None)])) if folders else None

    def inputs(self, account: Account) -> Iterator[Input]:
        """Every file below a class folder that is not hidden, of whatever kind; what is no image is rejected later."""
        known: dict[str, bytes] = {}
        for split, folder, truth in self.splits:
            if truth is not None:
                for class_name, name in truth.sorted(self.files.file_names(folder)):
                    yield Input(split, class_name, Location(os.path.join(folder, name)))
                continue
            for class_folder in self.files.folder_names(folder):
                class_name = class_name_of(class_folder, known, self.files.display())
                for path in self.files.walk(os.path.join(folder, class_folder)):
                    yield Input(split, class_name, Location(path))

    def covers(self, target: str) -> bool:
        """Whether `target` lies in a split's folder, or in one that would be taken for it."""
        below = self.files.below(target)
        if below and below[0].decode("utf-8", "replace").lower() in SPLITS:
            return True
        return any(self.files.below(target, folder) is not None for _, folder, _ in self.splits)

    def year(self) -> str:
        """As some of the images' names tell it: those in a flat folder, or in the first class folder."""
        names: list[bytes] = []
        for _, folder, _ in self.splits:
            classes = self.files.folder_names(folder)
            some = self.files.entries(os.path.join(folder, classes[0]) if classes else folder)
            names += [entry.name for entry in some]
        return year_of(names)

    def devkit(self) -> tuple[str, bytes] | None:
        """Also beside the root, where people unpack it."""
        found = super().devkit()
        if found is None and isinstance(self.files, LocalFiles):
            found = find_meta_mat(LocalFiles(os.path.dirname(self.files.root)), self.year())
        return found


@dataclass(frozen=True)
class Kaggle(ClassFolders):
    """The unpacked download of Kaggle's competition imagenet-object-localization-challenge.

    ILSVRC/Data/CLS-LOC/{train/WNID,val,test}, with LOC_val_solution.csv beside ILSVRC. The test images have no classes.
    """

    layout = "kaggle"
    expects = "a folder with ILSVRC/Data/CLS-LOC and LOC_val_solution.csv"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`. Refused: a val folder without LOC_val_solution.csv."""
        present = [] if name else files.entries(_KAGGLE_IMAGES)
        splits: list[tuple[str, bytes, GroundTruth | None]] = []
        if any(entry == (b"train", True) for entry in present):
            splits.append(("train", _KAGGLE_IMAGES + b"/train", None))
        if any(entry == (b"val", True) for entry in present):
            folder = _KAGGLE_IMAGES + b"/val"
            truth = find_ground_truth(files, "val", files.file_names(folder), year="2012")
            if truth is None:
                raise AlexprepError(
                    f"{files.display()} has no LOC_val_solution.csv, which tells the classes of the val images: "
                    "download it from the same page"
                )
            splits.append(("val", folder, truth))
        return cls(files, tuple(splits)) if present else None

    def inputs(self, account: Account) -> Iterator[Input]:
        """As from class folders, the test images first."""
        test = _KAGGLE_IMAGES + b"/test"
        for name in self.files.file_names(test):
            yield Input("test", UNLABELLED, Location(os.path.join(test, name)))
        yield from super().inputs(account)

    def covers(self, target: str) -> bool:
        """Whether `target` lies among the images."""
        return self.files.below(target, _KAGGLE_IMAGES) is not None

    def year(self) -> str:
        """The competition has the images of 2012."""
        return "2012"


def _ground_truth(files: Files, split: str, folder: bytes, train: bytes | None) -> GroundTruth | None:
    """None where `folder` holds class folders; otherwise what tells the classes of its images."""
    entries = files.entries(folder)
    if any(entry.is_folder for entry in entries):
        return None
    train_classes = [as_text(name) for name in files.folder_names(train)] if train else []
    truth = find_ground_truth(files, split, [entry.name for entry in entries], train_classes)
    if truth is None:
        flat = files.display(folder)
        raise AlexprepError(
            f"{flat} holds no class folders, and nothing beside it tells the classes of its images: sort them into "
            f"{flat}/CLASS/IMAGE, put a ground truth into SOURCE (LOC_{split}_solution.csv, {split}.txt, or the devkit), "
            "or move it away"
        )
    return truth
