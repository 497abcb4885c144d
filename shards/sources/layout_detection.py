"""Finds out which source a path or URL is, by asking each in turn; or takes the one that is named.

What a layout looks like is known to its source alone, in `Source.at`.
"""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import replace

from alexprep.shards.errors import AlexprepError, AmbiguousSourceError, counted
from alexprep.shards.sources import BY_COLUMNS, BY_FOLDERS, LAYOUTS, WITHOUT_LABELS
from alexprep.shards.sources.base import NO_CHOICES, SPLITS, Choices, Source, as_options
from alexprep.shards.sources.folder_reading import flat_question
from alexprep.shards.sources.foreign_formats import foreign, stand_in
from alexprep.shards.sources.ilsvrc import IlsvrcArchives
from alexprep.shards.sources.numbered_files import names_near_root
from alexprep.shards.sources.picture_names import is_picture
from alexprep.shards.sources.published_lists import may_hold
from alexprep.shards.sources.tree import read_tree
from alexprep.shards.storage import Files, as_text, files_at

# Layouts whose pictures are packed in files, beside which a folder may hold others; archives of ILSVRC hold the same as the folders there.
_PACKED = {
    "cifar",
    "mnist",
    "norb",
    "hub-imagenet",
    "arrow",
    "tfrecord",
    "recordio",
    "lmdb",
    "parquet",
    "synset-tars",
    "tar",
    "webdataset",
    "zip",
}


def find_source(place: str, layout: str | None = None, choices: Choices = NO_CHOICES) -> Source:
    """The source at a path or URL, of one of `LAYOUTS` or of whichever fits.

    Raises:
        AlexprepError: there is none.
        AmbiguousSourceError: there are several readings, and `layout` and `choices` do not tell which is meant.
    """
    files, name = files_at(place)
    if choices.split_folders:
        named = tuple(
            (split, _below(folder, split, place, None if name else files)) for split, folder in choices.split_folders
        )
        choices = replace(choices, split_folders=named)
    if choices.unlabelled and choices.class_depth is not None:
        raise AlexprepError("--class-depth says where classes lie, --unlabelled that there are none: give one of them")
    for kept in (may_hold, names_near_root):  # they serve all that look for one layout of the same files
        kept.cache_clear()
    if name and (words := stand_in(files, name)):
        raise AlexprepError(words)
    uses = _uses(choices)
    if unfit := [f"{option} is for {', '.join(some)}" for option, some in uses if layout and layout not in some]:
        raise AlexprepError(f"{'; '.join(unfit)}: leave it out, SOURCE {place} is to be read as {layout!r}")
    for candidate in [layout] if layout else [each for each in LAYOUTS if all(each in some for _, some in uses)]:
        try:
            source = _source_class(candidate).at(files, name, choices)
        except AlexprepError:
            if candidate in _PACKED and (words := stand_in(files, name)):
                raise AlexprepError(words) from None
            if name or layout or candidate not in BY_FOLDERS or _has_pictures(files):
                raise
            if words := foreign(files, name):  # what has no ending counted as pictures, and is something else
                raise AlexprepError(words) from None
            raise
        if source is not None:
            if layout is None and source.whole and candidate in _PACKED:
                _check_packed(files, candidate)
            if layout is None and isinstance(source, IlsvrcArchives):
                _check_splits_of_folders(files, {split for split, _ in source.archives})
            if layout is None and choices == NO_CHOICES:
                source.check_alone()
            return source
    if choices != NO_CHOICES:
        raise AlexprepError(
            f"SOURCE {place} holds no {_meant(choices)}, of which {as_options(choices)} could speak: leave it out"
        )
    if layout:
        raise AlexprepError(f"SOURCE {place} has not the layout {layout!r}: expected {_source_class(layout).expects}")
    if words := foreign(files, name):
        raise AlexprepError(words)
    if not name and _has_pictures(files):
        raise flat_question(read_tree(files).root, place)
    if name:
        raise AlexprepError(
            f"SOURCE {place} is a file of no known layout: name a folder, a tar, or a list: .csv, .tsv, .jsonl or .parquet, or .txt or .lst with "
            "lines of `path label`"
        )
    raise AlexprepError(
        f"SOURCE {place} holds no class folders and no other layout that is known: expected {_source_class('folders').expects}"
    )


def _below(folder: str, split: str, place: str, files: Files | None) -> str:
    """A split's folder, below the source: as it is, unless it is an absolute path or URL, as a shell completes it.

    `files` are those of the source, where it is a folder.
    """
    if not (os.path.isabs(folder) or "://" in folder):
        return folder
    root = place.rstrip("/") if "://" in place else os.path.abspath(place)
    target = folder.rstrip("/") if "://" in folder else os.path.normpath(folder)
    if target == root or target.startswith(root + "/"):
        return target[len(root) + 1 :] or "."
    below = files.below(folder) if files else None  # by another path to the same folder
    if below is None:
        raise AlexprepError(
            f"--split-folders {split}={folder} does not lie below SOURCE {place}: name a folder there, as its path from SOURCE"
        )
    return os.fsdecode(b"/".join(below)) or "."


def _uses(choices: Choices) -> list[tuple[str, tuple[str, ...]]]:
    """What is given, and the layouts that it can be meant for."""
    each = (
        (Choices(split_folders=choices.split_folders), BY_FOLDERS),
        (Choices(class_depth=choices.class_depth), BY_FOLDERS),
        (Choices(columns=choices.columns), BY_COLUMNS),
        (Choices(unlabelled=choices.unlabelled), WITHOUT_LABELS),
    )
    return [(as_options(given), layouts) for given, layouts in each if given != NO_CHOICES]


def _meant(choices: Choices) -> str:
    """What choices speak of."""
    return "columns" if choices.columns else "pictures" if choices.unlabelled else "class folders"


def _has_pictures(files: Files) -> bool:
    """Whether any file is a picture by its ending."""
    return any(is_picture(name) for folder in read_tree(files).root.walk() for name in folder.pictures)


def _check_packed(files: Files, layout: str) -> None:
    """Refuses a folder whose files were not fetched; and asks where class folders, or several loose pictures in the root, lie beside what another layout reads."""
    if words := stand_in(files, b""):
        raise AlexprepError(words)
    root = read_tree(files).root
    folders = [folder for folder in root.walk() if any(map(is_picture, folder.pictures))]
    loose = [name for name in root.pictures if is_picture(name)]
    if len(folders) < 2 and len(loose) < 2:
        return
    pictures = sum(len(folder.pictures) for folder in folders)
    inner = [folder for folder in folders if folder is not root]
    where = (
        f"{counted(len(folders), 'folder')}, such as {files.display(inner[0].path)}"
        if inner
        else "no folder, such as " + as_text(loose[0])
    )
    ways = [(f"--layout {layout}", f"{_source_class(layout).expects}; the pictures beside are passed over")]
    if inner:
        ways.append(("--layout folders", "the folders are classes or splits; all else is passed over"))
    ways.append(("--layout folders --unlabelled", "all these pictures, without labels; all else is passed over"))
    raise AmbiguousSourceError(
        f"SOURCE {files.display()} has the layout {layout!r}, and beside it {pictures:,} pictures in {where}.", ways
    )


def _check_splits_of_folders(files: Files, packed: set[str]) -> None:
    """Asks where a split lies in folders beside ILSVRC's archives, and in no archive."""
    split_of_folder = {name: SPLITS.get(name.decode("utf-8", "replace").lower()) for name in files.folder_names()}
    lost = [name for name, split in split_of_folder.items() if split and split not in packed]
    if lost and any(folder.count for folder in read_tree(files).root.folders if folder.name in lost):
        raise AmbiguousSourceError(
            f"SOURCE {files.display()} holds ILSVRC's archives of {' and '.join(sorted(packed))}, and {' and '.join(map(as_text, lost))} in "
            "folders.",
            [
                ("--layout ilsvrc", "the archives; the folders are passed over"),
                ("--layout folders", "the folders; the archives are passed over"),
            ],
        )


@functools.cache
def _source_class(layout: str) -> type[Source]:
    if layout not in LAYOUTS:
        raise AlexprepError(f"--layout {layout} is not one of {', '.join(LAYOUTS)}")
    module, _, name = LAYOUTS[layout].partition(".")
    return getattr(importlib.import_module(f"alexprep.shards.sources.{module}"), name)  # type: ignore[no-any-return]
