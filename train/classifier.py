"""A trained network that is shown photos: the five best classes of each, the same to the last digit as an evaluation of the same image.

A photo is first brought to the form of the dataset's images, JPEG included, as `convert` would bring it; then it is cut, and the mean
subtracted, by the graph that an evaluation runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alexprep.pipeline.device import choose_device
from alexprep.pipeline.evaluation_views import ViewMaker
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError, one_of, whole_number
from alexprep.shards.image_header import Refused
from alexprep.shards.photos import Photo, convert_photos, find_photos, target_of
from alexprep.shards.rgb_statistics import read_statistics
from alexprep.shards.worker_pool import Engine
from alexprep.train.data import stored_sides
from alexprep.train.evaluation import Scores, mean_of, tuning_of
from alexprep.train.metrics import TOP
from alexprep.train.precision import Precision, check_precision, float32_kernels, memory
from alexprep.train.prediction_table import PredictionTable
from alexprep.train.predictions import EvaluationViews, Net, Predicted, ask, check_classes, data_of, open_net
from alexprep.train.run_dir import Place
from alexprep.train.signals_and_memory import keep_freed_memory

PhotoPlace = str | Path | bytes | NDArray[np.uint8]  # what `find_photos` takes


@dataclass(frozen=True)
class Classified:
    """What a classifier found: a row of `table` for each photo that can be decoded, and why each of the others cannot."""

    table: PredictionTable
    refused: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)


class Classifier:
    """A trained network, opened once, that classifies photos.

    Attributes:
        net: the network, its run and its recipe.
        classes: names, by label.
        precision: that the network computes in.
        batch: images that it is shown at a time; fewer are filled up.
        notes: a sentence for each thing that is not as it was in the training.
    """

    def __init__(
        self,
        place: Place,
        *,
        data: Path | None = None,
        views: EvaluationViews = "centre",
        batch_size: int = 128,
        precision: Precision = "fp32",
        threads: int | None = None,
        device: str | None = None,
        recipe: str | None = None,
        model: str | None = None,
    ) -> None:
        """Reads the checkpoint and what the run's dataset says; for the arguments see `open`."""
        one_of("views", views, ("centre", "ten"))
        whole_number("batch_size", batch_size, 1, 65_536)
        where = choose_device(device)
        check_precision(precision, where)
        if where.type == "cpu":
            keep_freed_memory()
        self.net: Net = open_net(place, where, recipe, model)
        folder = data or data_of([self.net])
        dataset = read_dataset(folder)
        note = check_classes(self.net, folder, dataset)
        self.notes: list[str] = [*self.net.skipped, *([note] if note else [])]
        self.classes: list[str] = dataset["classes"]
        self.data, self.views, self.device = folder, views, where
        self.target = target_of(dataset)
        self.net.recipe.check_sides(*stored_sides(folder, dataset))
        self.precision: Precision = precision
        augmentation = self.net.recipe.augmentation
        mean_from = mean_of(self.net, dataset, self.notes) or folder
        self.batch = batch_size if views == "centre" else max(1, batch_size // 10)
        tuning = tuning_of([self.net], folder, where)
        self._maker = ViewMaker(
            augmentation,
            views,
            size=self.target.common_size,
            raw=self.target.format == "raw",
            batch_size=self.batch,
            statistics=read_statistics(mean_from) if augmentation.needs_statistics else None,
            device=where,
            memory_format=memory(where).memory_format,
            tuning=replace(tuning, threads=threads) if threads is not None else tuning,
        )

    @classmethod
    def open(cls, run: Path | str, step: int | None = None, **options: Any) -> Classifier:
        """Opens the newest valid checkpoint of the run in a folder, or that of `step`.

        Args:
            run: the run's folder.
            step: of the checkpoint.
            options: `data`, the dataset's folder, where it is no longer where it was; `views`, "centre" or "ten"; `batch_size`, crops at
                a time, to which a smaller number of photos is filled up, so that a photo's probabilities do not depend on its
                neighbours; `precision`; `threads` for decoding; `device`, "cpu" or "cuda"; `recipe` and `model`, the user's own code.

        Raises:
            AlexprepError: there is no such run, checkpoint or dataset, or they do not go together.
        """
        return cls(Place(Path(run), step), **options)

    def predict(
        self,
        photos: Iterable[PhotoPlace] | PhotoPlace,
        engine: Engine | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Classified:
        """Classifies photos: files, folders, tars or URLs by name, encoded pictures as bytes, or pixels (H, W, 3), uint8 RGB.

        Photos are converted in worker processes of this machine, or by another `engine`; `progress` is called with the number of photos
        done and of all. Raises AlexprepError where one of them does not exist; one that cannot be decoded is listed as refused.
        """
        alone = isinstance(photos, str | Path | bytes | np.ndarray)
        listed = find_photos([photos] if alone else photos)  # type: ignore[list-item, arg-type]
        scores = Scores(min(TOP, len(self.classes)))
        refused: dict[int, str] = {}
        for batch in self._batches(listed, engine, refused):
            logs = self._ask([data for _, data in batch])
            numbers = torch.tensor([number for number, _ in batch])
            scores.add(Predicted(logs, torch.full_like(logs[:, 0], -1, dtype=torch.int64), numbers))
            if progress is not None:
                progress(scores.images + len(refused), len(listed))
        names = [photo.name for photo in listed]
        found = [(names[number], reason) for number, reason in sorted(refused.items())]
        return Classified(scores.table(names, names, self.classes), found)

    def close(self) -> None:
        """Frees DALI's threads and memory."""
        self._maker.close()

    def __enter__(self) -> Classifier:
        """The classifier itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()

    def views_of(
        self, listed: Sequence[Photo], engine: Engine | None, refused: dict[int, str]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The views of photos, batch after batch, with their places in the list; why others have none goes to `refused`."""
        for batch in self._batches(listed, engine, refused):
            yield [number for number, _ in batch], self._maker([data for _, data in batch])

    def _batches(
        self, listed: Sequence[Photo], engine: Engine | None, refused: dict[int, str]
    ) -> Iterator[list[tuple[int, bytes]]]:
        """Photos in the target form, with their places in the list, as many at a time as the network is shown."""
        waiting: list[tuple[int, bytes]] = []
        with contextlib.closing(convert_photos(listed, self.target, engine)) as converted:  # type: ignore[type-var]
            for number, _, result in converted:
                reason = result.reason if isinstance(result, Refused) else self._maker.too_small(*result.size)
                if isinstance(result, Refused) or reason is not None:
                    refused[number] = str(reason)
                    continue
                waiting.append((number, result.data))
                if len(waiting) == self.batch:
                    yield waiting
                    waiting = []
        if waiting:
            yield waiting

    def _ask(self, encoded: Sequence[bytes]) -> torch.Tensor:
        with torch.inference_mode(), float32_kernels(self.precision):
            return ask(self.net, self._maker(encoded), self.precision, self.batch)


def check_refused(found: Classified) -> None:
    """Raises AlexprepError where not one photo could be decoded."""
    if not len(found.table) and found.refused:
        name, reason = found.refused[0]
        raise AlexprepError(f"none of the {len(found.refused):,} photos can be decoded, the first, {name}: {reason}")
