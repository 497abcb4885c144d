"""A trained network as a program of its own uses it: `load` gives the network, its classes, and what makes its input of a picture.

A picture is first brought to the form of the dataset's images, JPEG included, as `convert` would bring it; then it is cut, and the mean
subtracted, by the graph that an evaluation runs. So the network is shown the same values, to the last bit.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.device import choose_device
from alexprep.pipeline.evaluation_views import ViewMaker, too_small
from alexprep.pipeline.loader_settings import Tuning
from alexprep.shards.any_dataset import TARS, dataset_facts
from alexprep.shards.errors import AlexprepError, one_of, whole_number
from alexprep.shards.image_codec import Target, shared_decoder
from alexprep.shards.image_header import Refused
from alexprep.shards.photos import Photo, convert_photos, find_photos, target_of
from alexprep.shards.rgb_statistics import Statistics, read_statistics
from alexprep.shards.storage import folder_at
from alexprep.shards.worker_pool import Engine, InProcessEngine
from alexprep.train.data import stored_sides
from alexprep.train.evaluation import mean_of, tuning_of
from alexprep.train.precision import memory
from alexprep.train.predictions import EvaluationViews, Net, check_classes, data_of, images_at_once, open_net
from alexprep.train.run_dir import Place, place_at

Picture = str | Path | bytes | NDArray[np.uint8] | Image.Image
_HERE = InProcessEngine()


@dataclass
class EvaluationTransform:
    """Makes of pictures what a network is shown in an evaluation. To be closed, or used as a context manager.

    Called with one picture, it gives float32 (3, H, W), or (2, 3, H, W) and (10, 3, H, W) of two and ten views; with a list of them, one more dimension in front. A
    picture is an encoded one by its path, URL or bytes; pixels, uint8 (H, W, 3) RGB or (H, W) grey; or one of Pillow's, which is taken as
    its `convert("RGB")`. It works in forked and spawned processes too, such as a DataLoader's.

    Attributes:
        target: the form of the dataset's images; None of other people's tars, whose images are taken as they are.
        augmentation: of the recipe's evaluations, whose crop, mean and deviation count here.
        views: "centre", "two" or "ten".
        statistics: of the training, where the augmentation needs them.
        batch_size: pictures that are worked on at a time.
        device: where the result lies.
        tuning: how the machine is used.
    """

    target: Target | None
    augmentation: Augmentation
    views: EvaluationViews
    statistics: Statistics | None
    batch_size: int
    device: torch.device
    tuning: Tuning

    def __post_init__(self) -> None:
        """Nothing is opened before it is used."""
        self._maker: ViewMaker | None = None
        self._process = os.getpid()

    def __call__(self, pictures: Picture | Sequence[Picture]) -> torch.Tensor:
        """The views, on the device. AlexprepError where a picture does not exist or cannot be decoded, with its name."""
        alone = not isinstance(pictures, list | tuple)
        some = [pictures] if alone else pictures
        plain = [np.asarray(each.convert("RGB")) if isinstance(each, Image.Image) else each for each in some]  # type: ignore[union-attr]
        photos = find_photos(plain)  # type: ignore[arg-type]
        if alone and len(photos) != 1:
            raise AlexprepError(f"{pictures!s} holds {len(photos):,} pictures: name one, or give a list")
        refused: dict[int, str] = {}
        parts = list(self.batches(photos, _HERE, refused))
        if refused:
            number, reason = min(refused.items())
            raise AlexprepError(f"{photos[number].name} cannot be decoded: {reason}")
        views = torch.cat([made for _, made in parts])
        return views[0] if alone else views

    def batches(
        self, photos: Sequence[Photo], engine: Engine | None, refused: dict[int, str]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The views of photos, batch after batch, with their places in the list; why others have none goes to `refused`.

        They are converted in worker processes of this machine, or by another engine.
        """
        numbers: list[int] = []
        waiting: list[bytes] = []
        with contextlib.closing(self._converted(photos, engine)) as converted:
            for number, result in converted:
                if isinstance(result, Refused):
                    refused[number] = result.reason
                    continue
                numbers.append(number)
                waiting.append(result)
                if len(waiting) == self.batch_size:
                    yield numbers, self.encoded(waiting)
                    numbers, waiting = [], []
        if waiting:
            yield numbers, self.encoded(waiting)

    def _converted(
        self, photos: Sequence[Photo], engine: Engine | None
    ) -> Generator[tuple[int, bytes | Refused], None, None]:
        """Photos in the form of the dataset's images."""
        if self.target is not None:
            for number, _, result in convert_photos(photos, self.target, engine):
                words = None if isinstance(result, Refused) else too_small(self.augmentation, *result.size)
                yield number, result if isinstance(result, Refused) else Refused(words) if words else result.data
            return
        for number, photo in enumerate(photos):
            try:
                found = photo.read()
            except OSError as error:
                found = Refused(f"cannot be read: {error.strerror or error}")
            encoded = _as_png(found) if isinstance(found, np.ndarray) else found
            pixels = None if isinstance(encoded, Refused) else shared_decoder().decode(encoded)
            words = (
                "not an image that can be decoded"
                if pixels is None
                else too_small(self.augmentation, *pixels.shape[:2])
            )
            yield number, Refused(words) if words and not isinstance(encoded, Refused) else encoded

    def encoded(self, images: Sequence[bytes]) -> torch.Tensor:
        """The views of at most `batch_size` images that have the dataset's form already, encoded as its members are."""
        if self._maker is None or self._process != os.getpid():  # DALI's threads do not survive a fork
            self._process = os.getpid()
            self._maker = ViewMaker(
                self.augmentation,
                self.views,
                size=None if self.target is None else self.target.common_size,
                raw=self.target is not None and self.target.format == "raw",
                batch_size=self.batch_size,
                statistics=self.statistics,
                device=self.device,
                memory_format=memory(self.device).memory_format,
                tuning=self.tuning,
            )
        return self._maker(images)

    def close(self) -> None:
        """Frees DALI's threads and memory; it opens again when it is called."""
        maker, self._maker = self._maker, None
        if maker is not None and self._process == os.getpid():
            maker.close()

    def __enter__(self) -> EvaluationTransform:
        """The transform itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes it."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process."""
        return self.__dict__ | {"_maker": None}


class Loaded(NamedTuple):
    """A trained network for a program of one's own."""

    network: nn.Module  # in evaluation mode, on its device, from float32 (N, 3, H, W) to logits (N, classes)
    classes: list[str]  # names, by label
    transform: EvaluationTransform  # from a picture to the network's input


@dataclass(frozen=True)
class Opened:
    """A run's network with what an evaluation shows it."""

    net: Net
    dataset: dict[str, Any]  # what dataset.json says
    transform: EvaluationTransform
    data: Path  # the dataset's folder
    notes: list[str]  # a sentence for each thing that is not as it was in the training


def load(
    run: Path | str,
    *,
    views: EvaluationViews = "centre",
    device: str | None = "cpu",
    data: Path | str | None = None,
    recipe: str | None = None,
    model: str | None = None,
) -> Loaded:
    """The network of a run, its classes, and the transform that an evaluation applies to an image.

    Args:
        run: the run's folder, on a disk or a URL such as s3://…, for its newest valid checkpoint; or FOLDER@STEP, FOLDER@best.
        views: "centre", "two" with its reflection, or "ten" of the paper, whose softmax outputs are to be averaged.
        device: "cpu" or "cuda"; None for the GPU if there is one.
        data: the dataset's folder, where it is no longer where it was.
        recipe: the user's own recipe file, of a run that has one.
        model: likewise the code of the network.

    Raises:
        AlexprepError: there is no such run, checkpoint or dataset, or they do not go together.
    """
    opened = open_run_of(
        place_at(run),
        views=views,
        device=device,
        data=None if data is None else folder_at(data),
        recipe=recipe,
        model=model,
    )
    return Loaded(opened.net.network, opened.dataset["classes"], opened.transform)


def open_run_of(
    place: Place,
    *,
    data: Path | None = None,
    views: EvaluationViews = "centre",
    batch_size: int = 128,
    threads: int | None = None,
    device: str | None = None,
    recipe: str | None = None,
    model: str | None = None,
) -> Opened:
    """Reads a checkpoint and what its run's dataset says; `batch_size` is in crops, for the other arguments see `load`."""
    one_of("views", views, get_args(EvaluationViews))
    whole_number("batch_size", batch_size, 1, 65_536)
    where = choose_device(device)
    net = open_net(place, where, recipe, model)
    folder = data or data_of([net])
    dataset = dataset_facts(folder)
    note = check_classes(net, folder, dataset)
    notes = [*net.skipped, *([note] if note else [])]
    target = None if dataset["image"]["format"] == TARS else target_of(dataset)
    net.recipe.check_sides(stored_sides(folder, dataset))
    augmentation = net.recipe.evaluation_augmentation
    mean_from = mean_of(net, dataset, notes) or folder
    tuning = tuning_of([net], folder, where)
    transform = EvaluationTransform(
        target,
        augmentation,
        views,
        read_statistics(mean_from) if augmentation.needs_statistics else None,
        images_at_once(batch_size, views),
        where,
        replace(tuning, threads=threads) if threads is not None else tuning,
    )
    return Opened(net, dataset, transform, folder, notes)


def _as_png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels as a file that loses nothing."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()
