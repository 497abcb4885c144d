"""Kaggle's ImageNet: ILSVRC/Data/CLS-LOC/{train/WNID,val,test} with LOC_val_solution.csv beside ILSVRC."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import UNLABELLED, Input, Location, Source, class_name_of
from alexprep.shards.sources.files import Files
from alexprep.shards.sources.ground_truth import find_truth

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
