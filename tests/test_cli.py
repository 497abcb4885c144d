"""The commands as a user meets them."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import fsspec
import pytest
from PIL import Image

from alexprep.cli.main import _began_with_interrupt, cli, main
from alexprep.cli.train import with_synonyms
from alexprep.pipeline.augmentation import PRESETS
from alexprep.pipeline.autotune import tune
from alexprep.shards.dataset_format import FORMATS
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.resample import FILTERS
from alexprep.shards.worker_pool import IMAGE_SECONDS
from alexprep.train.config import MOST_TRACED, TrainConfig
from alexprep.train.distributed.tensor_parallel import SCHEMES
from alexprep.train.distributed.world import TIMEOUT
from alexprep.train.evaluation import evaluate
from alexprep.train.loader_overlap import measure
from alexprep.train.predictions import EvaluationViews


def _run(*arguments: str, cwd: Path, check: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alexprep.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr
    return done


Command = Callable[..., tuple[int, str, str]]


@pytest.mark.usefixtures("cold_processes")
def test_help_needs_no_heavy_library() -> None:
    """What --help imports decides how fast it answers."""
    code = "import sys, alexprep.cli.main; print([m for m in ('torch', 'nvidia', 'numpy', 'pyarrow', 'rich', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("cold_processes")
def test_commands_that_compute_with_no_network_load_no_torch(tmp_path: Path) -> None:
    """Nor DALI. One process runs them, one after the other."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 7)).save(tmp_path / "images" / "a" / "1.jpg")
    shell = {"_ALEXPREP_COMPLETE": "bash_complete", "COMP_CWORD": "5"}
    commands = [
        (["--version"], {}),
        (["train", "--help"], {}),
        (["recipes", "--json"], {}),
        (["recipes", "alexnet-2012", "--set", "network.pool=2"], {}),
        (["recipes", "lenet5"], {}),
        ([], shell | {"COMP_WORDS": "alexprep train --recipe small-net --set network.po"}),
        (["inspect", "images"], {}),
        (["shard", "images", "--out", "out", "--size", "8", "--workers", "1"], {}),
        (["verify", "out", "--workers", "1"], {}),
    ]
    code = """
import json, sys
from click.testing import CliRunner
from alexprep.cli.main import cli
for words, environment in json.loads(sys.argv[1]):
    done = CliRunner().invoke(cli, words, env=environment, prog_name="alexprep")
    print(json.dumps([done.exit_code, f"{done.output}{done.exception or ''}", [name for name in ("torch", "nvidia.dali") if name in sys.modules]]))
"""
    words = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=True)
    for (command, _), line in zip(commands, done.stdout.splitlines(), strict=True):
        status, told, loaded = json.loads(line)
        assert (status, loaded) == (0, []), (command, told)
        if not command:
            assert told.split() == ["plain,network.pool=", "plain,network.pool_size="]


def test_every_command_has_help_and_an_example() -> None:
    groups = {name: command for name, command in cli.commands.items() if isinstance(command, click.Group)}
    nested = {f"{name} {each}": command for name, group in groups.items() for each, command in group.commands.items()}
    for name, command in [*cli.commands.items(), *nested.items()]:
        assert command.help and f"Example: alexprep {name}" in command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help or parameter.show_default, f"{name} {parameter.name}"


# The library's defaults, choices and bounds, which commands repeat: to import them would take seconds at every --help.


def _command(name: str) -> click.Command:
    found: click.Command = cli
    for word in name.split():
        assert isinstance(found, click.Group)
        found = found.commands[word]
    return found


def _defaults(name: str) -> dict[str, Any]:
    """What a command is called with where nothing is said."""
    return _command(name).make_context(name, [], resilient_parsing=True).params


def _signature(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_train_s_defaults_are_the_library_s() -> None:
    chosen = _defaults("train")
    del chosen["as_json"]
    assert TrainConfig(**with_synonyms(chosen)) == TrainConfig(chosen["data"])
    assert chosen["rank_seconds"] == TIMEOUT


def test_shard_s_defaults_are_the_library_s() -> None:
    chosen = _defaults("shard")
    target = {name: chosen[name] for name in asdict(Target())}
    rest = ("seed", "shard_samples", "labels", "limit", "class_names", "class_words", "metadata")
    more = {name: chosen[name] for name in rest}
    assert asdict(ShardOptions()) == {"target": target, **more}
    assert chosen["image_seconds"] == IMAGE_SECONDS


@pytest.mark.parametrize(
    ("name", "option", "function"),
    [
        *(("eval", option, evaluate) for option in ("views", "split", "weights", "weights_from", "batch_size")),
        ("tune", "seconds", tune),
        ("bench overlap", "rounds", measure),
    ],
)
def test_defaults_are_the_library_s(name: str, option: str, function: Callable[..., Any]) -> None:
    assert _defaults(name)[option] == _signature(function)[option]


@pytest.mark.parametrize(
    ("name", "option", "choices"),
    [
        ("shard", "filter", FILTERS),
        ("shard", "format", tuple(FORMATS)),
        *(
            ("shard", each, get_args(get_type_hints(Target)[each]))
            for each in ("filter", "format", "reencode", "subsampling", "device")
        ),
        ("train", "scheme", tuple(scheme for scheme in SCHEMES if scheme != "single")),  # which one process is
        ("eval", "views", get_args(EvaluationViews)),
        ("tune", "augmentation", tuple(PRESETS)),
    ],
)
def test_choices_are_the_library_s(name: str, option: str, choices: tuple[str, ...]) -> None:
    (found,) = (parameter.type for parameter in _command(name).params if parameter.name == option)
    assert isinstance(found, click.Choice) and sorted(found.choices) == sorted(choices)


def test_the_longest_trace_is_the_library_s() -> None:
    (found,) = (parameter.type for parameter in _command("train").params if parameter.name == "trace")
    assert isinstance(found, click.IntRange) and (found.min, found.max) == (1, MOST_TRACED)


def test_the_three_commands(photos: Path, tmp_path: Path) -> None:
    """shard, pca-stats and train in an empty folder, and eval after them."""
    done = _run("shard", str(photos), "--size", "64", "--json", cwd=tmp_path)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["inputs"], result["written"], result["rejected"]) == (68, 68, 0)
    assert result["converted_in_this_run"] == 68 and "every input's fate" in done.stdout
    assert "nothing was missing" in _run("shard", str(photos), "--size", "64", cwd=tmp_path).stdout

    done = _run("pca-stats", "--json", cwd=tmp_path)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["images"] == 48 and len(result["eigenvalues"]) == 3
    assert "121.78  37.09  19.72" in done.stdout and "(0-255)²" in done.stdout

    done = _run("train", "--recipe", "tiny", "--steps", "3", "--json", cwd=tmp_path)
    result = json.loads(done.stdout.splitlines()[-1])
    wanted = {"steps", "epochs", "val_top1_error", "val_top5_error", "images_per_second", "data_wait_ms"}
    assert wanted <= result.keys() and result["steps"] == 3

    done = _run("eval", "--views", "ten", "--json", cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["samples"] == 20


def test_what_the_system_refuses_is_one_line(photos: Path, tmp_path: Path) -> None:
    done = _run("shard", str(photos), "--out", "/proc/nowhere/out", cwd=tmp_path, check=1)
    assert [line.startswith("Error: /proc/nowhere") for line in done.stderr.splitlines() if "Error" in line] == [True]


def test_the_unexpected_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless the user asks for the traceback, to report it."""

    def fail(**options: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.startswith("Error: RuntimeError: two\nThis may be a bug")
    monkeypatch.setenv("ALEXPREP_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="two"):
        main()


def test_an_interrupt_is_found_behind_any_chain_of_errors() -> None:
    """Each error has one as its cause and its context, so the ways double with each; the first has another cause."""
    error: BaseException = KeyboardInterrupt()
    for cause in (ValueError(), *[None] * 200):
        later = ImportError("initialization failed")
        later.__cause__, later.__context__ = cause or error, error
        error = later
    assert _began_with_interrupt(error) and not _began_with_interrupt(ImportError())


def test_the_data_folder_can_come_from_the_environment(
    command: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALEXPREP_DATA", str(tmp_path / "elsewhere"))
    assert command("shard", str(photos), "--size", "16", "--limit", "4", "--workers", "1")[0] == 0
    assert command("pca-stats", "--workers", "1")[0] == 0
    assert (tmp_path / "elsewhere" / "stats" / "stats.json").exists()


def test_a_store_that_cannot_be_reached_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each store raises errors of its own kind."""
    fsspec.filesystem("memory").pipe("/taken", b"")
    assert "memory://taken is a file, not a folder" in command("shard", ".", "--out", "memory://taken")[2]

    def fail(*arguments: object, **options: object) -> None:
        raise LookupError("no credentials\nsee the manual")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", fail)
    status, _, error = command("shard", ".", "--out", "memory://bucket/data")
    assert status == 1 and len(error.splitlines()) == 1
    assert "memory://bucket/data cannot be reached (LookupError: no credentials): check the URL" in error


def test_the_patience_is_known_before_a_folder_is_looked_for(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise ConnectionError("reset")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", fail)
    monkeypatch.setenv("ALEXPREP_STORE_PATIENCE", "5")
    status, _, error = command("train", "--data", "memory://bucket/data", "--store-patience", "0")
    assert (status, len(asked)) == (1, 1) and "memory://bucket/data cannot be reached (ConnectionError: reset)" in error


@pytest.mark.parametrize("name", ["train", "eval", "features", "similar", "pca-stats"])
def test_a_limit_of_no_cache_is_refused(name: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line, and not in the environment, where it stands for the commands that are given a cache."""
    for variable in ("ALEXPREP_CACHE", "ALEXPREP_CACHE_LIMIT"):
        monkeypatch.setenv(variable, "")
    arguments = {"features": ["run"], "similar": ["run", "photo.jpg"]}.get(name, [])
    words = "--cache-limit 40000000000 has no effect without --cache: name the folder with --cache FOLDER, or leave"
    status, _, error = command(name, *arguments, "--cache-limit", "40GB")
    assert status == 2 and words in error
    assert "no effect" not in command(name, *arguments, "--cache-limit", "40GB", "--cache", "kept")[2]
    monkeypatch.setenv("ALEXPREP_CACHE", "")  # which --cache has set for the processes that a command starts
    monkeypatch.setenv("ALEXPREP_CACHE_LIMIT", "40GB")
    assert "no effect" not in command(name, *arguments)[2]
    monkeypatch.setenv("ALEXPREP_CACHE", "kept")
    assert "no effect" not in command(name, *arguments, "--cache-limit", "1GB")[2]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (
            ["push", ".", "hf://datasets/me/set"],
            1,
            "dataset.json does not exist: make one with `alexprep shard SOURCE`, or name another folder\n",
        ),
        (["shard", "nowhere"], 1, "SOURCE nowhere does not exist"),
        (["shard"], 2, "Missing argument 'SOURCE'"),
        (["shard", ".", "--size", "-3"], 1, "--size -3 is not between 1 and 8,192"),
        (["shard", ".", "--filter", "box"], 2, "'box' is not one of"),
        (["shard", "images", "--out", "s3://bucket/data"], 1, "s3://bucket/data needs a package that is not installed"),
        (["shard", "images", "--out", "nfs://server/data"], 1, "nfs://server/data is no place that fsspec can open"),
        (["shard", "images", "--out", "github://a"], 1, "github://a is no place that fsspec can open"),
        (["shard", "images", "--out", "zip:///"], 1, "zip:/// is no place that fsspec can open"),
        (["train", "--data", "memory://"], 1, "memory:// names a whole store: name a folder in it"),
        (["train", "--runs", "memory:///"], 1, "memory:/// names a whole store: name a folder in it"),
        (["train", "--data", "http://me:secret@host/data"], 1, "the URL http://…@host has a password"),
        (["eval", "--runs", "s3://me:secret@bucket/runs"], 1, "the URL s3://…@bucket has a password"),
        (["shard", "images", "--out", __file__], 2, "is a file, not a folder"),
        (["pca-stats", __file__], 2, "is a file, not a folder"),
        (["pca-stats"], 1, "make one with `alexprep shard SOURCE`"),
        (["pca-stats", "nowhere"], 1, "nowhere/dataset.json does not exist"),
        (["verify", "here", "--data", "there"], 2, "DATA here and --data there are both given: give one"),
        (["pca-stats", ""], 2, "the name is empty: name a folder, . for this one"),
        (["verify", "nowhere", "--image-seconds", "inf"], 2, "inf is not in the range 0<x<=32000000.0"),
        (["train"], 1, "make one with `alexprep shard SOURCE`"),
        (["train", "--steps", "0"], 2, "0 is not in the range"),
        (["eval"], 1, "alexprep train"),
        (["fly"], 2, "No such command 'fly'"),
    ],
)
def test_errors_name_the_next_step(arguments: list[str], status: int, words: str, command: Command) -> None:
    found, told, error = command(*arguments)
    assert (found, told) == (status, "") and words in error and "Traceback" not in error and "secret" not in error


def test_letters_that_the_terminal_lacks_cost_no_result(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    program = "import sys; sys.argv[0] = 'alexprep'; from alexprep.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "pca-stats", str(tmp_path / "data"), "--workers", "1", "--json"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"] == 48
