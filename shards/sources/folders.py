"""Class folders: ROOT/{train,val,test}/CLASS/**/FILE, or one tree ROOT/CLASS/**/FILE, which becomes the split "train".

Also as Kaggle packs ImageNet. What the folders mean is decided in `folder_reading`; tars of such folders are in `tars`, the lists that
tell the classes of a flat `val` in `ground_truth`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from alexprep.shards.errors import AlexprepError, counted
from alexprep.shards.sources.base import FOLDER_LINK, NO_CHOICES, SPLITS, Account, Choices, Input, Location, Source
from alexprep.shards.sources.folder_reading import FindTruth, read_folders
from alexprep.shards.sources.ground_truth import GroundTruth, find_ground_truth, find_meta_mat, stem, year_of
from alexprep.shards.sources.split_folders import SplitFolder, inputs_of, metadata_of
from alexprep.shards.sources.tree import Folder, Tree, read_tree
from alexprep.shards.storage import Files, LocalFiles, as_text

_KAGGLE_IMAGES = b"ILSVRC/Data/CLS-LOC"


@dataclass(frozen=True)
class ClassFolders(Source):
    """A tree of class folders.

    Attributes:
        splits: what each split's folder holds, in ascending order of the split.
        warnings: what the reading found that needs no decision.
    """

    splits: tuple[SplitFolder, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)
    layout = "folders"
    expects = "SOURCE/CLASS/IMAGE, or SOURCE/train/CLASS/IMAGE and SOURCE/val/CLASS/IMAGE"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source` and `read_folders`. A split's folder whose images have no classes is refused."""
        if name:
            return None
        tree = read_tree(files)
        if not tree.root.count or not (choices.unlabelled or any(folder.count for folder in tree.root.folders)):
            return None
        reading = read_folders(tree.root, files.display(), _looked_for(files), choices)
        links = tree.account.passed_over.get(FOLDER_LINK)
        if links:
            reading.warnings.append(
                f"not followed: {counted(links.count, 'link')} to folders, such as {links.names[0]}; name the folder around it as SOURCE if "
                "it is a class"
            )
        splits, warnings = tuple(reading.splits), tuple(reading.warnings)
        return cls(files, splits, warnings, choices=choices, whole=True, evidence=reading.evidence)._with_tree(tree)

    def inputs(self, account: Account) -> Iterator[Input]:
        """Every file below a class folder that may be a picture; what is none is rejected later."""
        account.warnings += self.warnings
        tree = self._take_tree()
        for split, class_name, path, beside in inputs_of(self.splits, tree, account, self.files.display()):
            image = Location(path)
            yield Input(split, class_name, image, metadata_of(beside, image) if beside else b"")

    def covers(self, target: str) -> bool:
        """Whether `target` lies in a split's folder, or in one that would be taken for it."""
        below = self.files.below(target)
        if below and below[0].decode("utf-8", "replace").lower() in SPLITS:
            return True
        return any(self.files.below(target, part.path) is not None for part in self.splits)

    def year(self) -> str:
        """As some of the images' names tell it: those in a flat folder, or in the first class folder."""
        names: list[bytes] = []
        for part in self.splits:
            classes = [] if part.flat else self.files.folder_names(part.path)
            some = self.files.entries(os.path.join(part.path, classes[0]) if classes else part.path)
            names += [entry.name for entry in some]
        return year_of(names)

    def devkit(self) -> tuple[str, bytes] | None:
        """Also beside the root, where people unpack it."""
        found = super().devkit()
        if found is None and isinstance(self.files, LocalFiles):
            found = find_meta_mat(LocalFiles(os.path.dirname(self.files.root)), self.year())
        return found

    # The tree that was read to recognise the source serves the first listing, so that both cost one reading. It is not sent to workers.

    def _with_tree(self, tree: Tree) -> ClassFolders:
        object.__setattr__(self, "_tree", tree)
        return self

    def _take_tree(self) -> Tree:
        tree: Tree | None = self.__dict__.pop("_tree", None)
        return tree or read_tree(self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tree"}


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
        present = {entry.name for entry in ([] if name else files.entries(_KAGGLE_IMAGES)) if entry.is_folder}
        splits: list[SplitFolder] = []
        if b"test" in present:
            splits.append(SplitFolder("test", _KAGGLE_IMAGES + b"/test", flat=True))
        if b"train" in present:
            splits.append(SplitFolder("train", _KAGGLE_IMAGES + b"/train"))
        if b"val" in present:
            folder = _KAGGLE_IMAGES + b"/val"
            truth = find_ground_truth(files, "val", files.file_names(folder), year="2012")
            if truth is None:
                raise AlexprepError(
                    f"{files.display()} has no LOC_val_solution.csv, which tells the classes of the val images: "
                    "download it from the same page"
                )
            splits.append(SplitFolder("val", folder, flat=True, truth=truth))
        return cls(files, tuple(splits), whole=True) if present else None

    def covers(self, target: str) -> bool:
        """Whether `target` lies among the images."""
        return self.files.below(target, _KAGGLE_IMAGES) is not None

    def year(self) -> str:
        """The competition has the images of 2012."""
        return "2012"


def _looked_for(files: Files) -> FindTruth:
    """Looks for lists of labels in the root, in the folders that lead to a split's pictures, and beside these."""

    def find(split: str, folder: Folder, train_classes: list[str]) -> GroundTruth | None:
        path, places = folder.path, [folder.path]
        while path:
            path = os.path.dirname(path)
            places.append(path)
        names = folder.pictures
        found = [find_ground_truth(files.inside(place), split, names, train_classes) for place in reversed(places)]
        truths = [truth for truth in found if truth is not None]
        for other in truths[1:]:
            for name in map(stem, names):
                classes = truths[0].classes.get(name), other.classes.get(name)
                if None not in classes and classes[0] != classes[1]:
                    raise AlexprepError(
                        f"{truths[0].origin} gives {as_text(name)} the class {classes[0]!r}, {other.origin} {classes[1]!r}: move one of the "
                        "lists away"
                    )
        return truths[0] if truths else None

    return find
