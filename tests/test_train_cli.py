"""`alexprep train` and `alexprep eval` on real shards, from the command line."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from alexprep.cli import main
from alexprep.cli import train as command
from alexprep.cli.demo import demo as demo_command
from alexprep.cli.evaluate import evaluate
from alexprep.cli.train import RECIPES, _next_commands, train
from alexprep.shards.errors import AlexprepError
from alexprep.train import config, demo, recipes
from alexprep.train.config import TrainConfig
from alexprep.train.demo import make_photos
from alexprep.train.run_dir import create_run
from alexprep.train.trainer import train as train_run

DEADLINE = 120.0  # seconds, for everything that waits


def done(command: click.Command, *words: object) -> tuple[dict[str, Any], str]:
    """What a command prints with --json, and what it says on stderr."""
    result = CliRunner().invoke(command, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def refused(*words: object) -> str:
    error = CliRunner().invoke(train, [*map(str, words)]).exception
    assert isinstance(error, AlexprepError)
    return str(error)


def test_train_then_eval(data: Path, tmp_path: Path) -> None:
    runs = ("--device", "cpu", "--runs", tmp_path / "runs")
    summary, _ = done(train, "--data", data, "--recipe", "tiny", "--epochs", 2, *runs)
    assert (summary["recipe"], summary["steps"], summary["epochs"], summary["device"]) == ("tiny", 12, 2, "cpu")
    assert summary["images_per_second"] > 0
    centre, ten = (done(evaluate, "--views", views, *runs)[0] for views in ("centre", "ten"))
    assert centre["run"] == ten["run"] == summary["run"] and centre["samples"] == ten["samples"] == 20
    assert (centre["views"], ten["views"]) == ("centre", "ten")
    assert centre["top1_error"] == summary["val_top1_error"]
    assert centre["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)  # another batch size rounds otherwise
    assert done(evaluate, "tiny", "--split", "train", *runs)[0]["samples"] == 48


def test_resume_is_exact_with_real_shards(data: Path, tmp_path: Path) -> None:
    def weights(**options: Any) -> object:
        config = TrainConfig(data=data, recipe="tiny", runs=tmp_path, epochs=3, batch_size=10, device="cpu", **options)
        return train_run(config)["weights_sha256"]

    whole = weights(name="whole")
    weights(name="part", steps=5)  # an epoch
    weights(name="part", resume=True, steps=7)
    assert weights(name="part", resume=True) == whole


@pytest.mark.usefixtures("cold_processes")
def test_sigterm_leaves_with_143_and_resumes(data: Path, tmp_path: Path) -> None:
    code = "from alexprep.cli.main import main; main()"
    arguments = ["--recipe", "tiny", "--epochs", "5000", "--checkpoint-steps", "1", "--device", "cpu", "--json"]
    command = [sys.executable, "-c", code, "train", "--data", str(data), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + DEADLINE
    while not list(tmp_path.glob("runs/tiny/checkpoints/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 143, err
    left = json.loads(out.splitlines()[-1])
    assert left["stopped_by"] == "SIGTERM"
    steps = left["steps"] + 1
    runs = tmp_path / "runs"
    assert done(train, "--data", data, "--runs", runs, "--resume", "--steps", steps)[0]["steps"] == steps


def test_a_demo_stopped_in_its_training_ends_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an error of a validation that there was not."""
    summary = {"stopped_by": "SIGINT", "val_top1_error": None}
    monkeypatch.setattr(demo, "make_photos", lambda folder: make_photos(folder, train=2, val=1))
    monkeypatch.setattr(demo, "train", lambda config: summary)
    result = CliRunner().invoke(demo_command, ["--out", str(tmp_path / "demo"), "--json"], catch_exceptions=False)
    assert result.exit_code == 128 + signal.SIGINT and json.loads(result.stdout.splitlines()[-1]) == summary
    assert "run the same command again" in result.stdout and "4. " not in result.stdout


def test_the_command_offers_every_recipe_and_tells_the_defaults() -> None:
    assert (command.KEEP, command.CHECKPOINT_STEPS) == (config.KEEP, config.CHECKPOINT_STEPS)
    assert tuple(recipes.RECIPES) == RECIPES
    for name in RECIPES:
        assert recipes.recipe(name).name == name
        json.dumps(recipes.recipe(name).describe())  # JSON values only
    with pytest.raises(AlexprepError, match="no recipe 'vgg': choose one of alexnet, alexnet-2012, "):
        recipes.recipe("vgg")


def test_a_recipe_refuses_senseless_numbers() -> None:
    recipe = recipes.recipe("tiny")
    wrong: dict[str, list[Any]] = {"epochs": [0, 1.5, 100_001], "batch_size": [0, 32.0, "32", True]}
    for name, values in (wrong | {"lr": [-1.0, float("nan")], "momentum": [1.0, "0.9"]}).items():
        for value in values:
            with pytest.raises(AlexprepError, match=f"recipe tiny: {name} .* is not"):
                replace(recipe, **{name: value})
    with pytest.raises(AlexprepError, match="tiny cuts 56 pixels out of stored sizes"):
        replace(recipe, stored_sizes=(16, 32))


def test_begun_with_another_run_s_weights(data: Path, tmp_path: Path) -> None:
    """The checkpoint meant is settled when the run begins; the run goes on with it, and with no other."""
    shared = ("--data", data, "--recipe", "tiny", "--runs", tmp_path, "--device", "cpu")
    done(train, *shared, "--name", "a", "--steps", 1)
    _, said = done(train, *shared, "--name", "b", "--steps", 1, "--init-from", "a", "--init-layers", "conv*, fc4")
    assert "begun with the saved weights of conv1, conv2, conv3, fc4" in said
    assert "fc5 begins fresh: not asked for" in said
    assert json.loads((tmp_path / "b" / "config.json").read_text())["options"]["init_from"] == "a@1"
    done(train, *shared, "--name", "b", "--resume", "--steps", 2)
    assert "init" in refused(*shared, "--name", "b", "--resume", "--steps", 3, "--init-layers", "conv1")
    for words, reason in (
        (["--init-from", "nobody"], "nobody"),
        (["--init-from", "a@7"], "no checkpoint of step 7"),
        (["--init-from", "a", "--init-layers", "conv9"], "conv9 matches no layer"),
        (
            ["--init-layers", "conv1"],
            "--init-layers conv1 says which layers of other weights: name these with --init-from",
        ),
        (["--epochs", "100001"], "epochs 100001 is not in [1, 100000]"),
    ):
        assert reason in refused(*shared, "--name", "c", *words)


def test_a_bare_resume_takes_the_run_s_data(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the default nor what the environment names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALEXPREP_DATA", "elsewhere")
    done(train, "--data", data, "--recipe", "tiny", "--steps", 1, "--keep", 1, "--device", "cpu")
    assert done(train, "--resume", "--steps", 2, "--device", "cpu")[0]["steps"] == 2
    assert len(list(tmp_path.glob("runs/tiny/checkpoints/*.json"))) == 1
    assert "nowhere/dataset.json does not exist" in refused("--resume", "--data", "nowhere")


def wrapped() -> None:
    """As a library in C that is being imported hands on a Ctrl-C, and a check for a package would tell it."""
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
    except ImportError:
        raise AlexprepError("it needs a package") from None


def plain() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [plain, wrapped])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shard", "Finished work is kept: run the same command again to go on."),
        (
            "train",
            "Checkpoints that were saved are kept: if the run has one, the same command with --resume goes on from it.",
        ),
        ("eval", "Interrupted before there was a result: run the same command again."),
    ],
)
def test_an_interrupted_command_says_what_it_leaves(
    name: str,
    words: str,
    interrupt: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(main.cli, "main", lambda **options: interrupt())
    monkeypatch.setattr(sys, "argv", ["alexprep", name, "--json"])
    with pytest.raises(SystemExit, match="130"):
        main.main()
    assert capsys.readouterr().err.endswith(f"{words}\n")


@pytest.mark.parametrize(("split", "words"), [("val", []), (None, ["--split", "train"])])
def test_the_next_command_evaluates_a_split_that_there_is(split: str | None, words: list[str], tmp_path: Path) -> None:
    """Without a val or test split, `alexprep eval` has to be told of the one that there is."""
    config = {"options": {"recipe": "tiny"}, "data": "there", "identity": {"recipe": {"augmentation": {}}}}
    run = create_run(tmp_path, "mine", "mine", config)
    options = {"runs": tmp_path, "recipe": None, "model": None}
    found = _next_commands({"run": str(run), "best_step": None, "val_split": split}, options)
    assert found[0] == shlex.join(["alexprep", "eval", "mine", *words, "--runs", str(tmp_path)])
