"""What is exported equals the run, in every format, and is enough to classify a photo without alexprep; and what `load` gives."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alexprep.pipeline.loader import Loader
from alexprep.shards.errors import AlexprepError
from alexprep.shards.sample_reader import Samples
from alexprep.train import export
from alexprep.train.export import export_run
from alexprep.train.loading import load
from alexprep.train.models.alexnet import alexnet_owt
from alexprep.train.models.layers import LocallyConnected2d, LocalResponseNorm, PaperDropout, SpatialResponseNorm
from alexprep.train.recipes import RECIPES
from alexprep.train.run_dir import Place
from tests.made_up import make_run

Command = Callable[..., tuple[int, str, str]]


def with_all_layers(classes: int, crop: int, *, seed: int, width: float) -> torch.nn.Module:
    """The paper's layers of every kind: response norms across and within maps, a locally connected layer, dropout."""
    torch.manual_seed(seed)
    layers = {
        "conv1": torch.nn.Conv2d(3, 8, 9, stride=8),
        "norms": torch.nn.Sequential(LocalResponseNorm(2, size=3, alpha=0.1), SpatialResponseNorm(3, alpha=0.1)),
        "pool1": torch.nn.MaxPool2d(3, 2, ceil_mode=True),
        "local2": LocallyConnected2d(8, 4, 3, 3),
        "drop2": PaperDropout(),
        "flatten": torch.nn.Flatten(),
        "fc3": torch.nn.Linear(36, classes),
    }
    return torch.nn.Sequential(OrderedDict(layers))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two checkpoints on `data`, with a network that has every kind of layer."""
    with pytest.MonkeyPatch.context() as patch:
        tried = replace(RECIPES["tiny"], network=with_all_layers)
        patch.setitem(RECIPES, "tiny", tried)
        yield make_run(tmp_path_factory.mktemp("runs"), "a", data, 1, steps=(2, 3))


def test_every_format_equals_the_run(run: Path, data: Path, photos: Path) -> None:
    written = export_run(Place(run))
    folder, document = run / "export", json.loads((run / "export/a.json").read_bytes())
    assert document == written.document and document["step"] == 3
    files = {name: (folder / name).read_bytes() for name in document["files"]}
    assert set(files) == {"a.safetensors", "a.pt", "a.pt2", "a.onnx", "a-mean.npy"}
    for name, told in document["files"].items():
        assert told == {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    network, classes, transform = load(run)
    assert document["classes"] == classes == ["class0", "class1", "class2", "class3"]
    weights = network.state_dict()
    for loaded in (torch.load(folder / "a.pt", weights_only=True), load_file(folder / "a.safetensors")):
        assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    import onnxruntime

    session = onnxruntime.InferenceSession(files["a.onnx"], providers=["CPUExecutionProvider"])
    graph = torch.export.load(io.BytesIO(files["a.pt2"])).module()
    shown = sorted((photos / "val").glob("*/*.JPEG"))[:5]
    with transform, torch.inference_mode():
        images = transform(shown).contiguous()
        expected = network(images)
        for count in (1, 5):
            onnx = session.run(None, {"images": images[:count].numpy()})[0]
            for found in (torch.from_numpy(onnx), graph(images[:count])):
                np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float(expected.std(0).max()) > 0.01


def preprocessed(document: dict[str, Any], folder: Path, picture: Image.Image, view: list[Any]) -> np.ndarray[Any, Any]:
    """A picture of the stored form as the JSON says, by numpy alone: float32 (3, H, W)."""
    told = document["preprocessing"]
    top, left, height, width, *mirrored = view
    pixels: np.ndarray[Any, Any] = np.asarray(picture, np.float32)[top : top + height, left : left + width]
    assert told["resize"] is None
    if "file" in told["mean"]:
        assert told["mean"]["window"] == "crop"
        pixels = pixels - np.load(folder / told["mean"]["file"])[top : top + height, left : left + width]
    else:
        pixels = pixels - np.array(told["mean"]["grey_levels"], np.float32)
    pixels = pixels / np.array(told["std"], np.float32)
    return (pixels[:, ::-1] if mirrored == [True] else pixels).transpose(2, 0, 1)


@pytest.mark.parametrize("mean", ["crop", "imagenet"])
def test_the_json_says_how_to_make_the_input(
    mean: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmentation = replace(RECIPES["tiny"].augmentation, mean=mean, std="none" if mean == "crop" else "imagenet")
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], augmentation=augmentation))
    run = make_run(tmp_path, "a", data, 1)
    document = export_run(Place(run), tmp_path / "out", formats=["safetensors"]).document
    samples = Samples(data, "val")
    encoded = samples.encoded(1).tobytes()
    picture = Image.open(io.BytesIO(encoded))
    told = document["preprocessing"]
    for views, windows in (("centre", [told["centre_view"]]), ("ten", told["ten_views"])):
        with load(run, views=views).transform as transform:  # type: ignore[arg-type]
            made = transform(encoded).reshape(len(windows), 3, 56, 56)
        for n, window in enumerate(windows):
            expected = preprocessed(document, tmp_path / "out", picture, window)
            np.testing.assert_allclose(
                made[n], expected, rtol=0, atol=1.01 if mean == "crop" else 0.02
            )  # decoders differ by 1


def test_the_transform_gives_what_an_evaluation_sees(run: Path, data: Path, photos: Path) -> None:
    """By path, bytes, pixels and Pillow's pictures, one and many, closed and opened again, and pickled."""
    with Loader(
        data,
        "val",
        batch_size=20,
        augmentation=RECIPES["tiny"].augmentation,
        views="centre",
        order="sequential",
        threads=1,
    ) as loader:
        (batch,) = loader
    encoded = [Samples(data, "val").encoded(row).tobytes() for row in range(20)]
    transform = load(run).transform
    with transform:
        assert torch.equal(transform(encoded), batch.images)
        assert torch.equal(transform(encoded[3]), batch.images[3])
    with pickle.loads(pickle.dumps(transform)) as copied:
        assert torch.equal(copied(encoded[:2]), batch.images[:2])
    pixels = np.random.default_rng(0).integers(0, 256, (80, 70, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    with transform:
        same = [transform(each) for each in (pixels, Image.fromarray(pixels), file.getvalue())]
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
        grey = Image.fromarray(pixels[:, :, 0])
        assert torch.equal(transform(grey), transform(pixels[:, :, 0]))
        with pytest.raises(AlexprepError, match="picture 2 cannot be decoded"):
            transform([pixels, b"no picture"])
        with pytest.raises(AlexprepError, match="holds 5 pictures: name one"):
            transform(photos / "val" / "class1")


def test_which_checkpoint_is_loaded(run: Path) -> None:
    newest, earlier = load(run), load(f"{run}@2")
    assert not torch.equal(newest.network.fc3.weight, earlier.network.fc3.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(newest.network.fc3.weight, load(f"{run}@3").network.fc3.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(AlexprepError, match="has no checkpoint of step 9"):
        load(f"{run}@9")


def test_nothing_is_replaced_unless_asked(run: Path, command: Command, tmp_path: Path) -> None:
    def exported(*words: str) -> tuple[int, str, str]:
        return command("export", f"a@{words[0]}", "--runs", str(run.parent), "--out", "out", *words[1:])

    status, out, _ = exported("2", "--formats", "safetensors,pt", "--json")
    assert status == 0 and json.loads(out.splitlines()[-1])["step"] == 2
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert set(before) == {"a.safetensors", "a.pt", "a-mean.npy", "a.json"}
    status, _, err = exported("3", "--formats", "safetensors")
    assert status == 1 and "out holds a-mean.npy already: name another folder with --out, or add --overwrite" in err
    assert before == {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert exported("3", "--formats", "safetensors", "--overwrite")[0] == 0
    assert {path.name for path in Path("out").iterdir()} == {
        "a.safetensors",
        "a-mean.npy",
        "a.json",
    }  # no .pt of another step
    status, _, err = exported("3", "--formats", "onnx,keras")
    assert status == 2 and "'keras' is none of safetensors, pt, pt2, onnx" in err


def test_what_cannot_be_exported_is_told_before_anything_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logits = torch.arange(6.0).reshape(3, 2)
    export._compared("ONNX", lambda images: images * (1 + 9e-6), logits, logits)
    with pytest.raises(
        AlexprepError, match=r"ONNX gives logits that are 1.1e-05 of the largest from the run's, more than 1e-05"
    ):
        export._compared("ONNX", lambda images: images * (1 + 11e-6), logits, logits)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        AlexprepError, match=r'ONNX needs onnx, onnxscript and onnxruntime .*: pip install "alexprep\[export\]"'
    ):
        export_run(Place(run), tmp_path / "out")

    def refusing(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent\nand more")

    monkeypatch.setattr(torch.export, "export", refusing)
    with pytest.raises(
        AlexprepError, match=r"a@3 cannot become a graph \(data-dependent\): write its weights alone with --formats"
    ):
        export_run(Place(run), tmp_path / "out", formats=["pt2"])
    with pytest.raises(AlexprepError, match="--names torchvision is for networks of torchvision's shapes"):
        export_run(Place(run), tmp_path / "out", formats=["pt"], names="torchvision")
    assert not (tmp_path / "out").exists()


def test_torchvision_s_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes that are asked for are those of alexnet-owt."""
    network = alexnet_owt(4, 67, width=1 / 16)
    with pytest.raises(AlexprepError, match=r"conv1 was \(64, 3, 11, 11\), is now \(4, 3, 11, 11\)"):
        export._named_weights(network, "torchvision")
    shapes = {name: tuple(getattr(network, name).weight.shape) for name in export.SHAPES}
    monkeypatch.setattr(export, "SHAPES", shapes)
    named = export._named_weights(network, "torchvision")
    assert torch.equal(named["features.10.bias"], network.conv5.bias) and named["classifier.6.weight"].shape == (4, 256)  # type: ignore[union-attr, arg-type]
