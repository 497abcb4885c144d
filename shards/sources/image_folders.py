"""Image folders as Hugging Face's hub has them: pictures, and a metadata.csv, .jsonl or .parquet that tells each one's label.

The list lies in SOURCE, or in each split's folder; its column file_name begins at its own folder. It is read as any table (`table`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from alexprep.shards.errors import AlexprepError, AmbiguousSourceError, counted
from alexprep.shards.sources.base import LIST, NO_CHOICES, NOT_LISTED, Account, Choices, Input, Source, split_of
from alexprep.shards.sources.foreign_formats import IMAGE_FOLDER_LISTS
from alexprep.shards.sources.picture_names import is_picture
from alexprep.shards.sources.table import ListFile, Rows, Table
from alexprep.shards.sources.table_rows import read_rows
from alexprep.shards.sources.tree import Folder, pass_over_rest, read_tree
from alexprep.shards.storage import Files


@dataclass(frozen=True)
class ImageFolder(Table):
    """Pictures below a folder, and one list or several that label them.

    Attributes:
        found: the lists, by path.
    """

    found: tuple[ListFile, ...] = ()
    layout = "imagefolder"
    expects = "a folder with pictures and metadata.csv, .jsonl or .parquet, which has the columns file_name and label"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: a list with labels in the root, or in its folders."""
        if name or not _has_list(files):
            return None
        root = read_tree(files).root
        found = [(folder, listed) for folder in root.walk() if folder.count and (listed := _list_in(folder))]
        lists = []
        for folder, listed in found:
            path = os.path.join(folder.path, listed)
            split = next(filter(None, map(split_of, folder.path.split(b"/")[::-1])), "")
            try:
                next(read_rows(files, path, choices), None)
            except AlexprepError:
                if not choices.columns and not any(map(is_picture, folder.pictures)):
                    return None  # of captions, perhaps: class folders may tell the labels
            lists.append(ListFile(path, folder.path, split))
        if not lists:
            return None
        return cls(
            files, found=tuple(lists), choices=choices, whole=True, evidence="labels in " + files.display(lists[0].name)
        )

    def lists(self) -> tuple[ListFile, ...]:
        """See `Table`."""
        return self.found

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, class and path; pictures that no list names are passed over."""
        rows = Rows(self.files, self.lists(), self.choices, account)
        own = rows.listed() | {some.name for some in self.found}
        yield from rows.in_order()
        for some in self.found:
            account.found += 1
            account.pass_over(LIST, self.files.display(some.name))
        pass_over_rest(self.files, own, account, NOT_LISTED)
        rest = account.passed_over.get(NOT_LISTED)
        if rest:
            account.warnings.append(
                f"passed over: {counted(rest.count, 'picture')} that no list names, such as {rest.names[0]}"
            )

    def check_alone(self) -> None:
        """Asks where the pictures lie in several folders beside a list, which are no splits, or in splits: these may be classes."""
        root = read_tree(self.files).root
        for some in self.found:
            here = (root.at(some.folder) or root).filled
            wide = [below for below in here if not split_of(below.name)]
            wide += [inner for below in here if split_of(below.name) for inner in below.filled]
            inner = [below for below in wide if below.leaf]
            if len({below.name for below in inner}) > 1:
                pictures = sum(below.count for below in inner)
                raise AmbiguousSourceError(
                    f"SOURCE {self.files.display()} has the list {self.files.display(some.name)}, and beside it {pictures:,} pictures in "
                    f"{len(inner):,} folders, such as {self.files.display(inner[0].path)}.",
                    [
                        ("--layout imagefolder", "the list tells the labels, and the folders tell nothing"),
                        ("--layout folders", "the folders are classes or splits, and the list is passed over"),
                    ],
                )

    def covers(self, target: str) -> bool:
        """Whether `target` is the root, or lies in another folder of a list."""
        inside = any(self.files.below(target, some.folder) is not None for some in self.found if some.folder)
        return inside or self.files.below(target) == ()


def _has_list(files: Files) -> bool:
    """Whether a list lies in the root, or in one of its folders, of which a few are looked into: class folders are many."""
    folders = [b"", *files.folder_names()[:20]]
    if len(folders) > 20:
        folders = [b""]
    folders += [os.path.join(b"data", name) for name in files.folder_names(b"data")[:5]] if b"data" in folders else []
    return any(name in IMAGE_FOLDER_LISTS for folder in folders for name in files.file_names(folder))


def _list_in(folder: Folder) -> bytes | None:
    """The name of the list in a folder."""
    return next((name for name in IMAGE_FOLDER_LISTS if name in folder.papers), None)
