"""Run folders: who gets a name when several want it, what a kill leaves behind, and whether there must be a checkpoint."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from alexprep.shards.errors import AlexprepError
from alexprep.train import run_dir
from alexprep.train.logger import Meter
from alexprep.train.run_dir import create_run, locked, read_config
from alexprep.train.trainer import train
from tests import training_ranks as ranks

CONFIG: dict[str, object] = {"options": {"recipe": "tiny"}, "data": "somewhere", "identity": {}}


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_name_is_free_again_after_a_kill_before_the_run_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has that name; what a real kill leaves beside it is no run."""

    def die(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, call, die)
        with pytest.raises(Killed):
            create_run(tmp_path, "mine", "tiny", CONFIG)
    assert not (tmp_path / "mine").exists()
    (tmp_path / ".mine.left" / "mine").mkdir(parents=True)
    (tmp_path / ".mine.left" / "mine" / "config.json").write_text("{}")
    with pytest.raises(AlexprepError, match="there is no run in"):
        run_dir.find_run(tmp_path, None)
    assert create_run(tmp_path, "mine", "tiny", CONFIG) == run_dir.find_run(tmp_path, None) == tmp_path / "mine"
    assert read_config(tmp_path / "mine") == CONFIG and os.listdir(tmp_path / "mine") == ["config.json"]
    with pytest.raises(AlexprepError, match="there is already a run"):
        create_run(tmp_path, "mine", "tiny", CONFIG)


def test_an_empty_folder_may_be_used_and_another_may_not(tmp_path: Path) -> None:
    for name, content in (("empty", None), ("notes", "a.txt"), ("old", "checkpoints")):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / content).write_text("kept")
    (tmp_path / "file").write_text("kept")
    assert create_run(tmp_path, "empty", "tiny", CONFIG) == tmp_path / "empty"
    for name in ("notes", "old", "file"):
        with pytest.raises(AlexprepError, match="choose another --name"):
            create_run(tmp_path, name, "tiny", CONFIG)
        assert len(list((tmp_path / name).glob("*"))) <= 1  # nothing was added, no lock either
    assert create_run(tmp_path, None, "notes", CONFIG) == tmp_path / "notes-2"


def test_of_several_that_want_a_name_one_gets_it(tmp_path: Path) -> None:
    def claim(rival: int) -> bool:
        try:
            create_run(tmp_path, "wanted", "tiny", {**CONFIG, "rival": rival})
        except AlexprepError as error:
            assert "choose another --name" in str(error)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(16)))
        made = list(pool.map(lambda _: create_run(tmp_path, None, "tiny", CONFIG).name, range(16)))
    assert won.count(True) == 1 and json.loads((tmp_path / "wanted/config.json").read_text())["rival"] == won.index(
        True
    )
    assert len(set(made)) == 16 and "tiny" in made
    assert len(list(tmp_path.iterdir())) == 17  # nothing is left of those that lost


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(
        AlexprepError, match=r"runs/tiny cannot be written \(Not a directory\): mend that and run the same"
    ):
        create_run(tmp_path / "runs", None, "tiny", CONFIG)


def test_a_config_that_was_cut_by_hand_is_refused(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mine", "tiny", CONFIG)
    (run / "config.json").write_text(json.dumps({"data": None, "options": {}, "identity": "x"}))
    words = "has no data and no identity as a run's has: mend that, or begin a new run"
    with pytest.raises(AlexprepError, match=words):
        read_config(run)


def test_files_that_cannot_be_opened_are_told(tmp_path: Path) -> None:
    run = create_run(tmp_path, "mine", "tiny", CONFIG)
    for name in ("config.json", ".lock", "log.jsonl"):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
    with pytest.raises(AlexprepError, match=r"config.json cannot be read \(.*Is a directory.*: mend that, or begin"):
        read_config(run)
    for context, words in (
        (locked(run), r".lock cannot be written \(Is a directory\): mend that and run the same"),
        (Meter(run / "log.jsonl", step=0, total_steps=1), r"log.jsonl cannot be written \(Is a directory\): mend that"),
    ):
        with pytest.raises(AlexprepError, match=words):
            context.__enter__()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return ranks.registered(tmp_path, monkeypatch)


def test_runs_are_named_and_found(data: Path) -> None:
    def run(**settings: Any) -> Path:
        return Path(train(ranks.config(data, **settings), ranks.MadeUp)["run"])

    folder = data.parent / "runs"
    assert [run(steps=1).name for _ in range(3)] == ["narrow", "narrow-2", "narrow-3"]
    assert run(resume=True, steps=2) == folder / "narrow-3"
    assert run(resume=True, steps=3, name="narrow") == folder / "narrow"
    assert run_dir.find_run(folder, None) == folder / "narrow"  # active last
    with pytest.raises(AlexprepError, match="already a run"):
        run(name="narrow")
    with pytest.raises(AlexprepError, match=r"there is no run .*nowhere: there are narrow, narrow-2, narrow-3"):
        run(name="nowhere", resume=True)
    with pytest.raises(AlexprepError, match="cannot name a run"):
        run(name="../out")
    with pytest.raises(AlexprepError, match="there is no run in"):
        run(runs=data.parent / "empty", resume=True)


@pytest.mark.parametrize(
    ("gone", "summary", "every"),
    [("moved", True, 2), ("moved", False, 1000), ("emptied", False, 2), ("damaged", True, 1000), ("damaged", False, 2)],
)
def test_a_run_whose_checkpoints_are_out_of_sight_is_not_begun_again(
    data: Path, gone: str, summary: bool, every: int
) -> None:
    """The summary tells of them, or a log that goes on after the first one."""
    settings = {"epochs": 2, "steps": 3 if every == 2 else 8, "checkpoint_steps": every}
    train(ranks.config(data, **settings), ranks.MadeUp)
    run = data.parent / "runs" / "narrow"
    folder = run / "checkpoints"
    if gone == "moved":
        folder.rename(data.parent / "elsewhere")
    for path in folder.glob("*" if gone == "emptied" else "*.safetensors"):
        path.unlink() if gone == "emptied" else path.write_bytes(b"x")
    if not summary:
        (run / "summary.json").unlink()
    log = (run / "log.jsonl").read_text()
    words = rf"narrow had checkpoints \(.*\), but in {folder} there is none .*bring the"
    with pytest.raises(AlexprepError, match=words):
        train(ranks.config(data, resume=True), ranks.MadeUp)
    assert (run / "log.jsonl").read_text() == log
    if gone == "moved":
        (data.parent / "elsewhere").rename(folder)
    else:
        for path in (run / "log.jsonl", run / "summary.json", *folder.iterdir()):
            path.unlink(missing_ok=True)
    assert train(ranks.config(data, resume=True, epochs=2), ranks.MadeUp)["steps"] == 12


def test_commands_name_the_users_own_code(tmp_path: Path) -> None:
    """Without it they would be refused; what the caller names is not named twice."""
    options = {"recipe": "tiny", "model": "/nets/mine.py:net"}
    run = create_run(tmp_path, "own", "own", CONFIG | {"options": options})
    found = run_dir.command("eval", run, "--predictions")
    assert found == f"`alexprep eval own --runs {tmp_path} --model /nets/mine.py:net --predictions`"
    assert run_dir.command("eval", run, "--model", "here.py:net").count("--model") == 1
    assert run_dir.resuming(run)[-2:] == ["--model", "/nets/mine.py:net"]
    plain = create_run(tmp_path, "plain", "plain", CONFIG)
    assert "--recipe" not in run_dir.command("eval", plain) and run_dir.resuming(plain)[-1] == "plain"
