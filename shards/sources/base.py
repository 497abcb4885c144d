"""What a source is: a list of inputs in a fixed order, each of which can be read on its own.

A new source is a new module beside this one, with a subclass of `Source` and a line in `LAYOUTS`. It needs three things:

1. `at`: recognises its own form by evidence that fits nothing else, and returns the source, or None;
2. `inputs`: lists every image once, in an order that any two listings share, and tells the `Account` of all else that it met;
3. `read`: gives one of them, as encoded bytes or as pixels; by default the bytes at the input's location.

Where values go along with an image, `inputs` gives each a short reference to them (`Input.metadata`), and `metadata` the values for it;
files or members beside the image need no more than `reference_to`. `classes`, `covers`, `resident_bytes` and `window_inputs` are overridden where the defaults do not hold. Turning images into shards is no matter
of a source: see `conversion`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.metadata import MAX_PART_BYTES, MetadataError, joined
from alexprep.shards.sources.class_words import words_beside
from alexprep.shards.sources.ground_truth import find_meta_mat
from alexprep.shards.storage import Files, as_text

# What people call their splits, and what they are called in a dataset.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}
# The class name of images whose class nobody tells (the test images of ILSVRC 2012) or asks for; their label is -1.
UNLABELLED = ""


class Location(NamedTuple):
    """Where a source finds one input.

    Attributes:
        path: the file, below the source's root.
        member: its name inside that file; empty where the input is the whole file.
        offset: of the input's first byte in the file (after decompression, where it is gzipped).
        size: its bytes; -1 for all to the end.
    """

    path: bytes
    member: bytes = b""
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        """For ledgers and messages; bytes that are not UTF-8 are written as escapes."""
        return as_text(b"/".join(part for part in (self.path, self.member) if part))


class Input(NamedTuple):
    """One image to be converted.

    Attributes:
        split: that it belongs to.
        class_name: of its class, or `UNLABELLED`.
        location: where its source finds it.
        metadata: where its source finds what goes along with it, in the source's own words, which the plan keeps; empty for nothing.
    """

    split: str
    class_name: str
    location: Location
    metadata: bytes = b""


class Part(NamedTuple):
    """A file or member that goes along with an image: its extension in lower case, and where it lies."""

    extension: str
    location: Location


def reference_to(parts: Iterable[Part], image: Location) -> bytes:
    """An `Input.metadata` for parts that lie anywhere; `Source.metadata` reads them."""
    fields: list[bytes] = []
    for extension, place in parts:
        path = b"" if place.path == image.path else place.path
        fields += [extension.encode(), path, place.member, b"%d" % place.offset, b"%d" % place.size]
    return b"\0".join(fields)


def parts_of(reference: bytes, image: Location) -> Iterator[Part]:
    """What `reference_to` was given."""
    fields = reference.split(b"\0")
    for extension, path, member, offset, size in zip(*(fields[at::5] for at in range(5)), strict=True):
        yield Part(extension.decode(), Location(path or image.path, member, int(offset), int(size)))


# Rules by which files are passed over: what a listing says instead of making an input of them.
HIDDEN = "hidden: the name begins with a dot"
SYSTEM = "made by the system, such as Thumbs.db and __MACOSX"
SIDECAR = "no picture by its ending, such as lists, readmes and annotations"
ARCHIVE = "an archive or data file, which is not looked into here"
LIST = "a list that was read"
UNLISTED = "a picture that no list names"
BESIDE = "beside what this layout reads"
NO_CLASS = "a picture in no class folder"
FOLDER_LINK = "a link to a folder"
OUR_DATASET = "in a dataset of alexprep"
BESIDE_PICTURE = "metadata beside a picture, KEY.json or KEY.txt"
SAMPLE_PART = "a sample's label or other part that is no picture"
NOT_LISTED = "a picture that no list names"
NO_LABEL = "a row without a label, in a split whose other rows have one"
NO_PICTURE = "a record without a picture"
LIMITED = "beyond --limit"

_NAMES_KEPT = 5  # of the files that one rule passes over


@dataclass
class PassedOver:
    """How many files one rule passed over, and the first few of their names."""

    count: int = 0
    names: list[str] = field(default_factory=list)


@dataclass
class Account:
    """What a listing met: every file, row or member of an archive is an input, or passed over by a named rule.

    An archive counts by its members and a table by its rows, where these are listed; otherwise as one file.

    Attributes:
        found: how many there are, as the listing counted them before it decided anything.
        passed_over: by rule.
        warnings: sentences that need no decision, each said once to the user.
    """

    found: int = 0
    passed_over: dict[str, PassedOver] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def pass_over(self, rule: str, name: str | tuple[Callable[[bytes], str], bytes, bytes], count: int = 1) -> None:
        """Notes that `count` files are passed over by `rule`, of which one is called `name`.

        Of millions of files few names are kept, so it may be what writes a path, and the folder and name that make it.
        """
        passed = self.passed_over.setdefault(rule, PassedOver())
        passed.count += count
        if len(passed.names) < _NAMES_KEPT:
            passed.names.append(name if isinstance(name, str) else name[0](os.path.join(*name[1:])))

    def take(self, other: Account) -> None:
        """Takes in what another account found and passed over; its warnings are left to the caller."""
        self.found += other.found
        for rule, passed in other.passed_over.items():
            own = self.passed_over.setdefault(rule, PassedOver())
            own.count += passed.count
            own.names += passed.names[: _NAMES_KEPT - len(own.names)]

    def make_relative(self, root: str) -> None:
        """Writes the names relative to the root: where a source lies is no part of what it holds."""
        for passed in self.passed_over.values():
            passed.names = [name.removeprefix(f"{root}/") for name in passed.names]

    @property
    def passed_over_count(self) -> int:
        """By all rules together."""
        return sum(passed.count for passed in self.passed_over.values())


@dataclass(frozen=True)
class Choices:
    """What the user says of a source, where looking at it would leave a doubt.

    Attributes:
        split_folders: (split, folder below the root), one or more of each split; () says that no folder means a split; None looks.
        class_depth: how many folders below a split's folder the class folders lie, 1 for directly in it; "leaf" makes every
            folder that holds pictures a class; None looks.
        columns: (what it is for, its name) of columns of a table: "image" for pictures themselves, "path", "label", "split"; what is
            not named is looked for.
        unlabelled: True says that no picture has a label, whatever lies around it; None looks for labels.
    """

    split_folders: tuple[tuple[str, str], ...] | None = None
    class_depth: int | Literal["leaf"] | None = None
    columns: tuple[tuple[str, str], ...] = ()
    unlabelled: Literal[True] | None = None

    def column(self, use: str) -> str | None:
        """The name of the column for a use; None where it is to be looked for."""
        return dict(self.columns).get(use)


NO_CHOICES = Choices()


def as_options(choices: Choices) -> str:
    """The options of the command line that say the same."""
    words = []
    if choices.split_folders is not None:
        folders = ",".join(f"{split}={folder}" for split, folder in choices.split_folders) or "none"
        words.append(f"--split-folders {shlex.quote(folders)}")
    if choices.class_depth is not None:
        words.append(f"--class-depth {choices.class_depth}")
    if choices.columns:
        words.append(f"--columns {shlex.quote(','.join(f'{use}={column}' for use, column in choices.columns))}")
    if choices.unlabelled:
        words.append("--unlabelled")
    return " ".join(words)


def as_json(choices: Choices) -> dict[str, Any]:
    """Choices as plan.json has them: what was not chosen is absent."""
    folders: dict[str, Any] = {}  # a split's folder, or the list of them
    for split, folder in choices.split_folders or ():
        known = folders.get(split, [])
        folders[split] = [*([known] if isinstance(known, str) else known), folder] if split in folders else folder
    given = {
        "split_folders": None if choices.split_folders is None else folders,
        "class_depth": choices.class_depth,
        "columns": dict(choices.columns) or None,
        "unlabelled": choices.unlabelled,
    }
    return {name: value for name, value in given.items() if value is not None}


def choices_of(document: Mapping[str, Any]) -> Choices:
    """What `as_json` wrote, from plan.json or dataset.json."""
    folders: dict[str, str | list[str]] | None = document.get("split_folders")
    pairs = ((split, [some] if isinstance(some, str) else some) for split, some in (folders or {}).items())
    return Choices(
        None if folders is None else tuple((split, folder) for split, some in pairs for folder in some),
        document.get("class_depth"),
        tuple(document.get("columns", {}).items()),
        document.get("unlabelled"),
    )


@dataclass(frozen=True)
class Source:
    """A place that images come from; one subclass a layout. It is sent to worker processes, so it holds no open file.

    Attributes:
        files: where its files lie.
        choices: what the user said of it, which another reading of it needs again.
        whole: whether all of the root is meant, so that what else lies there goes to the account, rather than one file in it.
        evidence: why it is read as it is, in a few words for the user; empty where the layout's name says it.
        layout: the name for `--layout`, recorded in the plan.
        expects: what this layout looks like, for messages.
    """

    files: Files
    choices: Choices = field(default=NO_CHOICES, kw_only=True)
    whole: bool = field(default=False, kw_only=True)
    evidence: str = field(default="", kw_only=True, compare=False)
    layout: ClassVar[str]
    expects: ClassVar[str]

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """The source of this layout in the root of `files`, or that the file `name` there is or stands for; None for none.

        What is of this layout, and damaged, incomplete, or to be understood in two ways, is an AlexprepError.
        """
        raise NotImplementedError

    def inputs(self, account: Account) -> Iterator[Input]:
        """Every input once, in an order that any two listings share: by split, class, and then name, as bytes.

        All else that is met goes to the `account`, which is complete when the inputs are at their end. Where the source is damaged,
        or its labels make no sense, an AlexprepError names the place.
        """
        raise NotImplementedError

    def read(self, location: Location) -> bytes | NDArray[np.uint8]:
        """One input: its encoded bytes, or its pixels, uint8 (H, W, 3) RGB or (H, W) grey; OSError where it cannot be had."""
        return self.files.read(location.path, location.offset, location.size)

    def metadata(self, location: Location, reference: bytes) -> dict[str, Any]:
        """What goes along with an input, by name, of the kinds that `alexprep.shards.metadata` writes.

        By default of the parts of `reference_to`: see `joined`. MetadataError where it is damaged, OSError where it cannot be had.
        """
        return joined(self._part(part) for part in parts_of(reference, location))

    def _part(self, part: Part) -> tuple[str, bytes]:
        if part.location.size > MAX_PART_BYTES:
            raise MetadataError(f".{part.extension} has {part.location.size:,} bytes, more than {MAX_PART_BYTES:,}")
        data = self.read(part.location)
        assert isinstance(data, bytes)
        return part.extension, data

    def classes(self, present: set[str]) -> list[str]:
        """The class names by label, by this source's own numbering; those `present` in the order of `sorted_names` without one."""
        return sorted_names(present)

    def covers(self, target: str) -> bool:
        """Whether files written below `target`, a path or URL, would become inputs."""
        return False

    def resident_bytes(self) -> int:
        """Memory that reading keeps in each worker."""
        return 0

    def check_alone(self) -> None:
        """Raises AmbiguousSourceError where what lies beside may be meant as well. Asked where the layout was found by looking."""

    def window_inputs(self) -> int:
        """How many inputs' groups a worker keeps at once, where inputs of one path and offset form a group that is read as a whole.

        The inputs of a group are listed one after the other. 0 where each input is read by itself.
        """
        return 0

    def labelled(self) -> bool:
        """Whether its samples get a label, if only -1; where not, they have no KEY.cls."""
        return not self.choices.unlabelled

    def year(self) -> str:
        """Of ILSVRC's images, as "2012", whose devkit is meant; empty where nothing tells it."""
        return ""

    def words(self, present: set[str]) -> dict[str, str]:
        """What some of the classes `present` mean in words, for people: by what lies beside the images, where that tells WordNet IDs."""
        return words_beside(self.files, self.devkit, present)

    def devkit(self) -> tuple[str, bytes] | None:
        """The name and content of a devkit's meta.mat, where there is one beside the images."""
        return find_meta_mat(self.files, self.year())


def not_installed(what: str, error: ImportError) -> AlexprepError:
    """The refusal of a source that needs a package of the extra "sources"; `what` begins the sentence "WHAT needs …"."""
    return AlexprepError(f"{what} needs the package {error.name} ({error}): pip install 'alexprep[sources]'")


def sorted_names(present: Iterable[str]) -> list[str]:
    """Names in ascending order: as numbers where all of them are whole numbers, otherwise as bytes.

    >>> sorted_names({"10", "9", "1"}), sorted_names({"10", "9", "x"})
    (['1', '9', '10'], ['10', '9', 'x'])
    """
    names = sorted(present, key=str.encode)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


def numbered_classes(present: set[str]) -> list[str]:
    """The names "0" to the highest of `present`, all of which are numbers, in numeric order."""
    return [str(label) for label in range(1 + max(map(int, present), default=-1))]


def class_name_of(folder: bytes, known: dict[str, bytes], place: str) -> str:
    """The name of a class folder as text, added to those that are `known`; bytes that are not UTF-8 are written as escapes.

    Another folder that has that name already, written out as such escapes, is an AlexprepError.
    """
    name = as_text(folder)
    if known.setdefault(name, folder) != folder:
        raise AlexprepError(
            f"{place} holds the folders {known[name]!r} and {folder!r}, both the class {name}: rename one"
        )
    return name


def split_of(name: bytes) -> str | None:
    """The split that a folder or file named so stands for, by the one word of its name that means a split.

    >>> split_of(b"validation"), split_of(b"imagenet-train-000012.tar"), split_of(b"pictures")
    ('val', 'train', None)
    """
    words = re.split(r"[^a-z]+", name.decode("utf-8", "replace").lower())
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 else None
