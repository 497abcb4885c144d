"""Runs in a store: what a kill at any operation leaves, that they are the runs of a disk to the bit, and who may write them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import folder_at
from alexprep.shards.store_path import StorePath
from alexprep.train import recipes, run_dir, run_writer
from alexprep.train.checkpoint import newest
from alexprep.train.config import TrainConfig
from alexprep.train.initial_weights import find_weights
from alexprep.train.loading import load
from alexprep.train.report.page import find_places
from alexprep.train.report.training_section import newest_predictions, read_log
from alexprep.train.run_dir import CHECKPOINTS, create_run, find_run, place_at, place_named, read_config
from alexprep.train.run_writer import StoreWriter, writer_of
from alexprep.train.trainer import train
from tests import resuming
from tests.made_up import changed, write_data
from tests.support.dying_store import Killed, dying
from tests.support.failing_store import FailingStore, failing, hurry

__all__ = ["failing"]  # a fixture
CONFIG: dict[str, object] = {"options": {"recipe": "tiny"}, "data": "somewhere", "identity": {}}
RECIPE = ("adamw", "warm")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of runs in a store; what a killed process claimed there is given up soon."""
    monkeypatch.setattr(run_writer, "SILENT", 0.01)
    hurry(monkeypatch, 1)
    yield folder_at("memory://bucket/runs")
    emptied()


def emptied() -> None:
    memory = fsspec.filesystem("memory")
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weights": torch.full((5,), float(step))}


def save_all(run: Path, steps: range, done: list[int] | None = None) -> None:
    """Checkpoints of some steps; each that is saved for certain is noted."""
    with writer_of(run) as writer:
        for step in steps:
            with (writer.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"kind": "steps", "step": step}) + "\n")
            writer.save(step, tensors(step), {"of": step}, keep=2, best=1)
            if step % 2:
                writer.settle()
                (done if done is not None else []).append(step)
        writer.publish("summary.json", b"{}")


def contents(run: Path) -> dict[str, bytes]:
    memory = fsspec.filesystem("memory")
    found = {path.removeprefix(run.path): memory.cat_file(path) for path in memory.find(run.path)}  # type: ignore[attr-defined]
    return {name: data for name, data in found.items() if name != "/.lock"}


def test_a_kill_at_any_operation_leaves_the_newest_checkpoint_that_was_saved(store: Path) -> None:
    """And who goes on from it comes to the very files of a training that was not killed. The last operation is not done, or in part."""
    run = create_run(store, "mine", "tiny", CONFIG)
    with dying() as operations:
        save_all(run, range(1, 5))
    whole = contents(run)
    assert [int(name[18:26]) for name in whole if name.endswith(".safetensors")] == [1, 3, 4]
    seen = set()
    torn_too = (
        (last, torn) for last, name in enumerate(operations) for torn in (False, True)[: 1 + (name == "pipe_file")]
    )
    for last, torn in torn_too:
        emptied()
        create_run(store, "mine", "tiny", CONFIG)
        done: list[int] = []
        with dying(last, torn), pytest.raises(Killed):
            save_all(run, range(1, 5), done)
        found, damage = newest(run / CHECKPOINTS)
        step = 0 if found is None else found.step
        assert step >= max(done, default=0), f"killed at operation {last}"
        assert found is None or torch.equal(found.tensors["weights"], tensors(step)["weights"])
        assert not damage or torn  # what was written in part
        seen.add(step)
        save_all(run, range(step + 1, 5))
        after = contents(run)
        assert all(after[name] == data for name, data in whole.items() if name != "/log.jsonl"), (
            f"killed at operation {last}"
        )
        assert after.keys() == whole.keys() or step == 4  # nobody tidies up after the last one
    assert seen == {0, 1, 2, 3, 4}


@pytest.fixture
def specks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))
    resuming.register([RECIPE])
    return write_data(tmp_path / "data", resuming.Specks)


def config(data: Path, runs: Path, name: str = "run", **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"device": "cpu", "keep": 2, "checkpoint_steps": 1, "log_steps": 1}
    return TrainConfig(data, "-".join(RECIPE), runs=runs, name=name, **settings | changes)


def tensor_files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / CHECKPOINTS).glob("*.safetensors")}


def timeless(run: Path) -> list[dict[str, Any]]:
    """The log, but for what a clock measured."""
    clocks = ("images_per_second", "data_wait_ms", "step_ms", "seconds")
    return [{key: value for key, value in one.items() if key not in clocks} for one in run_dir.log_records(run)]


def test_a_run_in_a_store_is_that_of_a_disk_however_often_it_is_killed(
    whole: bool, seed: int, specks: Path, store: Path, tmp_path: Path
) -> None:
    """To the bit; and a copy of it on a disk is gone on with there."""
    disk = train(config(specks, tmp_path / "runs", epochs=3), resuming.Specks)
    with dying() as operations:
        straight = train(config(specks, store, epochs=3), resuming.Specks)
    assert straight["weights_sha256"] == disk["weights_sha256"] and straight["run"] == "memory://bucket/runs/run"
    right, there = tmp_path / "runs/run", store / "run"
    assert tensor_files(there) == tensor_files(right) and timeless(there) == timeless(right)
    assert {path.name for path in there.iterdir()} == {path.name for path in right.iterdir()} - {".lock"}
    chance = random.Random(seed)
    count = len(operations)
    for last in range(count) if whole else chance.sample(range(count // 4, count), 2):
        emptied()
        with contextlib.suppress(Killed), dying(last):
            train(config(specks, store, epochs=3), resuming.Specks)
        again = chance.randrange(count)
        begun = (there / "config.json").exists()
        with contextlib.suppress(Killed), dying(again):
            train(config(specks, store, epochs=3, resume=begun), resuming.Specks)
        begun = (there / "config.json").exists()
        assert (
            train(config(specks, store, resume=begun, epochs=3), resuming.Specks)["weights_sha256"]
            == disk["weights_sha256"]
        )
        assert tensor_files(there).items() >= tensor_files(right).items(), f"{last}, {again}"
        assert timeless(there) == timeless(right), f"{last}, {again}"
    emptied()
    train(config(specks, store, epochs=3, steps=3), resuming.Specks)
    fsspec.filesystem("memory").get(there.path, str(tmp_path / "copy/run"), recursive=True)  # type: ignore[attr-defined]
    copied = train(config(specks, tmp_path / "copy", epochs=3, resume=True), resuming.Specks)
    assert copied["weights_sha256"] == disk["weights_sha256"] and tensor_files(tmp_path / "copy/run") == tensor_files(
        right
    )


def test_damaged_objects_are_passed_over_with_a_sentence(
    specks: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(config(specks, store, epochs=2), resuming.Specks)
    memory, run = fsspec.filesystem("memory"), store / "run"
    last, before = sorted(path.path for path in (run / CHECKPOINTS).glob("*.safetensors"))[::-1]  # type: ignore[attr-defined]
    memory.pipe_file(last, memory.cat_file(last)[:-100])
    again = train(config(specks, store, epochs=2, resume=True), resuming.Specks)
    assert "skipped the checkpoint of step 4: " in capsys.readouterr().err and again["steps"] == 4
    assert again["weights_sha256"] == whole["weights_sha256"] and newest(run / CHECKPOINTS)[1] == []
    for path in (last, before):
        memory.pipe_file(path, b"")
    with pytest.raises(
        AlexprepError, match=r"had checkpoints \(damaged ones are there\), but in memory://bucket/runs/run"
    ):
        train(config(specks, store, epochs=2, resume=True), resuming.Specks)


def test_what_is_cut_on_the_way_is_not_damaged(store: Path, failing: FailingStore) -> None:
    run, cut = create_run(store, "mine", "tiny", CONFIG), [True, True]
    save_all(run, range(1, 3))
    failing.fault = lambda path, data: data[:-9] if path.endswith(".safetensors") and cut and cut.pop() else data
    saved, damage = newest(run / CHECKPOINTS)
    assert saved is not None and (saved.step, damage, cut) == (2, [], [])


def failing_uploads(monkeypatch: pytest.MonkeyPatch, fault: Callable[[str], None]) -> None:
    pipe_file = MemoryFileSystem.pipe_file

    def failing(system: MemoryFileSystem, path: str, data: bytes, **options: Any) -> None:
        fault(path)
        pipe_file(system, path, data, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", failing)


def test_a_store_that_stays_away_leaves_the_run_on_this_machine(
    specks: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(specks, tmp_path / "runs", epochs=3), resuming.Specks)
    tempfile_folder = tmp_path / "tmp"
    tempfile_folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tempfile_folder))
    hurry(monkeypatch, 0.05)

    def away(path: str) -> None:
        if "step-00000003" in path:
            raise ConnectionRefusedError("nobody there")

    with monkeypatch.context() as patch:
        failing_uploads(patch, away)
        with pytest.raises(AlexprepError, match="nobody there") as told:
            train(config(specks, store, epochs=3), resuming.Specks)
    (folder,) = tempfile_folder.iterdir()
    words = f"memory://bucket/runs/run cannot be written (ConnectionRefusedError: nobody there): the run up to step 4 is kept in {folder}/run. "
    assert str(told.value).startswith(f"{words}Go on there with --resume --runs {folder} --name run, or")
    rest = train(config(specks, folder, resume=True), resuming.Specks)
    assert rest["weights_sha256"] == whole["weights_sha256"]
    assert timeless(folder / "run") == timeless(tmp_path / "runs/run")
    rest = train(
        config(specks, store, resume=True), resuming.Specks
    )  # the store is back: it has all that was saved there
    assert rest["weights_sha256"] == whole["weights_sha256"]
    assert list(tempfile_folder.iterdir()) == [folder]  # those of trainings that ended well are gone


def test_training_goes_on_while_a_checkpoint_is_uploaded_and_ends_when_it_is_saved(
    specks: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is asked to stop: what a signal saves is in the store when the command ends."""
    uploading, pause = threading.Event(), threading.Event()
    steps: list[bool] = []

    def slow(path: str) -> None:
        if "step-00000002" in path:
            uploading.set()
            assert pause.wait(60)

    def stopped(loader: Any, images: torch.Tensor) -> torch.Tensor:
        if loader.split == "train":
            steps.append(uploading.wait(60) if len(steps) == 2 else uploading.is_set())
        if len(steps) == 4:
            pause.set()
            os.kill(os.getpid(), signal.SIGTERM)
        return images

    failing_uploads(monkeypatch, slow)
    summary = train(config(specks, store, epochs=3, checkpoint_steps=2), changed(stopped, resuming.Specks))
    assert steps == [False, False, True, True] and (summary["stopped_by"], summary["steps"]) == ("SIGTERM", 4)
    saved, _ = newest(store / "run" / CHECKPOINTS)
    assert saved is not None and saved.step == 4
    assert not [path for path in store.glob("run/.lock")]


def test_a_run_that_is_a_whole_bucket_has_a_folder_of_its_own_here(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beside that folder stays: the path of a bucket has no name, of which the folder's was made once."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "beside").touch()
    with StoreWriter(cast(Path, StorePath("memory://"))) as writer:
        assert writer.folder.parent.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["beside"]


def test_what_a_killed_process_left_on_this_machine_is_removed_by_the_next(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But nothing that may be anyone's yet: a living process's, a rescued run, another machine's or user's, what a link leads to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import sys, time
from alexprep.shards.store_path import StorePath
from alexprep.train.run_writer import StoreWriter
with StoreWriter(StorePath("memory://bucket/killed")) as writer:
    (writer.folder / "log.jsonl").write_text("a line")
    print(writer.folder.parent, flush=True)
    time.sleep(500)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            left = Path(process.stdout.readline().strip())
            run_writer.remove_left_behind()
            assert left.parent == tmp_path and (left / "killed/log.jsonl").exists()  # its process lives
        finally:
            process.kill()

    def copied(name: str) -> Path:
        shutil.copytree(left, tmp_path / f"alexprep-run-{name}")
        return tmp_path / f"alexprep-run-{name}"

    (copied("rescued") / "killed" / CHECKPOINTS).mkdir()
    (copied("of-another-machine") / ".lock").write_bytes(b"elsewhere\xff")
    (copied("without-a-lock") / ".lock").unlink()
    copied("second")
    shutil.copytree(left, tmp_path / "photos")
    (tmp_path / "alexprep-run-link").symlink_to("photos")
    (left / "link").symlink_to("../photos")
    everything = {path.name for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        run_writer.remove_left_behind()
    assert {path.name for path in tmp_path.iterdir()} == everything
    with writer_of(create_run(store, "next", "tiny", CONFIG)) as writer:
        run_writer.remove_left_behind()
        stays = {path.name for path in tmp_path.iterdir()}
        assert everything - stays == {left.name, "alexprep-run-second"} and stays - everything == {
            writer.folder.parent.name
        }
    assert (tmp_path / "photos/killed/log.jsonl").read_text() == "a line"


def test_a_run_is_trained_by_one_process(store: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(run_writer, "BEAT", 0.02)
    monkeypatch.setattr(run_writer, "SILENT", 5)
    run = create_run(store, "mine", "tiny", CONFIG)
    host = socket.gethostname()
    words = (
        rf"another process is training memory://bucket/runs/mine: process {os.getpid()} on {host}, since 20.* UTC: wait"
    )
    with writer_of(run) as writer:
        began = time.monotonic()
        with pytest.raises(AlexprepError, match=words):
            StoreWriter(run).__enter__()
        assert time.monotonic() - began < 4 and "watching for 5 s whether it still is" in caplog.text
        claim = json.loads((run / ".lock").read_bytes())
        (run / ".lock").write_bytes(json.dumps(claim | {"token": "another"}).encode())
        with pytest.raises(AlexprepError, match=words):
            writer.save(1, tensors(1), {}, 2)
            writer.settle()
    assert json.loads((run / ".lock").read_bytes())["token"] == "another"  # it is not ours to delete
    assert newest(run / CHECKPOINTS) == (None, [])
    for left in (
        b"",
        b"[3]",
        json.dumps(claim | {"pid": 2**22 + 1}).encode(),
    ):  # copied from a disk; of a process that has ended
        (run / ".lock").write_bytes(left)
        began = time.monotonic()
        with writer_of(run):
            assert time.monotonic() - began < 4
        assert not (run / ".lock").exists()


def test_what_a_claim_cannot_prevent_is_noticed(store: Path) -> None:
    """A process that was stopped for long finds that another one has gone on, and leaves its checkpoints alone."""
    run = create_run(store, "mine", "tiny", CONFIG)
    with writer_of(run) as stopped:
        stopped.save(1, tensors(1), {}, 2)
        stopped.settle()
        save_all(run, range(2, 5))  # by another one, which saw no sign of life
        with pytest.raises(AlexprepError, match=r"runs/mine/\.lock is gone: another process went on"):
            stopped.save(2, tensors(9), {}, 2)
            stopped.settle()
    saved, _ = newest(run / CHECKPOINTS)
    assert saved is not None and saved.step == 4


def test_who_lost_a_run_amid_a_checkpoint_spoils_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither checkpoints of another process, which are later, nor its log."""
    run = create_run(store, "mine", "tiny", CONFIG)
    after: list[dict[str, bytes]] = []

    def stopped(path: str) -> None:
        if "step-00000001-" in path and not after:
            save_all(run, range(2, 4))
            after.append(contents(run))

    failing_uploads(monkeypatch, stopped)
    with pytest.raises(AlexprepError, match="is gone: another process went on"), writer_of(run) as writer:
        writer.save(1, tensors(1), {}, 2)
        writer.settle()
    assert after[0].items() <= contents(run).items()
    with pytest.raises(ZeroDivisionError), writer_of(run) as writer:
        (writer.folder / "log.jsonl").write_text("of long ago")
        save_all(run, range(4, 6))
        after.append(contents(run))
        raise ZeroDivisionError
    assert after[1].items() <= contents(run).items()


def test_runs_in_a_store_are_named_and_found(store: Path) -> None:
    with pytest.raises(AlexprepError, match="there is no run in memory://bucket/runs: start one"):
        find_run(store, None)
    for name in (None, None, "mine"):
        run = create_run(store, name, "tiny", CONFIG)
        assert read_config(run) == CONFIG
        time.sleep(0.002)
    assert sorted(path.name for path in store.iterdir()) == ["mine", "tiny", "tiny-2"]
    assert find_run(store, None).name == "mine" and find_run(store, "tiny").name == "tiny"
    with pytest.raises(AlexprepError, match="there is already a run memory://bucket/runs/mine"):
        create_run(store, "mine", "tiny", CONFIG)
    with pytest.raises(
        AlexprepError, match="there is no run memory://bucket/runs/nowhere: there are mine, tiny, tiny-2"
    ):
        find_run(store, "nowhere")


def test_every_command_that_names_a_run_finds_it_in_a_store(
    data: Path, photos: Path, command: Callable[..., tuple[int, str, str]], store: Path
) -> None:
    """And says where it is by its URL; what they write goes beside the run."""
    runs = ("--runs", str(store))

    def done(*arguments: object) -> str:
        status, out, said = command(*map(str, (*arguments, *runs)))
        assert status == 0, said
        return out

    out = done("train", "--data", data, "--recipe", "tiny", "--steps", 2, "--checkpoint-steps", 1, "--device", "cpu")
    assert "Run memory://bucket/runs/tiny" in out and "alexprep report tiny --runs memory://bucket/runs" in out
    out = done("eval", "tiny@1", "--split", "val", "--device", "cpu", "--predictions")
    assert "Written to memory://bucket/runs/tiny/eval-val-centre-" in out
    photo = min(photos.glob("val/*/*"))
    assert str(photo) in done("predict", "tiny", photo, "--device", "cpu")
    assert "in memory://bucket/runs/tiny/export" in done("export", "tiny", "--formats", "safetensors")
    _, (run,), notes = find_places([f"{store}/tiny"], data, store)  # what a report would show
    assert not notes and read_log(run).steps[-1]["step"] == 2 and len(newest_predictions(data, run).table) == 20
    status, _, said = command("features", "tiny", *runs)
    assert status == 1 and "name a file there with --out" in said
    for name in ("tiny@1", f"{store}/tiny@1"):
        weights = find_weights(store, name)
        assert weights.name == name == find_weights(store, weights.name).name and "fc5.weight" in weights.tensors
    loaded = load(f"{store}/tiny@1")
    assert len(loaded.classes) == 4 and loaded.network(loaded.transform(str(photo))[None]).shape == (1, 4)
    assert place_at(f"{store}/tiny@2") == place_named(store, "tiny@2") == (store / "tiny", 2)
