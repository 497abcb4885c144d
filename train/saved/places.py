"""Which checkpoint RUN or RUN@STEP means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from alexprep.shards.errors import AlexprepError
from alexprep.train.saved import checkpoint, runs


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
        return Place(runs.find_run(folder, text))
    name, _, step = text.rpartition("@")
    if not re.fullmatch(r"\d{1,18}", step):
        raise AlexprepError(f"{text}: {step!r} is no step; write RUN@STEP, for example {name or 'alexnet'}@1000")
    return Place(runs.find_run(folder, name), int(step))


def saved_checkpoint(place: Place) -> tuple[checkpoint.Checkpoint, list[str]]:
    """Reads it; and a sentence for every damaged checkpoint that is newer than the one found.

    Raises:
        AlexprepError: there is none, or the one named is damaged.
    """
    run, step = place
    folder = run / runs.CHECKPOINTS
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
