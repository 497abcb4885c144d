"""Which checkpoint RUN or RUN@STEP means, and whether there must be one."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.train import checkpoint, run_dir


class Place(NamedTuple):
    """A checkpoint of a run."""

    run: Path
    step: int | None = None  # None: the newest valid one


def place_named(folder: Path, text: str | None) -> Place:
    """The checkpoint that RUN or RUN@STEP names in a folder of runs; None for the run last active.

    Raises:
        AlexprepError: there is no such run, or STEP is no number.
    """
    if text is None or "@" not in text:
        return Place(run_dir.find_run(folder, text))
    name, _, step = text.rpartition("@")
    if not re.fullmatch(r"\d{1,18}", step):
        raise AlexprepError(f"{text}: {step!r} is no step; write RUN@STEP, for example {name or 'alexnet'}@1000")
    return Place(run_dir.find_run(folder, name), int(step))


def saved_checkpoint(place: Place) -> tuple[checkpoint.Checkpoint, list[str]]:
    """Reads it; and a sentence for every damaged checkpoint that is newer than the one found.

    Raises:
        AlexprepError: there is none, or the one named is damaged.
    """
    run, step = place
    folder = run / run_dir.CHECKPOINTS
    if step is None:
        saved, skipped = checkpoint.newest(folder)
        if saved is None:
            raise AlexprepError(f"{run} has no valid checkpoint: {'; '.join(skipped) or 'none was saved yet'}")
        return saved, skipped
    marks = checkpoint.marks(folder)
    if step not in marks:
        there = ", ".join(map(str, sorted(marks))) or "none"
        raise AlexprepError(
            f"{run} has no checkpoint of step {step}: there are {there} (`--keep` says how many are kept)"
        )
    try:
        return checkpoint.read(marks[step]), []
    except checkpoint.Damaged as error:
        raise AlexprepError(f"the checkpoint of step {step} of {run} is damaged: {error}") from None


def check_unsaved(run: Path, damaged: Sequence[str]) -> None:
    """Makes sure that a run without a valid checkpoint never had one: else to begin it anew would cost all that was trained.

    Args:
        run: its folder.
        damaged: what `checkpoint.newest` says of damaged ones.

    Raises:
        AlexprepError: it had one: the folder of checkpoints was moved, is not mounted, or all in it are damaged.
    """
    folder = run / run_dir.CHECKPOINTS
    told = "damaged ones are there" if damaged else _told_of(run)
    if told is None:
        return
    state = "; ".join(damaged) or ("it holds no checkpoint" if folder.is_dir() else "there is no such folder")
    raise AlexprepError(
        f"{run} had checkpoints ({told}), but in {folder} there is none to go on from ({state}): bring the folder back and run the "
        f"same command again, or begin a new run without --resume. To train {run.name} again from its beginning, delete "
        f"{run_dir.LOG}, {run_dir.SUMMARY} and {run_dir.CHECKPOINTS} in it"
    )


def _told_of(run: Path) -> str | None:
    """What says that a run saved a checkpoint; None where nothing does.

    A checkpoint is saved every so many steps and after each epoch, after the records of that step: a later record means that it was.
    """
    if (run / run_dir.SUMMARY).exists():
        return f"{run_dir.SUMMARY} is written after one"
    records = _records(run / run_dir.LOG)
    saved = [record["step"] for record in records if record.get("kind") == "epoch"]
    if every := run_dir.read_config(run)["options"].get("checkpoint_steps"):  # older runs do not say it
        saved.append(every)
    last = max((record["step"] for record in records), default=0)
    return (
        f"{run_dir.LOG} goes on to step {last} after one of step {min(saved)}" if last > min(saved, default=last) else None
    )


def _records(log: Path) -> list[dict[str, Any]]:
    """What a log holds, but for lines that a kill cut short."""
    try:
        lines = log.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AlexprepError(f"{log} cannot be read ({error.strerror or error}): {checkpoint.UNREAD}") from error
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and isinstance(record.get("step"), int)]
