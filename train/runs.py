"""Run folders: `runs/NAME/` with config.json, log.jsonl, checkpoints/ and, at the end, summary.json."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alexprep.shards.errors import AlexprepError
from alexprep.shards.layout import read_json

CONFIG, LOG, SUMMARY, CHECKPOINTS = "config.json", "log.jsonl", "summary.json", "checkpoints"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def create_run(runs: Path, name: str | None, recipe: str) -> Path:
    """Makes the folder of a new run.

    Args:
        runs: the folder of all runs; made if missing.
        name: of the run; by default the recipe's name, or the first free one of recipe-2, recipe-3, …
        recipe: the recipe's name.

    Raises:
        AlexprepError: the name is taken or is not a plain file name.
    """
    runs.mkdir(parents=True, exist_ok=True)
    if name is None:
        candidates: Iterator[str] = itertools.chain([recipe], (f"{recipe}-{number}" for number in itertools.count(2)))
    else:
        candidates = iter([_checked(name)])
    for candidate in candidates:
        with contextlib.suppress(FileExistsError):
            (runs / candidate).mkdir()
            return runs / candidate
    raise AlexprepError(
        f"there is already a run {runs / str(name)}: continue it with --resume, or choose another --name"
    )


def find_run(runs: Path, name: str | None) -> Path:
    """The folder of a run: the named one, or the one that was last active.

    Raises:
        AlexprepError: there is no such run.
    """
    if name is not None:
        run = runs / _checked(name)
        if not (run / CONFIG).exists():
            raise AlexprepError(f"there is no run {run}: there are {', '.join(_names(runs)) or 'none'}")
        return run
    if not _names(runs):
        raise AlexprepError(f"there is no run in {runs}: start one with `alexprep train`")
    return max((runs / candidate for candidate in _names(runs)), key=_last_active)


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run: {"options", "data", "identity", "versions"}.

    Raises:
        AlexprepError: it cannot be read.
    """
    next_step = f"{run} is no run of `alexprep train` that can be used; begin a new one"
    config = read_json(run / CONFIG, next_step)
    if not {"options", "data", "identity"} <= config.keys():
        raise AlexprepError(f"{run / CONFIG} lacks options, data or identity: {next_step}")
    return config


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other processes from training the same run inside the block; the kernel lets go when the process ends.

    Raises:
        AlexprepError: another process trains it.
    """
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlexprepError(
                f"another process is training {run}: wait for it, or start a new run without --resume"
            ) from None
        yield


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise AlexprepError(f"{name!r} cannot name a run: use up to 100 letters, digits, dots, dashes and underscores")
    return name


def _names(runs: Path) -> list[str]:
    return sorted(config.parent.name for config in runs.glob(f"*/{CONFIG}"))


def _last_active(run: Path) -> int:
    return max((run / name).stat().st_mtime_ns for name in (CONFIG, LOG) if (run / name).exists())
