"""What makes a webdataset sample: which members belong together, which is the image, what the label says."""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.archive import Packed
from alexprep.shards.sources.base import UNLABELLED, Location, numbered_classes

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
