"""A training finds no room at each of its fsyncs, one after the other; `make test` does not collect this file.

python -m pytest tests/stress/full_disk_in_training.py
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import is_temporary
from alexprep.train.distributed.world import World
from alexprep.train.trainer import train
from tests import training_ranks as ranks


def test_a_full_disk_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An fsync finds no room: of config.json and its folder, of the folder of runs, of a checkpoint or of the summary."""
    data = ranks.registered(tmp_path, monkeypatch)
    alone, fsync = World.alone("cpu"), os.fsync
    count = 0

    def counted(descriptor: int) -> None:
        nonlocal count
        count += 1
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    whole = ranks.begun(alone, data, name="whole", steps=3, checkpoint_steps=1)["weights_sha256"]
    assert count > 15
    for n in range(1, count + 1):
        name = f"full{n}"
        run = data.parent / "runs" / name
        left, before = n, 0

        def full(descriptor: int) -> None:
            nonlocal left, before
            left -= 1
            if left == 0:
                before = len(list((run / "checkpoints").glob("*.json")))  # noqa: B023
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patch, pytest.raises(AlexprepError) as failure:
            patch.setattr(os, "fsync", full)
            ranks.begun(alone, data, name=name, steps=3, checkpoint_steps=1)
        words = str(failure.value)
        assert str(run) in words and "No space left on device" in words, words
        assert " are free, make room and " in words
        assert not [path for path in run.rglob("*") if is_temporary(path.name)]
        begins = "run the same command again" in words
        assert begins == (n <= 2) and begins != ("go on with --resume" in words)
        assert len(list((run / "checkpoints").glob("*.json"))) >= before
        if (run / "config.json").exists():
            rest = train(ranks.config(data, name=name, resume=True, steps=3), ranks.MadeUp)
        else:
            rest = ranks.begun(alone, data, name=name, steps=3)
        assert rest["weights_sha256"] == whole, words
