"""A trained network that is shown photos: the five best classes of each, the same to the last digit as an evaluation of the same image.

What a photo becomes for it is made in `alexprep.train.loading`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline.device import choose_device
from alexprep.shards.contact_sheet import SheetRow, lay_out, photo_cells
from alexprep.shards.dataset_format import short_classes, shown_classes
from alexprep.shards.errors import AlexprepError
from alexprep.shards.photos import Photo, find_photos
from alexprep.shards.storage import folder_at
from alexprep.shards.worker_pool import Engine
from alexprep.train.evaluation import Scores
from alexprep.train.loading import open_run_of
from alexprep.train.metrics import TOP
from alexprep.train.precision import Precision, check_precision, float32_kernels
from alexprep.train.prediction_table import PredictionTable
from alexprep.train.predictions import EvaluationViews, Net, Predicted, ask
from alexprep.train.run_dir import Place
from alexprep.train.signals_and_memory import keep_freed_memory

_DRAWN = 100  # photos of a contact sheet
PhotoPlace = str | Path | bytes | NDArray[np.uint8]  # what `find_photos` takes


@dataclass(frozen=True)
class Classified:
    """What a classifier found: a row of `table` for each photo that can be decoded, and why each of the others cannot."""

    table: PredictionTable
    refused: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    photos: list[Photo] = field(default_factory=list)  # those of the table, in its order


class Classifier:
    """A trained network, opened once, that classifies photos.

    Attributes:
        net: the network, its run and its recipe.
        classes: names, by label.
        shown_names: the same as people read them, with words where dataset.json has any.
        short_names: likewise as short as they can be, for pictures.
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
        where = choose_device(device)
        check_precision(precision, where)
        if where.type == "cpu":
            keep_freed_memory()
        opened = open_run_of(
            place,
            data=data,
            views=views,
            batch_size=batch_size,
            threads=threads,
            device=device,
            recipe=recipe,
            model=model,
        )
        self.net: Net = opened.net
        self.notes, self.data, dataset = opened.notes, opened.data, opened.dataset
        self.classes: list[str] = dataset["classes"]
        self.shown_names, self.short_names = shown_classes(dataset), short_classes(dataset)
        self.precision: Precision = precision
        self.views, self.batch = views, opened.transform.batch_size
        self._transform = opened.transform

    @classmethod
    def open(cls, run: Path | str, step: int | None = None, **options: Any) -> Classifier:
        """Opens the newest valid checkpoint of the run in a folder, or that of `step`.

        Args:
            run: the run's folder, on a disk or a URL such as s3://….
            step: of the checkpoint.
            options: `data`, the dataset's folder, where it is no longer where it was; `views`, "centre", "two" or "ten"; `batch_size`, crops at
                a time, to which a smaller number of photos is filled up, so that a photo's probabilities do not depend on its
                neighbours; `precision`; `threads` for decoding; `device`, "cpu" or "cuda"; `recipe` and `model`, the user's own code.

        Raises:
            AlexprepError: there is no such run, checkpoint or dataset, or they do not go together.
        """
        return cls(Place(folder_at(run), step), **options)

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
        for numbers, views in self.views_of(listed, engine, refused):
            with torch.inference_mode(), float32_kernels(self.precision):
                logs = ask(self.net, views, self.precision, self.batch)
            scores.add(Predicted(logs, torch.full_like(logs[:, 0], -1, dtype=torch.int64), torch.tensor(numbers)))
            if progress is not None:
                progress(scores.images + len(refused), len(listed))
        names = [photo.name for photo in listed]
        found = [(names[number], reason) for number, reason in sorted(refused.items())]
        seen = [photo for number, photo in enumerate(listed) if number not in refused]
        return Classified(scores.table(names, names, self.classes), found, seen)

    def close(self) -> None:
        """Frees DALI's threads and memory."""
        self._transform.close()

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
        return self._transform.batches(listed, engine, refused)


def draw_predictions(found: Classified, names: Sequence[str], engine: Engine | None = None) -> Image.Image:
    """Draws a contact sheet: a row a photo, at most 100, with its best classes, which are called as `names` says by label."""
    rows = []
    table = found.table
    cells = photo_cells(found.photos[:_DRAWN], engine)
    for cell, photo, best, given in zip(
        cells, found.photos, table.best.tolist(), table.probabilities.tolist(), strict=False
    ):
        words = [f"{100 * share:.1f} %  {names[label]}" for label, share in zip(best, given, strict=True)]
        rows.append(SheetRow(Path(photo.name).name, "\n".join(words), [[cell]]))
    return lay_out(["photo"], rows)


def check_refused(found: Classified) -> None:
    """Raises AlexprepError where not one photo could be decoded."""
    if not len(found.table) and found.refused:
        name, reason = found.refused[0]
        raise AlexprepError(f"none of the {len(found.refused):,} photos can be decoded, the first, {name}: {reason}")
