"""Runs `build` with a fault at file-system call N, for every N; prints what came of each as JSON.

python fault_driver.py MODE SOURCE WORK SEED      MODE: kill, error or power-cut

A program of its own because a process that is forked should have no threads, and pytest's has.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alexprep.shards import storage
from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import Refused
from alexprep.shards.plan import ShardOptions
from alexprep.shards.worker_pool import InProcessEngine

KILLED = 77
Call = tuple[str, Any]  # a call's name and its arguments
Hook = Callable[[str, Any], Any]  # sees every call before it is made; returns None, or how many bytes a write may take
Files = dict[str, bytes]

hook: Hook | None = None


class Stub(Codec):
    """Keeps bytes as they are, so that a run takes milliseconds."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def convert(self, data: Any) -> Converted | Refused:
        return Converted(bytes(data), 1, 1, kept=True) if data else Refused("empty file")


def install() -> None:
    """Leads every call by which alexprep changes a file system through `hook`; fsync is not done, it only takes time."""

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            limit = hook and hook("write", (self.fileno(), bytes(data)))
            return super().write(bytes(data)[:limit])

    def opened(path: Path, mode: str) -> Any:
        if "x" not in mode or not hook:
            return builtins.open(path, mode)
        hook("open", (path,))
        raw = Raw(path, "x+")
        hook("opened", (raw.fileno(), path))  # no call: tells the descriptor
        return io.BufferedRandom(raw)

    def led(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if hook:
                hook(name, arguments)
            return real(*arguments, **options)

        return call

    storage.open = opened  # type: ignore[attr-defined]
    os.fsync = led("fsync", lambda descriptor: None)
    os.rename, os.link = led("rename", os.rename), led("link", os.link)
    Path.unlink, Path.mkdir = led("unlink", Path.unlink), led("mkdir", Path.mkdir)  # type: ignore[method-assign]


def attempt(source: Path, out: Path, with_hook: Hook | None = None) -> tuple[int, str]:
    """One run: 0, 1 (refused with words) or 2 (an OSError, which the command line words), and the words."""
    global hook
    hook = with_hook
    try:
        convert(source, out, ShardOptions(Target(size=8), shard_samples=2), InProcessEngine(), make_codec=Stub)
    except AlexprepError as error:
        return 1, str(error)
    except OSError as error:
        return 2, str(error)
    finally:
        hook = None
    return 0, ""


def finished(folder: Path) -> Files:
    """All files with final names."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not storage.is_temporary(path.name))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def wrong(folder: Path, reference: Files) -> list[str]:
    """The files with final names that are not the undisturbed run's."""
    return [name for name, content in finished(folder).items() if reference.get(name) != content]


def goes_on(source: Path, out: Path, reference: Files) -> bool:
    """Whether the same run again ends with the undisturbed run's files and no others. Clears the folder."""
    status, _ = attempt(source, out)
    equal = status == 0 and finished(out) == reference and not [path for path in out.rglob("*.tmp-*")]
    shutil.rmtree(out)
    return equal


def kill(source: Path, work: Path, reference: Files, seed: int) -> Iterator[dict[str, Any]]:
    """The process ends at call N without a chance to tidy up; every other time the run that goes on does too, early."""
    rng = random.Random(seed)
    out, number, reached = work / "out", 0, True
    while reached:
        number += 1
        reached = dies_at(number, source, out)
        bad = wrong(out, reference)
        twice = number % 2 and dies_at(rng.randint(1, 30), source, out)
        bad += wrong(out, reference)
        yield {
            "call": number,
            "died": int(reached) + int(twice),
            "wrong": bad,
            "equal": goes_on(source, out, reference),
        }


def dies_at(number: int, source: Path, out: Path) -> bool:
    """Whether a run got as far as call `number`, where it was ended."""
    count = 0

    def dying(name: str, arguments: Any) -> None:
        nonlocal count
        count += name != "opened"
        if count == number:
            os._exit(KILLED)

    child = os.fork()
    if not child:
        signal.alarm(30)
        try:
            os._exit(attempt(source, out, dying)[0])
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), f"exit status {status}"
    return status == KILLED


def error(source: Path, work: Path, reference: Files, seed: int) -> Iterator[dict[str, Any]]:
    """Call N fails, alone or with all that follow, with each error in turn; writes are also interrupted and cut short."""
    kinds = [(code, forever) for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT) for forever in (False, True)]
    kinds += [(errno.EINTR, False), (0, True)]
    for turn in range(2):
        number, call = 0, "?"
        while call:
            number += 1
            code, forever = kinds[(number + 3 * turn) % len(kinds)]
            call, status, words = fails_at(number, source, work / "out", code, forever)
            record = {"call": call, "error": errno.errorcode.get(code, "short write"), "forever": forever}
            record |= {"status": status, "words": words, "wrong": wrong(work / "out", reference)}
            yield record | {"equal": goes_on(source, work / "out", reference)}


def fails_at(number: int, source: Path, out: Path, code: int, forever: bool) -> tuple[str, int, str]:
    """The name of call `number` ("" where there is none that late), and how the run ended in which it failed."""
    count, struck = 0, ""

    def failing(name: str, arguments: Any) -> int | None:
        nonlocal count, struck
        count += name != "opened"
        if name == "opened" or count < number or (count > number and not forever):
            return None
        struck = struck or name
        if code in (0, errno.EINTR) and name != "write":
            return None
        if not code:
            return 1 + len(arguments[1]) // 2
        path = [] if name in ("write", "fsync") else [str(arguments[0])]  # as the system's calls do
        raise OSError(code, os.strerror(code), *path)

    status, words = attempt(source, out, failing)
    return struck, status, words


def power_cut(source: Path, work: Path, reference: Files, seed: int) -> Iterator[dict[str, Any]]:
    """What a disk may hold after a power cut behind call N; then the same with a disk that takes no notice of fsync."""
    rng = random.Random(seed)
    out, journal = work / "out", []

    def recording(name: str, arguments: Any) -> None:
        is_folder = name == "fsync" and Path(f"/proc/self/fd/{arguments[0]}").is_dir()
        journal.append((name, (Path(os.readlink(f"/proc/self/fd/{arguments[0]}")),) if is_folder else arguments))

    attempt(source, work / "whole", recording)
    for honest in (True, False):
        for cut in range(1, len(journal) + 1):
            remains(journal[:cut], work / "whole", out, rng, honest)
            bad = [path.name for path in out.glob("*/*-*.json") if not verifies(path)]
            equal = goes_on(source, out, reference) if honest else None
            yield {"call": cut, "honest": honest, "wrong": bad, "equal": equal}
            shutil.rmtree(out, ignore_errors=True)


def remains(journal: list[Call], root: Path, out: Path, rng: random.Random, honest: bool) -> None:
    """Writes to `out` what may be left of `root`: what was synced, and any part of the rest, in any order, torn."""
    contents: list[bytes] = []
    synced: dict[int, int] = {}  # file → bytes that are on the disk for certain
    descriptors: dict[int, int] = {}
    names: dict[Path, int] = {}
    changes: list[dict[Path, int | None]] = []  # names that come, with their file, or go; one folder each
    certain: set[int] = set()
    for name, arguments in journal:
        change: dict[Path, int | None] = {}
        match name:
            case "opened":
                descriptors[arguments[0]] = change[arguments[1]] = len(contents)
                contents.append(b"")
            case "write":
                contents[descriptors[arguments[0]]] += arguments[1]
            case "fsync" if honest and isinstance(arguments[0], Path):
                certain |= {n for n, made in enumerate(changes) if next(iter(made)).parent == arguments[0]}
            case "fsync" if honest:
                synced[descriptors[arguments[0]]] = len(contents[descriptors[arguments[0]]])
            case "rename":
                change |= {arguments[1]: names[arguments[0]], arguments[0]: None}
            case "link" if arguments[1] not in names:
                change[arguments[1]] = names[arguments[0]]
            case "unlink" if arguments[0] in names:
                change[arguments[0]] = None
        _apply(change, names)
        changes += [change] if change else []
    left: dict[Path, int] = {}
    for n, change in enumerate(changes):
        if n in certain or rng.random() < 0.5:
            _apply(change, left)
    out.mkdir()
    for path, file in left.items():
        whole, sure = contents[file], synced.get(file, 0)
        cut = rng.choice([sure, len(whole), rng.randint(sure, len(whole))])
        target = out / path.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(whole[:cut] + rng.choice([b"", bytes(len(whole) - cut)]))


def _apply(change: dict[Path, int | None], names: dict[Path, int]) -> None:
    for path, file in change.items():
        names.pop(path, None) if file is None else names.update({path: file})


def verifies(path: Path) -> bool:
    """Whether a shard is what its sidecar says."""
    try:
        sidecar = json.loads(path.read_bytes())
        tar = path.with_suffix(".tar")
        return not sidecar["samples"] or storage.file_sha256(tar) == sidecar["sha256"]
    except (ValueError, OSError):
        return False


def main() -> None:
    mode, source, work, seed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    install()
    assert attempt(source, work / "reference") == (0, "")
    print(json.dumps(list(MODES[mode](source, work, finished(work / "reference"), seed))))  # noqa: T201


MODES = {"kill": kill, "error": error, "power-cut": power_cut}

if __name__ == "__main__":
    main()
