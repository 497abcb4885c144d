"""Files that tell the classes of images that lie in one flat folder or archive: Kaggle's CSV, Caffe's list, the devkit."""

from __future__ import annotations

import csv
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import Files, inflated
from alexprep.shards.tar_format import members

# -------------------- ILSVRC's devkits, which tell what class a number means: those of 2010 and of 2012 number different classes.


_FOLDER = re.compile(rb"(?:ILSVRC(20\d\d)_)?devkit[\w.-]*")
_ARCHIVE = re.compile(rb"(?:ILSVRC(20\d\d)_)?devkit[\w.-]*\.(?:tar|tgz|tar\.gz)")
_YEAR = re.compile(rb"(?:^|/)ILSVRC(20\d\d)_")
_META = rb"meta\.mat"


class DevkitFile(NamedTuple):
    """A file of a devkit.

    Attributes:
        place: the folder or archive in the root that holds it; empty for the root itself.
        year: of the devkit, as "2012"; empty where nothing tells it.
        origin: its name, for messages.
        content: its bytes.
    """

    place: bytes
    year: str
    origin: str
    content: bytes


def year_of(names: Iterable[bytes]) -> str:
    """The year that names such as ILSVRC2012_val_00000001.JPEG tell; empty where they tell none, or several.

    >>> year_of([b"val/ILSVRC2012_val_00000001.JPEG", b"n01440764_10026.JPEG"])
    '2012'
    """
    found = {match[1] for name in names if (match := _YEAR.search(name))}
    return found.pop().decode() if len(found) == 1 else ""


def find_meta_mat(files: Files, year: str) -> tuple[str, bytes] | None:
    """The name and content of meta.mat: in the root, or in a devkit there, unpacked or as downloaded.

    Args:
        files: where to look.
        year: of the images; empty where it is not known.

    Raises:
        AlexprepError: there are some of several years, and no year tells which one counts.
    """
    found = _one_year(files, [*_meta_mats(files, year)])
    return (found[0].origin, found[0].content) if found else None


def find_ground_truth(files: Files, split: str, year: str) -> tuple[DevkitFile, DevkitFile | None] | None:
    """The list of IDs of a split's images, and the meta.mat of the same year, of the same devkit if it is there.

    Args:
        files: where to look.
        split: "val" or "test".
        year: of the images; empty where it is not known.

    Raises:
        AlexprepError: there are some of several years, and no year tells which one counts.
    """
    word = {"val": "validation"}.get(split, split)
    any_year = r"20\d\d"
    named = rf"ILSVRC{year or any_year}_{word}_ground_truth\.txt".encode()
    truths = _one_year(files, [*_held(files, named, year)])
    if not truths:
        return None
    metas = [*_meta_mats(files, truths[0].year)]
    pairs = [(truth, meta) for truth in truths for meta in metas]
    together = (pair for pair in pairs if pair[0].place == pair[1].place)
    return next(together, pairs[0] if pairs else (truths[0], None))


def _one_year(files: Files, found: list[DevkitFile]) -> list[DevkitFile]:
    """What was found, where all that tell a year tell the same one."""
    years = {file.year: file.origin for file in found if file.year}
    if len(years) > 1:
        raise AlexprepError(
            f"{files.display()} holds devkits of {' and '.join(sorted(years))} ({', '.join(sorted(years.values()))}), which "
            "number classes differently, and the images' names do not tell their year: move the other devkits away"
        )
    return found


def _meta_mats(files: Files, year: str) -> Iterator[DevkitFile]:
    """Those of a year, and those that tell none; of all years where `year` is empty."""
    for file in _held(files, _META, year):
        told = file._replace(year=file.year or _year_within(file.content))
        if not year or told.year in ("", year):
            yield told


def _held(files: Files, pattern: bytes, year: str) -> Iterator[DevkitFile]:
    """The files of that name in the root and in the devkits there, but for devkits whose name tells another year."""
    for entry in files.entries():
        place = (_FOLDER if entry.is_folder else _ARCHIVE).fullmatch(entry.name)
        if place and year and place[1] and place[1].decode() != year:
            continue
        told = (place[1] or b"").decode() if place else ""
        if entry.is_folder:
            for below in files.entries(entry.name + b"/data") if place else ():
                if re.fullmatch(pattern, below.name):
                    path = entry.name + b"/data/" + below.name
                    own = year_of([below.name]) or told
                    yield DevkitFile(entry.name, own, files.display(path), files.read(path))
        elif re.fullmatch(pattern, entry.name):
            yield DevkitFile(b"", year_of([entry.name]), files.display(entry.name), files.read(entry.name))
        elif place:
            shown = files.display(entry.name)
            found = _member(inflated(files, entry.name), shown, b"(^|/)" + pattern + b"$")
            if found is not None:
                own = year_of([found[0].encode()]) or told
                yield DevkitFile(entry.name, own, f"{shown}/{found[0]}", found[1])


def _member(content: bytes, name: str, pattern: bytes) -> tuple[str, bytes] | None:
    """The name and content of the first member of a tar in memory whose name matches `pattern`."""
    for member in members(lambda offset, size: content[offset : offset + size], len(content), name):
        if member.kind == "file" and re.search(pattern, member.name):
            shown = member.name.decode("utf-8", "backslashreplace")
            return shown, content[member.offset : member.offset + member.size]
    return None


def devkit_order(name: str, content: bytes) -> list[str]:
    """The low-level synsets of a 2010 or 2012 devkit's meta.mat (see its readme.txt), by ID; IDs above are ancestors.

    Raises:
        AlexprepError: `content`, read from the file `name`, is none.
    """
    try:
        synsets, identity = _synsets(content)
        leaves = [(int(s[identity]), str(s["WNID"])) for s in synsets if int(s["num_children"]) == 0]
    except Exception as error:  # noqa: BLE001  (scipy raises many kinds)
        raise AlexprepError(f"{name} is not a devkit's meta.mat ({error}): give --labels FILE instead") from None
    return [wnid for _, wnid in sorted(leaves)]


def _year_within(content: bytes) -> str:
    """The year by the name that a meta.mat gives its IDs (ILSVRC2012_ID); empty where it is none."""
    try:
        return year_of([_synsets(content)[1].encode()])
    except Exception:  # noqa: BLE001  (scipy raises many kinds; whoever needs the file will say so)
        return ""


@functools.lru_cache(maxsize=2)
def _synsets(content: bytes) -> tuple[Any, str]:
    """The table of synsets, and the name of the column with their IDs."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(content), squeeze_me=True, struct_as_record=True)["synsets"]
    return synsets, next(name for name in synsets.dtype.names if name.endswith("_ID"))


# -------------------- Files that tell the classes of images that lie in one flat folder or archive: Kaggle's CSV, Caffe's list, the devkit.


_DOWNLOAD = "download it again"
_STEM_END = re.compile(rb"\.(jpe?g|png|bmp|gif|webp|tiff?)$", re.IGNORECASE)


class _NumbersNothingError(AlexprepError):
    """A list has numbers where there are no classes that they could count."""


@dataclass(frozen=True)
class Truth:
    """The class of each image of one split.

    Attributes:
        origin: the file that says so, for messages.
        classes: class name by the image's file name without folder and extension.
    """

    origin: str
    classes: dict[bytes, str]

    def sorted(self, names: Iterable[bytes]) -> list[tuple[str, bytes]]:
        """(class, name) of each name, ascending.

        Raises:
            AlexprepError: some names have no class.
        """
        labelled, unknown = [], []
        for name in names:
            class_name = self.classes.get(stem(name))
            if class_name is None:
                unknown.append(name)
            else:
                labelled.append((class_name, name))
        if unknown:
            first = min(unknown).decode("utf-8", "backslashreplace")
            raise AlexprepError(
                f"{self.origin} gives no class to {len(unknown):,} of {len(unknown) + len(labelled):,} files, "
                f"among them {first}: move them away, or use the list that belongs to these images"
            )
        return sorted(labelled, key=lambda pair: (pair[0].encode(), pair[1]))


def stem(name: bytes) -> bytes:
    """A file's name without folder and image extension.

    >>> stem(b"val/ILSVRC2012_val_00000001.JPEG")
    b'ILSVRC2012_val_00000001'
    """
    return _STEM_END.sub(b"", os.path.basename(name))


def find_truth(
    files: Files, split: str, names: list[bytes], train_classes: list[str] | None = None, year: str = ""
) -> Truth | None:
    """What tells the classes of the images `names` of a split, looked for in the root of `files`; None where nothing does.

    Args:
        files: where to look: LOC_val_solution.csv, val.txt, a devkit (folder or archive), a ground-truth file with meta.mat.
        split: "val" or "test".
        names: the images.
        train_classes: the classes of the train split, for lists that number them in sorted order.
        year: whose devkit is meant; empty for the year that the images' names tell.

    Raises:
        AlexprepError: there is a file, but it makes no sense; or the devkits of two years, and nothing tells which counts.
    """
    numbers: _NumbersNothingError | None = None
    for entry in files.entries():
        name = entry.name.decode("utf-8", "replace")
        if entry.is_folder:
            continue
        if re.fullmatch(rf"LOC_{split}_solution\.csv", name):
            return _kaggle(files, entry.name)
        if name == f"{split}.txt":
            try:
                truth = _listed(files, entry.name, split, train_classes)
            except _NumbersNothingError as error:
                numbers = error
            else:
                if truth is not None:
                    return truth
    found = find_ground_truth(files, split, year or year_of(names))
    if found is not None:
        return _numbered(*found, names)
    if numbers is not None:
        raise numbers
    return None


def _lines(content: bytes, origin: str) -> list[str]:
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AlexprepError(f"{origin} is no text in UTF-8 ({error}): {_DOWNLOAD}") from None


def _kaggle(files: Files, path: bytes) -> Truth:
    """ImageId,PredictionString: the class is the first word of the second column, boxes follow."""
    origin = files.display(path)
    pairs = []
    rows = csv.reader(_lines(files.read(path), origin))
    try:
        for row in rows:
            if rows.line_num == 1 and row[:1] == ["ImageId"]:
                continue
            words = row[1].split() if len(row) == 2 else []
            if not words:
                raise AlexprepError(f"{origin}, line {rows.line_num}: expected ImageId,PredictionString: {_DOWNLOAD}")
            pairs.append([row[0], words[0]])
    except csv.Error as error:
        raise AlexprepError(f"{origin}, line {rows.line_num}: {error}: {_DOWNLOAD}") from None
    return Truth(origin, _each_once(origin, pairs))


def _listed(files: Files, path: bytes, split: str, train_classes: list[str] | None) -> Truth | None:
    """NAME CLASS a line; a CLASS that is a number counts the train classes in sorted order from 0, as Caffe's list does.

    None for a list that tells nothing: Caffe's test.txt has a 0 for every image.
    """
    origin = files.display(path)
    pairs = [line.rsplit(None, 1) for line in _lines(files.read(path), origin) if line.strip()]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise AlexprepError(f"{origin}, line {number}: expected NAME CLASS")
    values = {value for _, value in pairs}
    if split == "test" and len(pairs) > 1 and values == {"0"}:
        return None
    if pairs and all(value.isdecimal() for _, value in pairs):
        pairs = _counted(origin, pairs, train_classes or [])
    return Truth(origin, _each_once(origin, pairs))


def _each_once(origin: str, pairs: list[list[str]]) -> dict[bytes, str]:
    """The class of each image by its stem, of pairs of name and class.

    Raises:
        AlexprepError: an image has two classes.
    """
    classes: dict[bytes, str] = {}
    for name, value in pairs:
        other = classes.setdefault(stem(os.fsencode(name)), value)
        if other != value:
            raise AlexprepError(f"{origin} names {name} twice, with the classes {other!r} and {value!r}: delete one")
    return classes


def _counted(origin: str, pairs: list[list[str]], train_classes: list[str]) -> list[list[str]]:
    """The pairs with class names in place of numbers, which count the train classes, or are their very names."""
    values = {value for _, value in pairs}
    highest = max(map(int, values))
    named = values <= set(train_classes)
    if highest >= len(train_classes):
        if named:
            return pairs
        # Kaggle's own val.txt counts images, not classes: its classes are in LOC_val_solution.csv.
        raise _NumbersNothingError(
            f"{origin} numbers classes up to {highest}, but there are {len(train_classes)} train classes to "
            "number: give class names, or put LOC_val_solution.csv or the devkit into SOURCE"
        )
    other = next((pair for pair in pairs if train_classes[int(pair[1])] != pair[1]), None)
    if named and other:
        raise AlexprepError(
            f"{origin}: '{other[0]} {other[1]}' may mean the class named {other[1]!r}, or number {other[1]} of the sorted "
            f"train classes, which is {train_classes[int(other[1])]!r}: sort the images into class folders, or give the "
            "names in a file of ImageId,PredictionString, LOC_val_solution.csv for val"
        )
    return [[name, train_classes[int(value)]] for name, value in pairs]


def _numbered(truth: DevkitFile, devkit: DevkitFile | None, names: list[bytes]) -> Truth:
    """One ILSVRC ID a line, in ascending order of the images' names; meta.mat tells the synset of an ID."""
    origin = truth.origin
    if devkit is None:
        raise AlexprepError(
            f"{origin} numbers classes by ILSVRC ID: put the devkit's meta.mat of {truth.year}, or that devkit, beside it"
        )
    synsets = devkit_order(devkit.origin, devkit.content)
    identities = [line.strip() for line in _lines(truth.content, origin) if line.strip()]
    images = sorted({stem(name) for name in names})
    if len(identities) != len(images):
        raise AlexprepError(
            f"{origin} has {len(identities):,} lines for {len(images):,} images: the images are incomplete, or of another year"
        )
    classes = {}
    for number, (image, identity) in enumerate(zip(images, identities, strict=True), 1):
        if not identity.isdecimal() or not 1 <= int(identity) <= len(synsets):
            raise AlexprepError(f"{origin}, line {number}: {identity!r} is no ID between 1 and {len(synsets)}")
        classes[image] = synsets[int(identity) - 1]
    return Truth(origin, classes)
