"""What training needs to know of a data set, and what it asks of whatever delivers batches.

The loader itself is `alexprep.pipeline.loader.Loader`; tests and users may hand in any object of the same form.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from alexprep.shards.any_dataset import TARS, common_size, dataset_facts
from alexprep.shards.dataset_format import INDEX, read_index
from alexprep.shards.errors import AlexprepError

EVALUATION_SPLITS = ("val", "test")  # the first that has samples with labels is evaluated on


class LoadedBatch(Protocol):
    """The part of `alexprep.pipeline.Batch` that training reads; of a `MixedBatch` also what `examples` finds."""

    @property
    def images(self) -> torch.Tensor:
        """Float32 (N, C, H, W), or (N, views, C, H, W) for several views of each."""

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


class WithoutLastStep:
    """A loader's epochs without their last step, whose images have their turn in other epochs where the order is shuffled."""

    def __init__(self, loader: BatchSource) -> None:
        """The loader has at least two steps an epoch."""
        self._loader, self.samples, self.digest = loader, loader.samples, loader.digest

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self._loader) - 1

    def __iter__(self) -> Iterator[LoadedBatch]:
        """The rest of the current epoch; of the next one where nothing is left but the last step."""
        state = self._loader.state_dict()
        if state["step"] >= len(self):
            state = state | {"epoch": state["epoch"] + 1, "step": 0}
            self._loader.load_state_dict(state)
        return itertools.islice(iter(self._loader), len(self) - state["step"])

    def state_dict(self) -> dict[str, int]:
        """{"seed", "epoch", "step"} of the next batch."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a state; its step is below the epoch's length."""
        self._loader.load_state_dict(state)

    def close(self) -> None:
        """Frees threads and memory."""
        self._loader.close()


class ByCrop:
    """The epochs of loaders that cut crops of other sides out of the same images; one is open at a time."""

    def __init__(self, opened: Callable[[int, int], BatchSource], early: Sequence[int], side: int, epoch: int) -> None:
        """`opened` opens the loader of a side, for the epochs below a number; `epoch` is the first one that is wanted.

        `early` are the sides of the first epochs, one each; then comes `side`.
        """
        self._opened, self._early, self._last = opened, tuple(early), side
        self._loader, self._side = self._open(epoch)
        self.samples, self.digest = self._loader.samples, self._loader.digest

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self._loader)

    def __iter__(self) -> Iterator[LoadedBatch]:
        """The rest of the current epoch."""
        state = self.state_dict()
        if self._side_of(state["epoch"]) != self._side:
            self.load_state_dict(state)
        return iter(self._loader)

    def state_dict(self) -> dict[str, int]:
        """{"seed", "epoch", "step"} of the next batch, whose loader may be another one than the open one, of the same images."""
        return {name: value for name, value in self._loader.state_dict().items() if name != "augmentation"}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a state that `state_dict` gave; its step is below the epoch's length."""
        if self._side_of(state["epoch"]) != self._side:
            self._loader.close()
            self._loader, self._side = self._open(state["epoch"])
        self._loader.load_state_dict(state)

    def close(self) -> None:
        """Frees threads and memory."""
        self._loader.close()

    def _side_of(self, epoch: int) -> int:
        return self._early[epoch] if epoch < len(self._early) else self._last

    def _open(self, epoch: int) -> tuple[BatchSource, int]:
        """The loader of an epoch, which goes on as long as the side stays, and that side."""
        side = self._side_of(epoch)
        others = (later for later in range(epoch, len(self._early) + 1) if self._side_of(later) != side)
        return self._opened(side, next(others, sys.maxsize)), side


OpenLoader = Callable[..., BatchSource]  # opens a split with the arguments of `alexprep.pipeline.loader.Loader`


class Examples(NamedTuple):
    """A batch in the form that a network takes."""

    images: torch.Tensor  # float32 (N, C, H, W), or (N, views, C, H, W) for several views of each
    labels: torch.Tensor  # int64 (N,)

    @property
    def counted_labels(self) -> torch.Tensor:
        """What errors are measured by."""
        return self.labels


class MixedExamples(NamedTuple):
    """A batch whose pairs are mixed: each image has two labels. Of four tensors, so that nobody takes it for `Examples`."""

    images: torch.Tensor  # as in `Examples`
    labels: torch.Tensor  # int64 (N,)
    partner_labels: torch.Tensor  # int64 (N,)
    weights: torch.Tensor  # float32 (N,), 0 to 1: what the own label counts, beside the partner's

    @property
    def counted_labels(self) -> torch.Tensor:
        """What errors are measured by: of both labels the one that counts more."""
        return torch.where(self.weights < 0.5, self.partner_labels, self.labels)


def examples(batch: LoadedBatch) -> Examples | MixedExamples:
    """A loader's batch for a network."""
    partner_labels, weights = (getattr(batch, name, None) for name in ("partner_labels", "weights"))
    if partner_labels is None or weights is None:
        return Examples(batch.images, batch.labels)
    return MixedExamples(batch.images, batch.labels, partner_labels, weights)


class DataFacts(NamedTuple):
    """What training needs to know of a data set before it opens a loader."""

    digest: str
    classes: int
    sides: tuple[int, int] | None  # see `stored_sides`
    evaluation_split: str | None  # with samples and labels
    unlabelled: list[str]  # splits that would have come first, but have no labels


def data_facts(data: Path) -> DataFacts:
    """Reads dataset.json, or indexes anyone's tars, and finds out from the indexes whether splits have labels."""
    dataset = dataset_facts(data)
    classes = len(dataset["classes"])
    if dataset.get("unlabelled"):
        raise AlexprepError(
            f"{data} was made with --unlabelled and has no labels, which training a network needs: shard a source that has them; for a training "
            "without labels, use Loader in a program of your own (docs/pipelines.md)"
        )
    if classes < 2:
        raise AlexprepError(f"{data} has {classes} classes: training needs at least 2; shard a source with more")
    filled = [split for split in EVALUATION_SPLITS if dataset["splits"].get(split, {}).get("samples")]
    split = next((split for split in filled if _has_labels(data, split)), None)
    unlabelled = filled[: filled.index(split)] if split else filled
    return DataFacts(dataset["digest"], classes, stored_sides(data, dataset), split, unlabelled)


def stored_sides(data: Path, dataset: dict[str, Any]) -> tuple[int, int] | None:
    """The shortest and the longest of the stored images' shorter sides, pixels, over all splits; None for other people's tars that differ."""
    size = common_size(dataset["image"])
    if size is not None:
        return min(size), min(size)
    if dataset["image"]["format"] == TARS:
        return None
    filled = [split for split, record in dataset["splits"].items() if record["samples"]]
    shorter = [np.minimum(index["height"], index["width"]) for index in (read_index(data, split) for split in filled)]
    return min(int(sides.min()) for sides in shorter), max(int(sides.max()) for sides in shorter)


def _has_labels(data: Path, split: str) -> bool:
    """Whether any image of a split has a label; taken for granted where there is no index to tell."""
    return not (data / split / INDEX).exists() or bool((read_index(data, split)["label"] >= 0).any())
