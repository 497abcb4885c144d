"""The pictures of a split in a tree of folders: which class each one has, and what is passed over.

What the folders mean was decided in `folder_reading`; here it is carried out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import (
    BESIDE,
    BESIDE_PICTURE,
    LIST,
    NO_CLASS,
    UNLABELLED,
    Account,
    Location,
    Part,
    class_name_of,
    reference_to,
)
from alexprep.shards.sources.ground_truth import GroundTruth
from alexprep.shards.sources.tree import Folder, Tree, rule_of
from alexprep.shards.storage import as_text

Depth = int | Literal["leaf"]
_METADATA = (b".json", b".txt")


@dataclass(frozen=True)
class SplitFolder:
    """What one folder holds of a split.

    Attributes:
        split: its name.
        path: of the folder that holds the class folders, or the pictures of a flat split.
        depth: where the class folders lie below it: 1 for directly in it; "leaf" where each folder that holds pictures is a class.
        flat: whether there are no class folders; `truth` tells the classes then, or nothing does.
        truth: the classes of a flat split.
        by_last_name: whether a class deeper than 1 is called by its own folder's name alone, which no other has.
        without: folders in it that belong to other splits.
        unlabelled: whether all pictures in it and below are taken, without a class.
    """

    split: str
    path: bytes
    depth: Depth = 1
    flat: bool = False
    truth: GroundTruth | None = None
    by_last_name: bool = False
    without: tuple[bytes, ...] = ()
    unlabelled: bool = False


def inputs_of(
    reading: Sequence[SplitFolder], tree: Tree, account: Account, shown: str, known: dict[str, bytes] | None = None
) -> Iterator[tuple[str, str, bytes, list[bytes]]]:
    """(split, class name, path, paths of its metadata) of every picture, by split, class and path; all else of the tree goes to the account.

    `known` are the class folders by name, where other trees have some too.
    """
    root, taken = tree.root, set[bytes]()
    known = {} if known is None else known
    account.take(tree.account)
    flat: dict[bytes, SplitFolder] = {}
    beside = metadata_beside(root)
    for _, parts in itertools.groupby(reading, lambda part: part.split):
        several = list(parts)
        found = (item for part in several for item in _inputs_in(part, root, taken, flat, shown, known))
        in_order = found if len(several) == 1 else sorted(found, key=lambda item: (item[1].encode(), item[2]))
        for split, class_name, path in in_order:
            yield split, class_name, path, beside.get(os.path.splitext(path)[0], []) if beside else []
    _pass_over_rest(reading, root, taken, flat, {path for paths in beside.values() for path in paths}, account, shown)


def metadata_beside(root: Folder) -> dict[bytes, list[bytes]]:
    """The files KEY.json and KEY.txt beside a picture KEY of any ending, by KEY with its folders."""
    beside: dict[bytes, list[bytes]] = {}
    for folder in root.walk():
        papers = [name for name in folder.papers if name.lower().endswith(_METADATA)] if folder.pictures else []
        keys = {os.path.splitext(name)[0] for name in folder.pictures} if papers else set()
        for name in papers:
            if (key := os.path.splitext(name)[0]) in keys:
                beside.setdefault(os.path.join(folder.path, key), []).append(os.path.join(folder.path, name))
    return beside


def metadata_of(paths: Sequence[bytes], image: Location, where: Callable[[bytes], Location] = Location) -> bytes:
    """An `Input.metadata` for files beside the image; `where` says where a path lies."""
    return reference_to((Part(as_text(path).rpartition(".")[2].lower(), where(path)) for path in paths), image)


def _inputs_in(
    part: SplitFolder,
    root: Folder,
    taken: set[bytes],
    flat: dict[bytes, SplitFolder],
    shown: str,
    known: dict[str, bytes],
) -> Iterator[tuple[str, str, bytes]]:
    """Those of one folder of a split; which folders were `taken`, or read as `flat`, is noted."""
    top = root.at(part.path)
    if top is None:
        raise AlexprepError(
            f"{shown}/{as_text(part.path)} has vanished since it was listed: run the same command again"
        )
    if part.unlabelled:
        inside = top.without(part.without)
        taken.update(inner.path for inner in inside.walk())
        yield from ((part.split, UNLABELLED, path) for path in inside.paths())
        return
    if part.flat:
        flat[top.path] = part
        names = part.truth.sorted(top.pictures) if part.truth else ((UNLABELLED, name) for name in top.pictures)
        yield from ((part.split, class_name, os.path.join(top.path, name)) for class_name, name in names)
        return
    for relative, folder in class_folders(part, top):
        class_name = class_name_of(relative, known, shown)
        if part.depth == "leaf":
            taken.add(folder.path)
            yield from ((part.split, class_name, os.path.join(folder.path, name)) for name in folder.pictures)
        else:
            taken.update(inner.path for inner in folder.walk())
            yield from ((part.split, class_name, path) for path in folder.paths())


def class_folders(part: SplitFolder, top: Folder) -> list[tuple[bytes, Folder]]:
    """(class name as bytes, folder) of the class folders that hold pictures below `top`, ascending by name."""
    return [(name, folder) for name, folder in candidates(part, top) if folder.count]


def class_names(part: SplitFolder, root: Folder) -> list[str]:
    """The names of the classes of a split, ascending."""
    top = root.at(part.path)
    return [as_text(name) for name, _ in class_folders(part, top)] if top and not part.flat else []


def candidates(part: SplitFolder, top: Folder) -> list[tuple[bytes, Folder]]:
    """As `class_folders`, empty ones too."""
    top = top.without(part.without)
    skip = len(top.path) + 1 if top.path else 0
    if part.depth == "leaf":
        inner = [folder for folder in top.walk() if folder is not top and folder.pictures]
    else:
        inner = [top]
        for _ in range(part.depth):
            inner = [below for folder in inner for below in folder.folders]
    names = (folder.name if part.by_last_name else folder.path[skip:] for folder in inner)
    return sorted(zip(names, inner, strict=True), key=lambda found: (found[0], found[1].path))


def _pass_over_rest(
    reading: Sequence[SplitFolder],
    root: Folder,
    taken: set[bytes],
    flat: dict[bytes, SplitFolder],
    metadata: set[bytes],
    account: Account,
    shown: str,
) -> None:
    tops = [part.path for part in reading]
    lists = {part.truth.origin for part in reading if part.truth}

    def named(path: bytes) -> str:
        return f"{shown}/{as_text(path)}"

    for folder in root.walk():
        for name in folder.papers:
            path = os.path.join(folder.path, name)
            rule = LIST if lists and named(path) in lists else str(rule_of(name))
            account.pass_over(BESIDE_PICTURE if path in metadata else rule, (named, folder.path, name))
        if folder.path in taken or folder.path in flat:
            continue
        inside = any(top in (b"", folder.path) or folder.path.startswith(top + b"/") for top in tops)
        for name in folder.pictures:
            account.pass_over(NO_CLASS if inside else BESIDE, (named, folder.path, name))
