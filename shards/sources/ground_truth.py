"""Files that tell the classes of images that lie in one flat folder or archive: Kaggle's CSV, Caffe's list, ILSVRC's devkit.

The devkits of 2010 and of 2012 number different classes, so the year of the images decides which one counts. Tables of any images
are a source of their own: see `table`.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.picture_names import without_ending
from alexprep.shards.storage import Files, as_text, read_inflated
from alexprep.shards.tar_format import members, reader_of

_DOWNLOAD = "download it again"
_YEAR = re.compile(rb"(?:^|/)ILSVRC(20\d\d)_")
_DEVKIT_FOLDER = re.compile(rb"(?:ILSVRC(20\d\d)_)?devkit[\w.-]*")
_DEVKIT_ARCHIVE = re.compile(rb"(?:ILSVRC(20\d\d)_)?devkit[\w.-]*\.(?:tar|tgz|tar\.gz)")


@dataclass(frozen=True)
class GroundTruth:
    """The class of each image of one split, by the image's file name without folder and extension, as the file `origin` says."""

    origin: str
    classes: dict[bytes, str]

    def sorted(self, names: Iterable[bytes]) -> list[tuple[str, bytes]]:
        """(class, name) of each name, ascending; AlexprepError where some names have no class."""
        names = list(names)
        unknown = [name for name in names if stem(name) not in self.classes]
        if unknown:
            raise AlexprepError(
                f"{self.origin} gives no class to {len(unknown):,} of {len(names):,} files, among them "
                f"{as_text(min(unknown))}: move them away, or use the list that belongs to these images"
            )
        labelled = [(self.classes[stem(name)], name) for name in names]
        return sorted(labelled, key=lambda pair: (pair[0].encode(), pair[1]))


def find_ground_truth(
    files: Files, split: str, names: list[bytes], train_classes: Sequence[str] = (), year: str = ""
) -> GroundTruth | None:
    """What tells the classes of the images `names` of a split, looked for in the root of `files`; None where nothing does.

    That is LOC_val_solution.csv, val.txt, or a devkit (folder or archive) or a ground-truth file with meta.mat.

    Args:
        files: where to look.
        split: "val" or "test".
        names: the images.
        train_classes: the classes of the train split, for lists that number them in sorted order.
        year: whose devkit is meant; empty for the year that the images' names tell.
    """
    present = files.file_names()
    kaggle, listing = f"LOC_{split}_solution.csv".encode(), f"{split}.txt".encode()
    if kaggle in present:
        return _read_kaggle_csv(files, kaggle)
    pairs = _read_list(files, listing, split) if listing in present else []
    origin = files.display(listing)
    named = _with_class_names(origin, pairs, train_classes)
    if named:
        return _ground_truth(origin, named)
    by_devkit = _devkit_ground_truth(files, split, names, year or year_of(names))
    if by_devkit is None and pairs:
        raise AlexprepError(
            f"{origin} numbers classes up to {max(int(value) for _, value in pairs)}, but there are {len(train_classes)} train "
            "classes to number: give class names, or put LOC_val_solution.csv or the devkit into SOURCE"
        )
    return by_devkit


def stem(name: bytes) -> bytes:
    """A file's name without folder and image extension.

    >>> stem(b"val/ILSVRC2012_val_00000001.JPEG")
    b'ILSVRC2012_val_00000001'
    """
    return without_ending(os.path.basename(name))


def year_of(names: Iterable[bytes]) -> str:
    """The year that names such as ILSVRC2012_val_00000001.JPEG tell; empty where they tell none, or several.

    >>> year_of([b"val/ILSVRC2012_val_00000001.JPEG", b"n01440764_10026.JPEG"])
    '2012'
    """
    found = {match[1] for name in names if (match := _YEAR.search(name))}
    return found.pop().decode() if len(found) == 1 else ""


# Lists of images


def _read_kaggle_csv(files: Files, path: bytes) -> GroundTruth:
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
            pairs.append((row[0], words[0]))
    except csv.Error as error:
        raise AlexprepError(f"{origin}, line {rows.line_num}: {error}: {_DOWNLOAD}") from None
    return _ground_truth(origin, pairs)


def _read_list(files: Files, path: bytes, split: str) -> list[tuple[str, str]]:
    """The pairs NAME CLASS, one a line; none of a list that tells nothing: Caffe's test.txt has a 0 for every image."""
    origin = files.display(path)
    pairs = []
    for number, line in enumerate(filter(str.strip, _lines(files.read(path), origin)), 1):
        name, *value = line.rsplit(None, 1)
        if not value:
            raise AlexprepError(f"{origin}, line {number}: expected NAME CLASS")
        pairs.append((name, value[0]))
    tells_nothing = split == "test" and len(pairs) > 1 and {value for _, value in pairs} == {"0"}
    return [] if tells_nothing else pairs


def _with_class_names(
    origin: str, pairs: list[tuple[str, str]], train_classes: Sequence[str]
) -> list[tuple[str, str]] | None:
    """The pairs with class names: where all are numbers, these count the train classes in sorted order from 0, as Caffe's do.

    Numbers that are too high are the very names of train classes, or (None) nothing: Kaggle's own val.txt counts images.
    """
    values = {value for _, value in pairs}
    if not all(map(str.isdecimal, values)):
        return pairs
    named = values <= set(train_classes)
    if max(map(int, values), default=0) >= len(train_classes):
        return pairs if named else None
    other = next((pair for pair in pairs if train_classes[int(pair[1])] != pair[1]), None)
    if named and other:
        raise AlexprepError(
            f"{origin}: '{other[0]} {other[1]}' may mean the class named {other[1]!r}, or number {other[1]} of the sorted "
            f"train classes, which is {train_classes[int(other[1])]!r}: sort the images into class folders, or give the "
            "names in a file of ImageId,PredictionString, LOC_val_solution.csv for val"
        )
    return [(name, train_classes[int(value)]) for name, value in pairs]


def _ground_truth(origin: str, pairs: list[tuple[str, str]]) -> GroundTruth:
    """Of pairs of image and class; an image that has two classes is an error."""
    classes: dict[bytes, str] = {}
    for name, value in pairs:
        other = classes.setdefault(stem(os.fsencode(name)), value)
        if other != value:
            raise AlexprepError(f"{origin} names {name} twice, with the classes {other!r} and {value!r}: delete one")
    return GroundTruth(origin, classes)


def _lines(content: bytes, origin: str) -> list[str]:
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AlexprepError(f"{origin} is no text in UTF-8 ({error}): {_DOWNLOAD}") from None


# ILSVRC's devkits


class DevkitFile(NamedTuple):
    """A file of a devkit, which lies in `place`, a folder or archive in the root, or in the root itself (empty).

    `year` is the devkit's, as "2012"; empty where nothing tells it.
    """

    place: bytes
    year: str
    origin: str
    content: bytes


def find_meta_mat(files: Files, year: str) -> tuple[str, bytes] | None:
    """The name and content of meta.mat: in the root, or in a devkit there, unpacked or as downloaded.

    Where there are some of several years and `year`, that of the images, is not known (empty), that is an AlexprepError.
    """
    found = _of_one_year(files, _meta_mats(files, year))
    return (found[0].origin, found[0].content) if found else None


def devkit_order(name: str, content: bytes) -> list[str]:
    """The low-level synsets of a 2010 or 2012 devkit's meta.mat (see its readme.txt), by ID; IDs above are ancestors."""
    try:
        synsets, identity = _synsets(content)
        leaves = [(int(s[identity]), str(s["WNID"])) for s in synsets if int(s["num_children"]) == 0]
    except Exception as error:  # noqa: BLE001  (scipy raises many kinds)
        raise AlexprepError(f"{name} is not a devkit's meta.mat ({error}): give --labels FILE instead") from None
    return [wnid for _, wnid in sorted(leaves)]


def devkit_words(name: str, content: bytes) -> dict[str, str]:
    """The words of every synset of a devkit's meta.mat, by WordNet ID; AlexprepError where it is none."""
    try:
        return {str(s["WNID"]): str(s["words"]) for s in _synsets(content)[0]}
    except Exception as error:  # noqa: BLE001  (scipy raises many kinds)
        raise AlexprepError(f"{name} is not a devkit's meta.mat ({error})") from None


def _devkit_ground_truth(files: Files, split: str, names: list[bytes], year: str) -> GroundTruth | None:
    """By a list of one ILSVRC ID a line, in ascending order of the images' names; meta.mat tells the synset of an ID.

    The meta.mat is of the list's year, and of the same devkit if it is there.
    """
    word = {"val": "validation"}.get(split, split)
    any_year = r"20\d\d"
    lists = _of_one_year(files, _devkit_files(files, rf"ILSVRC{year or any_year}_{word}_ground_truth\.txt", year))
    if not lists:
        return None
    metas = list(_meta_mats(files, lists[0].year))
    if not metas:
        raise AlexprepError(
            f"{lists[0].origin} numbers classes by ILSVRC ID: put the devkit's meta.mat of {lists[0].year}, or that devkit, "
            "beside it"
        )
    together = ((found, meta) for found in lists for meta in metas if found.place == meta.place)
    truth, meta = next(together, (lists[0], metas[0]))
    origin, synsets = truth.origin, devkit_order(meta.origin, meta.content)
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
    return GroundTruth(origin, classes)


def _of_one_year(files: Files, found: Iterable[DevkitFile]) -> list[DevkitFile]:
    """What was found, where all that tell a year tell the same one."""
    found = list(found)
    years = {file.year: file.origin for file in found if file.year}
    if len(years) > 1:
        raise AlexprepError(
            f"{files.display()} holds devkits of {' and '.join(sorted(years))} ({', '.join(sorted(years.values()))}), which "
            "number classes differently, and the images' names do not tell their year: move the other devkits away"
        )
    return found


def _meta_mats(files: Files, year: str) -> Iterator[DevkitFile]:
    """Those of a year, and those that tell none; of all years where `year` is empty."""
    for file in _devkit_files(files, r"meta\.mat", year):
        own = file.year or _year_within(file.content)
        if not year or own in ("", year):
            yield file._replace(year=own)


def _devkit_files(files: Files, pattern: str, year: str) -> Iterator[DevkitFile]:
    """The files whose names match in the root and in the devkits there, but for devkits whose name tells another year."""
    matches = re.compile(pattern.encode()).fullmatch
    for name, is_folder in files.entries():
        devkit = (_DEVKIT_FOLDER if is_folder else _DEVKIT_ARCHIVE).fullmatch(name)
        told = (devkit[1] or b"").decode() if devkit else ""
        if told and year and told != year:
            continue
        if devkit and is_folder:
            for file in filter(matches, files.file_names(name + b"/data")):
                path = name + b"/data/" + file
                yield DevkitFile(name, year_of([file]) or told, files.display(path), files.read(path))
        elif matches(name) and not is_folder:
            yield DevkitFile(b"", year_of([name]), files.display(name), files.read(name))
        elif devkit:
            content, shown = read_inflated(files, name), files.display(name)
            for member in members(reader_of(content), len(content), shown):
                if member.kind == "file" and matches(os.path.basename(member.name)):
                    data = content[member.offset : member.offset + member.size]
                    yield DevkitFile(name, year_of([member.name]) or told, f"{shown}/{as_text(member.name)}", data)
                    break


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
