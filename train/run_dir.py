"""The folders of runs: making one, finding one, what config.json remembers, and which checkpoint RUN or RUN@STEP means.

runs/NAME/config.json      what makes a folder a run: options, data, identity, versions
runs/NAME/log.jsonl        see `alexprep.train.logger`
runs/NAME/checkpoints/     see `alexprep.train.checkpoint`
runs/NAME/summary.json     written at the end
runs/NAME/.lock            held by the process that trains

A folder of runs may lie in a store, with the same files; how a training writes there is in `alexprep.train.run_writer`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alexprep.shards.any_dataset import is_dataset
from alexprep.shards.dataset_format import read_json
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import as_now, folder_at, is_local, json_bytes, modified, publish_bytes, sync_folder
from alexprep.train import checkpoint
from alexprep.train.checkpoint import publish, writing

CONFIG, LOG, SUMMARY, CHECKPOINTS = "config.json", "log.jsonl", "summary.json", "checkpoints"
LOCK = ".lock"
RUNS = Path("runs")  # the folder of runs where none is named
BEST = "best"  # in the place of a step
TRACE, TENSORBOARD = "trace", "tensorboard"  # folders that are there if asked for
FIELDS = {"options": dict, "data": str, "identity": dict}  # of config.json; it also has versions
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # what a folder's name may be when another is moved there
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def create_run(runs: Path, name: str | None, usual_name: str, config: Mapping[str, Any]) -> Path:
    """Makes the folder of a new run, and in it config.json, which is what makes it a run.

    Its name is by default `usual_name`, or the first free one of usual_name-2, usual_name-3, … An empty folder of that name is
    taken. Of several processes that want one name at once, one gets it; in a store the name is looked for, then written, and two that do
    so in the same instant meet when they begin to train.
    """
    check_not_commits(runs)
    numbered = (f"{usual_name}-{number}" for number in itertools.count(2))
    for candidate in itertools.chain([_checked(usual_name)], numbered) if name is None else [_checked(name)]:
        if _made(runs / candidate, json_bytes(config)):
            return runs / candidate
    raise AlexprepError(
        f"there is already a run {runs / str(name)}: continue it with --resume, or choose another --name"
    )


def runs_option(runs: Path) -> list[str]:
    """What commands are to be told for a folder of runs: nothing for `RUNS`.

    >>> runs_option(Path("runs")), runs_option(Path("/scratch/runs"))
    ([], ['--runs', '/scratch/runs'])
    """
    return [] if runs.resolve() == RUNS.resolve() else ["--runs", str(runs)]


def command(verb: str, run: Path, *options: str, step: int | None = None) -> str:
    """A command of the command line on a run, or on a checkpoint of it, in backticks, as messages have it; it can be pasted.

    >>> command("features", Path("runs/alexnet"), "--split", "val"), command("eval", Path("/my runs/alexnet"), step=7)
    ('`alexprep features alexnet --split val`', "`alexprep eval alexnet@7 --runs '/my runs'`")
    """
    run = _with_name(run)
    name = run.name if step is None else f"{run.name}@{step}"
    own = own_code(run) if not {"--model", "--recipe"} & set(options) else []
    return f"`{shlex.join(['alexprep', verb, name, *runs_option(run.parent), *own, *options])}`"


def own_code(run: Path) -> list[str]:
    """Options that name the recipe file and the network of the user's own that a run was trained with; none where that cannot be read."""
    from alexprep.train.user_code import is_reference

    try:
        began = read_config(run)["options"]
    except AlexprepError:
        return []
    named = ((name, began.get(name)) for name in ("recipe", "model"))
    return [word for name, value in named if value and is_reference(value) for word in (f"--{name}", value)]


def resuming(run: Path) -> list[str]:
    """Options of `alexprep train` that go on with a run."""
    run = _with_name(run)
    return ["--resume", *runs_option(run.parent), "--name", run.name, *own_code(run)]


def _with_name(run: Path) -> Path:
    """A run's folder by its name, also where it was given as "." or ".."."""
    return run if run.name not in ("", "..") else run.resolve()


def find_run(runs: Path, name: str | None) -> Path:
    """The folder of a run: the named one, or the one that was last active."""
    as_now(runs)
    if name is not None:
        run = runs / _checked(name)
        if not (run / CONFIG).exists():
            raise AlexprepError(f"there is no run {run}: there are {', '.join(_names(runs)) or 'none'}")
        return run
    if not _names(runs):
        begin = shlex.join(["alexprep", "train", *runs_option(runs)])
        raise AlexprepError(f"there is no run in {runs}: start one with `{begin}`")
    return max((runs / candidate for candidate in _names(runs)), key=_last_active)


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run: {"options", "data", "identity", "versions"}, and "history" where a resume changed what decides the result."""
    next_step = "mend that, or begin a new run"
    config = read_json(run / CONFIG, next_step)
    lacking = [name for name, kind in FIELDS.items() if not isinstance(config.get(name), kind)]
    if not lacking and not isinstance(config["options"].get("recipe"), str):
        lacking = ["recipe among its options"]
    if lacking:
        raise AlexprepError(f"{run / CONFIG} has no {' and no '.join(lacking)} as a run's has: {next_step}")
    return config


def still_there(run: Path, data: Path) -> Path:
    """Makes sure that the data set that a run was trained on is still in `data`, and returns that."""
    if not is_dataset(data):
        raise AlexprepError(f"{run} was trained on {data}, which holds no data set now: name the folder where it is")
    return data


def remember(
    run: Path, options: Mapping[str, Any], data: Path, change: Mapping[str, Any], recipe: Mapping[str, Any]
) -> None:
    """Notes in config.json what a run goes on with from now on. The caller holds the run's lock.

    A `change` of what decides the result, if it is not empty, is added to the run's history, and `recipe`, the fields of the recipe that
    it is about, to the run's identity.
    """
    config = read_config(run)
    changed = config | {"options": config["options"] | options, "data": str(data.resolve())}
    if change:
        identity = config["identity"]
        changed["identity"] = identity | {"recipe": identity.get("recipe", {}) | recipe}
        changed["history"] = [*config.get("history", []), change]
    if changed != config:
        publish(run / CONFIG, json_bytes(changed))


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps other processes from training the same run inside the block; the kernel lets go when the process ends."""
    with contextlib.ExitStack() as stack:
        with writing(run / LOCK, next_step="run the same command again"):
            file = stack.enter_context(open(run / LOCK, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlexprepError(
                    f"another process is training {run}: wait for it, or start a new run without --resume"
                ) from None
        yield


class Place(NamedTuple):
    """A checkpoint of a run."""

    run: Path
    step: int | None = None  # None: the newest valid one


def check_not_commits(place: Path) -> None:
    """Refuses a store where each file that a training writes would be a commit."""
    if not is_local(place) and place.protocol == "hf":  # type: ignore[attr-defined]
        raise AlexprepError(
            f"{place} is no place to train in, since every file would be a commit: name a folder or another store with --runs"
        )


def place_at(path: Path | str) -> Place:
    """The checkpoint that a run's folder, on a disk or in a store, names: FOLDER, FOLDER@STEP or FOLDER@best; see `place_named`."""
    folder = folder_at(str(path).rstrip("/"))
    return place_named(folder.parent, folder.name)


def place_named(folder: Path, text: str | None) -> Place:
    """The checkpoint that RUN, RUN@STEP or RUN@best names in a folder of runs; None for the run last active.

    Raises:
        AlexprepError: there is no such run, STEP is no number, or no checkpoint is known as the best.
    """
    if text is None or "@" not in text:
        return Place(find_run(folder, text))
    name, _, step = text.rpartition("@")
    if step == BEST:
        return Place(run := find_run(folder, name), best_step(run))
    if not re.fullmatch(r"\d{1,18}", step):
        raise AlexprepError(
            f"{text}: {step!r} is no step; write RUN@STEP, for example {name or 'alexnet'}@1000, or RUN@{BEST}"
        )
    return Place(find_run(folder, name), int(step))


def best_step(run: Path) -> int:
    """The step of the checkpoint with the lowest validation error of a run, as its newest checkpoint says.

    Those of older runs do not say; of these it is the best by the log of what is still there.

    Raises:
        AlexprepError: the run measured no validation error, or has no checkpoint.
    """
    marks = checkpoint.marks(run / CHECKPOINTS)
    for _, mark in sorted(marks.items(), reverse=True):
        with contextlib.suppress(checkpoint.Damaged):
            if best := checkpoint.facts_of(mark)["position"].get("best"):
                return int(best["step"])
            break
    measured = [record for record in log_records(run) if record["kind"] == "epoch" and record.get("val")]
    errors = [(one["val"]["top1_error"], one["val"]["loss"], one["step"]) for one in measured if one["step"] in marks]
    if not errors:
        raise AlexprepError(f"{run} has no checkpoint with a validation error, so none is the best: name its step")
    return int(min(errors)[2])


def log_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's log, but for a last line that a kill cut short."""
    records: list[dict[str, Any]] = []
    for line in (run / LOG).read_bytes().splitlines() if (run / LOG).exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            records += [record] if isinstance(record, dict) and {"kind", "step"} <= record.keys() else []
    return records


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

    Its folder of checkpoints may have been moved, or is not mounted. `damaged` is what `checkpoint.newest` says of damaged ones.
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


def _made(run: Path, config: bytes) -> bool:
    """Whether the folder is this process's: it is made beside its place, and moved there unless something is there by then."""
    if not is_local(run):
        with contextlib.suppress(FileNotFoundError):
            if any(run.iterdir()):
                return False
        publish(run / CONFIG, config)
        return True
    with writing(run, len(config), "run the same command again"):
        with contextlib.suppress(FileExistsError):
            run.parent.mkdir(parents=True)
        with tempfile.TemporaryDirectory(prefix=f".{run.name}.", dir=run.parent) as beside:
            made = Path(beside, run.name)
            made.mkdir()
            publish_bytes(made / CONFIG, config)
            try:
                made.rename(run)
            except OSError as error:
                if error.errno in TAKEN:
                    return False
                raise
    with writing(run):
        sync_folder(run.parent)
    return True


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise AlexprepError(f"{name!r} cannot name a run: use up to 100 letters, digits, dots, dashes and underscores")
    return name


def _names(runs: Path) -> list[str]:
    return sorted(config.parent.name for config in runs.glob(f"*/{CONFIG}"))


def _last_active(run: Path) -> int:
    times = []
    for name in (CONFIG, LOG):
        with contextlib.suppress(FileNotFoundError):
            times.append(modified(run / name))
    return max(times, default=0)


def _sign_of_a_checkpoint(run: Path) -> str | None:
    """What in a run's folder shows that it saved a checkpoint; None where nothing does.

    A checkpoint is saved every so many steps and after each epoch, after the records of that step: a later record means that it was.
    """
    if (run / SUMMARY).exists():
        return f"{SUMMARY} is written after one"
    records = log_records(run)
    saved = [record["step"] for record in records if record["kind"] == "epoch"]
    if every := read_config(run)["options"].get("checkpoint_steps"):  # older runs do not say it
        saved.append(every)
    last = max((record["step"] for record in records), default=0)
    return f"{LOG} goes on to step {last} after one of step {min(saved)}" if last > min(saved, default=last) else None
