"""Faults while shards are made: kills, failing calls, power cuts, other writers, and decoders that misbehave.

A seeded sample of what can be tried; `make stress` tries all of it, and with the system's own kills and errors (tests/stress).
"""

from __future__ import annotations

import collections
import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from alexprep.shards import manifest, shard_writer
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.storage import publish_first, published, remove_temporaries
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine, LocalEngine
from tests.stress import misbehaving
from tests.stress.misbehaving import MISDEEDS, Misbehaving

SEED = 20_261_121
PATIENCE = 1000  # s that a worker may take for an image: what hangs only seems to take that long
ROOT = Path(__file__).parents[1]


def _finished(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


Faults = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def faults(tmp_path: Path, whole: bool) -> Faults:
    """What becomes of runs with a kind of fault: stress/file_system_faults.py, five inputs, two of them empty, in three shards."""
    source, work = tmp_path / "source" / "class", tmp_path / "work"
    source.mkdir(parents=True)
    work.mkdir()
    for n, size in enumerate((5000, 10000, 0, 15000, 0)):
        (source / f"{n}.jpg").write_bytes(os.urandom(size))

    def run(kind: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "tests.stress.file_system_faults", kind, str(source.parent), str(work)]
        command += [str(SEED), "1" if whole else "0.2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        records: list[dict[str, Any]] = json.loads(done.stdout)
        return records

    return run


def test_a_kill_at_any_call_leaves_only_whole_files_and_the_rest_is_redone(faults: Faults) -> None:
    """So does one in the run that goes on, every other time."""
    records = faults("kill")
    assert sum(record["died"][0] for record in records) > 10 and sum(record["died"][-1] for record in records) > 10
    assert [record for record in records if record["wrong"] or not record["equal"]] == []


def test_any_failing_call_ends_the_run_with_words_or_is_survived(faults: Faults) -> None:
    records = faults("error")
    struck = collections.Counter((record["error"], record["forever"]) for record in records if record["call"])
    assert len(struck) == 8 and struck.total() > 30
    assert {record["call"] for record in records} >= {"open", "write", "fsync", "rename", "link", "mkdir"}
    for record in records:
        assert not record["wrong"] and record["equal"], record
        harmless = not record["call"] or record["error"] in ("EINTR", "short write")
        assert (record["status"] == 0) == harmless, record
        assert harmless or "/work/out" in record["words"], record  # which file it was


def test_after_a_power_cut_every_shard_that_counts_is_whole(faults: Faults) -> None:
    """At every call; where fsync does nothing some shard is not, so this can tell."""
    records = faults("power-cut")
    honest = [record for record in records if record["honest"]]
    assert len(honest) > 10
    assert [record for record in honest if record["wrong"] or not record["equal"]] == []
    assert any(record["wrong"] for record in records if not record["honest"])


def test_writers_at_the_same_time_share_the_work(photos: Path, data: Path, tmp_path: Path) -> None:
    """Those with the plan's options all succeed, with the bytes of one writer; others are refused."""
    reference = {name: content for name, content in _finished(data).items() if not name.startswith("stats")}
    for turn in range(2):
        out = tmp_path / str(turn)
        command = [sys.executable, "-m", "alexprep.cli", "shard", str(photos), "--out", str(out), "--size", "64"]
        sizes = ("7", "7", "6") if turn else ("7", "7")
        started = [
            subprocess.Popen([*command, "--shard-samples", size, "--workers", "1"], stderr=subprocess.PIPE, text=True)
            for size in sizes
        ]
        ended = [process.communicate(timeout=500)[1] for process in started]
        states = [process.returncode for process in started]
        if states[:2] == [0, 0]:
            assert _finished(out) == reference, ended
        else:  # the third was first
            assert turn and states[2] == 0 and len(list(out.glob("train/*.tar"))) == 8, ended
        for state, words in zip(states, ended, strict=True):
            assert state == 0 or (state == 1 and "was begun differently" in words and "Traceback" not in words), words
        assert len({size for size, state in zip(sizes, states, strict=True) if state == 0}) == 1, ended


@pytest.mark.parametrize("moment", ["before the tar", "before the index", "before the sidecar"])
def test_a_sidecar_never_describes_another_writer_s_tar(
    moment: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writers that decode differently meet at a shard: the second one stops, and what counts is whole."""
    out, options = tmp_path / "out", ShardOptions(Target(size=16), shard_samples=100, limit=5)

    def other(target: Target) -> Codec:
        return Codec(replace(target, quality=50))

    def meets(name: str) -> None:
        module = manifest if name == "publish_first" else shard_writer
        real = getattr(module, name)
        met: list[int] = []

        def first(*arguments: Any, **more: Any) -> Any:
            if not met:
                met.append(1)
                convert(photos, out, options, InProcessEngine())
            return real(*arguments, **more)

        monkeypatch.setattr(module, name, first)

    meets({"before the tar": "published", "before the index": "publish_bytes"}.get(moment, "publish_first"))
    words = "The first one is kept" if moment == "before the tar" else "Neither counts"
    with pytest.raises(AlexprepError, match=f"made twice with different bytes .*{words}"):
        convert(photos, out, options, InProcessEngine(), make_codec=other)
    report = convert(photos, out, options, InProcessEngine())
    assert report.made_inputs == (0 if moment == "before the tar" else 5)
    assert verify(out, InProcessEngine()).problems == []


def test_tidying_up_spares_the_files_of_living_writers(tmp_path: Path) -> None:
    dead = tmp_path / ".old.tmp-1-abcd"
    dead.write_bytes(b"left")
    with published(tmp_path / "new") as file:
        file.write(b"half")
        remove_temporaries(tmp_path)
        assert not dead.exists()
        file.write(b" and half")
    assert _finished(tmp_path) == {"new": b"half and half"}


def test_a_file_that_is_tidied_away_before_it_is_locked_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, [0]

    def slow(file: Any, how: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            remove_temporaries(tmp_path)
            assert not list(tmp_path.iterdir())
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with published(tmp_path / "new") as file:
        file.write(b"whole")
    assert calls == [3] and _finished(tmp_path) == {"new": b"whole"}


def test_tidying_up_works_where_only_writers_may_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, which answers EBADF to an exclusive lock on a file that is open for reading."""
    real = fcntl.flock

    def strict(file: Any, how: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", strict)
    (tmp_path / ".old.tmp-1-abcd").write_bytes(b"left")
    remove_temporaries(tmp_path)
    assert _finished(tmp_path) == {}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_rename_stands_in_for_a_link(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no links; an error of the disk is no such case. Who comes second finds the first's bytes."""

    def link(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            publish_first(tmp_path / "plan", b"one")
        assert _finished(tmp_path) == {}
        return
    assert publish_first(tmp_path / "plan", b"one") == b"one"
    answers = iter([False, True])  # it is not there yet, then another writer is quicker
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: next(answers) if path.name == "plan" else os.path.lexists(path))
        assert publish_first(tmp_path / "plan", b"two") == b"one"
    assert _finished(tmp_path) == {"plan": b"one"}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_fault_of_the_disk(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            publish_first(tmp_path / "plan", b"one")
    else:
        assert publish_first(tmp_path / "plan", b"one") == b"one"


def test_a_file_server_that_stalls_condemns_no_image() -> None:
    engine = LocalEngine(1, image_seconds=PATIENCE)
    assert list(engine.run(misbehaving.slow, [0])) == ["fine"]
    words = rf"/server/n01/a\.jpg could not be read within {PATIENCE} s: mend the disk or the network"
    with pytest.raises(AlexprepError, match=words):
        list(engine.run(misbehaving.stalled, [0]))


def test_an_unexpected_error_in_a_worker_is_told_in_the_first_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        list(LocalEngine(1).run(misbehaving.odd, [0]))
    lines = str(caught.value).splitlines()
    assert lines[0] == "in a worker: OddError: 1 is not 2" and "raise OddError(1, 2)" in str(caught.value)


def test_a_decoder_that_misbehaves_costs_just_its_image(photos: Path, tmp_path: Path) -> None:
    """Six kinds of misdeed among 68 images; all else as if those images were empty."""
    shutil.copytree(photos, tmp_path / "source")
    shutil.copytree(photos, tmp_path / "empty")
    images = sorted(path.relative_to(photos) for path in photos.rglob("*.JPEG"))
    chosen = dict(zip(images[::11], MISDEEDS, strict=False))
    for path, word in chosen.items():
        with open(tmp_path / "source" / path, "ab") as file:
            file.write(word.encode().rjust(8, b"."))
        (tmp_path / "empty" / path).write_bytes(b"")
    options = ShardOptions(Target(size=64), shard_samples=17)
    engine = LocalEngine(2, image_seconds=PATIENCE, image_bytes=200 * 2**20)
    report = convert(tmp_path / "source", tmp_path / "out", options, engine, make_codec=Misbehaving)
    convert(tmp_path / "empty", tmp_path / "without", options, 2)
    assert (report.written, report.rejected.total()) == (68 - 6, 6)
    rows = [row for table in (tmp_path / "out").glob("*/samples.parquet") for row in pq.read_table(table).to_pylist()]
    reasons = {row["source"]: row["reason"] for row in rows if row["status"] == "rejected"}
    assert reasons == {str(path): MISDEEDS[word].format(PATIENCE) for path, word in chosen.items()}
    assert read_dataset(tmp_path / "out")["digest"] == read_dataset(tmp_path / "without")["digest"]
    tars = [
        {name: content for name, content in _finished(tmp_path / name).items() if name.endswith((".tar", ".idx"))}
        for name in ("out", "without")
    ]
    assert tars[0] == tars[1] and len(tars[0]) == 2 * 5
