"""The part of a report with the paper's pictures: the kernels of figure 3, and both halves of figure 4, from what a run has left."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.dataset_format import read_dataset, read_index, short_classes
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sample_reader import Samples
from alexprep.shards.storage import folder_at
from alexprep.train import checkpoint
from alexprep.train.layer_outputs import LayerOutputs, read_outputs
from alexprep.train.models.alexnet import AlexNet
from alexprep.train.recipes import RECIPES
from alexprep.train.report.blocks import BAR, RIGHT, Block, Picture, Section, Words, enlarged, plot, tiled
from alexprep.train.report.data_section import decoded
from alexprep.train.report.training_section import data_with, newest_predictions
from alexprep.train.run_dir import Place, command, read_config, saved_checkpoint

_EXAMPLES = 8  # test images of figure 4, left
_QUERIES, _NEIGHBOURS = 5, 6  # of figure 4, right
_KERNELS_A_ROW = 16
_SIDE = 64  # pixels of a neighbour's picture, at least


def paper_section(data: Path | None, runs: Sequence[Path]) -> Section:
    """The section of the first run, with the images of `data` where its outputs are of these."""
    section = Section("paper", "The paper's pictures")
    if not runs:
        section.blocks.append(Words("There is no run whose kernels and predictions could be drawn.", True))
        return section
    run = runs[0]
    section.add(lambda: _kernels(run), "picture of the kernels (figure 3)")
    section.add(lambda: _guesses(data, run), "picture of the five best labels (figure 4, left)")
    section.add(lambda: _neighbours(data, run), "picture of the nearest images (figure 4, right)")
    return section


def _kernels(run: Path) -> list[Block]:
    saved, _ = saved_checkpoint(Place(run))
    weights = checkpoint.saved_weights(saved)
    name = next((name for name, weight in weights.items() if weight.ndim == 4 and weight.shape[1] == 3), None)
    if name is None:
        raise AlexprepError(f"the net of {run} has no convolution of three channels")
    kernels = weights[name].float().permute(0, 2, 3, 1).numpy()
    recipe = RECIPES.get(str(read_config(run)["options"]["recipe"]))
    network = None if recipe is None else recipe.network
    towers = 2 if isinstance(network, AlexNet) and network.towers == 2 and len(kernels) % 2 == 0 else 1
    count, height, width = kernels.shape[:3]
    scale = max(1, 44 // height)
    parts = []
    for tower in np.split(np.array([_as_picture(kernel) for kernel in kernels]), towers):
        parts.append(
            tiled([list(tower[at : at + _KERNELS_A_ROW]) for at in range(0, len(tower), _KERNELS_A_ROW)], gap=1)
        )
    gap = np.full((max(2, height // 2), parts[0].shape[1], 3), 255, np.uint8)
    sheet = parts[0] if towers == 1 else np.concatenate([parts[0], gap, parts[1]])
    apart = ", those of the first tower above and of the second below" if towers == 2 else ""
    words = f"The {count} kernels of {name.rpartition('.')[0] or name}, {height} x {width} x 3, after step {saved.step}{apart}; each scaled to its own range."
    return [Picture("kernels", words, words + " Figure 3 of the paper.", sheet, scale)]


def _as_picture(kernel: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A kernel about mid grey, its largest weight at black or white."""
    scale = max(float(np.abs(kernel).max()), 1e-30)
    picture: NDArray[np.uint8] = np.rint(127.5 + 127.5 * kernel / scale).astype(np.uint8)
    return picture


def _guesses(data: Path | None, run: Path) -> list[Block]:
    found = newest_predictions(data, run)
    document, table, names = found.document, found.table, short_classes(found.dataset)
    samples = Samples(found.data, document["split"])
    if len(samples) != len(table):
        raise AlexprepError(
            f"{found.data} has changed since: make the predictions again with {command('eval', run, '--predictions')}"
        )
    known = np.flatnonzero(table.labels >= 0)
    chosen = (
        known[np.rint(np.linspace(0, len(known) - 1, min(_EXAMPLES, len(known)))).astype(int)].tolist()
        if len(known)
        else []
    )
    if not chosen:
        raise AlexprepError(f"no image of {document['split']!r} has a label")
    pictures = [decoded(samples, n) for n in chosen]

    def draw(figure: Any) -> None:
        columns = min(4, len(chosen))
        rows = -(-len(chosen) // columns)
        grid = figure.subplots(2 * rows, columns, squeeze=False, gridspec_kw={"height_ratios": [3, 2] * rows})
        for axes in grid.flat:
            axes.set_axis_off()
        for n, (image, pixels) in enumerate(zip(chosen, pictures, strict=True)):
            row, column = divmod(n, columns)
            photo, bars = grid[2 * row][column], grid[2 * row + 1][column]
            photo.imshow(pixels)
            photo.set_title(names[table.labels[image]], fontsize=9)
            colours = [RIGHT if guess == table.labels[image] else BAR for guess in table.best[image]]
            places = np.arange(len(colours))[::-1]
            bars.barh(places, table.probabilities[image], color=colours)
            bars.set(xlim=(0, 1), ylim=(-0.5, len(colours) - 0.5))
            for place, guess in zip(places, table.best[image], strict=True):
                bars.text(0.02, place, names[guess], va="center", fontsize=8)

    right = sum(int(table.best[n, 0] == table.labels[n]) for n in chosen)
    labels = ", ".join(names[table.labels[n]] for n in chosen)
    words = f"{len(chosen)} images of {document['split']!r} with their labels ({labels}) and the five best guesses as bars, the right one red; {right} have the right one first."
    return [
        plot("guesses", words, words + " Figure 4, left, of the paper.", draw, (9.6, 7.2 if len(chosen) > 4 else 3.8))
    ]


def _neighbours(data: Path | None, run: Path) -> list[Block]:
    train, queries = _outputs(data, run)
    data = data_with(train.facts["data_digest"], data, folder_at(train.facts["data"]))
    digest = read_dataset(data)["digest"]
    if any(found.facts["data_digest"] != digest for found in (train, queries)):
        raise AlexprepError(
            f"{train.path} and {queries.path} are not of the data in {data}: make them again with "
            f"{train.command()} and {queries.command()}"
        )
    split = queries.facts["split"]
    labels = np.asarray(read_index(data, split)["label"])
    chosen = np.rint(np.linspace(0, len(labels) - 1, min(_QUERIES, len(labels)))).astype(int)
    count = min(_NEIGHBOURS, train.facts["images"])
    _, rows = train.nearest(queries.array()[chosen], count)
    here, there = Samples(data, split), Samples(data, "train")
    sheet = [
        [_shrunk(decoded(here, int(n))), *(_shrunk(decoded(there, row)) for row in near)]
        for n, near in zip(chosen, rows.tolist(), strict=True)
    ]
    of_train = np.asarray(read_index(data, "train")["label"])
    same = 100 * float(np.mean([of_train[near] == labels[n] for n, near in zip(chosen, rows, strict=True)]))
    step, words = (
        train.facts["step"],
        f"Left, {len(chosen)} images of {split!r}; beside each the {count} training images",
    )
    words += (
        f" whose output of {train.facts['layer']} is nearest, after step {step}. {same:.0f} % of these have its label."
    )
    return [
        Picture(
            "neighbours",
            words,
            words + " Figure 4, right, of the paper.",
            _set_apart(sheet),
            enlarged(sheet[0][0]),
        )
    ]


def _outputs(data: Path | None, run: Path) -> tuple[LayerOutputs, LayerOutputs]:
    """Of one layer and checkpoint, for the training images and for others."""
    found: dict[tuple[str, str], dict[str, LayerOutputs]] = {}
    for path in sorted(run.glob("features-*.npy"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            outputs = read_outputs(path)
            facts = outputs.facts
            splits = found.setdefault((facts["layer"], facts["weights_sha256"]), {})
        except (AlexprepError, KeyError):
            continue
        splits.setdefault(facts["split"], outputs)
    for splits in found.values():
        other = splits.get("val") or splits.get("test")
        if "train" in splits and other is not None:
            return splits["train"], other
    named = "val"
    with contextlib.suppress(AlexprepError):
        filled = {} if data is None else read_dataset(data)["splits"]
        named = "test" if "test" in filled and "val" not in filled else "val"
    raise AlexprepError(
        f"{run} has no outputs of its last hidden layer for both splits: make them with {command('features', run)} and "
        f"{command('features', run, '--split', named)}"
    )


def _shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels[:: max(1, len(pixels) // (2 * _SIDE)), :: max(1, len(pixels) // (2 * _SIDE))]


def _set_apart(rows: list[list[NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """The sheet, with more room after the first column."""
    first, others = tiled([row[:1] for row in rows]), tiled([row[1:] for row in rows])
    return np.concatenate([first, np.full((len(first), 14, 3), 255, np.uint8), others], axis=1)
