"""Column nets from a line: sizes, errors, arithmetic against scipy, and trainings of digits and of stereo pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from alexprep.cli.evaluate import evaluate
from alexprep.cli.recipes import recipes
from alexprep.cli.train import train
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.worker_pool import InProcessEngine
from alexprep.train.config import TrainConfig
from alexprep.train.models.column_layers import ScaledTanh, Subsampling, TableConv2d
from alexprep.train.models.columns import LENET5, ColumnNet, parsed
from alexprep.train.optimizer import MomentumSGD
from alexprep.train.recipes import RECIPES
from alexprep.train.trainer import train as train_run
from tests.test_binary_records import idx, norb

LINE = "20C4-MP2-40C5-MP3-150N-10N"


def test_sizes_and_parameters_are_those_of_the_papers() -> None:
    shapes = [part.shape for part in parsed(f"1x29x29-{LINE}", (1, 29, 29))]
    assert shapes == [(20, 26, 26), (20, 13, 13), (40, 9, 9), (40, 3, 3), (150, 1, 1), (10, 1, 1)]
    # LeCun et al. 1998, section II.B: C1 to F6.
    parts = parsed(LENET5, (1, 32, 32))
    assert [part.parameters for part in parts] == [156, 12, 1516, 32, 48_120, 10_164, 850]
    assert sum(part.parameters for part in parts[:-1]) == 60_000


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if isinstance(recipe.network, ColumnNet)])
def test_what_is_told_is_what_is_learned(name: str) -> None:
    recipe = RECIPES[name]
    assert isinstance(recipe.network, ColumnNet) and recipe.network.input is not None
    classes = 5 if name.startswith("norb") else 10
    network = recipe.make_network(classes, 0)
    learned = sum(weight.numel() for weight in network.parameters())
    unseen = sum(
        int((layer.mask == 0).sum()) * layer.weight[0, 0].numel()
        for layer in network.modules()
        if isinstance(layer, TableConv2d)
    )
    parts = parsed(recipe.network.line, recipe.network.input)
    assert sum(part.parameters for part in parts) == learned - unseen
    assert network(torch.zeros(2, *recipe.network.input)).shape == (2, classes)
    assert (recipe.summary() or "").endswith(f"; {learned - unseen:,} parameters")


def test_a_summary_tells_of_the_width() -> None:
    recipe = replace(RECIPES["mnist-column"], width=0.5)
    learned = sum(weight.numel() for weight in recipe.make_network(10, 0).parameters())
    assert (recipe.summary() or "").endswith(f"; {learned:,} parameters")


@pytest.mark.parametrize(
    ("line", "at", "words"),
    [
        ("1x29x29-20C4-MP2-40Q5-10N", 20, "'40Q5' is no layer"),
        ("20C4--10N", 6, "there is nothing between two -"),
        ("", 1, "there is nothing"),
        ("1x29x29", 7, "there are no layers"),
        ("20C4S-10N", 5, "'20C4S' is no layer"),
        ("20C4R2s-10N", 7, "is no layer"),
        ("1x29x29-20C4-MP5-10N", 14, "MP5 does not go into 26 pixels: 1 left over; 25 would do"),
        ("1x32x32-20C5S1-10N", 9, "20C5S1 does not go into 32 pixels: 1 left over; 31 would do"),
        ("1x29x29-20C40-10N", 9, "20C40 looks at 40 pixels, the maps below it have 29"),
        ("1x29x29-20C4-SP2x1-10N", 14, "SP2x1 is not square: write SP2"),
        ("1x29x29-20C4-MP2", 14, "the line ends with MP2: end it with the classes"),
        ("1x29x29-10N-20C1-10N", 13, "only N may follow N"),
        ("1x29x29-20C4-5C4R30-10N", 18, "each map is to see 30 maps of 20 below"),
        ("1x29x29-20C4-4C4T0,1+25-10N", 22, "'25' is no list of different maps from 0 to 19"),
        ("1x29x29-20C4-4C4T0+1+2-10N", 18, "3 lists of connections do not go into 4 maps"),
        ("9x32x32-10N", 1, "is not of 1 to 3 channels"),
        ("1x29x29-0C4-10N", 9, "0 maps are not 1 to"),
        (
            "1x29x29-999999C4-999999C4-MP23-10N",
            18,
            "999999C4 has 15,999,969,000,015 weights, the layers before it 16,999,983: a net may have 1,000,000,000 (4 GB in float32)",
        ),
        (
            "1x29x29-999999C4-999999C4R9-10N",
            18,
            "999999C4R9 has 15,999,969,000,015 weights",
        ),  # before connections are drawn
        ("1x999999x999999-20C4-10N", 22, "10N has "),
        ("1x29x29-40000N-20000N-9000N-10N", 23, "9000N has 180,009,000 weights, the layers before it 833,"),
    ],
)
def test_errors_point_at_the_character(line: str, at: int, words: str) -> None:
    with pytest.raises(AlexprepError) as error:
        ColumnNet(line)
    assert f"columns:{line}, character {at}: " in str(error.value) and words in str(error.value)


def test_a_line_and_its_recipe_must_agree() -> None:
    for line, channels, classes, words in (
        (f"1x29x29-{LINE}", 3, 10, "the recipe gives it 3x29x29"),
        (LINE, 1, 7, "character 24: 10N ends the net with 10 outputs, the data set has 7 classes: end it with 7N"),
    ):
        with pytest.raises(AlexprepError, match=words):
            ColumnNet(line)(classes, 29, in_channels=channels)
    with pytest.raises(AlexprepError, match="a table of connections"):
        ColumnNet("4C4T0-10N")(10, 29, width=2.0)
    assert len(ColumnNet(LINE)(10, 29, width=0.5).get_parameter("conv1.bias")) == 10


def _convolved(
    maps_CHW: NDArray[np.float64], layer: torch.nn.Conv2d, table: list[list[int]] | None
) -> NDArray[np.float64]:
    """Sums of correlations over the maps that are seen, by scipy."""
    assert layer.bias is not None
    made = []
    for number, kernels in enumerate(layer.weight.detach().numpy()):
        seen = range(len(maps_CHW)) if table is None else table[number]
        whole = sum(scipy.signal.correlate2d(maps_CHW[below], kernels[below], "valid") for below in seen)
        made.append(whole[:: layer.stride[0], :: layer.stride[1]] + float(layer.bias.detach()[number]))
    return np.stack(made)


def _squares(maps: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    count, rows, columns = maps.shape
    blocks = maps.reshape(count, rows // height, height, columns // width, width).swapaxes(2, 3)
    return blocks.reshape(count, rows // height, columns // width, -1)


def test_a_line_has_the_other_pools_and_dropconnect() -> None:
    network = ColumnNet("4C3-SP2-6C2-LP2-9ND-3N", activation="relu")(3, 12, seed=1, in_channels=1).eval()
    layers: dict[str, Any] = dict(network.named_children())
    other = dict(ColumnNet("4C3-MP2-6C2-MP2-9N-3N")(3, 12, seed=1, in_channels=1).named_parameters())
    assert all(torch.equal(weight, other[name]) for name, weight in network.named_parameters())
    images = torch.rand(2, 1, 12, 12)
    values = torch.relu(layers["conv1"](images)).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    values = values.square().sum(dim=4) / values.sum(dim=4).clamp(min=1e-30)
    values = torch.relu(layers["conv3"](values)).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).square().sum(dim=4).sqrt()
    hidden = torch.relu(0.5 * values.flatten(1) @ layers["fc5"].weight.T + layers["fc5"].bias)
    torch.testing.assert_close(network(images), layers["fc6"](hidden))
    network.train()
    assert not torch.equal(network(images), network(images))


def test_a_net_computes_what_its_line_says(seed: int) -> None:
    """Skipping factors, oblong kernels, connection tables, all pools and the activation, against scipy and numpy."""
    line = "4C2x3S1x0-MP2x3-6C2T0,1+2,3+0,1,2,3-SS2x1-4C1R2s5-AP1x5-7N-3N"
    network = ColumnNet(line)(3, 20, seed=seed, in_channels=2).double()
    layers: dict[str, Any] = dict(network.named_children())
    scale = layers["pool4"]
    assert isinstance(scale, Subsampling)
    with torch.no_grad():
        scale.weight.uniform_(-1, 1)
        scale.bias.uniform_(-1, 1)
        for layer in layers.values():
            if isinstance(getattr(layer, "bias", None), torch.nn.Parameter):
                layer.bias.uniform_(-1, 1)
    tables = [part.table for part in parsed(line, (2, 20, 20))]
    assert tables[2] == [[0, 1], [2, 3], [0, 1, 2, 3]] * 2
    assert tables[4] is not None and [len(set(row)) for row in tables[4]] == [2] * 4
    image = np.random.default_rng(seed).normal(size=(2, 20, 20))

    def active(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.7159 * np.tanh(2 / 3 * values)

    values = active(_convolved(image, layers["conv1"], None))
    values = _squares(values, 2, 3).max(axis=3)
    values = active(_convolved(values, layers["conv3"], tables[2]))
    means = _squares(values, 2, 1).mean(axis=3)
    values = active(means * scale.weight.detach().numpy()[:, None, None] + scale.bias.detach().numpy()[:, None, None])
    values = _squares(active(_convolved(values, layers["conv5"], tables[4])), 1, 5).mean(axis=3)
    assert values.shape == (4, 2, 1)
    for name, last in (("fc7", False), ("fc8", True)):
        weight, bias = (getattr(layers[name], each).detach().numpy() for each in ("weight", "bias"))
        values = weight @ values.ravel() + bias
        values = values if last else active(values)
    found = network(torch.from_numpy(image)[None])[0].detach().numpy()
    np.testing.assert_allclose(found, values, rtol=0, atol=1e-12)
    assert float(ScaledTanh()(torch.tensor(1.0))) == pytest.approx(1, abs=1e-4)


def test_weights_begin_as_they_are_said_to_and_unseen_ones_stay_0() -> None:
    line = "8C3R2-10N"
    uniform, other = (ColumnNet(line)(10, 9, seed=seed, in_channels=3) for seed in (0, 1))
    layer = uniform[0]
    assert isinstance(layer, TableConv2d) and layer.bias is not None
    assert not torch.equal(layer.weight, other.get_parameter("conv1.weight"))
    assert 0.04 < float(layer.weight.detach().abs().max()) <= 0.05 and not layer.bias.any()
    fan_in = ColumnNet("50C5-10N", initial="fan-in")(10, 9, in_channels=2)
    assert float(fan_in.get_parameter("conv1.weight").detach().std()) == pytest.approx(50**-0.5, rel=0.1)
    unseen = layer.mask.expand_as(layer.weight) == 0
    optimizer = MomentumSGD([{"params": list(uniform.parameters())}], lr=0.1, decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        uniform(torch.ones(2, 3, 9, 9)).square().sum().backward()
        optimizer.step()
    assert not layer.weight[unseen].any() and layer.weight[~unseen].all()


def test_a_recipe_s_layers_are_listed() -> None:
    listed = CliRunner().invoke(recipes, ["lenet5"]).output
    assert "Layers of 1x32x32: 6C5 6x28x28 (156), SS2 6x14x14 (12), 16C5T0,1,2+… 16x10x10 (1,516)" in listed


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up digits of 28 pixels as a data set. Not to be changed."""
    source, folder = tmp_path_factory.mktemp("mnist"), tmp_path_factory.mktemp("digits")
    _write_digits(source)
    convert(source, folder, ShardOptions(Target(size=28, format="png")), InProcessEngine())
    return folder


def _write_digits(folder: Path) -> None:
    """30 and 10 pictures of a bar whose place tells its class, in idx files."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[5:23, 5 + 2 * label : 8 + 2 * label] = rng.integers(200, 256)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))


def _done(command: Any, *words: object) -> dict[str, Any]:
    result = CliRunner().invoke(command, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_single_images_train_and_go_on_to_the_last_bit(digits: Path, tmp_path: Path) -> None:
    """The loader gives small steps several at a time; a run that is left between two of them goes on with the third."""

    def weights(**options: Any) -> object:
        config = TrainConfig(
            data=digits, recipe="mnist-column", runs=tmp_path, epochs=2, device="cpu", lr=0.01, **options
        )
        return train_run(config)["weights_sha256"]

    whole = weights(name="whole")
    weights(name="part", steps=17)
    weights(name="part", resume=True, steps=41)
    assert weights(name="part", resume=True) == whole


def test_columns_of_different_widths_are_evaluated_as_one(digits: Path, tmp_path: Path) -> None:
    runs = ("--device", "cpu", "--runs", tmp_path)
    model = "columns:1x29x29-4C6-MP4-10N"
    for width, name in ((10, "ten"), (18, "eighteen")):
        words = ("--set", f"augmentation.normalised_width={width}", "--model", model, "--name", name)
        summary = _done(train, "--data", digits, "--recipe", "mnist-column-fast", "--epochs", 1, *words, *runs)
        assert summary["steps"] == 1
    _done(
        train, "--resume", "--name", "ten", "--epochs", 2, "--schedule", "linear", *runs
    )  # a line is no code: it need not be named again
    both, ten = _done(evaluate, "ten", "eighteen", *runs), _done(evaluate, "ten", *runs)
    assert [net["run"].rpartition("/")[2] for net in both["nets"]] == ["ten", "eighteen"] and both["samples"] == 10
    assert both["nets"][0]["loss"] == pytest.approx(ten["loss"], rel=1e-12)  # each with its own width
    error = CliRunner().invoke(evaluate, ["ten", "--views", "ten", *map(str, runs)]).exception
    assert isinstance(error, AlexprepError) and "use --views centre" in str(error)


def test_a_line_that_does_not_suit_is_refused_before_a_run_begins(digits: Path, tmp_path: Path) -> None:
    words = ["--data", str(digits), "--recipe", "mnist-column", "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    for model, told in (
        ("columns:20C4-MP2-10Q", "character 12: '10Q' is no layer"),
        ("columns:20C4-MP3-10N", "MP3 does not go into 26 pixels"),
        ("columns:3x28x28-20C5-11N", "10 classes: end it with 10N"),
    ):
        error = CliRunner().invoke(train, [*words, "--model", model]).exception
        assert isinstance(error, AlexprepError) and told in str(error)
    grey = replace(RECIPES["tiny"], augmentation=replace(RECIPES["tiny"].augmentation, channels=1))
    with pytest.raises(AlexprepError, match="sees 3 channels"):
        grey.make_network(10, 0)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_stereo_pairs_are_two_channels_and_train(tmp_path: Path) -> None:
    """Made-up files: the real ones are 24,300 pairs."""
    (tmp_path / "norb").mkdir()
    norb(tmp_path / "norb")
    source, folder = find_source(str(tmp_path / "norb"), "norb-stereo"), tmp_path / "data"
    convert(source, folder, ShardOptions(Target(size=48, format="png")), InProcessEngine())
    summary = _done(
        train, "--data", folder, "--recipe", "norb-column", "--epochs", 1, "--runs", tmp_path, "--device", "cpu"
    )
    assert summary["steps"] == 13 and summary["val_split"] == "test" and np.isfinite(summary["train_loss"])
