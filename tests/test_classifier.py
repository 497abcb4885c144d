"""Photos classified: equal to an evaluation's predictions of the same images to the last digit; the table that both write."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from alexprep.shards.contact_sheet import CELL_SIDE
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.photos import find_photos, target_of
from alexprep.shards.plan import ShardOptions
from alexprep.shards.rgb_statistics import pca_stats, publish_statistics
from alexprep.shards.worker_pool import InProcessEngine
from alexprep.train.classifier import Classifier, check_refused
from alexprep.train.evaluation import evaluate, predictions_of
from alexprep.train.prediction_table import PredictionTable, read_predictions, write_predictions
from alexprep.train.predictions import filled
from alexprep.train.run_dir import Place
from tests.made_up import make_run
from tests.source_checks import write_tar

HERE = InProcessEngine()


def evaluated(run: Path, **options: Any) -> dict[str, tuple[Any, ...]]:
    """By source: the best classes and their probabilities, as an evaluation has them."""
    table = predictions_of(evaluate([Place(run)], device="cpu", threads=1, **options))
    return {
        source: (best, given)
        for source, best, given in zip(table.sources, table.best.tolist(), table.probabilities.tolist(), strict=True)
    }


@pytest.mark.parametrize("views", ["centre", "ten"])
def test_photos_have_the_predictions_of_their_samples(views: Any, photos: Path, data: Path, tmp_path: Path) -> None:
    """The source's photos, in another order and other batches, and the shards' members: not one bit differs."""
    run = make_run(tmp_path, "a", data, 1)
    expected = evaluated(run, views=views, batch_size=60)
    with Classifier.open(run, views=views, batch_size=60, threads=1, device="cpu") as classifier:
        raw = classifier.predict(sorted(photos.glob("val/*/*.JPEG"), reverse=True), HERE).table
        tars = classifier.predict(sorted((data / "val").glob("*.tar")), HERE).table
        alone = classifier.predict(photos / "val" / "class1" / "001.JPEG", HERE).table
    assert len(raw) == len(tars) == len(expected) == 20
    found = {str(Path(key).relative_to(photos)): n for n, key in enumerate(raw.keys)}
    for source, (best, given) in expected.items():
        assert raw.best[found[source]].tolist() == best
        assert raw.probabilities[found[source]].tolist() == given
    assert (alone.best[0].tolist(), alone.probabilities[0].tolist()) == expected["val/class1/001.JPEG"]
    assert sorted(map(tuple, tars.probabilities.tolist())) == sorted(tuple(given) for _, given in expected.values())
    np.testing.assert_allclose(raw.probabilities.sum(axis=1), 1)  # of four classes


def test_shards_of_pixels(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    convert(photos, data, ShardOptions(Target(size=64, format="raw"), shard_samples=10, limit=10), 1)
    publish_statistics(pca_stats(data, "train", 1), data, "train")
    run = make_run(tmp_path / "runs", "a", data, 1)
    expected = evaluated(run, batch_size=16)
    with Classifier.open(run, batch_size=16, threads=1, device="cpu") as classifier:
        for places in (sorted((data / "val").glob("*.tar")), [photos / "val"]):
            found = classifier.predict(places, HERE).table
            assert {tuple(p) for _, p in expected.values()} <= set(map(tuple, found.probabilities.tolist()))


CHANNEL_MEANS = """
from dataclasses import replace
from alexprep.train import Recipe, recipe

def channel() -> Recipe:
    tiny = recipe("tiny")
    return replace(tiny, augmentation=replace(tiny.augmentation, mean="channel"))
"""


@pytest.mark.parametrize("views", ["centre", "ten"])
def test_photos_of_whole_images(views: Any, photo: Any, encoded: Any, tmp_path: Path) -> None:
    """Stored with their aspect ratio, and not enlarged: as in an evaluation; what is smaller than the crop is refused alone."""
    for n, size in enumerate([(90, 70), (70, 90), (64, 100), (200, 65)]):
        for split in ("train", "val"):
            path = tmp_path / "photos" / split / f"class{n % 2}" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(photo(*size, seed=n), "PNG"))
    data, recipe = tmp_path / "data", tmp_path / "own.py"
    convert(tmp_path / "photos", data, ShardOptions(Target(size=64, fit="shorter", only_shrink=True)), HERE)
    publish_statistics(pca_stats(data, "train", HERE), data, "train")
    recipe.write_text(CHANNEL_MEANS)
    run = make_run(tmp_path, "a", data, 1, recipe=f"{recipe}:channel")
    expected = evaluated(run, views=views, batch_size=20, recipe=f"{recipe}:channel")
    options: Any = {"views": views, "batch_size": 20, "threads": 1, "device": "cpu", "recipe": f"{recipe}:channel"}
    with Classifier.open(run, **options) as classifier:
        small = np.zeros((50, 60, 3), np.uint8)
        found = classifier.predict([small, *sorted((tmp_path / "photos/val").glob("*/*"), reverse=True)], HERE)
    assert found.refused == [("picture 1", "60 x 50 pixels are too few for a crop of 56 x 56")]
    names = [str(Path(key).relative_to(tmp_path / "photos")) for key in found.table.keys]
    assert dict(zip(names, found.table.probabilities.tolist(), strict=True)) == {
        name: given for name, (_, given) in expected.items()
    }


def test_pixels_and_bytes(photos: Path, data: Path, tmp_path: Path) -> None:
    """What is no picture is refused with its reason, and costs no other its place."""
    photo = photos / "val" / "class0" / "000.JPEG"
    with Classifier.open(make_run(tmp_path, "a", data, 1), batch_size=4, threads=1, device="cpu") as classifier:
        found = classifier.predict([photo.read_bytes(), b"no picture", np.zeros((50, 70), np.uint8), photo], HERE)
        assert found.table.keys == ["picture 1", "picture 3", str(photo)]
        assert found.table.probabilities[0].tolist() == found.table.probabilities[2].tolist()
        assert [name for name, _ in found.refused] == ["picture 2"] and "not an image" in found.refused[0][1]
        nothing = classifier.predict([b"", b"x"], HERE)
        assert len(nothing.table) == 0 and nothing.table.as_json() == [] and len(nothing.refused) == 2
        with pytest.raises(
            AlexprepError, match=r"none of the 2 photos can be decoded, the first, picture 1: empty file"
        ):
            check_refused(nothing)
        with pytest.raises(AlexprepError, match=r"pixels are float64 of shape \(2, 2\)"):
            classifier.predict(np.zeros((2, 2)), HERE)


def test_what_places_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jpg", "a/1.png", "a/.hidden.jpg", "a/notes.txt", "a/noending"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    tar = write_tar(tmp_path / "c.tar", {"x/1.jpg": b"one", "x/1.cls": b"3", "x/2.npy": b"two", "x/l.jpg": b"link"})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"given")))
    found = find_photos([tmp_path / "b.jpg", tmp_path / "a", str(tar), "-", b"held"])
    names = ["b.jpg", "a/1.png", "a/noending", "c.tar/x/1.jpg", "c.tar/x/2.npy", "c.tar/x/l.jpg"]
    assert [photo.name for photo in found] == [*(f"{tmp_path}/{name}" for name in names), "stdin", "picture 8"]
    assert [found[n].read() for n in (0, 1, 3, 6, 7)] == [b"b.jpg", b"a/1.png", b"one", b"given", b"held"]
    with pytest.raises(OSError, match="a link"):
        found[5].read()
    (tmp_path / "empty").mkdir()
    for place, words in (("none.jpg", "does not exist"), ("empty", "holds no pictures"), ("cut.tar", "cut.tar")):
        (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:700])
        with pytest.raises(AlexprepError, match=words):
            find_photos([tmp_path / place])
    with pytest.raises(AlexprepError, match="no photo is named"):
        find_photos([])


def test_the_form_that_is_recorded() -> None:
    """What dataset.json does not say is at its default; bytes that have the form already are kept."""
    target = Target(size=64, quality=80, subsampling="444", orient=True, reencode="always")
    image = {name: value for name, value in vars(target).items() if name != "reencode"} | {"extension": "jpg"}
    assert target_of({"image": image}) == replace(target, reencode="needed")
    assert target_of({"image": {"size": 32}}) == Target(size=32)
    assert target_of({"image": {"size": 32}, "options": {"on_damaged": "keep", "seed": 1}}) == Target(
        size=32, on_damaged="keep"
    )


def test_a_batch_is_filled_up_in_its_memory_format() -> None:
    images = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        whole = filled(given, 4)
        assert torch.equal(whole, images[[0, 1, 1, 1]]) and whole.stride() == _strides(given, 4)
        assert filled(given, 2) is given and len(filled(given[:0], 2)) == 0
    views = torch.arange(2 * 10 * 5 * 4 * 3.0).reshape(2, 10, 5, 4, 3).movedim(-1, -3)
    assert torch.equal(filled(views, 3), views[[0, 1, 1]])
    assert filled(views, 3).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def _strides(images: torch.Tensor, count: int) -> tuple[int, ...]:
    form = torch.contiguous_format if images.is_contiguous() else torch.channels_last
    return torch.empty((count, *images.shape[1:]), memory_format=form).stride()


def made_up_table(seed: int, count: int = 6) -> PredictionTable:
    rng = np.random.default_rng(seed)
    classes = ["cat", "emu, grey", 'q"uote', "ünï", "five", "six"]
    labels = rng.integers(-1, 6, count)
    best = (
        np.stack([rng.permutation(6)[:5] for _ in range(count)]).astype(np.int32)
        if count
        else np.zeros((0, 5), np.int32)
    )
    return PredictionTable(
        [f"{n:08d}" for n in range(count)],
        [f"train/a b/{n}.jpg" for n in range(count)],
        labels,
        np.where(labels < 0, np.nan, rng.random(count)),
        best,
        rng.random((count, 5)),
        classes,
    )


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("count", [0, 6])
def test_a_table_reads_back_as_it_was(ending: str, count: int, seed: int, tmp_path: Path) -> None:
    table, path = made_up_table(seed, count), tmp_path / f"t.{ending}"
    write_predictions(table, path)
    found = read_predictions(path, table.classes)
    assert (found.keys, found.sources) == (table.keys, table.sources)
    for name in ("labels", "label_probabilities", "best", "probabilities"):
        np.testing.assert_array_equal(getattr(found, name), getattr(table, name))
    if count:
        with pytest.raises(AlexprepError, match="has other classes than the dataset"):
            read_predictions(path, ["other", *table.classes[1:]][::-1])
    path.write_bytes(path.read_bytes()[: -9 if ending == "parquet" else 30])
    with pytest.raises(AlexprepError, match="cannot be read"):
        read_predictions(path, table.classes)
    with pytest.raises(AlexprepError, match="cannot be read"):
        read_predictions(tmp_path / "none.csv", table.classes)


def test_the_commands_write_one_table(
    photos: Path, data: Path, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    make_run(tmp_path / "runs", "a", data, 1)
    options = ("--device", "cpu", "--threads", "1", "--batch-size", "32")
    assert command("eval", "a", "--predictions", "val.csv", *options)[0] == 0
    status, _, _ = command("eval", "a", *options, "--predictions")
    (beside,) = (tmp_path / "runs" / "a").glob("eval-*.parquet")
    document = json.loads(beside.with_suffix(".json").read_text())
    assert status == 0 and document["predictions_file"] == str(beside)
    val = list(csv.DictReader((tmp_path / "val.csv").read_text().splitlines()))
    whole = pq.read_table(beside).to_pylist()
    assert [float(row["probability1"]) for row in val] == [row["probability1"] for row in whole]
    wrong = sum(row["label1"] != row["label"] for row in val)
    assert document["top1_error"] == pytest.approx(100 * wrong / 20)

    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    status, out, err = command("predict", "a", str(photos / "val"), str(bad), "--csv", *options)
    assert status == 0 and f"{bad}: not an image" in err
    found = {str(Path(row["key"]).relative_to(photos)): row for row in csv.DictReader(io.StringIO(out))}
    for row in val:
        assert all(row[name] == found[row["source"]][name] for name in row if name[-1].isdigit()), row["source"]
    status, out, _ = command(
        "predict", "a", str(photos / "val/class0/000.JPEG"), "--json", *options, "--predictions", "p.csv"
    )
    printed = json.loads(out.splitlines()[-1])
    best = [(guess["class"], guess["probability"]) for guess in printed["predictions"][0]["best"]]
    assert best == [
        (row[f"class{n}"], float(row[f"probability{n}"]))
        for row in val
        if row["source"] == "val/class0/000.JPEG"
        for n in (1, 2, 3, 4)
    ]
    assert printed["refused"] == [] and len((tmp_path / "p.csv").read_text().splitlines()) == 2
    status, out, _ = command("predict", "a", str(photos / "val/class0/000.JPEG"), *options, "--picture", "p.png")
    assert status == 0 and out.splitlines()[-4].split()[0] == best[0][0]
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    top, left = 46, 222  # the photo, and its five lines of words beside it
    assert np.ptp(sheet[top : top + CELL_SIDE, left : left + CELL_SIDE]) > 50 and sheet[top:, :left].min() < 100
    for arguments, words in (
        (("none.jpg",), "none.jpg does not exist"),
        ((str(bad),), "none of the 1 photos can be decoded"),
        ((str(bad), "--csv", "--json"), "give one"),
        ((str(bad), "--predictions", "x.txt"), "ends in .csv or .parquet"),
        ((str(bad), "--picture", "x.jpg"), "does not end in .png"),
        ((str(bad), "--predictions", "no/x.csv"), "there is no folder no"),
    ):
        status, _, err = command("predict", "a", *arguments, *options)
        assert status in (1, 2) and words in err
    assert "ends in .csv" in command("eval", "a", "--predictions", "tiny", *options)[2]


def test_worker_processes_convert(photos: Path, data: Path, tmp_path: Path) -> None:
    """In worker processes, as by default; a tar may be longer than a worker's share."""
    photo = photos / "val" / "class0" / "000.JPEG"
    with tarfile.open(tmp_path / "many.tar", "w") as tar:
        for n in range(40):
            tar.add(photo, f"{n}.jpg")
    with Classifier.open(make_run(tmp_path, "a", data, 1), batch_size=16, threads=1, device="cpu") as classifier:
        seen: list[tuple[int, int]] = []
        found = classifier.predict([tmp_path / "many.tar"], progress=lambda *done: seen.append(done))
    assert len(found.table) == 40 and seen[-1] == (40, 40)
    assert len({tuple(given) for given in found.table.probabilities.tolist()}) == 1
