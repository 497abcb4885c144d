"""What a layer gives for a split, interrupted or not, against the network's own layers; nearest neighbours against plain numpy."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from alexprep.pipeline.loader import Loader
from alexprep.shards.contact_sheet import CELL_SIDE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.photos import find_photos
from alexprep.shards.worker_pool import InProcessEngine, LocalEngine
from alexprep.train import layer_outputs
from alexprep.train.classifier import Classifier
from alexprep.train.layer_outputs import last_hidden_layer, layer_names, outputs_of, read_outputs, write_outputs
from alexprep.train.predictions import open_net
from alexprep.train.recipes import recipe
from alexprep.train.run_dir import Place
from alexprep.train.similar_images import find_similar
from tests.made_up import make_run

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"batch_size": 8, "threads": 1, "device": "cpu"}


@pytest.mark.parametrize("layer", ["conv2", "relu4"])
def test_outputs_are_the_layers_own(layer: str, data: Path, tmp_path: Path) -> None:
    """A convolution, whose output the ReLU after it overwrites, and the last hidden layer."""
    run = make_run(tmp_path, "a", data, 1)
    found = write_outputs(Place(run), layer, split="val", **OPTIONS)
    network = open_net(Place(run), CPU).network
    assert isinstance(network, nn.Sequential) and last_hidden_layer(network) == "relu4"
    upto = network[: layer_names(network).index(layer) + 1]
    augmentation = recipe("tiny").augmentation
    with (
        Loader(data, "val", batch_size=20, augmentation=augmentation, views="centre", order="sequential") as loader,
        torch.inference_mode(),
    ):
        expected = upto(next(iter(loader)).images)
    assert found.facts["shape"] == list(expected.shape[1:]) and found.path.name == f"features-{layer}-val.npy"
    np.testing.assert_allclose(found.array(), expected.flatten(1).numpy(), rtol=1e-4, atol=1e-4)
    assert isinstance(found.array(), np.memmap)


def test_interrupted_outputs_are_gone_on_with(data: Path, tmp_path: Path) -> None:
    """The same bytes as without an interruption; rows that are there are not computed again, nor is a finished file."""
    run = make_run(tmp_path, "a", data, 1)
    whole = write_outputs(Place(run), out=tmp_path / "whole.npy", **OPTIONS)  # 48 images, 6 batches

    def stop(done: int, total: int) -> None:
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_outputs(Place(run), progress=stop, **OPTIONS)
    assert not list(run.glob("*.npy")) and len(list(run.glob("*.part*"))) == 2
    with mock.patch.object(layer_outputs, "outputs_of", wraps=outputs_of) as asked:
        found = write_outputs(Place(run), **OPTIONS)
        assert asked.call_count == 3
        assert write_outputs(Place(run), **OPTIONS) == found and asked.call_count == 3
        write_outputs(Place(run), **OPTIONS | {"batch_size": 48}, split="val")
    assert found.path.read_bytes() == whole.path.read_bytes() and not list(run.glob("*.part*"))
    make_run(tmp_path, "b", data, 2)
    other = write_outputs(Place(tmp_path / "b"), out=found.path, **OPTIONS)  # of other weights: made anew
    assert not np.array_equal(other.array(), whole.array())


def test_what_is_refused(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", data, 1)
    with pytest.raises(AlexprepError, match=r"no layer 'conv9': there are scale, conv1, .*fc5"):
        write_outputs(Place(run), "conv9", **OPTIONS)
    with pytest.raises(AlexprepError, match="no layer before a linear one"):
        last_hidden_layer(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(AlexprepError, match=r"does not exist: make it with `alexprep features RUN`"):
        read_outputs(run / "features-relu4-train.npy")
    twice = nn.ReLU()
    with pytest.raises(AlexprepError, match="used 2 times"):
        outputs_of(nn.Sequential(twice, twice), "0", torch.zeros(1, 2), "fp32", 1)
    found = write_outputs(Place(run), split="val", **OPTIONS)
    found.path.write_bytes(found.path.read_bytes()[:-1])
    with pytest.raises(
        AlexprepError, match=r"write it again with `alexprep features a@2 --runs .* --layer relu4 --split val`"
    ):
        read_outputs(found.path).array()


def test_neighbours_equal_numpy(photos: Path, data: Path, tmp_path: Path) -> None:
    """A training photo is its own nearest neighbour, at distance 0."""
    run = make_run(tmp_path, "a", data, 1)
    outputs = write_outputs(Place(run), **OPTIONS)
    queries: list[Any] = [photos / "train/class3/003.JPEG", photos / "val/class0/000.JPEG", b"no picture"]
    with Classifier.open(run, **OPTIONS) as classifier:
        found = find_similar(classifier, outputs, queries, 5, InProcessEngine())
        twice = find_similar(classifier, outputs, [queries[0], *queries[:2]], 5, InProcessEngine())
        views = [view for _, view in classifier.views_of(find_photos(queries[1:2]), InProcessEngine(), {})]
        vector = outputs_of(classifier.net.network, "relu4", views[0], "fp32", 8)[0].numpy()
        other = make_run(tmp_path, "b", data, 2)
        with pytest.raises(AlexprepError, match="is of other weights than a@2: make them with") as refused:
            find_similar(classifier, write_outputs(Place(other), **OPTIONS), queries)
    words = f"features a@2 --runs {tmp_path} --layer relu4 --split train --out {other}/features-relu4-train.npy"
    assert f"`alexprep {words}`" in str(refused.value)
    assert [photo.name for photo in twice.photos] == list(twice.neighbours) == list(found.neighbours)
    own, new = found.neighbours.values()
    assert (own[0].source, own[0].distance, own[0].label) == ("train/class3/003.JPEG", 0, 3)
    assert [name for name, _ in found.refused] == ["picture 3"]
    exact = np.linalg.norm(outputs.array().astype(np.float64) - vector, axis=1)
    assert [one.row for one in new] == np.argsort(exact, kind="stable")[:5].tolist()
    np.testing.assert_allclose([one.distance for one in new], np.sort(exact)[:5], rtol=1e-4)


def test_the_commands(
    photos: Path,
    data: Path,
    command: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_run(tmp_path / "runs", "a", data, 1)
    make_run(tmp_path / "other runs", "b", data, 1)
    options = ("--device", "cpu", "--threads", "1", "--batch-size", "16")
    photo = str(photos / "train/class3/003.JPEG")
    status, _, err = command("similar", "a", photo, *options)
    assert status == 1 and "make it with `alexprep features a@2 --layer relu4 --split train`" in err
    status, _, err = command("similar", "b", photo, "--split", "val", "--runs", "other runs", *options)
    told = re.search("make it with `alexprep (.*)`", err)
    assert status == 1 and told is not None
    assert command(*shlex.split(told[1]), *options)[0] == 0
    assert (tmp_path / "other runs/b/features-relu4-val.npy").exists()
    status, out, _ = command("features", "a", str(data), *options, "--json")
    assert status == 0 and json.loads(out.splitlines()[-1])["shape"] == [128]
    monkeypatch.setattr(LocalEngine, "run", lambda engine, *arguments: InProcessEngine().run(*arguments))
    status, out, _ = command("similar", "a", photo, "--count", "2", *options, "--picture", "near.png")
    sheet = np.asarray(Image.open(tmp_path / "near.png").convert("RGB"))
    cells = [sheet[46 : 46 + CELL_SIDE, left : left + CELL_SIDE] for left in (222, 330)]
    assert (
        np.ptp(cells[0]) > 50 and np.abs(cells[0] - cells[1].astype(int)).mean() < 12
    )  # a photo, and the sample made of it
    assert status == 0 and out.splitlines()[1].split() == ["0.0000", "class3", "train/class3/003.JPEG"]
    assert "ends in .npy" in command("features", "a", "--out", "x.txt", *options)[2]
    status, out, _ = command("features", "a", "--out", "f.parquet", *options)
    assert status == 0 and "The same as a table: f.parquet" in out
    table, outputs = pq.read_table(tmp_path / "f.parquet"), np.load(tmp_path / "runs/a/features-relu4-train.npy")
    ledger = {row["key"]: row for row in pq.read_table(data / "train/samples.parquet").to_pylist()}
    np.testing.assert_array_equal(np.array(table["values"].to_pylist(), np.float32), outputs)
    for row in table.drop_columns("values").to_pylist():
        assert row == {name: ledger[row["key"]][name] for name in ("key", "source", "label")} | {
            "class": f"class{row['label']}"
        }
    status, out, _ = command("similar", "a", photo, "--codes", "--bits", "64", "--count", "2", *options, "--json")
    found = json.loads(out.splitlines()[-1])
    assert (status, found["distance"], found["bits"]) == (0, "hamming", 64)
    assert found["photos"][0]["neighbours"][0]["distance"] == 0 and 0 < found["recall@10 among 10"] <= 1
    status, out, _ = command("similar", "a", photo, "--codes", "--bits", "64", *options)
    assert status == 0 and "Codes of 64 bits: 8 bytes an image instead of 512" in out
    assert "a multiple of 64" in command("similar", "a", photo, "--bits", "33", *options)[2]
