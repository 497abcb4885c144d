"""`alexprep train` and `alexprep eval` on real shards, from the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from alexprep.cli import main
from alexprep.cli import train as command
from alexprep.cli.evaluate import evaluate
from alexprep.cli.train import RECIPES, train
from alexprep.shards.errors import AlexprepError
from alexprep.train import config, recipes
from alexprep.train.config import TrainConfig
from alexprep.train.trainer import train as train_run

DEADLINE = 120.0  # seconds, for everything that waits


def last_line(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text.splitlines()[-1])
    return document


def test_train_then_eval(data: Path, tmp_path: Path) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    options = ["--data", str(data), "--recipe", "tiny", "--epochs", "2", "--device", "cpu", "--json", *runs]
    result = CliRunner().invoke(train, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    summary = last_line(result.stdout)
    assert (summary["recipe"], summary["steps"], summary["epochs"], summary["device"]) == ("tiny", 4, 2, "cpu")
    assert summary["images_per_second"] > 0
    for views in ("centre", "ten"):
        arguments = ["--views", views, "--json", "--device", "cpu", *runs]
        result = CliRunner().invoke(evaluate, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found = last_line(result.stdout)
        assert (found["run"], found["samples"], found["views"]) == (summary["run"], 20, views)
        if views == "centre":
            assert found["top1_error"] == summary["val_top1_error"]
            assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)  # another batch size rounds otherwise
    train_split = CliRunner().invoke(evaluate, ["tiny", "--split", "train", "--json", *runs], catch_exceptions=False)
    assert last_line(train_split.stdout)["samples"] == 48


def test_resume_is_exact_with_real_shards(data: Path, tmp_path: Path) -> None:
    def weights(**options: Any) -> object:
        config = TrainConfig(data=data, recipe="tiny", runs=tmp_path, epochs=3, batch_size=10, device="cpu", **options)
        return train_run(config)["weights_sha256"]

    whole = weights(name="whole")
    weights(name="part", steps=5)  # an epoch
    weights(name="part", resume=True, steps=7)
    assert weights(name="part", resume=True) == whole


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
    steps = last_line(out)["steps"]
    assert last_line(out)["stopped_by"] == "SIGTERM"
    more = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--resume", "--steps", str(steps + 1), "--json"]
    result = CliRunner().invoke(train, more, catch_exceptions=False)
    assert last_line(result.stdout)["steps"] == steps + 1


def test_the_wrong_recipe_names_the_right_one(data: Path, tmp_path: Path) -> None:
    options = ["--data", str(data), "--runs", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(train, options)
    assert isinstance(result.exception, AlexprepError)
    assert str(result.exception) == (
        "the stored images have a side of 64 pixels, recipe alexnet is for 256: "
        "train with --recipe tiny, or shard again with --size 256"
    )


def test_missing_data_and_runs_are_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(train, ["--data", str(tmp_path / "none")])
    assert isinstance(result.exception, AlexprepError)
    assert "alexprep shard" in str(result.exception)
    result = CliRunner().invoke(evaluate, ["--runs", str(tmp_path)])
    assert isinstance(result.exception, AlexprepError)
    assert "start one with `alexprep train`" in str(result.exception)


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
    wrong: dict[str, list[Any]] = {
        "epochs": [0, 1.5, 100_001],
        "batch_size": [0, 32.0, "32", True],
        "lr": [-1.0, float("nan")],
        "momentum": [1.0, "0.9"],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(AlexprepError, match=f"{name} is {value!r} in recipe tiny: it must be"):
                replace(recipe, **{name: value})
    with pytest.raises(AlexprepError, match="tiny cuts 56 pixels out of stored sizes"):
        replace(recipe, stored_sizes=(16, 32))


def test_begun_with_another_run_s_weights(data: Path, tmp_path: Path) -> None:
    """The checkpoint meant is settled when the run begins; the run goes on with it, and with no other."""

    def run(*words: str) -> Any:
        options = ["--data", str(data), "--recipe", "tiny", "--runs", str(tmp_path), "--device", "cpu", *words]
        return CliRunner().invoke(train, options)

    assert run("--name", "a", "--steps", "1").exit_code == 0
    result = run("--name", "b", "--steps", "1", "--init-from", "a", "--init-layers", "conv*, fc4")
    assert result.exit_code == 0, result.output
    assert "begun with the saved weights of conv1, conv2, conv3, fc4" in result.stderr
    assert "fc5 begins fresh: not asked for" in result.stderr
    assert json.loads((tmp_path / "b" / "config.json").read_text())["options"]["init_from"] == "a@1"
    assert run("--name", "b", "--resume", "--steps", "2").exit_code == 0
    refused = run("--name", "b", "--resume", "--steps", "3", "--init-layers", "conv1").exception
    assert isinstance(refused, AlexprepError) and "init" in str(refused)
    for words, reason in (
        (["--init-from", "nobody"], "nobody"),
        (["--init-from", "a@7"], "no checkpoint of step 7"),
        (["--init-from", "a", "--init-layers", "conv9"], "conv9 matches no layer"),
        (["--init-layers", "conv1"], "--init-layers conv1 says which layers of another run: name it with --init-from"),
        (["--epochs", "100001"], "epochs 100001 is not in [1, 100000]"),
    ):
        error = run("--name", "c", *words).exception
        assert isinstance(error, AlexprepError) and reason in str(error)


def test_a_bare_resume_takes_the_run_s_data(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the default nor what the environment names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALEXPREP_DATA", "elsewhere")
    begun = ["--data", str(data), "--recipe", "tiny", "--steps", "1", "--keep", "1", "--device", "cpu"]
    assert CliRunner().invoke(train, begun).exit_code == 0
    more = CliRunner().invoke(train, ["--resume", "--steps", "2", "--device", "cpu", "--json"], catch_exceptions=False)
    assert last_line(more.stdout)["steps"] == 2
    assert len(list(tmp_path.glob("runs/tiny/checkpoints/*.json"))) == 1
    told = CliRunner().invoke(train, ["--resume", "--data", "nowhere"]).exception
    assert isinstance(told, AlexprepError) and "nowhere/dataset.json does not exist" in str(told)


def wrapped() -> None:
    """As a library in C that is being imported hands on a Ctrl-C."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error


def hidden() -> None:
    """As a check for a package would tell it."""
    try:
        wrapped()
    except ImportError:
        raise AlexprepError("it needs a package") from None


def plain() -> None:
    raise KeyboardInterrupt


AGAIN = "run the same command again"
LEFT = {
    "shard": f"Finished work is kept: {AGAIN} to go on.",
    "pca-stats": f"Finished work is kept: {AGAIN} to go on.",
    "train": "Checkpoints that were saved are kept: if the run has one, `alexprep train --resume` goes on from it.",
    "eval": f"Interrupted before there was a result: {AGAIN}.",
    "tune": f"Interrupted before there was a result: {AGAIN}.",
}


@pytest.mark.parametrize("interrupt", [plain, wrapped, hidden])
def test_an_interrupted_command_says_what_it_leaves(
    interrupt: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main.cli, "main", lambda **options: interrupt())
    for name, words in LEFT.items():
        monkeypatch.setattr(sys, "argv", ["alexprep", name, "--json"])
        with pytest.raises(SystemExit, match="130"):
            main.main()
        assert capsys.readouterr().err.endswith(f"{words}\n")
