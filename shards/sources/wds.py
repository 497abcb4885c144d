"""Webdatasets: tars whose neighbouring members KEY.jpg and KEY.cls form samples; what a sample is, and the source.

The tars lie in one folder, in split folders, or are given by a brace pattern. Tars of class folders are in `tars`; reading other
people's tars at random, as a training does, is the business of `webdataset_index`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import DATASET, DATASET_FORMAT, PLAN, PLAN_FORMAT, recorded_shards
from alexprep.shards.errors import AlexprepError
from alexprep.shards.metadata import joined, parsed
from alexprep.shards.sources.base import (
    BESIDE,
    HIDDEN,
    NO_CHOICES,
    OUR_DATASET,
    SAMPLE_PART,
    UNLABELLED,
    Account,
    Choices,
    Input,
    Location,
    Part,
    Source,
    numbered_classes,
    parts_of,
    reference_to,
    split_of,
)
from alexprep.shards.sources.labels import LABEL_FIELDS, LabelError, check_range, is_number, label_in, label_name
from alexprep.shards.sources.picture_names import READ
from alexprep.shards.sources.tars import ArchiveSource, is_hidden, packed_files
from alexprep.shards.sources.tree import pass_over_rest
from alexprep.shards.storage import Entry, Files, as_text

RAW_EXTENSION = "npy"  # of pixels in our own shards; in others' it may be anything
LABEL_EXTENSIONS = ("cls", "class", "label", "index", "json")  # in this order of preference
_LABELLED_JSON = "json with the label"  # what a reference to metadata calls a .json that tells the label too
_MAX_LABEL_BYTES = 2**20
_USUAL_LABEL_BYTES = 64
_LOOK = 8  # members that are looked at to recognise a webdataset


@dataclass(frozen=True)
class Webdataset(ArchiveSource):
    """Other people's shards, or our own, to be sharded anew.

    Attributes:
        shards: (split, file), in ascending order.
        names: the class names by label, where the dataset.json of `alexprep shard` tells them.
        unlabelled: whether no label is read, as the user or that dataset.json says.
    """

    shards: tuple[tuple[str, bytes], ...] = ()
    names: tuple[str, ...] | None = None
    unlabelled: bool = False
    layout = "webdataset"
    expects = "tars of KEY.jpg and KEY.cls, in SOURCE or in SOURCE/train and SOURCE/val"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the tars in the root and its split folders, or those that `name`, a tar or a pattern, stands for."""
        if name:
            meant = braces(name) if b"{" in name and Entry(name, False) not in files.entries() else [name]
            found = [(split_of(os.path.basename(path)) or "train", path) for path in meant]
        else:
            found = [(split or "train", path) for split, path in shards_below(files)]
            _check_complete(files, [path for _, path in found])
        if not found or not all(path.endswith(b".tar") for _, path in found):
            return None
        try:
            names = None if name else recorded_classes(files)
            if names is None and not _is_webdataset(files, found[0][1], choices):
                return None
        except FileNotFoundError:
            raise AlexprepError(f"SOURCE {files.display(found[0][1])} does not exist") from None
        unlabelled = bool(choices.unlabelled) or (names is not None and _recorded_unlabelled(files))
        return cls(files, tuple(sorted(found)), names, unlabelled, choices=choices, whole=not name)

    def inputs(self, account: Account) -> Iterator[Input]:
        """Every sample in the order of the shards."""
        ours = self.names is not None
        images = (*READ, RAW_EXTENSION) if ours else READ
        for split, path in self.shards:
            others, first = 0, ""  # of a shard's members that are no image
            shown = self.files.display(path)
            with self.files.reading(path) as read:
                for sample in samples_of(self._counted(path, account)):
                    try:
                        image = image_of(sample, images)
                        label = UNLABELLED if self.unlabelled else label_of(sample, read, ours)
                        metadata = reference_to(_along(sample, image), image)
                        class_name = label if self.names is None else named_label(label, self.names)
                    except BadSampleError as bad:
                        raise AlexprepError(f"{shown}: sample {as_text(sample.key)} {bad}") from None
                    others += len(sample.parts) - 1
                    if not first:
                        other = next((part for part in sample.parts.values() if part is not image), None)
                        first = f"{shown}/{as_text(other.member)}" if other else ""
                    yield Input(split, class_name, image, metadata)
            if others:
                account.pass_over(SAMPLE_PART, first, others)
        if self.whole:
            rule = OUR_DATASET if ours else BESIDE
            pass_over_rest(self.files, {path for _, path in self.shards}, account, rule)

    def _counted(self, path: bytes, account: Account) -> Iterator[Location]:
        """The members of a shard as `packed_files` gives them, each counted as found; hidden ones are passed over."""
        for location in packed_files(self.files, path, hidden=True):
            account.found += 1
            if not is_hidden(location.member):
                yield location
            else:
                account.pass_over(HIDDEN, f"{self.files.display(path)}/{as_text(location.member)}")

    def classes(self, present: set[str]) -> list[str]:
        """See `class_names`."""
        if self.unlabelled:
            return []
        return class_names(present, self.names or (), self.files.display())

    def labelled(self) -> bool:
        """See `Source`."""
        return not self.unlabelled

    def metadata(self, location: Location, reference: bytes) -> dict[str, Any]:
        """See `Source`; of a .json that tells the label all but the label."""
        parts = dict(self._part(part) for part in parts_of(reference, location))
        if _LABELLED_JSON not in parts:
            return joined(parts.items())
        values = parsed(parts.pop(_LABELLED_JSON), ".json")
        name = _label_field(values)
        rest = {key: value for key, value in values.items() if key != name}
        return joined([("json", json.dumps(rest).encode()), *parts.items()])

    def words(self, present: set[str]) -> dict[str, str]:
        """As our dataset.json has them, or a list beside the shards."""
        if self.names is None:
            return super().words(present)
        with _our_document(self.files, DATASET, DATASET_FORMAT) as dataset:
            words = (dataset or {}).get("words") or ()
            return {name: str(text) for name, text in zip(self.names, words, strict=False) if text}

    def read(self, location: Location) -> bytes | NDArray[np.uint8]:
        """See `Source`; pixels where the shards are our own of `--format raw`."""
        data = super().read(location)
        raw = location.member.lower().endswith(b"." + RAW_EXTENSION.encode())
        if not raw or not isinstance(data, bytes):
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
    """The class names by label that our dataset.json in the root tells; None where there is none, or somebody else's."""
    with _our_document(files, DATASET, DATASET_FORMAT) as dataset:
        if dataset is None:
            return None
        classes = tuple(dataset["classes"])
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("a class name is no text")
        return classes


def _recorded_unlabelled(files: Files) -> bool:
    """Whether our dataset.json in the root says that its samples have no labels."""
    with _our_document(files, DATASET, DATASET_FORMAT) as dataset:
        return bool(dataset and dataset.get("unlabelled"))


def _check_complete(files: Files, tars: list[bytes]) -> None:
    """Sees to it that a data set of ours in the root has the tars that it was finished with: others hold other images."""
    shown = files.display()
    with _our_document(files, DATASET, DATASET_FORMAT) as dataset:
        if dataset is not None and not dataset.get("splits"):
            return
        wanted = {record["name"].encode() + b".tar" for record in recorded_shards(dataset)} if dataset else set()
    if dataset is None:
        with _our_document(files, PLAN, PLAN_FORMAT) as plan:
            if plan is None:
                return
        raise AlexprepError(
            f"SOURCE {shown} holds an unfinished data set: run the `alexprep shard` that began it again to finish it, or "
            "name the tars that are meant by a pattern such as 'train-{000000..000007}.tar'"
        )
    present = {os.path.basename(path) for path in tars}
    if wanted - present:
        raise AlexprepError(
            f"SOURCE {shown}: {as_text(min(wanted - present))} is missing, but dataset.json names it: mend it with "
            f"`alexprep verify {shown} --repair IMAGES`"
        )
    if present - wanted:
        raise AlexprepError(
            f"SOURCE {shown}: {as_text(min(present - wanted))} is none of those that dataset.json names: move it away"
        )


@contextlib.contextmanager
def _our_document(files: Files, name: str, form: str) -> Iterator[dict[str, Any] | None]:
    """A JSON document in the root that says to be of our format `form`; None for anybody else's, or none.

    What fails while it is taken at its word is an AlexprepError: it is damaged.
    """
    try:
        raw = files.read(name.encode()) if name.encode() in files.file_names() else b""
        document = json.loads(raw) if form.encode() in raw else None
        yield document if document is not None and document["format"] == form else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AlexprepError(
            f"{files.display(name.encode())} is damaged ({error!r}): run the `alexprep shard` that made it again, or "
            "delete it if the class names do not matter"
        ) from None


def shards_below(files: Files) -> Iterator[tuple[str | None, bytes]]:
    """(split, path) of the tars in the root and in its split folders; None where neither tar nor folder tells a split."""
    for name in files.file_names():
        if name.endswith(b".tar"):
            yield split_of(name), name
    for folder in files.folder_names():
        if split := split_of(folder):
            yield from (
                (split, os.path.join(folder, name)) for name in files.file_names(folder) if name.endswith(b".tar")
            )


def _is_webdataset(files: Files, path: bytes, choices: Choices) -> bool:
    """Whether the first members form a sample: a picture with its label, or with anything else where no label is wanted."""
    parts: dict[bytes, set[str]] = {}
    try:
        for location in itertools.islice(packed_files(files, path), _LOOK):
            key, extension = split_name(location.member)
            parts.setdefault(key, set()).add(extension)
    except AlexprepError:
        if not parts:  # a damaged first header: whatever reads it will say so
            return False
    wanted = set(READ if choices.unlabelled else LABEL_EXTENSIONS)
    return any(found & wanted and len(found) > 1 for found in parts.values())


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


# What makes a sample


class Sample(NamedTuple):
    """Neighbouring members of one key.

    Attributes:
        key: their names up to the first dot of the file name.
        parts: the members by extension, in lower case.
        problem: why they make no sample, as the end of the sentence "sample KEY …"; empty for nearly all.
    """

    key: bytes
    parts: dict[str, Location]
    problem: str = ""


def _along(sample: Sample, image: Location) -> Iterator[Part]:
    """The parts of a sample that go along with its image: those that are not its label."""
    label = label_part(sample)
    for extension, location in sample.parts.items():
        if location is not image and location.offset >= 0 and (extension != label or extension == "json"):
            # Without the name, by which pixels are told from bytes.
            yield Part(_LABELLED_JSON if extension == label else extension, location._replace(member=b""))


class BadSampleError(Exception):
    """A sample that cannot be used, as without the one image or label that it needs: the message completes "sample KEY …"."""


def samples_of(packed: Iterable[Location]) -> Iterator[Sample]:
    """The samples of one shard: neighbouring members whose names agree up to the first dot of the file name.

    A key that comes back after others, and one with two parts of one name, are samples with a problem.
    """
    seen: set[bytes] = set()
    for key, group in itertools.groupby(
        ((*split_name(location.member), location) for location in packed), lambda part: part[0]
    ):
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
    return folder + slash + first, as_text(rest).lower()


def image_of(sample: Sample, extensions: Container[str] = READ) -> Location:
    """The one image of a sample, by its extension in lower case; BadSampleError where it has none, or several."""
    if sample.problem:
        raise BadSampleError(sample.problem)
    images = [extension for extension in sample.parts if extension.rpartition(".")[2] in extensions]
    if len(images) != 1:
        raw = RAW_EXTENSION in sample.parts and not images
        raise BadSampleError(
            f"has {len(images)} images among {', '.join(sample.parts)}, expected one"
            + ("; .npy counts only below the dataset.json of `alexprep shard`: name its folder" if raw else "")
        )
    return sample.parts[images[0]]


def label_of(sample: Sample, read: Callable[[int, int], bytes], ours: bool = False) -> str:
    """The label of a sample, a number or a name as `labels.label_in` has it.

    In shards of `alexprep shard` (`ours`) it is `UNLABELLED` for -1. BadSampleError where there is none, or one that makes no
    sense.
    """
    extension = label_part(sample)
    if extension is None:
        raise BadSampleError(
            f"has no label among {', '.join(sample.parts)}: expected one of {', '.join(LABEL_EXTENSIONS)}"
        )
    _, _, offset, size = sample.parts[extension]
    if offset < 0:
        raise BadSampleError(f"has a link or special file as its .{extension}: expected a file")
    if size > _MAX_LABEL_BYTES:
        raise BadSampleError(f"has a label of {size:,} bytes: the limit is {_MAX_LABEL_BYTES:,}")
    data = read(offset, size)
    if ours and data == b"-1":
        return UNLABELLED
    try:
        if extension == "json":
            label = _numbered_or_named(_label_in_json(data))
        else:
            label = (_label_in_bytes if len(data) <= _USUAL_LABEL_BYTES else _numbered_or_named)(data)
    except LabelError as error:
        raise BadSampleError(f"has no label in its .{extension}: {error}") from None
    return label


def label_part(sample: Sample) -> str | None:
    """The extension of the part that tells the label; None where none does."""
    return next((extension for extension in LABEL_EXTENSIONS if extension in sample.parts), None)


def _numbered_or_named(value: Any) -> str:
    """As `label_in`, but a number that is too high is a LabelError."""
    label = label_in(value)
    check_range(label)
    return label


_label_in_bytes = functools.lru_cache(maxsize=65_536)(_numbered_or_named)  # the same come again and again


def _label_in_json(data: bytes) -> Any:
    """The value of the field that holds the label; LabelError where there is none, or no JSON."""
    try:
        document = json.loads(data.decode("utf-8"))
        name = _label_field(document)
        if name is None:
            raise LabelError(f"expected a field {', '.join(LABEL_FIELDS[:-1])} or {LABEL_FIELDS[-1]}")
        label = document[name]
        if isinstance(label, str):
            label.encode()  # JSON can write half a character, which no file can
    except (ValueError, AttributeError, RecursionError):
        raise LabelError(f"expected JSON in UTF-8 with a field such as {LABEL_FIELDS[0]}") from None
    return label


def _label_field(document: dict[str, Any]) -> str | None:
    """The field of a document that holds the label; None for none."""
    return label_name((key for key, value in document.items() if value is not None), LABEL_FIELDS)


def named_label(label: str, names: tuple[str, ...]) -> str:
    """The class name of a label, which must be a number, one of the names, or `UNLABELLED`."""
    if is_number(label) and int(label) < len(names):
        return names[int(label)]
    if label != UNLABELLED and label not in names:
        raise BadSampleError(
            f"has the label {label[:30] if is_number(label) else repr(label[:30])}, none of the {len(names):,} classes of the dataset.json there"
        )
    return label


def class_names(present: set[str], names: tuple[str, ...], place: str) -> list[str]:
    """The class names by label: `names` if there are any; else the numbers up to the largest label; else the texts, sorted.

    Numbers and texts together are an AlexprepError, which names `place`.
    """
    if names:
        return list(names)
    numbers = {name for name in present if is_number(name)}
    if not numbers:
        return sorted(present, key=str.encode)
    if len(numbers) != len(present):
        odd = min(present - numbers)
        raise AlexprepError(f"{place} has numbers as labels, but also {odd!r}: make them alike")
    return numbered_classes(present)
