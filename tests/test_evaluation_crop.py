"""Evaluations whose crops have a side of their own: whatever shows a trained network images shows it those, and training does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.train import recipes
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.evaluation import evaluate, evaluate_run
from alexprep.train.export import export_run
from alexprep.train.layer_outputs import outputs_file, read_outputs, write_outputs
from alexprep.train.loading import load
from alexprep.train.predictions import open_net
from alexprep.train.report.augmentation_section import augmentation_section
from alexprep.train.report.blocks import Picture
from alexprep.train.run_dir import Place
from alexprep.train.settings import recipe_of
from alexprep.train.trainer import train
from tests.made_up import forget, pooled_network

CROP, SIDE = 41, 56
CPU = torch.device("cpu")
Opened = list[tuple[str, Any]]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe `wide`, and `narrow`, which is evaluated as it is trained."""
    tiny = recipes.TINY
    augmentation = replace(tiny.augmentation, crop=CROP, noise="none")
    narrow = replace(tiny, name="narrow", network=pooled_network, augmentation=augmentation, epochs=2)
    monkeypatch.setitem(recipes.RECIPES, "narrow", narrow)
    monkeypatch.setitem(recipes.RECIPES, "wide", replace(narrow, name="wide", evaluation_crop=SIDE))


@pytest.fixture
def opened() -> Opened:
    """Splits and crops that loaders of `trained` were opened for."""
    return []


def trained(data: Path, runs: Path, opened: Opened, **options: Any) -> dict[str, Any]:
    def loader(data: Path, split: str, **arguments: Any) -> Loader:
        opened.append((split, arguments["augmentation"].crop))
        return Loader(data, split, **arguments)

    given = {"name": "a", "recipe": "wide", "device": "cpu", **options}
    return train(TrainConfig(data=data, runs=runs, **given), loader)


def centres(data: Path, crop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    seen = replace(recipes.RECIPES["wide"].augmentation, crop=crop)
    with Loader(data, "val", batch_size=7, augmentation=seen, views="centre", order="sequential") as loader:
        for batch in loader:
            yield batch.images, batch.labels


def loss(data: Path, run: Path, crop: int) -> float:
    network, losses = open_net(Place(run), CPU).network, []
    with torch.inference_mode():
        for images, labels in centres(data, crop):
            losses.append(F.cross_entropy(network(images).double(), labels, reduction="none"))
    return float(torch.cat(losses).mean())


def test_evaluations_see_it_and_training_does_not(data: Path, tmp_path: Path, opened: Opened) -> None:
    summary = trained(data, tmp_path, opened)
    assert set(opened) == {("train", CROP), ("val", SIDE)}
    run = tmp_path / "a"
    assert summary["val_loss"] == pytest.approx(loss(data, run, SIDE), rel=1e-5)
    assert evaluate_run(run, device="cpu")["loss"] == pytest.approx(loss(data, run, SIDE), rel=1e-5)
    assert abs(loss(data, run, SIDE) - loss(data, run, CROP)) > 1e-4
    plain = trained(data, tmp_path, opened, name="b", settings=("evaluation_crop=none",))
    assert plain["weights_sha256"] == summary["weights_sha256"]
    assert plain["val_loss"] == pytest.approx(loss(data, tmp_path / "b", CROP), rel=1e-5)


def test_what_else_shows_a_network_images(data: Path, photos: Path, tmp_path: Path, opened: Opened) -> None:
    trained(data, tmp_path, opened)
    run = tmp_path / "a"
    _, _, transform = load(run)
    with transform:
        photo = next((photos / "val").rglob("*.JPEG"))
        assert transform(photo.read_bytes()).shape == (3, SIDE, SIDE)
    document = export_run(Place(run), formats=("pt2",)).document
    assert document["input"]["shape"] == ["batch", 3, SIDE, SIDE] and document["preprocessing"]["crop"] == SIDE
    write_outputs(Place(run), split="val", layer="flatten", device="cpu")
    read = read_outputs(outputs_file(run, "flatten", "val")).array()
    layers = open_net(Place(run), CPU).network[:4]  # type: ignore[index]
    with torch.inference_mode():
        expected = np.concatenate([layers(images).numpy() for images, _ in centres(data, SIDE)])
    np.testing.assert_allclose(read, expected, rtol=1e-4, atol=1e-5)


def test_a_run_from_before_keeps_its_crop(
    data: Path, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that has a crop for evaluations in a later release changes no run that began without, also one that goes on."""
    with monkeypatch.context() as earlier:
        earlier.setitem(recipes.RECIPES, "wide", replace(recipes.RECIPES["wide"], evaluation_crop=None))
        trained(data, tmp_path, opened, epochs=1)
    run = tmp_path / "a"
    forget(run, "evaluation_crop")
    assert evaluate_run(run, device="cpu")["loss"] == pytest.approx(loss(data, run, CROP), rel=1e-5)
    trained(data, tmp_path, opened, resume=True, recipe=None, epochs=2)
    assert set(opened) == {("train", CROP), ("val", CROP)}


def test_nets_that_see_other_crops_are_evaluated_together(data: Path, tmp_path: Path, opened: Opened) -> None:
    for recipe in ("wide", "narrow"):
        trained(data, tmp_path, opened, name=recipe, recipe=recipe, epochs=1)
    found = evaluate([Place(tmp_path / "wide"), Place(tmp_path / "narrow")], device="cpu").document
    for net, crop in zip(found["nets"], (SIDE, CROP), strict=True):
        assert net["loss"] == pytest.approx(loss(data, Path(net["run"]), crop), rel=1e-5)


def test_a_report_shows_the_views_of_evaluations(data: Path, tmp_path: Path, opened: Opened) -> None:
    trained(data, tmp_path, opened, epochs=1)
    blocks = augmentation_section(data, [tmp_path / "a"]).blocks
    pixels = {block.name: block.pixels.shape for block in blocks if isinstance(block, Picture)}
    assert pixels["ten_views"] == (2 * SIDE + 4, 5 * SIDE + 16, 3) and pixels["draws"] == (
        3 * CROP + 8,
        8 * CROP + 28,
        3,
    )


def test_a_crop_smaller_than_the_training_s_is_told(data: Path, tmp_path: Path) -> None:
    notes = prepare(TrainConfig(data, "wide", runs=tmp_path, device="cpu", settings=("evaluation_crop=40",))).notes
    assert any("see crops of 40 pixels, smaller than the training's, 41" in note for note in notes), notes


def test_what_does_not_go_together_is_refused(data: Path, tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(AlexprepError, match=r"wide cuts 57 pixels .* sizes \(56, 96\): evaluation_crop is at most 56"):
        trained(data, tmp_path, opened, settings=("evaluation_crop=57",))
    with pytest.raises(AlexprepError, match=r"evaluation_crop \(or none\) 0 is not in \[1, 65535\]"):
        trained(data, tmp_path, opened, settings=("evaluation_crop=0",))
    words = (
        "recipe tiny does not take images of 46 pixels, as evaluation_crop has them, but of 56: .*evaluation_crop=none"
    )
    with pytest.raises(AlexprepError, match=words):
        trained(data, tmp_path, opened, recipe="tiny", settings=("evaluation_crop=46",))
    assert not any(tmp_path.iterdir())


def test_a_network_of_another_keeps_none(tmp_path: Path) -> None:
    """Said of the recipe's own; of a user's it is asked for."""
    file = tmp_path / "mine.py"
    file.write_text("def net(classes, crop):\n    raise NotImplementedError\n")
    options = {"recipe": "cifar10-fast", "model": f"{file}:net"}
    assert recipe_of({"recipe": "cifar10-fast"}).evaluation_crop == 30 and recipe_of(options).evaluation_crop is None
    assert recipe_of(options | {"settings": ["evaluation_crop=31"]}).evaluation_crop == 31
