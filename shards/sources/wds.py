"""Any webdataset: tars of KEY.jpg KEY.cls, in one folder, in split folders, or given by a brace pattern."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import operator
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import DATASET, DATASET_FORMAT, PLAN, PLAN_FORMAT, recorded_shards
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import UNLABELLED, Input, Location, numbered_classes, split_of
from alexprep.shards.sources.tars import ArchiveSource, Packed, packed_files, read_packed
from alexprep.shards.storage import Entry, Files

# -------------------- What makes a webdataset sample: which members belong together, which is the image, what the label says.


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
RAW_EXTENSION = "npy"  # of pixels in our own shards; in others' it may be anything
LABEL_EXTENSIONS = ("cls", "class", "label", "index", "json")  # in this order of preference
_JSON_LABELS = ("label", "cls", "class", "class_id")
_MAX_LABEL_BYTES = 2**20
_first = operator.itemgetter(0)


class Sample(NamedTuple):
    """Neighbouring members of one key.

    Attributes:
        key: their names up to the first dot of the file name.
        parts: the members by extension, in lower case.
        problem: why they make no sample; empty for nearly all.
    """

    key: bytes
    parts: dict[str, Location]
    problem: str = ""


class BadSampleError(Exception):
    """A sample without the one image or the one label that it needs: the message completes "sample KEY has …"."""


def samples_of(packed: Iterable[Packed]) -> Iterator[Sample]:
    """The samples of one shard: neighbouring members whose names agree up to the first dot of the file name.

    A key that comes back after others, and one with two parts of one name, are samples with a problem.
    """
    seen: set[bytes] = set()
    for key, group in itertools.groupby(((*split_name(name), location) for name, location in packed), _first):
        parts: dict[str, Location] = {}
        problem = "is scattered: its parts must be neighbours, or readers see two samples" if key in seen else ""
        for _, extension, location in group:
            if extension in parts:
                problem = problem or f"has two .{extension}: remove one"
            parts.setdefault(extension, location)
        seen.add(key)
        yield Sample(key, parts, problem)


def split_name(name: bytes) -> tuple[bytes, str]:
    """webdataset's rule: the extension begins at the first dot of the file name, whatever folders come before."""
    folder, slash, file = name.rpartition(b"/")
    first, _, rest = file.partition(b".")
    return folder + slash + first, rest.decode("utf-8", "backslashreplace").lower()


def image_of(sample: Sample, extensions: Container[str] = IMAGE_EXTENSIONS) -> Location:
    """The one image of a sample.

    Args:
        sample: of a shard.
        extensions: of images, in lower case.

    Raises:
        BadSampleError: it has none, or several.
    """
    images = [extension for extension in sample.parts if extension.rpartition(".")[2] in extensions]
    if len(images) != 1:
        raw = RAW_EXTENSION in sample.parts and not images
        raise BadSampleError(
            f"{len(images)} images among {', '.join(sample.parts)}, expected one"
            + ("; .npy counts only below the dataset.json of `alexprep shard`: name its folder" if raw else "")
        )
    return sample.parts[images[0]]


def label_of(sample: Sample, read: Callable[[int, int], bytes], ours: bool = False) -> str:
    """The label of a sample: a number from 0 to 2**20 - 1 without leading zeros, or a name; `UNLABELLED` for -1 in our shards.

    Args:
        sample: of a shard.
        read: (offset, size) → those bytes of the shard.
        ours: whether `alexprep shard` made the shards, to which -1 means that nobody knows the class.

    Raises:
        BadSampleError: it has none, several, or one that makes no sense.
    """
    extension = next((extension for extension in LABEL_EXTENSIONS if extension in sample.parts), None)
    if extension is None:
        raise BadSampleError(f"no label among {', '.join(sample.parts)}: expected one of {', '.join(LABEL_EXTENSIONS)}")
    _, _, offset, size = sample.parts[extension]
    if offset < 0:
        raise BadSampleError(f"a link or special file as its .{extension}: expected a file")
    if size > _MAX_LABEL_BYTES:
        raise BadSampleError(f"a label of {size:,} bytes: the limit is {_MAX_LABEL_BYTES:,}")
    try:
        text = read(offset, size).decode("utf-8").strip()
        if extension == "json":
            document = json.loads(text)
            label = next(document[key] for key in _JSON_LABELS if document.get(key) is not None)
            if isinstance(label, list | dict):
                raise BadSampleError("several labels: one is needed")
            if isinstance(label, float) and not math.isfinite(label):
                raise ValueError
            text = str(label)
            text.encode()  # JSON can write half a character, which no file can
    except (ValueError, AttributeError, StopIteration, RecursionError):
        raise BadSampleError(
            f"no label in its .{extension}: expected a number or a name"
            + (f" under {' or '.join(_JSON_LABELS)}" if extension == "json" else "")
        ) from None
    if ours and text == "-1":
        return UNLABELLED
    if text.removeprefix("-").isdecimal():
        if len(text) > 30 or not 0 <= int(text) < 2**20:
            raise BadSampleError(f"the label {text[:30]}, not between 0 and {2**20 - 1:,}")
        text = str(int(text))
    if not text:
        raise BadSampleError("an empty label")
    return text


def named_label(label: str, names: tuple[str, ...]) -> str:
    """The class name of a label, which is a number, one of the names, or `UNLABELLED`.

    Raises:
        BadSampleError: it is none of them.
    """
    if label.isdecimal() and int(label) < len(names):
        return names[int(label)]
    if label != UNLABELLED and label not in names:
        raise BadSampleError(
            f"the label {label[:30] if label.isdecimal() else repr(label[:30])}, none of the {len(names):,} classes of the dataset.json there"
        )
    return label


def class_names(present: set[str], names: tuple[str, ...], place: str) -> list[str]:
    """The class names by label: `names` if there are any; else the numbers up to the largest label; else the texts, sorted.

    Raises:
        AlexprepError: numbers and texts are mixed; it names `place`.
    """
    if names:
        return list(names)
    numbers = {name for name in present if name.isdecimal()}
    if not numbers:
        return sorted(present, key=str.encode)
    if len(numbers) != len(present):
        odd = min(present - numbers)
        raise AlexprepError(f"{place} has numbers as labels, but also {odd!r}: make them alike")
    return numbered_classes(present)


# -------------------- Any webdataset: tars of KEY.jpg KEY.cls, in one folder, in split folders, or given by a brace pattern.


_LOOK = 8  # members that are looked at to recognise a webdataset


@dataclass(frozen=True)
class Webdataset(ArchiveSource):
    """Other people's shards, or our own, to be sharded anew.

    Attributes:
        shards: (split, file), in ascending order.
        names: the class names by label, where the dataset.json of `alexprep shard` tells them.
    """

    shards: tuple[tuple[str, bytes], ...] = ()
    names: tuple[str, ...] | None = None
    layout = "webdataset"
    expects = "tars of KEY.jpg and KEY.cls, in SOURCE or in SOURCE/train and SOURCE/val"

    @classmethod
    def at(cls, files: Files, name: bytes) -> Webdataset | None:
        """The shards in the root and its split folders, or those that `name` (a tar, or a brace pattern) stands for."""
        if name:
            meant = braces(name) if b"{" in name and Entry(name, False) not in files.entries() else [name]
            found = [(split_of(os.path.basename(path)) or "train", path) for path in meant]
        else:
            found = [(split or "train", path) for split, path in shards_below(files)]
            _check_complete(files, [path for _, path in found])
        if not found or not all(path.endswith(b".tar") for _, path in found):
            return None
        try:
            if not _is_webdataset(files, found[0][1]):
                return None
        except FileNotFoundError:
            raise AlexprepError(f"SOURCE {files.display(found[0][1])} does not exist") from None
        return cls(files, tuple(sorted(found)), None if name else recorded_classes(files))

    def inputs(self) -> Iterator[Input]:
        """Every sample in the order of the shards.

        Raises:
            AlexprepError: a shard is damaged, or a sample lacks its image or its label, or has two of them.
        """
        ours = self.names is not None
        images = (*IMAGE_EXTENSIONS, RAW_EXTENSION) if ours else IMAGE_EXTENSIONS
        for split, path in self.shards:
            with self.files.reading(path) as read:
                for sample in samples_of(packed_files(self.files, path)):
                    where = f"{self.files.display(path)}: sample {sample.key.decode('utf-8', 'backslashreplace')}"
                    if sample.problem:
                        raise AlexprepError(f"{where} {sample.problem}")
                    try:
                        image, label = image_of(sample, images), label_of(sample, read, ours)
                        class_name = label if self.names is None else named_label(label, self.names)
                    except BadSampleError as bad:
                        raise AlexprepError(f"{where} has {bad}") from None
                    yield Input(split, class_name, image)

    def classes(self, present: set[str]) -> list[str]:
        """See `class_names`."""
        return class_names(present, self.names or (), self.files.display())

    def read(self, location: Location) -> bytes | NDArray[np.uint8]:
        """See `Source`; pixels where the shards are our own of `--format raw`."""
        data = read_packed(self.files, location)
        if not location.member.lower().endswith(b"." + RAW_EXTENSION.encode()):
            return data
        from alexprep.shards.image_codec import read_raw

        pixels = read_raw(data)
        if pixels is None or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise OSError("no .npy of uint8 pixels (height, width, 3)")
        return pixels

    def covers(self, target: str) -> bool:
        """Whether `target` lies in a folder of shards, or in one that would be looked into."""
        below = self.files.below(target)
        if below and split_of(below[0]):
            return True
        return any(
            self.files.below(target, folder) is not None
            for folder in {os.path.dirname(path) for _, path in self.shards}
        )


def recorded_classes(files: Files) -> tuple[str, ...] | None:
    """The class names by label that our dataset.json in the root tells; None where there is none, or somebody else's.

    Raises:
        AlexprepError: it is ours, and damaged.
    """
    with _reading_ours(files, DATASET):
        document = _ours(files, DATASET, DATASET_FORMAT)
        if document is None:
            return None
        classes = tuple(document["classes"])
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("a class name is no text")
        return classes


def _check_complete(files: Files, tars: list[bytes]) -> None:
    """Sees to it that a data set of ours in the root has the tars that it was finished with: others hold other images.

    Raises:
        AlexprepError: it is unfinished or damaged, lacks a tar, or has one too many.
    """
    shown = files.display()
    with _reading_ours(files, DATASET):
        document = _ours(files, DATASET, DATASET_FORMAT)
        wanted = None
        if document is not None and document.get("splits"):
            wanted = {record["name"].encode() + b".tar" for record in recorded_shards(document)}
    if document is None:
        with _reading_ours(files, PLAN):
            if _ours(files, PLAN, PLAN_FORMAT) is not None:
                raise AlexprepError(
                    f"SOURCE {shown} holds an unfinished data set: run the `alexprep shard` that began it again to finish it, or "
                    "name the tars that are meant by a pattern such as 'train-{000000..000007}.tar'"
                )
    if wanted is None:
        return
    present = {os.path.basename(path) for path in tars}
    for odd, words in (
        (
            wanted - present,
            f"is missing, but dataset.json names it: mend it with `alexprep verify {shown} --repair IMAGES`",
        ),
        (present - wanted, "is none of those that dataset.json names: move it away"),
    ):
        if odd:
            raise AlexprepError(f"SOURCE {shown}: {min(odd).decode('utf-8', 'backslashreplace')} {words}")


@contextlib.contextmanager
def _reading_ours(files: Files, name: str) -> Iterator[None]:
    """Around what takes a document of ours at its word."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AlexprepError(
            f"{files.display(name.encode())} is damaged ({error!r}): run the `alexprep shard` that made it again, or "
            "delete it if the class names do not matter"
        ) from None


def _ours(files: Files, name: str, form: str) -> dict[str, Any] | None:
    """A JSON document in the root that says to be of our format `form`; None for anybody else's, or none."""
    if all(entry.name != name.encode() for entry in files.entries()):
        return None
    content = files.read(name.encode())
    if form.encode() not in content:
        return None
    document: dict[str, Any] = json.loads(content)
    return document if document["format"] == form else None


def shards_below(files: Files) -> Iterator[tuple[str | None, bytes]]:
    """(split, path) of the tars in the root and in its split folders; None where neither tar nor folder tells a split."""
    entries = files.entries()
    for entry in entries:
        if not entry.is_folder and entry.name.endswith(b".tar"):
            yield split_of(entry.name), entry.name
    for entry in entries:
        if entry.is_folder and (split := split_of(entry.name)):
            for below in files.entries(entry.name):
                if not below.is_folder and below.name.endswith(b".tar"):
                    yield split, os.path.join(entry.name, below.name)


def _is_webdataset(files: Files, path: bytes) -> bool:
    """Whether the first members form a sample."""
    parts: dict[bytes, set[str]] = {}
    try:
        for packed in itertools.islice(packed_files(files, path), _LOOK):
            key, extension = split_name(packed.name)
            parts.setdefault(key, set()).add(extension)
    except AlexprepError:
        if not parts:  # a damaged first header: whatever reads it will say so
            return False
    return any(found & set(LABEL_EXTENSIONS) and len(found) > 1 for found in parts.values())


def braces(pattern: bytes) -> list[bytes]:
    """Expands {000..003} and {a,b}, as shells do.

    >>> braces(b"train-{08..10}.tar")
    [b'train-08.tar', b'train-09.tar', b'train-10.tar']
    """
    match = re.search(rb"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(rb"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        values = [b"%0*d" % (len(first), n) for n in range(int(first), min(int(last), int(first) + 10**6) + 1)]
    else:
        values = match[1].split(b",")
    return [one for value in values for one in braces(pattern[: match.start()] + value + pattern[match.end() :])]
