"""What published sets share whose classes or splits stand in lists of their publisher; the sets themselves are in `published`.

The lists are compared with the files that are there: each file is an input, or passed over by a rule, and where lists and folders
disagree, an error names both.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alexprep.shards.dataset_format import PLAN
from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.sources.base import (
    BESIDE,
    LIST,
    NO_CHOICES,
    UNLISTED,
    Account,
    Choices,
    Input,
    Location,
    Source,
)
from alexprep.shards.sources.tree import Folder, read_tree, with_rules
from alexprep.shards.storage import Entry, Files, as_text

WRAPPERS = 2  # folders around a set that hold nothing else
_BEGINNING_BYTES = 4096  # of a list, which show its form
_AGAIN = "download it again"
MATLAB = rb"MATLAB 5\.0 MAT-file"  # how its files begin
ANY = rb""  # any beginning
Marks = Mapping[bytes, bytes | None]  # forms are patterns, compiled when they are first asked for
_Place = tuple[str, str]  # split and class


class Labels:
    """What the lists of a set say, by paths below the set's folder.

    Attributes:
        pictures: the split and class of each picture that a list names; those that are found are taken out.
        folders: the split and class of all pictures below a folder, where no list has to name them.
        read: the lists that were read.
    """

    def __init__(self, files: Files, folder: bytes) -> None:
        """Nothing is read yet."""
        self.pictures: dict[bytes, _Place] = {}
        self.folders: dict[bytes, _Place] = {}
        self.read: set[bytes] = set()
        self._files, self._folder = files, folder
        self._places: dict[_Place, _Place] = {}

    def take(self, path: bytes) -> _Place | None:
        """The split and class of a file that is there; None where nothing tells them."""
        place = self.pictures.pop(path, None)
        if place is None and self.folders:
            folder = os.path.dirname(path)
            while folder and folder not in self.folders:
                folder = os.path.dirname(folder)
            place = self.folders.get(folder)
        return place

    def put(self, path: bytes, split: str, class_name: str, origin: bytes) -> None:
        """Notes what the list `origin` says of a picture; AlexprepError where a line before says something else."""
        place = self._places.setdefault((split, class_name), (split, class_name))
        other = self.pictures.setdefault(path, place)
        if other != place:
            raise AlexprepError(
                f"{self.shown(origin)} says that {as_text(path)} is {class_name!r} of {split}, but it, or another list, also says "
                f"{other[1]!r} of {other[0]}: {_AGAIN}"
            )

    def lines(self, path: bytes, form: bytes) -> Iterator[tuple[bytes, ...]]:
        """The groups of `form` in each line that is not empty; AlexprepError where a line has another form."""
        matches = re.compile(form).fullmatch
        for number, line in enumerate(self._content(path).splitlines(), 1):
            match = matches(line.strip())
            if match:
                yield match.groups()
            elif line.strip():
                raise AlexprepError(f"{self.shown(path)}, line {number}, is damaged: {as_text(line[:80])!r}: {_AGAIN}")

    def names(self, path: bytes, form: bytes = rb"(.+)") -> list[str]:
        """Class names in the order of the lines; AlexprepError where one comes twice."""
        return self.by_number(path, enumerate(as_text(name) for (name,) in self.lines(path, form)))

    def by_number(self, path: bytes, pairs: Iterable[tuple[int, str]], first: int = 0) -> list[str]:
        """Class names in the order of their numbers, where pairs may come again.

        AlexprepError where a number has two names, a name two numbers, or the numbers do not go from `first` without a gap.
        """
        names: dict[int, str] = {}
        numbers: dict[str, int] = {}
        for number, name in pairs:
            if names.setdefault(number, name) != name or numbers.setdefault(name, number) != number:
                raise AlexprepError(
                    f"{self.shown(path)} numbers classes in two ways: {name!r} is {number}, {names[number]!r} is also {number}, and "
                    f"{name!r} also {numbers.get(name, number)}: {_AGAIN}"
                )
        if sorted(names) != list(range(first, first + len(names))):
            raise AlexprepError(
                f"{self.shown(path)} numbers {len(names):,} classes from {min(names)} to {max(names)}, expected every number from "
                f"{first}: {_AGAIN}"
            )
        return [names[number] for number in sorted(names)]

    def matlab(self, path: bytes, variable: str) -> list[Any]:
        """A vector of a MATLAB file, or of its cells' texts; AlexprepError where it is none."""
        from scipy.io import loadmat

        try:
            values = np.ravel(loadmat(io.BytesIO(self._content(path)), squeeze_me=True)[variable])
            return [value if isinstance(value, str) else int(value) for value in values]
        except AlexprepError:
            raise
        except Exception as error:  # noqa: BLE001  (scipy raises many kinds)
            raise AlexprepError(f"{self.shown(path)} has no vector {variable!r} ({error}): {_AGAIN}") from None

    def class_at(self, names: Sequence[str], number: int, origin: bytes, path: bytes) -> str:
        """`names[number]`; AlexprepError where there is none."""
        if not 0 <= number < len(names):
            raise AlexprepError(
                f"{self.shown(origin)} gives {as_text(path)} the number of a class that is none of the {len(names):,}: {_AGAIN}"
            )
        return names[number]

    def check_known(self, known: Container[str], name: bytes, origin: bytes, classes: bytes) -> str:
        """The name of a class; AlexprepError where `known`, what the list `classes` names, lacks it."""
        if as_text(name) not in known:
            raise AlexprepError(
                f"{self.shown(origin)} has the class {as_text(name)!r}, which {self.shown(classes)} does not name: take lists that "
                "belong together"
            )
        return as_text(name)

    def check_folder(self, path: bytes, root: bytes, class_name: str, origin: bytes) -> None:
        """AlexprepError where a picture's folder below `root` is not named as its class in the list `origin`."""
        if as_text(os.path.dirname(path)) != class_name:
            raise AlexprepError(
                f"{self.shown(origin)} says that {as_text(path)} is of the class {class_name!r}, which its folder in "
                f"{self.shown(root)} contradicts: take the list that belongs to these folders, or {_AGAIN}"
            )

    def shown(self, path: bytes = b"") -> str:
        """A path for messages."""
        return self._files.display(os.path.join(self._folder, path))

    def _content(self, path: bytes) -> bytes:
        self.read.add(path)
        try:
            return self._files.read(os.path.join(self._folder, path))
        except OSError as error:
            raise AlexprepError(f"{self.shown(path)} cannot be read ({error}): check it, or {_AGAIN}") from None


@dataclass(frozen=True)
class Published(Source):
    """A set that its publisher's lists tell; one subclass a set, which says what its lists mean.

    Attributes:
        folder: where the set lies, below the root: there, or in a folder or two that hold nothing else.
        marks: what must be in that folder: the form in which a file begins, or None for a folder with something in it.
        roots: how the paths of pictures begin: one there that no list names deserves a word.
    """

    folder: bytes = b""
    marks: ClassVar[Marks] = {}
    roots: ClassVar[tuple[bytes, ...]] = (b"images/",)

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: where all `marks` are. Lists of their names in another form, which several sets have, are a question."""
        needed = {path.split(b"/")[0] for path in cls.marks}
        lists = [path for path, form in cls.marks.items() if form is not None]
        for folder, names in () if name else may_hold(files):
            if needed <= names and cls.fits(files, folder):
                evidence = f"lists {', '.join(map(as_text, lists))}" if lists else cls.expects
                return cls(files, folder, whole=True, evidence=evidence)
            if len(lists) > 1 and needed <= names and cls.fits(files, folder, whatever=True):
                raise AmbiguousSourceError(
                    f"SOURCE {files.display(folder)} has lists named as those of {cls.expects}; but what is in them has another form.",
                    [("--layout folders", "the folders alone tell splits and classes, and the lists are not read")],
                )
        return None

    @classmethod
    def fits(cls, files: Files, folder: bytes, whatever: bool = False) -> bool:
        """Whether a folder has all the marks; `whatever` is in the lists, or in their form."""
        forms = {path: ANY if form and whatever else form for path, form in cls.marks.items()}
        return all(has(files, os.path.join(folder, path), form) for path, form in forms.items())

    @classmethod
    def is_named(cls, folder: Folder) -> bool:
        """Whether a folder of a tree has all the marks by their names."""
        for path, form in cls.marks.items():
            place = folder.at(path if form is None else os.path.dirname(path))
            if place is None or not (place.count if form is None else os.path.basename(path) in place.papers):
                return False
        return True

    def order(self, labels: Labels) -> list[str]:
        """The class names by label, as the publisher numbers them."""
        raise NotImplementedError

    def fill(self, labels: Labels, names: list[str]) -> None:
        """Reads the lists of pictures; `names` are the classes by label."""
        raise NotImplementedError

    def classes(self, present: set[str]) -> list[str]:
        """All that the publisher numbers, whether images of them are there or not."""
        return self.order(Labels(self.files, self.folder))

    def covers(self, target: str) -> bool:
        """Whether `target` lies in a folder of pictures."""
        below = self.files.below(target, self.folder)
        return below is not None and b"/".join(below).startswith(tuple(filter(None, self.roots)))

    def inputs(self, account: Account) -> Iterator[Input]:
        """The pictures that lists name, or that lie where all have one class; a picture that they do not name is told.

        Refused: lists that contradict each other or the folders, and a set of which most pictures are in no list.
        """
        labels = Labels(self.files, self.folder)
        self.fill(labels, self.order(labels))
        found: list[tuple[str, str, bytes]] = []
        unlisted: list[bytes] = []
        prefix = os.path.join(self.folder, b"")
        tree = read_tree(self.files)
        account.take(tree.account)
        for path, rule in with_rules(tree.root):
            below = path[len(prefix) :] if path.startswith(prefix) else b""
            if below in labels.read:
                account.pass_over(LIST, self.files.display(path))
            elif rule is not None:
                account.pass_over(rule, self.files.display(path))
            elif place := labels.take(below):
                found.append((*place, path))
            elif below.startswith(self.roots):
                account.pass_over(UNLISTED, self.files.display(path))
                unlisted.append(path)
            else:
                account.pass_over(BESIDE, self.files.display(path))
        self._compare(labels, len(found), unlisted, account)
        for split, class_name, path in sorted(found, key=lambda row: (row[0], row[1].encode(), row[2])):
            yield Input(split, class_name, Location(path))

    def _compare(self, labels: Labels, found: int, unlisted: list[bytes], account: Account) -> None:
        """Tells of pictures that are not there, and of those that no list names; where these are most, there is an error."""
        lists = " and ".join(labels.shown(path) for path in sorted(labels.read))
        if unlisted:
            several = f"{len(unlisted):,} pictures" if len(unlisted) > 1 else "1 picture"
            words = f"{several} in none of the lists ({lists}), such as {self.files.display(min(unlisted))}"
            if len(unlisted) > found:
                raise AlexprepError(
                    f"SOURCE holds {words}, and only {found:,} that they name: take the lists that belong to these pictures, or say "
                    "with --layout folders that the folders tell the classes"
                )
            account.warnings.append(f"passed over: {words}")
        if labels.pictures:
            path, (split, _) = next(iter(labels.pictures.items()))
            count = len(labels.pictures)
            which = f"{labels.shown(path)} of {split}"
            words = (
                f"1 picture that the lists name is not there: {which}"
                if count == 1
                else f"{count:,} pictures that the lists name are not there, among them {which}"
            )
            if not found:
                raise AlexprepError(
                    f"{words}, and no other is: unpack the pictures beside the lists ({lists}), or {_AGAIN}"
                )
            account.warnings.append(f"{words}: the download may be incomplete")


@functools.lru_cache(maxsize=1)
def may_hold(files: Files) -> list[tuple[bytes, set[bytes]]]:
    """The root, and the folder in it that is the only one, and so on, `WRAPPERS` of them; each with the names in it.

    What systems leave, and datasets of ours, which may be made there, do not count. The answer is kept for whoever asks next of the same
    files, so `find_source` begins with `may_hold.cache_clear()`.
    """
    folder, found = b"", list[tuple[bytes, set[bytes]]]()
    for _ in range(WRAPPERS + 1):
        entries = files.entries(folder)
        found.append((folder, {entry.name for entry in entries}))
        paths = (os.path.join(folder, entry.name) for entry in entries if entry.is_folder and entry.name != b"__MACOSX")
        others = (path for path in paths if PLAN.encode() not in files.file_names(path))
        inside = list(itertools.islice(others, 2))
        if len(inside) != 1:
            break
        (folder,) = inside
    return found


def has(files: Files, path: bytes, form: bytes | None) -> bool:
    """Whether there is a file that begins in this form; for None, a folder with something in it."""
    folder, name = os.path.split(path)
    if Entry(name, form is None) not in files.entries(folder):
        return False
    try:
        return (
            bool(files.entries(path)) if form is None else bool(re.match(form, files.read(path, 0, _BEGINNING_BYTES)))
        )
    except OSError as error:
        raise AlexprepError(f"{files.display(path)} cannot be read ({error}): check it, or {_AGAIN}") from None
