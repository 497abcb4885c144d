"""Datasets as `save_to_disk` of Hugging Face's library datasets writes them: Arrow files with pictures, and what lists them.

That is a folder with state.json and data-00000-of-00005.arrow, or one with dataset_dict.json and such a folder for each split; or one
.arrow file. What columns mean is told in `parquet_images`, whose rows these are too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import NO_CHOICES, Choices, Source, split_of
from alexprep.shards.sources.columnar_files import columnar
from alexprep.shards.sources.parquet_images import ParquetImages, Part, columns_of
from alexprep.shards.storage import Files, as_text

STATE, SPLITS_OF_DATASET = b"state.json", b"dataset_dict.json"
_AGAIN = "save the dataset again, or get it again"


@dataclass(frozen=True)
class ArrowImages(ParquetImages):
    """Rows of Arrow files; their record batches are the groups."""

    layout = "arrow"
    expects = "a folder that save_to_disk of the library datasets wrote (state.json, data-00000-of-00001.arrow), with a column of pictures"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the file that is named, or those that the root's state.json, or its dataset_dict.json, lists."""
        columnar.cache_clear()
        parts = _parts(files, name)
        if not parts:
            return None
        shown = files.display(parts[0].path)
        columns = columns_of(columnar(files, parts[0].path).schema, choices, shown)
        if columns is None:
            raise AlexprepError(
                f"{shown} has no column that is surely of pictures, or none of labels: name both with --columns image=NAME,label=NAME"
            )
        return cls.of(files, parts, columns, choices, whole=not name)


def _parts(files: Files, name: bytes) -> list[Part]:
    """The files with the split of each; [] where there is no such dataset."""
    if name:
        return [Part(split_of(os.path.splitext(name)[0]), name)] if name.lower().endswith(b".arrow") else []
    present = files.file_names()
    if SPLITS_OF_DATASET not in present:
        return _listed(files, b"", None) if STATE in present and any(map(_is_arrow, present)) else []
    splits = _document(files, SPLITS_OF_DATASET).get("splits")
    if not isinstance(splits, list) or not splits or not all(map(_is_name, splits)):
        raise AlexprepError(f"{files.display(SPLITS_OF_DATASET)} names no splits: {_AGAIN}")
    meant = {split: split_of(split.encode()) for split in splits}
    if len(splits) == 1:
        meant = {splits[0]: meant[splits[0]] or "train"}
    for split, own in meant.items():
        if own is None or list(meant.values()).count(own) > 1:
            what = "means no split" if own is None else f"means {own!r}, as another one does"
            raise AlexprepError(
                f"{files.display(SPLITS_OF_DATASET)}: {split!r} {what}: name the folder of one split as SOURCE, or save the dataset anew with splits "
                "called train, validation and test"
            )
    parts = [part for split, own in meant.items() for part in _listed(files, split.encode(), own)]
    return sorted(parts, key=lambda part: (part.split or "train", part.path))


def _listed(files: Files, folder: bytes, split: str | None) -> list[Part]:
    """The files that the state.json of a folder lists; `split` goes before the one that stands there."""
    path = os.path.join(folder, STATE)
    state = _document(files, path)
    try:
        told = [item["filename"] for item in state["_data_files"]]
    except (KeyError, TypeError):
        told = []
    if not told or not all(map(_is_name, told)):
        raise AlexprepError(f"{files.display(path)} lists no files of data: {_AGAIN}")
    names = [name.encode() for name in told]
    present = set(files.file_names(folder))
    if missing := [name for name in names if name not in present]:
        raise AlexprepError(
            f"{files.display(os.path.join(folder, missing[0]))} is missing, with {len(missing) - 1:,} others that {as_text(STATE)} lists: "
            "get what is missing"
        )
    split = split or split_of(str(state.get("_split") or "").encode())
    return [Part(split, os.path.join(folder, name)) for name in sorted(names)]


def _document(files: Files, path: bytes) -> dict[str, Any]:
    try:
        document = json.loads(files.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise AlexprepError(f"{files.display(path)} cannot be read ({error}): {_AGAIN}") from None
    return document if isinstance(document, dict) else {}


def _is_name(told: Any) -> bool:
    """Whether what a document tells is a name that leads nowhere but into its folder."""
    return isinstance(told, str) and told.isprintable() and "/" not in told and told not in ("", ".", "..")


def _is_arrow(name: bytes) -> bool:
    return name.lower().endswith(b".arrow")
