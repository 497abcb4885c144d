"""Finds the images of a split that are nearest to a photo, by the distance between what one layer of a network gives for them.

The distance is Euclidean, as for figure 4 of the paper, or the Hamming distance of binary codes that are made of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards.contact_sheet import SheetRow, cell_of, lay_out, photo_cells
from alexprep.shards.dataset_format import read_dataset, read_index, short_classes
from alexprep.shards.errors import AlexprepError, whole_number
from alexprep.shards.photos import Photo, find_photos
from alexprep.shards.sample_reader import Samples
from alexprep.shards.worker_pool import Engine
from alexprep.train.binary_codes import BinaryCodes
from alexprep.train.classifier import Classifier, PhotoPlace
from alexprep.train.evaluation import sample_names
from alexprep.train.layer_outputs import LayerOutputs, features_command, outputs_of
from alexprep.train.training_state import weights_digest

_ROWS, _COLUMNS = 100, 12  # of a contact sheet


class Neighbour(NamedTuple):
    """An image of the split: its row in the index, key, source, label (-1 for none) and distance; that of codes in bits."""

    row: int
    key: str
    source: str
    label: int
    distance: float


@dataclass(frozen=True)
class Similar:
    """What was found: for each photo that can be decoded its neighbours, nearest first; and why each of the others cannot."""

    neighbours: dict[str, list[Neighbour]]
    dataset: dict[str, Any]  # dataset.json
    data: Path
    split: str
    photos: list[Photo]  # those that have neighbours, in this order
    refused: list[tuple[str, str]] = field(default_factory=list)

    def as_json(self) -> list[dict[str, Any]]:
        """For `--json`: a photo's name and its neighbours, each with key, source, label, class and distance."""
        return [
            {
                "key": name,
                "neighbours": [
                    one._asdict() | {"class": self.dataset["classes"][one.label] if one.label >= 0 else None}
                    for one in found
                ],
            }
            for name, found in self.neighbours.items()
        ]


def outputs_command(classifier: Classifier, layer: str, split: str, *options: str, path: Path | None = None) -> str:
    """The command that writes what a layer of a classifier's network gives for a split of its data, in backticks; see `features_command`."""
    net, data = classifier.net, classifier.data
    other = [] if data == net.data else [str(data)]
    return features_command(net.run, layer, split, *options, *other, step=net.step, path=path)


def _unfit(classifier: Classifier, outputs: LayerOutputs | BinaryCodes, other: str) -> AlexprepError:
    """That outputs are of something else than they are compared with, and the command that makes those that are wanted."""
    path = None if isinstance(outputs, BinaryCodes) else outputs.path  # codes are made of outputs
    again = outputs_command(classifier, outputs.facts["layer"], outputs.facts["split"], path=path)
    return AlexprepError(f"{outputs.path} is of {other}: make them with {again}")


def find_similar(
    classifier: Classifier,
    outputs: LayerOutputs | BinaryCodes,
    photos: Iterable[PhotoPlace],
    count: int = 10,
    engine: Engine | None = None,
) -> Similar:
    """Finds the `count` images nearest to each photo among those that `outputs` has.

    Args:
        classifier: with the checkpoint that gave the outputs.
        outputs: what `write_outputs` wrote of a split; or `write_codes`, for the Hamming distance.
        photos: what `Classifier.predict` takes.
        count: neighbours a photo.
        engine: converts the photos, as `Classifier.predict` has it.

    Raises:
        AlexprepError: the outputs are of other weights or of other data; scikit-learn is not installed; a photo does not exist.
    """
    facts, data = outputs.facts, classifier.data
    whole_number("count", count, 1, facts["images"])
    if facts["weights_sha256"] != weights_digest(classifier.net.network.state_dict()):
        raise _unfit(classifier, outputs, f"other weights than {classifier.net.name}")
    dataset = read_dataset(data)
    if facts["data_digest"] != dataset["digest"]:
        raise _unfit(classifier, outputs, f"another dataset than {data}")
    listed = find_photos(photos)
    refused: dict[int, str] = {}
    vectors: dict[int, NDArray[np.float32]] = {}
    for numbers, views in classifier.views_of(listed, engine, refused):
        found = outputs_of(classifier.net.network, facts["layer"], views, classifier.precision, classifier.batch)
        vectors |= dict(zip(numbers, found.flatten(1).cpu().numpy(), strict=True))
    chosen = sorted(vectors)
    left_out = [(listed[number].name, reason) for number, reason in sorted(refused.items())]
    if not chosen:
        return Similar({}, dataset, data, facts["split"], [], left_out)
    distances, rows = outputs.nearest(np.stack([vectors[number] for number in chosen]), count)
    keys, sources = sample_names(data, facts["split"])
    labels = read_index(data, facts["split"])["label"]
    neighbours = {
        listed[number].name: [
            Neighbour(row, keys[row], sources[row], int(labels[row]), distance)
            for row, distance in zip(near.tolist(), far.tolist(), strict=True)
        ]
        for number, near, far in zip(chosen, rows, distances, strict=True)
    }
    seen = list({listed[number].name: listed[number] for number in chosen}.values())  # one named twice is one
    return Similar(neighbours, dataset, data, facts["split"], seen, left_out)


def draw_similar(found: Similar, engine: Engine | None = None) -> Image.Image:
    """Draws a contact sheet: a row a photo, at most 100, with its neighbours, nearest first, at most 12."""
    samples = Samples(found.data, found.split)
    photos = found.photos[:_ROWS]
    rows, classes = [], short_classes(found.dataset)
    for cell, (name, near) in zip(photo_cells(photos, engine), found.neighbours.items(), strict=False):
        shown = near[:_COLUMNS]
        names = [classes[one.label] if one.label >= 0 else "no label" for one in shown]
        nearest_cells = [cell_of(samples.encoded(one.row).tobytes()) for one in shown]
        rows.append(SheetRow(Path(name).name, ", ".join(dict.fromkeys(names)), [[cell], nearest_cells]))
    return lay_out(["photo", f"nearest in {found.split}"], rows)
