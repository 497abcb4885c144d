"""Files mapped for reading: their bytes, the length of their lives, and files that are cut or gone."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alexprep.shards import mapped_file
from alexprep.shards.errors import AlexprepError
from alexprep.shards.mapped_file import MappedFile, expect
from alexprep.shards.sample_reader import Samples


def _mappings_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    """Of odd lengths; no file stays open, and the mapping ends with the last array of it."""
    for size in (0, 1, 4096, 100_001):
        path = tmp_path / f"{size}"
        path.write_bytes(np.random.default_rng(size).bytes(size))
        opened = len(os.listdir("/proc/self/fd"))
        mapped = MappedFile(str(path))
        assert len(os.listdir("/proc/self/fd")) == opened
        assert mapped.contents.tobytes() == path.read_bytes()
        assert not mapped.shrunk() and not (size and mapped.contents.flags.writeable)
        part = mapped.contents[size // 2 :]
        del mapped
        gc.collect()
        assert _mappings_of(path) == (1 if size else 0)
        assert part.tobytes() == path.read_bytes()[size // 2 :]
        del part
        assert _mappings_of(path) == 0


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_expected_may_lie_beyond_the_end(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one call for all, where the system has it, or one for each; more than a call takes."""
    if not at_once:
        monkeypatch.setattr(os, "pidfd_open", lambda _: os.open(tmp_path / "none", os.O_RDONLY))
    opened = len(os.listdir("/proc/self/fd"))
    (tmp_path / "file").write_bytes(bytes(10_000))
    (tmp_path / "empty").touch()
    files = [MappedFile(str(tmp_path / name)) for name in ("file", "file", "empty", "file")]
    expect(files * 700, np.array([0, 9_999, 0, 2**40] * 700), np.array([10_000, 2, 1, 1] * 700))
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_file_that_is_not_there_or_cannot_be_mapped(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError, match=r"No such file|No such device|Is a directory"):
            MappedFile(str(path))


@pytest.mark.parametrize("trouble", [lambda path: os.truncate(path, 2000), os.unlink], ids=["cut", "gone"])
def test_a_shard_that_was_read_before_it_was_cut(
    trouble: Callable[[Path], None], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that names it, and no crash; what lies in other shards, or before the cut, is still read."""
    monkeypatch.setattr(mapped_file, "_LOOK_SECONDS", 0.0)
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    samples, rows = Samples(copy, "train"), np.arange(48)
    before = [image.tobytes() for image in samples.read(rows)]
    assert before == [samples.encoded(row).tobytes() for row in range(48)]
    trouble(copy / "train" / "train-000005.tar")
    with pytest.raises(AlexprepError, match=r"train-000005\.tar (ends inside the sample|cannot be read)"):
        samples.read(rows)
    others = samples.index["shard"] != 5
    assert [image.tobytes() for image in samples.read(rows[others])] == [before[row] for row in rows[others]]


def test_a_shard_that_grows_or_is_replaced_does_no_harm(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    samples, shard = Samples(copy, "train"), copy / "train" / "train-000000.tar"
    before = samples.encoded(0).tobytes()
    with shard.open("ab") as file:
        file.write(bytes(5000))
    assert samples.encoded(0).tobytes() == before
    os.replace(shutil.copy(shard, tmp_path / "new"), shard)
    assert samples.encoded(0).tobytes() == before
