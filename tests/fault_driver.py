"""Runs `build` in forked children with a fault at file-system call N, for every N; prints what came of it as JSON.

python fault_driver.py MODE SOURCE WORK SEED      MODE: kill, error or power-cut

A file of its own because a process that is forked must have no threads, and pytest's has.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import mmap
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alexprep.shards import files
from alexprep.shards.build import build
from alexprep.shards.codec import Codec, Converted, Target
from alexprep.shards.errors import AlexprepError
from alexprep.shards.opinion import Refused
from alexprep.shards.plan import ShardOptions

KILLED = 77
Call = tuple[str, Any]  # a call's name and its arguments
Hook = Callable[[str, Any], Any]  # (name of the call, its arguments) → None, or how many bytes a write may take


class Stub(Codec):
    """Keeps bytes as they are, so that a run takes milliseconds."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def convert(self, data: Any) -> Converted | Refused:
        return Converted(bytes(data), 1, 1, kept=True) if data else Refused("empty file")


class InProcess:
    """An engine without processes."""

    def run(self, task: Any, arguments: Sequence[Any], progress: Any) -> Iterator[Any]:
        condemned: Mapping[int, str] = {}
        yield from (task(argument, condemned) for argument in arguments)


def run(source: Path, out: Path) -> None:
    build(source, out, ShardOptions(Target(size=8), shard_samples=2), InProcess(), make_codec=Stub)


def install(hook: Hook) -> None:
    """Leads every call by which alexprep changes a file system through `hook`; fsync itself is left out, it only takes time."""

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            limit = hook("write", (self.fileno(), bytes(data)))
            return super().write(bytes(data)[:limit])

    def opened(path: Path, mode: str) -> Any:
        if "x" not in mode:
            return builtins.open(path, mode)
        hook("open", (path,))
        raw = Raw(path, "x+")
        hook("opened", (raw.fileno(), path))
        return io.BufferedRandom(raw)  # type: ignore[arg-type]

    def led(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            hook(name, arguments)
            return real(*arguments, **options)

        return call

    files.open = opened  # type: ignore[attr-defined]
    os.fsync = lambda descriptor: hook("fsync", (descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    os.rename, os.link = led("rename", os.rename), led("link", os.link)
    Path.unlink, Path.mkdir = led("unlink", Path.unlink), led("mkdir", Path.mkdir)  # type: ignore[method-assign]


def forked(work: Callable[[], None]) -> tuple[int, str]:
    """Exit status and last words of `work` in a child; its words come through shared memory, since files may fail."""
    words = mmap.mmap(-1, 4096)
    child = os.fork()
    if not child:
        signal.alarm(30)
        status = 0
        try:
            work()
        except (AlexprepError, OSError) as error:
            status = 1 if isinstance(error, AlexprepError) else 2
            words.write(str(error).encode()[:4096])
        except BaseException as error:  # noqa: BLE001
            status = 3
            words.write(repr(error).encode()[:4096])
        os._exit(status)
    _, wait_status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(wait_status), words[:].rstrip(b"\0").decode()


def contents(folder: Path) -> dict[str, bytes]:
    """All finished files: those with their final names."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not files.is_temporary(path.name))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def wrong(folder: Path, reference: dict[str, bytes]) -> list[str]:
    """The finished files that are not the undisturbed run's."""
    return [name for name, content in contents(folder).items() if reference.get(name) != content]


def after(source: Path, out: Path, reference: dict[str, bytes]) -> bool:
    """Whether the same command again ends with the undisturbed run's files and no others."""
    status, _ = forked(lambda: run(source, out))
    return status == 0 and contents(out) == reference and not [path for path in out.rglob("*.tmp-*")]


def recorded(source: Path, out: Path) -> list[Call]:
    """The calls of an undisturbed run. It takes place in this process, so it comes last."""
    calls: list[Call] = []
    install(lambda name, arguments: calls.append((name, arguments)))
    run(source, out)
    return calls


def kill(source: Path, work: Path, reference: dict[str, bytes], seed: int) -> Iterator[dict[str, Any]]:
    """The process ends at call N without a chance to tidy up; a second one, where it goes on, at a random call."""
    rng = random.Random(seed)
    out, first, reached = work / "out", 0, True
    while reached:
        first += 1
        status, _ = forked(lambda: _dying(source, out, first))
        reached = status == KILLED
        bad = wrong(out, reference)
        forked(lambda: _dying(source, out, rng.randint(1, 20)))
        bad += wrong(out, reference)
        yield {"call": first, "status": status, "wrong": bad, "equal": after(source, out, reference)}
        shutil.rmtree(out, ignore_errors=True)


def _dying(source: Path, out: Path, number: int) -> None:
    count = 0

    def hook(name: str, arguments: Any) -> None:
        nonlocal count
        count += name != "opened"
        if count == number:
            os._exit(KILLED)

    install(hook)
    run(source, out)


def error(source: Path, work: Path, reference: dict[str, bytes], seed: int) -> Iterator[dict[str, Any]]:
    """Call N fails, alone or with all that follow, by each error in turn; writes are also interrupted and cut short."""
    kinds = [(code, forever) for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT) for forever in (False, True)]
    kinds += [(errno.EINTR, False), (0, True)]
    for turn in range(len(kinds) // 2):
        number, reached = 0, True
        while reached:
            number += 1
            code, forever = kinds[(2 * turn + number % 2) % len(kinds)]
            out, hit = work / "out", mmap.mmap(-1, 64)
            status, words = forked(lambda: _failing(source, out, number, code, forever, hit))  # noqa: B023
            call = hit[:].rstrip(b"\0").decode()
            reached = bool(call)
            record = {"call": call, "error": errno.errorcode.get(code, "short write"), "forever": forever}
            record |= {"status": status, "words": words, "wrong": wrong(out, reference)}
            yield record | {"equal": after(source, out, reference)}
            shutil.rmtree(out, ignore_errors=True)


def _failing(source: Path, out: Path, number: int, code: int, forever: bool, hit: mmap.mmap) -> None:
    count = 0

    def hook(name: str, arguments: Any) -> int | None:
        nonlocal count
        count += name != "opened"
        if name == "opened" or count < number or (count > number and not forever):
            return None
        if count == number:
            hit.write(name.encode())
        if code in (0, errno.EINTR) and name != "write":
            return None
        if not code:
            return 1 + len(arguments[1]) // 2
        raise OSError(code, os.strerror(code))

    install(hook)
    run(source, out)


def power_cut(source: Path, work: Path, reference: dict[str, bytes], seed: int) -> Iterator[dict[str, Any]]:
    """What a disk may hold after a power cut behind call N; the same with a disk that takes no notice of fsync."""
    rng = random.Random(seed)
    out, journal = work / "out", recorded(source, work / "whole")
    for honest in (True, False):
        for cut in range(2, len(journal) + 1):
            remains(journal[:cut], work / "whole", out, rng, honest)
            bad = [path.name for path in out.glob("*/*-*.json") if not _verifies(path)]
            equal = after(source, out, reference) if honest else None
            yield {"call": cut, "honest": honest, "wrong": bad, "equal": equal}
            shutil.rmtree(out)


def remains(journal: list[Call], root: Path, out: Path, rng: random.Random, honest: bool) -> None:
    """Writes to `out` what may be left of `root`: all that was synced, and any part of the rest in any order."""
    content: list[bytes] = []
    synced: dict[int, int] = {}  # file → bytes that are certainly on disk
    descriptors: dict[int, int] = {}
    named: dict[Path, int] = {}
    changes: list[tuple[Path, dict[Path, int | None]]] = []  # by folder: names that come (with their file) and go
    done: set[int] = set()
    for name, arguments in journal:
        change: dict[Path, int | None] = {}
        if name == "opened":
            descriptors[arguments[0]] = len(content)
            change[arguments[1]] = len(content)
            content.append(b"")
        elif name == "write":
            content[descriptors[arguments[0]]] += arguments[1]
        elif name == "fsync" and honest:
            folder = Path(arguments[1])
            if folder == root or folder in {path.parent for path in named}:
                done |= {n for n, (place, _) in enumerate(changes) if place == folder}
            else:
                synced[descriptors[arguments[0]]] = len(content[descriptors[arguments[0]]])
        elif name in ("rename", "link") and not (name == "link" and arguments[1] in named):
            change[arguments[1]] = named[arguments[0]]
            if name == "rename":
                change[arguments[0]] = None
        elif name == "unlink" and arguments[0] in named:
            change[arguments[0]] = None
        for path, file in change.items():
            named.pop(path, None) if file is None else named.update({path: file})
        changes += [(next(iter(change)).parent, change)] if change else []
    left: dict[Path, int] = {}
    for n, (_, change) in enumerate(changes):
        if n in done or rng.random() < 0.5:
            for path, file in change.items():
                left.pop(path, None) if file is None else left.update({path: file})
    torn: dict[int, bytes] = {}
    for path, file in left.items():
        whole, sure = content[file], synced.get(file, 0)
        cut = rng.choice([sure, len(whole), rng.randint(sure, len(whole))])
        torn.setdefault(file, whole[:cut] + rng.choice([b"", bytes(len(whole) - cut)]))
        target = out / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(torn[file])
    out.mkdir(parents=True, exist_ok=True)


def _verifies(sidecar: Path) -> bool:
    """Whether a finished shard's tar is the one that its sidecar describes."""
    try:
        digest = json.loads(sidecar.read_bytes())["sha256"]
        return digest == files.file_sha256(sidecar.with_suffix(".tar"))
    except (ValueError, OSError):
        return False


def main() -> None:
    mode, source, work, seed = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    assert forked(lambda: run(source, work / "reference"))[0] == 0
    reference = contents(work / "reference")
    print(json.dumps(list(MODES[mode](source, work, reference, seed))))  # noqa: T201


MODES = {"kill": kill, "error": error, "power-cut": power_cut}

if __name__ == "__main__":
    main()
