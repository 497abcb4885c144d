"""The part of a report on the augmentation: one photo as a training draws it, presets side by side, its ten test crops, the shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.augmentation import (
    PARTS,
    PRESETS,
    Augmentation,
    augment,
    channel_stdevs,
    draw,
    ten_windows,
)
from alexprep.pipeline.geometry import resize
from alexprep.pipeline.sampler import BLOCK_SHARDS, block_order, epoch_order, shuffle_quality, stream_order
from alexprep.shards.errors import AlexprepError
from alexprep.shards.rgb_statistics import Statistics, read_statistics
from alexprep.shards.sample_reader import Samples
from alexprep.train.report.blocks import Block, Picture, Section, Table, Words, enlarged, tiled
from alexprep.train.report.data_section import decoded, typical_row
from alexprep.train.run_dir import read_config

_DRAWS, _PER_ROW = 24, 8
_GREY = 128.0  # what a value of 0 is shown as
_MOST_SHUFFLED = 200_000  # rows whose order is measured
_BATCH_SIZE = 128  # of the order that depends on it


def augmentation_section(data: Path | None, runs: Sequence[Path]) -> Section:
    """The section of a dataset, drawn with the augmentation of the first run, or the paper's where there is no run."""
    section = Section("augmentation", "Augmentation")
    if data is not None:
        section.add(lambda: _pictures(data, runs), "picture of the augmentation")
        section.add(lambda: _shuffles(data), "measure of the shuffle")
    return section


def _pictures(data: Path, runs: Sequence[Path]) -> list[Block]:
    samples = Samples(data, "train")
    row = typical_row(samples)
    photo = decoded(samples, row)
    whose, augmentation, evaluated = _augmentations(runs, photo.shape[:2])
    statistics = read_statistics(data) if augmentation.needs_statistics else None
    augmentation = _without_window(augmentation, statistics)
    count = f"{_DRAWS} draws of one photo"
    words = f"{count} as {whose} sees it in {_DRAWS} epochs, less the mean: 0 is shown as mid grey."
    shown = [_view(photo, augmentation, statistics, row, epoch) for epoch in range(_DRAWS)]
    blocks: list[Block] = [
        Picture(
            "draws",
            f"{count} with the augmentation of {whose}.",
            words,
            tiled([shown[at : at + _PER_ROW] for at in range(0, _DRAWS, _PER_ROW)]),
            enlarged(shown[0]),
        )
    ]
    height, width = augmentation.view or photo.shape[:2]
    presets = {
        name: _without_window(replace(preset, crop=_within(photo, height, width)), statistics)
        for name, preset in PRESETS.items()
        if name != "none"
    }
    if statistics is not None or not any(preset.needs_statistics for preset in presets.values()):
        rows = [
            [_view(photo, preset, statistics, row, epoch) for epoch in range(_PER_ROW)] for preset in presets.values()
        ]
        listed = ", ".join(presets)
        blocks.append(
            Picture(
                "presets",
                f"Eight draws of one photo with each preset: {listed}.",
                f"The presets, with crops of {width} x {height} pixels, a row each: {listed}.",
                tiled(rows),
                enlarged(rows[0][0]),
            )
        )
    windows = ten_windows(evaluated, np.array([photo.shape[:2]]))[0].tolist()
    edges = [(evaluated.pad, evaluated.pad)] * 2
    padded = np.pad(photo, [*edges, (0, 0)], constant_values=evaluated.background)
    crops = [_cut(padded, window, evaluated.view or photo.shape[:2]) for window in windows]
    ten = tiled([crops, [crop[:, ::-1] for crop in crops]])
    blocks.append(
        Picture(
            "ten_views",
            "The ten test views of one photo.",
            "The ten test views: corners and centre, and their reflections (section 4.1 of the paper).",
            ten,
            enlarged(crops[0]),
        )
    )
    return blocks


def _within(photo: NDArray[np.uint8], height: int, width: int) -> tuple[int, int]:
    """A crop that fits where nothing is padded."""
    return min(height, photo.shape[0]), min(width, photo.shape[1])


def _without_window(augmentation: Augmentation, statistics: Statistics | None) -> Augmentation:
    """With the channel means in place of the mean image where images have different sizes, and so none."""
    if not augmentation.windowed_mean or statistics is None or statistics.mean_HWC is not None:
        return augmentation
    return replace(augmentation, mean="channel")


def _augmentations(runs: Sequence[Path], size: tuple[int, ...]) -> tuple[str, Augmentation, Augmentation]:
    """Whose they are, that of the training and that of evaluations."""
    for run in runs:
        try:
            recipe = read_config(run)["identity"]["recipe"]
            told, crop = recipe["augmentation"], recipe.get("evaluation_crop")
        except (AlexprepError, KeyError, TypeError):
            continue
        known = {field.name for field in fields(Augmentation)}
        found = Augmentation(**{name: _value(name, value) for name, value in told.items() if name in known})
        evaluated = found if crop is None else replace(found, crop=crop)
        room = found.padded(np.array([size[:2]]))[0]
        if all(one.view is None or (np.array(one.view) <= room).all() for one in (found, evaluated)):
            return f"the net of {run.name}", found, evaluated
    papers = Augmentation(crop=max(1, min(size) * 224 // 256))
    return "the paper's net", papers, papers


def _value(name: str, value: Any) -> Any:
    """A field of an augmentation by its JSON value."""
    if isinstance(value, dict):
        kinds = {part: kinds for part, *kinds in PARTS}.get(name, [])
        fitting = [kind for kind in kinds if {field.name for field in fields(kind)} == value.keys()]
        return fitting[0](**{inner: _value("", each) for inner, each in value.items()}) if fitting else None
    return tuple(value) if isinstance(value, list) else value


def _view(
    photo: NDArray[np.uint8], augmentation: Augmentation, statistics: Statistics | None, row: int, epoch: int
) -> NDArray[np.uint8]:
    """What the network gets in an epoch, shown about mid grey."""
    rows, sizes = np.array([row]), np.array([photo.shape[:2]])
    draws = draw(augmentation, 0, epoch, rows, sizes, rows)
    values = augment(photo, draws, 0, augmentation, statistics, 0)
    if augmentation.channels < 3:
        missing = np.zeros((*values.shape[:2], 1))
        values = values.repeat(3, axis=2) if augmentation.channels == 1 else np.concatenate([values, missing], axis=2)
    shown = values * channel_stdevs(statistics, augmentation) + (_GREY if augmentation.mean != "none" else 0)
    return np.clip(np.rint(shown), 0, 255).astype(np.uint8)


def _cut(photo: NDArray[np.uint8], window: list[int], crop: tuple[int, int]) -> NDArray[np.uint8]:
    top, left, height, width = window
    part = photo[top : top + height, left : left + width]
    return part if (height, width) == crop else resize(part, crop)


def _shuffles(data: Path) -> list[Block]:
    shards = Samples(data, "train").index["shard"][:_MOST_SHUFFLED]
    if len(shards) < 2:
        return [Words("With one sample there is no order to measure.")]
    orders = {
        "as stored": np.arange(len(shards)),
        "blocks": block_order(0, 0, shards, BLOCK_SHARDS),
        "streams": stream_order(0, 0, shards, _BATCH_SIZE).row_N,
        "shuffle": epoch_order(0, 0, len(shards)),
    }
    rows = [[name, float(shuffle_quality(order))] for name, order in orders.items()]
    caption = "Shuffle quality: how far an epoch's order mixes what lies together on disk, from 0 (as stored) to near 1 (a uniform permutation)"
    return [Table(caption, ["order", "quality"], rows, formats={"quality": ".4f"})]
