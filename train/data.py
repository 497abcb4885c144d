"""Where batches come from, as the loop and the evaluation see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from alexprep.pipeline.augmentation import Augmentation
from alexprep.shards.errors import AlexprepError
from alexprep.shards.layout import read_dataset

EVALUATION_SPLITS = ("val", "test")  # the first that has samples is evaluated on


class LoadedBatch(Protocol):
    """The part of `alexprep.pipeline.loader.Batch` that training reads."""

    @property
    def images(self) -> torch.Tensor:
        """Float32, the last three dimensions C H W or H W C as the loader was asked."""

    @property
    def labels(self) -> torch.Tensor:
        """Int64 (N,)."""


class BatchSource(Protocol):
    """The part of `alexprep.pipeline.loader.Loader` that training uses."""

    samples: int
    digest: str

    def __len__(self) -> int:
        """Steps an epoch."""

    def __iter__(self) -> Iterator[LoadedBatch]:
        """The rest of the current epoch."""

    def state_dict(self) -> dict[str, int]:
        """{"seed", "epoch", "step"} of the next batch."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a state; its step is below the epoch's length."""

    def close(self) -> None:
        """Frees threads and memory."""


class OpenLoader(Protocol):
    """Anything that opens a split as `alexprep.pipeline.loader.Loader` does."""

    def __call__(
        self,
        data: str | Path,
        split: str = ...,
        *,
        batch_size: int,
        augmentation: Augmentation = ...,
        views: Literal["random", "centre", "ten"] = ...,
        order: Literal["shuffle", "blocks", "sequential"] = ...,
        seed: int = ...,
        rank: int = ...,
        world_size: int = ...,
        device: str = ...,
        layout: Literal["NCHW", "NHWC"] = ...,
        threads: int | None = ...,
    ) -> BatchSource:
        """Opens `split` of the data set in `data`."""


class Examples(NamedTuple):
    """A batch as networks want it."""

    images: torch.Tensor  # float32 (N, C, H, W), or (N, 10, C, H, W) for ten views
    labels: torch.Tensor  # int64 (N,)


class DataFacts(NamedTuple):
    """What training needs to know of a data set before it opens a loader."""

    digest: str
    classes: int
    size: int  # side of the stored images, pixels
    evaluation_split: str | None


def data_facts(data: Path) -> DataFacts:
    """Reads them from dataset.json.

    Raises:
        AlexprepError: there is no finished data set in `data`, or it has fewer than two classes.
    """
    dataset: dict[str, Any] = read_dataset(data)
    classes = len(dataset["classes"])
    if classes < 2:
        raise AlexprepError(f"{data} has {classes} classes: training needs at least 2; shard a source with more")
    filled = [split for split in EVALUATION_SPLITS if dataset["splits"].get(split, {}).get("samples")]
    return DataFacts(dataset["digest"], classes, int(dataset["image"]["size"]), filled[0] if filled else None)


def layout_for(device: torch.device) -> Literal["NCHW", "NHWC"]:
    """How pixels should lie in memory: convolutions on a CPU are faster with the channels last."""
    return "NHWC" if device.type == "cpu" else "NCHW"


def memory_format(device: torch.device) -> torch.memory_format:
    """The memory format of weights that goes with `layout_for`."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def examples(batches: Iterable[LoadedBatch], layout: str) -> Iterator[Examples]:
    """The same batches with the channels as third dimension from the end; a view, no pixel moves."""
    for batch in batches:
        images = batch.images
        yield Examples(images.movedim(-1, -3) if layout == "NHWC" else images, batch.labels)
