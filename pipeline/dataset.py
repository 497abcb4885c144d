"""Opens what a `Loader` reads: a dataset that `alexprep shard` made, or anyone's webdataset tars, as one kind of thing.

The bytes themselves are read by `alexprep.shards.sample_reader`; other people's tars are indexed by `alexprep.shards.webdataset_index`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.any_dataset import DataSource, SplitSamples, open_samples
from alexprep.shards.errors import AlexprepError, one_of
from alexprep.shards.rgb_statistics import Statistics, read_statistics
from alexprep.shards.sample_reader import Samples
from alexprep.shards.storage import is_place

OnBad = Literal["error", "skip"]
Source = DataSource


class Dataset(SplitSamples):
    """The samples of a split, as a loader reads them."""

    def keys(self, rows: Sequence[int]) -> list[str]:
        """The keys of some samples, by the rows of the index."""
        return [self.samples.key(row) for row in rows]

    def metadata(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What goes along with some samples: see `Samples.metadata`. AlexprepError for other people's tars, which may have it anywhere."""
        if not isinstance(self.samples, Samples):
            raise AlexprepError(
                "metadata are read of data sets that `alexprep shard` made: make one of these tars, which takes along what they have"
            )
        return [self.samples.metadata(row) for row in rows]

    def check(self, augmentation: Augmentation, statistics: Statistics | None) -> None:
        """Raises AlexprepError where these images cannot be augmented so."""
        mean = None if statistics is None else statistics.mean_HWC
        if augmentation.windowed_mean and (self.size is None or mean is None or mean.shape[:2] != self.size):
            have = (
                "images of several sizes" if self.size is None else f"images of {self.size[1]} x {self.size[0]} pixels"
            )
            there = "have none" if mean is None else f"another one, of {mean.shape[1]} x {mean.shape[0]}, is not theirs"
            raise AlexprepError(
                f"mean {augmentation.mean!r} subtracts a mean image of the images' own size, and {have} {there}: use mean 'channel' or "
                "'imagenet', or shards made by `alexprep shard` with --fit square"
            )
        if augmentation.crop is None and self.size is None and len(self.samples):
            raise AlexprepError(
                "whole images of several sizes make no batch: choose a crop, and a scale to resize to it"
            )
        if augmentation.view is not None and augmentation.scale is None:
            small = np.flatnonzero((augmentation.padded(self.sizes_N2) < np.array(augmentation.view)).any(axis=1))
            if len(small):
                (height, width), (rows, columns) = self.sizes_N2[small[0]].tolist(), augmentation.view
                square = rows == columns
                crop, size = (f"{rows} pixels", f"{rows}") if square else (f"{columns} x {rows}", f"{columns}x{rows}")
                raise AlexprepError(
                    f"a crop of {crop} does not fit {len(small):,} of {len(self.samples):,} images, for "
                    f"example {self.samples.where(int(small[0]))} with {width} x {height}: choose a smaller crop, resize "
                    f"(augmentation 'resized'), or shard again with --size {size} or more"
                )


def open_dataset(source: Source, split: str, on_bad: OnBad = "error", cache: str | Path | None = None) -> Dataset:
    """Opens a split of a finished dataset in a folder, or of tars, see `alexprep.shards.webdataset_index.index_tars`.

    Raises AlexprepError where there is no such data, or, unless told to skip them, samples in it that cannot be used.
    """
    one_of("on_bad", on_bad, get_args(OnBad))
    places = source if isinstance(source, Sequence) and not isinstance(source, str | bytes) else [source]
    if not all(is_place(place) for place in places):
        raise AlexprepError(f"data {source!r} is no path and no list of paths")
    dataset = Dataset(*open_samples(source, split, None if cache is None else Path(cache)))
    if dataset.bad and on_bad == "error":
        raise AlexprepError(
            f"{len(dataset.bad):,} samples cannot be used, the first: {dataset.bad[0]}; leave such samples out with "
            "on_bad='skip'"
        )
    return dataset


def statistics_for(dataset: Dataset, chosen: Statistics | str | Path | None) -> Statistics:
    """The statistics that were chosen, or the dataset's own; raises AlexprepError where there are none."""
    if isinstance(chosen, Statistics):
        return chosen
    if chosen is not None:
        if not isinstance(chosen, str | os.PathLike):
            raise AlexprepError(f"statistics {chosen!r} are neither a dataset's folder nor statistics")
        return read_statistics(str(chosen))
    if dataset.folder is None:
        raise AlexprepError(
            "these shards have no statistics: name a dataset that has them (statistics=FOLDER), or use an augmentation "
            "without, for example 'resized'"
        )
    return read_statistics(dataset.folder)
