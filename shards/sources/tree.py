"""Reads what lies below a folder, or inside a tar, as one tree of folders, each file noted once.

What is surely no picture is told apart here, by its name alone: hidden files, what systems leave, archives, lists and other
papers. What the folders mean, splits or classes, is decided in `folder_reading`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass, field

from alexprep.shards.dataset_format import DATASET, DATASET_FORMAT, PLAN, PLAN_FORMAT
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import (
    ARCHIVE,
    BESIDE,
    FOLDER_LINK,
    HIDDEN,
    LIST,
    OUR_DATASET,
    SIDECAR,
    SYSTEM,
    Account,
)
from alexprep.shards.storage import Files, as_text

# Endings in lower case. A file of another one, or of none, counts as a picture until a decoder says otherwise.
_ARCHIVES = b"""7z arrow beton bz2 db3 feather gz h5 hdf5 idx lmdb mat mdb mds msgpack npy npz parquet pickle pkl pt pth rar rec sqlite tar
tar.gz tgz tfrecord tfrecords xz zip zst""".split()
_PAPERS = b"""avi bib c cfg conf cpp css csv doc docx flac geojson h html htm ini ipynb java jpynb js json jsonl jsonlines log lst m
m4v md md5 mkv mov mp3 mp4 mpg names ods pdf ppt pptx prototxt py r rst rtf sh sha1 sha256 srt svg tex toml tsv txt wav webm xls xlsx
xml yaml yml""".split()
_ENDINGS = {b"." + ending: rule for rule, endings in ((ARCHIVE, _ARCHIVES), (SIDECAR, _PAPERS)) for ending in endings}
_PAPER_NAMES = {b"readme", b"license", b"licence", b"copying", b"authors", b"citation", b"changelog", b"makefile"}
_SYSTEM_FILES = {b"thumbs.db", b"desktop.ini", b"ehthumbs.db", b"icon\r"}
_SYSTEM_FOLDERS = {b"__macosx", b"@eadir", b"$recycle.bin", b"system volume information", b"lost+found"}
_LINKS_FOLLOWED = 2  # names below the root: a split's folder and a class's may be links, deeper ones might form loops

# Of a member with its folders, four times what Linux opens: the folders of one then take 64 MiB at most.
MAX_NAME_BYTES = 2**14


def rule_of(name: bytes) -> str | None:
    """The rule by which a file of this name is surely no picture; None where it may be one.

    >>> rule_of(b"a.jpg"), rule_of(b"no_ending"), rule_of(b"README.TXT")
    (None, None, 'no picture by its ending, such as lists, readmes and annotations')
    """
    if name.startswith(b"."):
        return HIDDEN
    lower = name.lower()
    rule = _ENDINGS.get(lower[lower.rfind(b".") :])
    if lower in _SYSTEM_FILES:
        return SYSTEM
    return rule or (SIDECAR if lower in _PAPER_NAMES else None)


def _rule_of_folder(name: bytes) -> str | None:
    """The rule by which all in a folder of this name is passed over; None where it is looked into."""
    if name.startswith(b"."):
        return HIDDEN
    return SYSTEM if name.lower() in _SYSTEM_FOLDERS else None


@dataclass
class Folder:
    """One folder of a tree.

    Attributes:
        path: below the root; empty for the root.
        pictures: the names of the files in it that may be pictures, ascending.
        papers: the names of those that are lists, readmes, archives and the like, ascending.
        folders: in it, ascending by name.
        count: pictures in it and below.
    """

    path: bytes
    pictures: list[bytes] = field(default_factory=list)
    papers: list[bytes] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    count: int = 0

    @property
    def name(self) -> bytes:
        """Its own name, without those of the folders around it."""
        return os.path.basename(self.path)

    @property
    def filled(self) -> list[Folder]:
        """The folders in it that hold pictures at any depth."""
        return [folder for folder in self.folders if folder.count]

    @property
    def leaf(self) -> bool:
        """Whether it holds pictures itself, and no folder in it does."""
        return bool(self.pictures) and not self.filled

    def walk(self) -> Iterator[Folder]:
        """The folder and all below it, each before those in it."""
        pending = [self]
        while pending:
            folder = pending.pop()
            yield folder
            pending.extend(reversed(folder.folders))

    def paths(self) -> Iterator[bytes]:
        """The pictures in it and below, ascending, as paths from the root."""
        yield from sorted(os.path.join(folder.path, name) for folder in self.walk() for name in folder.pictures)

    def without(self, paths: Collection[bytes]) -> Folder:
        """The same folder without those at `paths` below it; what none of these lies in is shared."""
        around = {path[:end] for path in paths for end in _ends(path)}
        if self.path not in around:
            return self
        changed = [self]
        for folder in changed:  # which grows meanwhile
            changed += [inner for inner in folder.folders if inner.path in around and inner.path not in paths]
        made: dict[bytes, Folder] = {}
        for folder in reversed(changed):  # the inner ones first
            folders = [made.get(inner.path, inner) for inner in folder.folders if inner.path not in paths]
            count = len(folder.pictures) + sum(inner.count for inner in folders)
            made[folder.path] = Folder(folder.path, folder.pictures, folder.papers, folders, count)
        return made[self.path]

    def at(self, path: bytes) -> Folder | None:
        """The folder at a path below it, one or several names; None where there is none."""
        here: Folder | None = self
        for part in path.split(b"/") if path else ():
            here = next((folder for folder in here.folders if folder.name == part), None) if here else None
        return here


@dataclass
class Tree:
    """A root folder, and the account of what was told apart by its name alone."""

    root: Folder
    account: Account


def read_tree(files: Files) -> Tree:
    """Reads everything below the root of `files`, once. Names within a folder are sorted as bytes."""
    account = Account()
    root = Folder(b"")
    pending = [(root, 0)]
    order = []
    while pending:
        folder, depth = pending.pop()
        order.append(folder)
        below: list[bytes] = []
        for name, is_folder in files.listed(folder.path, links=depth < _LINKS_FOLLOWED):
            if is_folder is None:  # a link to a folder that is not followed
                account.found += 1
                account.pass_over(FOLDER_LINK, (files.display, folder.path, name))
            elif is_folder:
                below.append(name)
            else:
                account.found += 1
                rule = rule_of(name)
                if rule is None:
                    folder.pictures.append(name)
                elif rule in (SIDECAR, ARCHIVE):
                    folder.papers.append(name)
                else:
                    account.pass_over(rule, (files.display, folder.path, name))
        folder.pictures.sort()
        folder.papers.sort()
        if folder.path and _is_ours(files, folder):
            _pass_over_all(files, folder, below, account)
            continue
        for name in sorted(below):
            path = os.path.join(folder.path, name)
            rule = _rule_of_folder(name)
            if rule is not None:
                _count_all(files, path, account, rule)
            else:
                inner = Folder(path)
                folder.folders.append(inner)
                pending.append((inner, depth + 1))
    for folder in reversed(order):  # the inner ones first
        folder.count = len(folder.pictures) + sum(inner.count for inner in folder.folders)
    return Tree(root, account)


def tree_of(paths: Iterable[bytes], shown: str) -> Tree:
    """The tree of the files with these paths, as an archive lists them; `shown` is the archive's name for the account.

    A name of more than `MAX_NAME_BYTES` is an AlexprepError.
    """
    account = Account()
    folders = {b"": Folder(b"")}

    def folder_at(path: bytes) -> Folder:
        missing = []
        while path not in folders:
            missing.append(path)
            path = os.path.dirname(path)
        for inner in reversed(missing):
            folders[inner] = Folder(inner)
            folders[path].folders.append(folders[inner])
            path = inner
        return folders[path]

    for path in paths:
        account.found += 1
        if len(path) > MAX_NAME_BYTES:
            raise AlexprepError(
                f"{shown} has a member whose name has {len(path):,} bytes, more than {MAX_NAME_BYTES:,}: {as_text(path[:60])}…; "
                "pack the archive anew, with shorter names"
            )
        *above, name = path.split(b"/")
        around = set(map(_rule_of_folder, above))
        rule = next((each for each in (HIDDEN, SYSTEM) if each in around), None) or rule_of(name)
        if rule in (HIDDEN, SYSTEM):
            account.pass_over(rule, f"{shown}/{as_text(path)}")
            continue
        folder = folder_at(b"/".join(above))
        (folder.pictures if rule is None else folder.papers).append(name)
    for folder in sorted(folders.values(), key=lambda folder: -folder.path.count(b"/") if folder.path else 1):
        folder.pictures.sort()
        folder.papers.sort()
        folder.folders.sort(key=lambda inner: inner.path)
        folder.count = len(folder.pictures) + sum(inner.count for inner in folder.folders)
    return Tree(folders[b""], account)


def with_rules(root: Folder) -> Iterator[tuple[bytes, str | None]]:
    """The path of every file of a tree, and the rule by which its name says that it is no picture."""
    for folder in root.walk():
        for names in (folder.pictures, folder.papers):
            for name in names:
                yield os.path.join(folder.path, name), rule_of(name) if names is folder.papers else None


def pass_over_rest(
    files: Files, own: Container[bytes], account: Account, rule: str = BESIDE, lists: Container[bytes] = ()
) -> None:
    """Counts every file below the root that is not among the paths `own` as found, and passes it over.

    Those among `lists` were read; hidden files, what systems leave, other lists and our own datasets are passed over by their own rules,
    all others by `rule`.
    """
    tree = read_tree(files)
    account.take(tree.account)
    for path, known_by_name in with_rules(tree.root):
        if path in own:
            account.found -= 1  # counted as what it holds
        else:
            account.pass_over(LIST if path in lists else known_by_name or rule, (files.display, b"", path))


def _ends(path: bytes) -> Iterator[int]:
    """Where the paths of the folders around `path` end in it: 0 for the root first."""
    yield 0
    yield from (match.start() for match in re.finditer(b"/", path))


def _is_ours(files: Files, folder: Folder) -> bool:
    """Whether a folder is a dataset that alexprep began or finished."""
    for name, form in ((DATASET, DATASET_FORMAT), (PLAN, PLAN_FORMAT)):
        if name.encode() in folder.papers and form.encode() in files.read(os.path.join(folder.path, name.encode())):
            return True
    return False


def _pass_over_all(files: Files, folder: Folder, below: list[bytes], account: Account) -> None:
    """Passes over the files of a dataset of ours, which are counted, and those in the folders `below` it."""
    for name in (*folder.pictures, *folder.papers):
        account.pass_over(OUR_DATASET, (files.display, folder.path, name))
    folder.pictures, folder.papers = [], []
    for name in below:
        _count_all(files, os.path.join(folder.path, name), account, OUR_DATASET)


def _count_all(files: Files, top: bytes, account: Account, rule: str) -> None:
    """Counts every file below a folder as found, and passes it over. A folder that cannot be listed counts as one file."""
    pending = [top]
    while pending:
        path = pending.pop()
        try:
            for name, is_folder in files.listed(path, links=False):
                if is_folder:
                    pending.append(os.path.join(path, name))
                else:
                    account.found += 1
                    account.pass_over(rule, (files.display, path, name))
        except OSError:
            account.found += 1
            account.pass_over(rule, (files.display, b"", path))
