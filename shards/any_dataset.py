"""A dataset that `alexprep shard` made, or anyone's webdataset tars, as one kind of thing: its facts, and the samples of a split.

Ours are described by `dataset_format` and read by `sample_reader`; other people's tars are indexed by `webdataset_index`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import DATASET, PLAN, read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import target_in
from alexprep.shards.sample_reader import Samples, TarSamples
from alexprep.shards.storage import digest_json, folder_at
from alexprep.shards.webdataset_index import UnusableSample, index_tars, splits_of

DataSource = Union[str, Path, Sequence[Union[str, Path]]]  # noqa: UP007  (evaluated, also by Python 3.10's typing)
TARS = "tars"  # the format of images in the facts of other people's tars


class SplitSamples(NamedTuple):
    """The samples of a split, and what is known of them."""

    samples: TarSamples
    sizes_N2: NDArray[np.integer]  # heights and widths of the stored images, pixels
    size: tuple[int, int] | None  # height and width where all have the same
    raw: bool  # whether members are pixels rather than encoded images
    digest: str  # the identity of the data, hex sha256; of other people's tars that of the split alone
    classes: list[str]  # by label
    bad: tuple[UnusableSample, ...]  # samples of other people's tars that cannot be used, with the reason
    folder: Path | None  # that has the dataset's statistics, or will


def is_tars(source: DataSource) -> bool:
    """Whether a source names other people's tars: several places, a tar, a pattern of tars, or a folder with tars and no dataset of ours."""
    if _several(source):
        return True
    name, folder = str(source), folder_at(str(source))
    if (folder / DATASET).exists() or (folder / PLAN).exists():
        return False
    return name.endswith(".tar") or "{" in name or any(folder.glob("*.tar")) or any(folder.glob("*/*.tar"))


def _several(source: DataSource) -> bool:
    """Whether it is a list of places; a place is a str, a Path or a UPath, which is no os.PathLike."""
    return isinstance(source, Sequence) and not isinstance(source, str)


def is_dataset(data: Path) -> bool:
    """Whether a place holds a finished dataset, or tars."""
    return (data / DATASET).exists() or is_tars(data)


def open_samples(source: DataSource, split: str, cache: Path | None = None) -> SplitSamples:
    """Opens a split of a finished dataset, or of tars, see `alexprep.shards.webdataset_index.index_tars`; AlexprepError where there is none."""
    if not is_tars(source):
        folder = folder_at(str(source))
        ours = Samples(folder, split)
        facts, raw = ours.dataset, ours.dataset["image"]["format"] == "raw"
        return SplitSamples(ours, ours.sizes_N2(), ours.common_size, raw, facts["digest"], facts["classes"], (), folder)
    index = index_tars(source, split, cache=cache)
    home = None if _several(source) or not folder_at(str(source)).is_dir() else folder_at(str(source))
    samples = TarSamples(dict(enumerate(index.paths)), index.records)
    return SplitSamples(
        samples, samples.sizes_N2(), samples.common_size, False, index.digest, index.classes, index.bad, home
    )


def dataset_facts(data: Path | str) -> dict[str, Any]:
    """The facts of a dataset, as `read_dataset` has them; of other people's tars the part of them that the tars tell.

    That is `digest`, `classes`, `image` with its `size` (a side, or height and width; None where images differ) and the format "tars", and
    `splits`, each with its `samples`.

    Raises:
        AlexprepError: there is no such dataset, a tar is damaged, or the splits have not the same classes.
    """
    if not is_tars(data):
        return read_dataset(data)
    place = folder_at(str(data))
    found = {split: index_tars(data, split) for split in (splits_of(place) if place.is_dir() else ["train"])}
    classes = max((index.classes for index in found.values()), key=len)
    for split, index in found.items():
        if index.classes != classes[: len(index.classes)]:
            raise AlexprepError(
                f"{data} has other classes in {split} than elsewhere, so that labels would mean different things: make a data set of them "
                "with `alexprep shard`, which numbers them together"
            )
    sizes = {TarSamples({}, index.records).common_size for index in found.values()}
    height, width = size if len(sizes) == 1 and (size := next(iter(sizes))) else (None, None)
    digests = [found[split].digest for split in sorted(found)]
    return {
        "digest": digests[0] if len(found) == 1 else digest_json(dict(zip(sorted(found), digests, strict=True))),
        "classes": classes,
        "image": {"size": height if height == width else [height, width], "format": TARS},
        "splits": {split: {"samples": len(index.records)} for split, index in found.items()},
    }


def common_size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width that all images have, pixels, by `image` of a dataset's facts; None where they differ."""
    if image["format"] != TARS:
        return target_in(image).common_size
    size = image["size"]
    return (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])
