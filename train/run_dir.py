"""The folders of runs: making one, finding one, what config.json remembers, and which checkpoint RUN or RUN@STEP means.

runs/NAME/config.json      what makes a folder a run: options, data, identity, versions
runs/NAME/log.jsonl        see `alexprep.train.logger`
runs/NAME/checkpoints/     see `alexprep.train.checkpoint`
runs/NAME/summary.json     written at the end
runs/NAME/.lock            held by the process that trains
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alexprep.shards.dataset_format import DATASET, read_json
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import is_temporary, json_bytes, publish_bytes, remove_temporaries
from alexprep.train import checkpoint
from alexprep.train.checkpoint import publish, writing

CONFIG, LOG, SUMMARY, CHECKPOINTS = "config.json", "log.jsonl", "summary.json", "checkpoints"
LOCK = ".lock"
TRACE, TENSORBOARD = "trace", "tensorboard"  # folders that are there if asked for
FIELDS = {"options": dict, "data": str, "identity": dict}  # of config.json; it also has versions
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def create_run(runs: Path, name: str | None, recipe: str, config: Mapping[str, Any]) -> Path:
    """Makes the folder of a new run, and in it config.json, which is what makes it a run.

    A folder of that name without config.json, as a kill at this moment leaves it, is taken if it holds nothing else either. Of several
    processes that want one name at once, one gets it.

    Args:
        runs: the folder of all runs; made if missing.
        name: of the run; by default that of the recipe, or the first free one of recipe-2, recipe-3, …
        recipe: the recipe's name.
        config: the document, see `read_config`.

    Raises:
        AlexprepError: the name is taken or is not a plain file name; the disk is full or broken.
    """
    numbered = (f"{recipe}-{number}" for number in itertools.count(2))
    for candidate in itertools.chain([_checked(recipe)], numbered) if name is None else [_checked(name)]:
        if _claimed(runs / candidate, json_bytes(config)):
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
    next_step = "mend that, or begin a new run"
    config = read_json(run / CONFIG, next_step)
    lacking = [name for name, kind in FIELDS.items() if not isinstance(config.get(name), kind)]
    if not lacking and not isinstance(config["options"].get("recipe"), str):
        lacking = ["options.recipe"]
    if lacking:
        raise AlexprepError(f"{run / CONFIG} has no {' and no '.join(lacking)} as a run's has: {next_step}")
    return config


def still_there(run: Path, data: Path) -> Path:
    """Makes sure that the data set that a run was trained on is still in `data`, and returns that.

    Raises:
        AlexprepError: it is not where it was.
    """
    if not (data / DATASET).exists():
        raise AlexprepError(f"{run} was trained on {data}, which holds no data set now: say with --data where it is")
    return data


def remember(run: Path, options: Mapping[str, Any], data: Path) -> None:
    """Notes in config.json what a run goes on with from now on. The caller holds the run's lock.

    Raises:
        AlexprepError: the disk is full or broken.
    """
    config = read_config(run)
    changed = config | {"options": config["options"] | options, "data": str(data.resolve())}
    if changed != config:
        publish(run / CONFIG, json_bytes(changed))


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other processes from training the same run inside the block; the kernel lets go when the process ends.

    Raises:
        AlexprepError: another process trains it.
    """
    with _lock(run) as ours:
        if not ours:
            raise AlexprepError(f"another process is training {run}: wait for it, or start a new run without --resume")
        yield


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
        return Place(find_run(folder, text))
    name, _, step = text.rpartition("@")
    if not re.fullmatch(r"\d{1,18}", step):
        raise AlexprepError(f"{text}: {step!r} is no step; write RUN@STEP, for example {name or 'alexnet'}@1000")
    return Place(find_run(folder, name), int(step))


def saved_checkpoint(place: Place) -> tuple[checkpoint.Checkpoint, list[str]]:
    """Reads a checkpoint; and a sentence for every damaged one that is newer than the one found.

    Raises:
        AlexprepError: there is none, or the one named is damaged.
    """
    run, step = place
    folder = run / CHECKPOINTS
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
    folder = run / CHECKPOINTS
    sign = "damaged ones are there" if damaged else _sign_of_a_checkpoint(run)
    if sign is None:
        return
    state = "; ".join(damaged) or ("it holds no checkpoint" if folder.is_dir() else "there is no such folder")
    raise AlexprepError(
        f"{run} had checkpoints ({sign}), but in {folder} there is none to go on from ({state}): bring the folder back and run the "
        f"same command again, or begin a new run without --resume. To train {run.name} again from its beginning, delete "
        f"{LOG}, {SUMMARY} and {CHECKPOINTS} in it"
    )


@contextlib.contextmanager
def _lock(run: Path) -> Iterator[bool]:
    """Holds the run's lock inside the block, unless another process does; tells which."""
    with contextlib.ExitStack() as stack:
        with writing(run / LOCK, next_step="run the same command again"):
            file = stack.enter_context(open(run / LOCK, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = True
            except BlockingIOError:
                ours = False
        yield ours


def _claimed(run: Path, config: bytes) -> bool:
    """Makes a folder a run, unless it is one already, holds something else, or another process is at it."""
    file = run / CONFIG
    with writing(file, len(config), "run the same command again"):
        with contextlib.suppress(FileExistsError):  # what a folder of that name holds is looked at below
            run.mkdir(parents=True)
        if not _vacant(run):
            return False
        with _lock(run) as ours:
            if not ours or not _vacant(run):
                return False
            publish_bytes(file, config)
            remove_temporaries(run)
    return True


def _vacant(run: Path) -> bool:
    """Whether a folder holds nothing but what a process leaves that is killed before it has published config.json."""
    return run.is_dir() and all(path.name == LOCK or is_temporary(path.name) for path in run.iterdir())


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise AlexprepError(f"{name!r} cannot name a run: use up to 100 letters, digits, dots, dashes and underscores")
    return name


def _names(runs: Path) -> list[str]:
    return sorted(config.parent.name for config in runs.glob(f"*/{CONFIG}"))


def _last_active(run: Path) -> int:
    return max((run / name).stat().st_mtime_ns for name in (CONFIG, LOG) if (run / name).exists())


def _sign_of_a_checkpoint(run: Path) -> str | None:
    """What in a run's folder shows that it saved a checkpoint; None where nothing does.

    A checkpoint is saved every so many steps and after each epoch, after the records of that step: a later record means that it was.
    """
    if (run / SUMMARY).exists():
        return f"{SUMMARY} is written after one"
    records = _records(run / LOG)
    saved = [record["step"] for record in records if record.get("kind") == "epoch"]
    if every := read_config(run)["options"].get("checkpoint_steps"):  # older runs do not say it
        saved.append(every)
    last = max((record["step"] for record in records), default=0)
    return f"{LOG} goes on to step {last} after one of step {min(saved)}" if last > min(saved, default=last) else None


def _records(log: Path) -> list[dict[str, Any]]:
    """The records of a log, without lines that a kill cut short."""
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
