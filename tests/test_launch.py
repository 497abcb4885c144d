"""A training shared by processes, through `alexprep train`: the run that it would be in one process, whoever goes on with it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from alexprep.cli.main import cli
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import folder_at
from alexprep.train import launch
from alexprep.train.config import TrainConfig, prepare
from alexprep.train.launch import launch_training
from alexprep.train.models.cifar import conv_local_13pct
from alexprep.train.recipes import RECIPES, recipe

SECONDS = 150  # for each test
# Without kinks: rounding, which differs between schemes, stays as small as it is, where a max pool or a rectifier may turn it into a step.
SMOOTH = """
from torch import nn
from alexprep.train.models.layers import Scale

def make(classes, crop):
    side = ((crop - 5) // 4 + 1) // 2 - 2
    return nn.Sequential(
        Scale(1 / 64), nn.Conv2d(3, 4, 5, 4), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(6 * side**2, 10), nn.Tanh(), nn.Dropout(), nn.Linear(10, classes),
    )
"""


def _words(data: Path, runs: Path, *words: str) -> list[str]:
    begin = ["train", "--data", str(data), "--recipe", "tiny", "--runs", str(runs), "--name", "run", "--device", "cpu"]
    return [*begin, "--batch-size", "13", "--checkpoint-steps", "2", *words]


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What --model takes."""
    file = tmp_path_factory.mktemp("smooth") / "smooth.py"
    file.write_text(SMOOTH)
    return f"{file}:make"


def _train(data: Path, runs: Path, *words: str) -> dict[str, Any]:
    """The command in this process, which has imported torch; ranks are processes of their own."""
    result = CliRunner().invoke(cli, [*_words(data, runs, *words), "--json"])
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"
    summary: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return summary


def _weights(runs: Path) -> dict[str, torch.Tensor]:
    newest = max((runs / "run" / "checkpoints").glob("*.safetensors"))
    return {key: value for key, value in load_file(newest).items() if not key.startswith("random")}


def _steps(runs: Path) -> list[int]:
    lines = (runs / "run" / "log.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "steps"]


def test_begun_on_two_ranks_and_gone_on_with_on_one_and_two(data: Path, tmp_path: Path, smooth: str) -> None:
    """Nine steps in epochs of four, the last of 9 images: the same weights as in one process but for rounding, one log throughout."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert _train(data, alone, "--model", smooth, "--steps", "9")["ranks"] == 1
    first = _train(data, shared, "--model", smooth, "--gpus", "2", "--scheme", "towers", "--steps", "3")
    assert (first["ranks"], first["steps"]) == (2, 3)
    assert _train(data, shared, "--model", smooth, "--resume", "--steps", "5")["ranks"] == 1
    last = _train(data, shared, "--model", smooth, "--resume", "--gpus", "2", "--scheme", "ddp", "--steps", "9")
    assert (last["epochs"], last["steps"]) == (2, 9)
    ours, theirs = _weights(alone), _weights(shared)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 1e-4 * tensor.norm(), name
    assert _steps(shared) == sorted(set(_steps(shared)))


def test_sigterm_lets_all_ranks_save_and_leave(data: Path, tmp_path: Path) -> None:
    words = _words(data, tmp_path, "--gpus", "2", "--scheme", "hybrid", "--epochs", "500")
    command = [sys.executable, "-m", "alexprep.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + SECONDS
        log = tmp_path / "run" / "log.jsonl"
        while (not log.exists() or log.read_text().count("\n") < 3) and time.monotonic() < end:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, said[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    newest = max(path.stem for path in (tmp_path / "run" / "checkpoints").glob("*.json"))
    assert newest == f"step-{summary['steps']:08d}"
    assert summary["stopped_by"] == "SIGTERM" and f"stopped by SIGTERM after step {summary['steps']}" in said


@pytest.mark.parametrize(
    ("places", "patience", "seconds"),
    [
        ({}, "300", 60),
        ({"statistics": "elsewhere", "init_from": "alexnet@best"}, "300", 60),
        ({"data": "memory://bucket/data"}, "300", 320),
        ({"runs": "memory://bucket/runs"}, "1000", 1020),
        ({"statistics": "memory://bucket/data"}, "", 320),
        ({"init_from": "memory://bucket/runs/alexnet"}, "300", 320),
        ({"data": "memory://bucket/data", "rank_seconds": 500.0}, "300", 500),
        ({"data": "memory://bucket/data"}, "0", 60),
    ],
)
def test_ranks_wait_as_long_as_a_store_may_be_away(
    places: dict[str, Any], patience: str, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALEXPREP_STORE_PATIENCE", patience)
    options: dict[str, Any] = {"data": tmp_path, "runs": tmp_path, **places}
    options |= {name: folder_at(str(options[name])) for name in ("data", "runs")}
    assert TrainConfig(**options).rank_wait == seconds


def test_ranks_are_started_to_wait_so_long(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the store is that of the data which a run goes on with."""
    monkeypatch.setenv("ALEXPREP_STORE_PATIENCE", "1000")
    store, waits = folder_at("memory://ranks-wait/data"), []

    def started(*arguments: object, timeout: float, **options: object) -> list[dict[str, Any]]:
        waits.append(timeout)
        raise AlexprepError("started")

    monkeypatch.setattr(launch, "launch_ranks", started)
    monkeypatch.setattr(launch, "from_environment", started)
    for file in data.rglob("*"):
        if file.is_file():
            (store / str(file.relative_to(data))).write_bytes(file.read_bytes())
    shared: dict[str, Any] = {"recipe": "tiny", "runs": tmp_path, "device": "cpu", "ranks": 2}
    for name, place in (("local", data), ("stored", store)):
        for given in ({"data": place}, {"resume": True}):
            with pytest.raises(AlexprepError, match="started"):
                launch_training(TrainConfig(**shared, name=name, **given))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("local", "stored", "a-run-of-another-host"):
        with pytest.raises(AlexprepError, match="started"):
            launch_training(TrainConfig(**shared, name=name, resume=True))
    assert waits == [60, 60, 1020, 1020, 60, 1020, 1020]


def test_torchrun_says_how_many(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AlexprepError, match="--gpus 4, but torchrun started 2 ranks: leave --gpus out"):
        launch_training(TrainConfig(data, "tiny", runs=tmp_path, device="cpu", ranks=4))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 0}, "ranks 0 is not in"),
        ({"ranks": 2, "scheme": "single"}, "scheme single is for one rank, there are 2"),
        ({"scheme": "towers"}, "scheme towers is for several ranks: add --gpus 2"),
        ({"ranks": 2, "scheme": "pipeline"}, "scheme 'pipeline' is not one of"),
        ({"ranks": 3, "scheme": "towers"}, "has 2 groups, which do not divide among 3 ranks"),
        ({"ranks": 2, "rank_seconds": 0.0}, "rank_seconds 0.0 is not a number in"),
        ({"ranks": 2, "rank_seconds": float("inf")}, r"rank_seconds inf is not a number in \[0.001, 1000000\]"),
        ({"ranks": 2, "rank_seconds": 1e300}, "rank_seconds 1e"),
        ({"ranks": 2, "rank_seconds": float("nan")}, "rank_seconds nan"),
    ],
)
def test_schemes_that_do_not_fit(options: dict[str, Any], words: str, data: Path, tmp_path: Path) -> None:
    """No run is begun, so no name is taken."""
    with pytest.raises(AlexprepError, match=words):
        launch_training(TrainConfig(data, "tiny", runs=tmp_path / "runs", device="cpu", **options))
    assert not (tmp_path / "runs").exists()


def test_the_scheme_unless_one_is_chosen(data: Path, tmp_path: Path) -> None:
    """The paper's for two ranks, where the network can be split so."""
    assert prepare(TrainConfig(data, "tiny", runs=tmp_path, device="cpu")).scheme == "single"
    assert prepare(TrainConfig(data, "tiny", runs=tmp_path, device="cpu", ranks=2)).scheme == "towers"
    assert prepare(TrainConfig(data, "tiny", runs=tmp_path, device="cpu", ranks=3)).scheme == "ddp"
    unsplit = replace(recipe("tiny"), network=conv_local_13pct, layer_decay={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "unsplit", unsplit)
        assert prepare(TrainConfig(data, "unsplit", runs=tmp_path, device="cpu", ranks=2)).scheme == "ddp"


def test_a_run_goes_on_with_its_scheme(data: Path, tmp_path: Path) -> None:
    """On as many ranks as may be; one that it was not begun with only by --scheme, or where the ranks cannot share it so."""

    def scheme(ranks: int, **options: Any) -> str:
        return prepare(
            TrainConfig(data, "tiny", runs=tmp_path, name="run", device="cpu", ranks=ranks, **options)
        ).scheme

    assert scheme(2, scheme="hybrid") == "hybrid"
    found = [
        scheme(2, resume=True),
        scheme(1, resume=True),
        scheme(3, resume=True),
        scheme(2, resume=True, scheme="ddp"),
    ]
    assert found == ["hybrid", "single", "hybrid", "ddp"]
    assert scheme(2, resume=True) == "hybrid"  # the one before trained nothing
    towers = TrainConfig(data, "tiny", runs=tmp_path, name="two", device="cpu", ranks=2)
    assert prepare(towers).scheme == prepare(replace(towers, resume=True)).scheme == "towers"
    assert prepare(replace(towers, resume=True, ranks=3)).scheme == "ddp"


@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "2 ranks need a GPU each, torch sees 1"), ("cuda:0", "2 ranks cannot share cuda:0")]
)
def test_each_rank_needs_a_gpu(
    device: str, words: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(AlexprepError, match=words):
        launch_training(TrainConfig(data, "tiny", runs=tmp_path / "runs", device=device, ranks=2))
    assert not (tmp_path / "runs").exists()


def test_what_fails_at_once_takes_no_name(data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(data, bare, ignore=shutil.ignore_patterns("stats"))
    runs = tmp_path / "runs"
    with pytest.raises(AlexprepError, match="pca-stats"):
        launch_training(TrainConfig(bare, "tiny", runs=runs, device="cpu"))
    assert not runs.exists()
