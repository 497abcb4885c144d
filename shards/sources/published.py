"""Published sets whose classes or splits stand in lists of their publisher: Tiny ImageNet, Places365, Food-101, CUB-200-2011 and more.

A set is a class that says which files show that it is this set, and what its lists mean; `published_lists` does the rest. Labels are
the publisher's numbers. Sets of plain class folders are read by `folders`, ImageNet-21k's tars by `ilsvrc`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import ClassVar

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import UNLABELLED
from alexprep.shards.sources.published_lists import ANY, MATLAB, WRAPPERS, Labels, Marks, Published, has
from alexprep.shards.sources.tree import Folder
from alexprep.shards.storage import Files, as_text


class TinyImageNet(Published):
    """Tiny ImageNet of Stanford's CS231n: train/WNID/images, val/images with val_annotations.txt, test/images without classes."""

    layout = "tiny-imagenet"
    expects = "Tiny ImageNet: train/WNID/images, val/images with val/val_annotations.txt, test/images, and wnids.txt"
    marks: ClassVar[Marks] = {
        b"wnids.txt": rb"n\d{8}\s",
        b"val/val_annotations.txt": rb"\S+\tn\d{8}\s",
        b"val/images": None,
    }
    roots = (b"train/", b"val/", b"test/")

    def order(self, labels: Labels) -> list[str]:
        """Sorted, as ImageNet's own and as torchvision numbers folders; wnids.txt gives --labels another order."""
        return sorted(labels.names(b"wnids.txt", rb"(n\d{8})"))

    def fill(self, labels: Labels, names: list[str]) -> None:
        """The lists of boxes in train say nothing of classes, and are not read."""
        for folder in self.files.folder_names(os.path.join(self.folder, b"train")):
            labels.folders[b"train/" + folder] = ("train", labels.check_known(names, folder, b"train", b"wnids.txt"))
        labels.folders[b"test"] = ("test", UNLABELLED)
        origin = b"val/val_annotations.txt"
        for name, wnid in labels.lines(origin, rb"([^\t]+)\t(n\d{8})(?:\t\d+)*"):
            labels.put(b"val/images/" + name, "val", labels.check_known(names, wnid, origin, b"wnids.txt"), origin)


class Places365(Published):
    """Places365, standard or challenge, of either size: data_256 in nested letters, val_256 and test_256 flat, and its lists."""

    layout = "places365"
    expects = (
        "Places365: data_256 (or data_large), val_256, test_256, with categories_places365.txt, places365_train_standard.txt and "
        "places365_val.txt"
    )
    roots = (b"data_", b"val_", b"test_")

    @classmethod
    def fits(cls, files: Files, folder: bytes, whatever: bool = False) -> bool:
        """See `Published`: the lists may lie in the folder that their archive unpacks to."""
        form = rb"/\w/\S+ \d+\s"
        lists = (os.path.join(folder, path) for path in (b"", *_filelists(files, folder)))
        return any(has(files, os.path.join(path, b"categories_places365.txt"), form) for path in lists) and any(
            map(_PLACES, files.folder_names(folder))
        )

    @classmethod
    def is_named(cls, folder: Folder) -> bool:
        """See `Published`."""
        return b"categories_places365.txt" in folder.papers and any(_PLACES(inner.name) for inner in folder.folders)

    def order(self, labels: Labels) -> list[str]:
        """As categories_places365.txt numbers them; "/a/airfield" is the class a/airfield."""
        (origin,) = self._lists(b"categories_places365.txt")
        lines = labels.lines(origin, rb"/(\S+) (\d+)")
        return labels.by_number(origin, ((int(number), as_text(name)) for name, number in lines))

    def fill(self, labels: Labels, names: list[str]) -> None:
        """A list says of train what the folders say too, and of val what nothing else says."""
        train, val, test = (self._pictures(kind) for kind in (b"data_", b"val_", b"test_"))
        if train:
            kinds = [kind for kind in (b"standard", b"challenge") if train.endswith(kind)] or [
                b"standard",
                b"challenge",
            ]
            origins = self._lists(*(b"places365_train_%s.txt" % kind for kind in kinds))
            for path, name, origin in self._rows(labels, names, origins):
                labels.check_folder(path, train, name, origin)
                labels.put(os.path.join(train, path), "train", name, origin)
            if not origins:
                labels.folders.update((os.path.join(train, name.encode()), ("train", name)) for name in names)
        if val:
            origins = self._lists(b"places365_val.txt")
            if not origins:
                raise AlexprepError(
                    f"{labels.shown(val)} has no class folders, and places365_val.txt, which tells the classes, is not beside it: it is "
                    "in filelist_places365-standard.tar; put it there, or move the folder away"
                )
            for path, name, origin in self._rows(labels, names, origins):
                labels.put(os.path.join(val, path), "val", name, origin)
        if test:
            labels.folders[test] = ("test", UNLABELLED)

    def _rows(self, labels: Labels, names: list[str], origins: list[bytes]) -> Iterator[tuple[bytes, str, bytes]]:
        for origin in origins:
            for path, number in labels.lines(origin, rb"/?(\S+) (\d+)"):
                yield path, labels.class_at(names, int(number), origin, path), origin

    def _pictures(self, kind: bytes) -> bytes:
        """The folder of this kind; empty without one."""
        found = [name for name in self.files.folder_names(self.folder) if name.startswith(kind) and _PLACES(name)]
        return self._one(found, "which hold the same pictures")[0] if found else b""

    def _lists(self, *names: bytes) -> list[bytes]:
        """The one list of these names that is there, or none."""
        folders = (b"", *_filelists(self.files, self.folder))
        paths = [os.path.join(folder, name) for name in names for folder in folders]
        return self._one(
            [path for path in paths if has(self.files, os.path.join(self.folder, path), ANY)],
            "of which one is to be read",
        )

    def _one(self, found: list[bytes], why: str) -> list[bytes]:
        if len(found) > 1:
            shown = " and ".join(self.files.display(os.path.join(self.folder, path)) for path in found)
            raise AlexprepError(f"SOURCE holds {shown}, {why}: move away all but one")
        return found


_PLACES = re.compile(rb"data_(256|large)(_standard|_challenge)?|(val|test)_(256|large)").fullmatch


def _filelists(files: Files, folder: bytes) -> list[bytes]:
    return [name for name in files.folder_names(folder) if name.startswith(b"filelist_places365")]


class Sun397(Published):
    """SUN397: class folders in folders of letters, to two levels, which ClassName.txt lists."""

    layout = "sun397"
    expects = "SUN397: the folders a to z of class folders, with ClassName.txt"
    marks: ClassVar[Marks] = {b"ClassName.txt": rb"/\w/\S+\s"}
    roots = (b"",)

    def order(self, labels: Labels) -> list[str]:
        """The order of ClassName.txt; "/a/abbey" is the class a/abbey."""
        return labels.names(b"ClassName.txt", rb"/(\S+)")

    def fill(self, labels: Labels, names: list[str]) -> None:
        """There is one split; the partitions of the publisher are not read."""
        labels.folders.update((name.encode(), ("train", name)) for name in names)


class Food101(Published):
    """Food-101: images/CLASS, with meta/train.txt and meta/test.txt."""

    layout = "food-101"
    expects = "Food-101: images/CLASS, with meta/classes.txt, meta/train.txt and meta/test.txt"
    marks: ClassVar[Marks] = {
        b"meta/classes.txt": rb"\S+\s",
        b"meta/train.txt": rb"[^/\s]+/\d+\s",
        b"meta/test.txt": rb"[^/\s]+/\d+\s",
        b"images": None,
    }

    def order(self, labels: Labels) -> list[str]:
        """The order of classes.txt."""
        return labels.names(b"meta/classes.txt", rb"(\S+)")

    def fill(self, labels: Labels, names: list[str]) -> None:
        """A line is CLASS/NUMBER."""
        known = set(names)
        for split in ("train", "test"):
            origin = b"meta/%s.txt" % split.encode()
            for class_name, number in labels.lines(origin, rb"([^/\s]+)/(\d+)"):
                name = labels.check_known(known, class_name, origin, b"meta/classes.txt")
                labels.put(b"images/%s/%s.jpg" % (class_name, number), split, name, origin)


class Cub200(Published):
    """CUB-200-2011: images/CLASS, whose classes and splits stand in lists that number pictures."""

    layout = "cub-200-2011"
    expects = (
        "CUB-200-2011: images/CLASS, with images.txt, image_class_labels.txt, train_test_split.txt and classes.txt"
    )
    marks: ClassVar[Marks] = {
        b"images.txt": rb"\d+ \S+/\S+\s",
        b"image_class_labels.txt": rb"\d+ \d+\s",
        b"train_test_split.txt": rb"\d+ [01]\s",
        b"classes.txt": rb"1 \S+\s",
        b"images": None,
    }

    def order(self, labels: Labels) -> list[str]:
        """By the numbers of classes.txt, which begin at 1."""
        lines = labels.lines(b"classes.txt", rb"(\d+) (\S+)")
        return labels.by_number(b"classes.txt", ((int(number), as_text(name)) for number, name in lines), first=1)

    def fill(self, labels: Labels, names: list[str]) -> None:
        """The three lists must number the same pictures."""
        forms = {
            b"images.txt": rb"(\d+) (\S+)",
            b"image_class_labels.txt": rb"(\d+) (\d+)",
            b"train_test_split.txt": rb"(\d+) ([01])",
        }
        paths, classes, trained = (
            {number: value for number, value in labels.lines(path, form)} for path, form in forms.items()
        )
        for origin, listed in ((b"image_class_labels.txt", classes), (b"train_test_split.txt", trained)):
            if paths.keys() != listed.keys():
                number = min(paths.keys() ^ listed.keys(), key=int)
                raise AlexprepError(
                    f"{labels.shown(b'images.txt')} and {labels.shown(origin)} do not number the same pictures: {number.decode()} "
                    f"stands in one of them: download it again"
                )
        for number, path in paths.items():
            name = labels.class_at(names, int(classes[number]) - 1, b"image_class_labels.txt", path)
            labels.check_folder(path, b"images", name, b"image_class_labels.txt")
            labels.put(b"images/" + path, "train" if trained[number] == b"1" else "test", name, b"images.txt")


class OxfordPets(Published):
    """Oxford-IIIT Pet: images/CLASS_NUMBER.jpg, with annotations/trainval.txt, which becomes train, and test.txt."""

    layout = "oxford-pets"
    expects = "Oxford-IIIT Pet: images/CLASS_NUMBER.jpg, with annotations/trainval.txt and annotations/test.txt"
    marks: ClassVar[Marks] = {
        b"annotations/trainval.txt": rb"\S+_\d+ \d+ [12] \d+\s",
        b"annotations/test.txt": rb"\S+_\d+ \d+ [12] \d+\s",
        b"images": None,
    }

    def order(self, labels: Labels) -> list[str]:
        """By the class number of each line, from 1, and the name that the pictures of a number share."""
        pairs = ((number, name) for _, _, name, _, number in self._rows(labels))
        return labels.by_number(b"annotations/trainval.txt", pairs, first=1)

    def fill(self, labels: Labels, names: list[str]) -> None:
        """A line is CLASS_NUMBER, class, species and breed."""
        for split, origin, name, picture, _ in self._rows(labels):
            labels.put(b"images/" + picture + b".jpg", split, name, origin)

    def _rows(self, labels: Labels) -> Iterator[tuple[str, bytes, str, bytes, int]]:
        for split, word in (("train", b"trainval"), ("test", b"test")):
            origin = b"annotations/%s.txt" % word
            for picture, name, number in labels.lines(origin, rb"((\S+)_\d+) (\d+) [12] \d+"):
                yield split, origin, as_text(name), picture, int(number)


class Flowers102(Published):
    """Oxford 102 Flower: jpg/image_00001.jpg …, with imagelabels.mat and setid.mat. Its classes are numbers, from 1."""

    layout = "flowers-102"
    expects = "Oxford 102 Flower: jpg/image_NNNNN.jpg, with imagelabels.mat and setid.mat"
    marks: ClassVar[Marks] = {b"imagelabels.mat": MATLAB, b"setid.mat": MATLAB, b"jpg": None}
    roots = (b"jpg/",)

    def order(self, labels: Labels) -> list[str]:
        """The class "1" has the label 0."""
        numbers = labels.matlab(b"imagelabels.mat", "labels")
        return labels.by_number(b"imagelabels.mat", ((number, str(number)) for number in numbers), first=1)

    def fill(self, labels: Labels, names: list[str]) -> None:
        """imagelabels.mat has a class for each picture in order, setid.mat the numbers of each split's pictures."""
        classes = labels.matlab(b"imagelabels.mat", "labels")
        for split, variable in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
            for number in labels.matlab(b"setid.mat", variable):
                if not 1 <= number <= len(classes):
                    raise AlexprepError(
                        f"{labels.shown(b'setid.mat')} names picture {number}, {labels.shown(b'imagelabels.mat')} has classes for "
                        f"{len(classes):,}: download it again"
                    )
                labels.put(b"jpg/image_%05d.jpg" % number, split, str(classes[number - 1]), b"setid.mat")


class DescribableTextures(Published):
    """DTD: images/CLASS, with ten partitions, of which the first is taken: labels/train1.txt, val1.txt and test1.txt."""

    layout = "dtd"
    expects = (
        "DTD: images/CLASS, with labels/train1.txt, labels/val1.txt and labels/test1.txt, the first of ten partitions"
    )
    marks: ClassVar[Marks] = {
        **{b"labels/%s1.txt" % split: rb"([^/\s]+)/\1_\d+\.jpg\s" for split in (b"train", b"val", b"test")},
        b"images": None,
    }

    def order(self, labels: Labels) -> list[str]:
        """Sorted, as the publisher's imdb.mat has them."""
        return sorted({as_text(name) for _, _, name, _ in self._rows(labels)})

    def fill(self, labels: Labels, names: list[str]) -> None:
        """A line is CLASS/NAME."""
        for split, origin, name, path in self._rows(labels):
            labels.put(b"images/" + path, split, as_text(name), origin)

    def _rows(self, labels: Labels) -> Iterator[tuple[str, bytes, bytes, bytes]]:
        for split in ("train", "val", "test"):
            origin = b"labels/%s1.txt" % split.encode()
            for path, name in labels.lines(origin, rb"(([^/\s]+)/\S+)"):
                yield split, origin, name, path


class FgvcAircraft(Published):
    """FGVC-Aircraft by variants: images/NUMBER.jpg, with images_variant_train.txt, _val.txt and _test.txt."""

    layout = "fgvc-aircraft"
    expects = "FGVC-Aircraft: images/NUMBER.jpg, with variants.txt and images_variant_train.txt, _val.txt and _test.txt"
    marks: ClassVar[Marks] = {
        b"variants.txt": rb"\S",
        **{b"images_variant_%s.txt" % split: rb"\d{7} \S" for split in (b"train", b"val", b"test")},
        b"images": None,
    }

    def order(self, labels: Labels) -> list[str]:
        """The order of variants.txt."""
        return labels.names(b"variants.txt")

    def fill(self, labels: Labels, names: list[str]) -> None:
        """A line is NUMBER and variant."""
        known = set(names)
        for split in ("train", "val", "test"):
            origin = b"images_variant_%s.txt" % split.encode()
            for number, name in labels.lines(origin, rb"(\d+) (.+)"):
                variant = labels.check_known(known, name, origin, b"variants.txt")
                labels.put(b"images/" + number + b".jpg", split, variant, origin)


class StanfordDogs(Published):
    """Stanford Dogs: Images/WNID-NAME, with train_list.mat and test_list.mat."""

    layout = "stanford-dogs"
    expects = "Stanford Dogs: Images/WNID-NAME, with train_list.mat and test_list.mat"
    marks: ClassVar[Marks] = {b"train_list.mat": MATLAB, b"test_list.mat": MATLAB, b"Images": None}
    roots = (b"Images/",)

    def order(self, labels: Labels) -> list[str]:
        """By the numbers of the lists, from 1, and the folder that the pictures of a number share."""
        pairs = ((number, as_text(os.path.dirname(path))) for _, _, path, number in self._rows(labels))
        return labels.by_number(b"train_list.mat", pairs, first=1)

    def fill(self, labels: Labels, names: list[str]) -> None:
        """A list has the paths of pictures, and their classes as numbers."""
        for split, origin, path, _ in self._rows(labels):
            labels.put(b"Images/" + path, split, as_text(os.path.dirname(path)), origin)

    def _rows(self, labels: Labels) -> Iterator[tuple[str, bytes, bytes, int]]:
        for split in ("train", "test"):
            origin = b"%s_list.mat" % split.encode()
            paths, numbers = labels.matlab(origin, "file_list"), labels.matlab(origin, "labels")
            if len(paths) != len(numbers):
                raise AlexprepError(
                    f"{labels.shown(origin)} has {len(paths):,} pictures and {len(numbers):,} labels: download it again"
                )
            for path, number in zip(paths, numbers, strict=True):
                yield split, origin, str(path).encode(), int(number)


class Gtsrb(Published):
    """GTSRB: Final_Training/Images/NNNNN, and Final_Test/Images flat, whose classes are in GT-final_test.csv, where it is there."""

    layout = "gtsrb"
    expects = "GTSRB: Final_Training/Images/NNNNN and Final_Test/Images, with GT-final_test.csv"
    marks: ClassVar[Marks] = {b"Final_Training/Images/00000/GT-00000.csv": rb"Filename;"}
    roots = (b"Final_Training/", b"Final_Test/")

    def order(self, labels: Labels) -> list[str]:
        """The 43 numbers of the signs, as five digits."""
        return [f"{number:05d}" for number in range(43)]

    def fill(self, labels: Labels, names: list[str]) -> None:
        """A line is Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId, the first names these columns."""
        labels.folders.update((b"Final_Training/Images/" + name.encode(), ("train", name)) for name in names)
        for origin in (b"GT-final_test.csv", b"Final_Test/GT-final_test.csv", b"Final_Test/Images/GT-final_test.csv"):
            if has(self.files, os.path.join(self.folder, origin), rb"Filename;.*;ClassId"):
                rows = labels.lines(origin, rb"(?:Filename;.*|([^;]+);.*;(\d+))")
                for name, number in (row for row in rows if row[0] is not None):
                    class_name = labels.class_at(names, int(number), origin, name)
                    labels.put(b"Final_Test/Images/" + name, "test", class_name, origin)
                return
        labels.folders[b"Final_Test/Images"] = ("test", UNLABELLED)


SETS: tuple[type[Published], ...] = (
    *(TinyImageNet, Places365, Sun397, Food101, Cub200, OxfordPets),
    *(Flowers102, DescribableTextures, FgvcAircraft, StanfordDogs, Gtsrb),
)


def check_unlisted(root: Folder, shown: str) -> None:
    """AlexprepError where a tree, which an archive holds, is a set by the names of its lists: these are not read in archives."""
    folder = root
    for _ in range(WRAPPERS + 1):
        for known in SETS:
            if known.is_named(folder):
                raise AlexprepError(
                    f"{shown} holds {known.expects}; its lists, which tell splits and labels, are not read inside an archive: unpack it "
                    "and name the folder as SOURCE, or give --class-depth, to read the class folders without the lists"
                )
        if len(folder.folders) != 1:
            return
        folder = folder.folders[0]
