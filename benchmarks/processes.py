"""Runs a contestant as a command of its own, in an environment of its own, and watches its memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTESTANTS = Path(__file__).parent / "contestants"
_POLL_SECONDS = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Missing(Exception):
    """A contestant that cannot take part, and why."""


@dataclass(frozen=True)
class Environment:
    """What a contestant needs to run.

    Attributes:
        packages: for pip, in an environment below build/; none for the environment of alexprep itself.
        bare: further ones, without what they ask for, built with what is there.
        system: libraries that pkg-config must know.
        python: the newest Python that it runs on.
    """

    packages: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    python: tuple[int, int] = (9, 9)


def interpreter(name: str, needs: Environment, minutes: float = 10) -> str:
    """A Python with what contestant `name` needs, made below build/ if it is not there.

    Raises:
        Missing: it cannot be made, or not in this time.
    """
    if not needs.packages:
        return sys.executable
    if sys.version_info[:2] > needs.python:
        raise Missing(f"needs Python {needs.python[0]}.{needs.python[1]} or older")
    for library in needs.system:
        if (
            not shutil.which("pkg-config")
            or subprocess.run(["pkg-config", "--exists", library], check=False).returncode
        ):
            raise Missing(f"needs pkg-config and the library {library}")
    folder = ROOT / "build" / "benchmarks" / name
    python = str(folder / "bin" / "python")
    if not (folder / "complete").exists():
        steps = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
        steps.append([python, "-m", "pip", "install", "--quiet", *needs.packages])
        if needs.bare:
            steps.append([python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", *needs.bare])
        end = time.monotonic() + 60 * minutes
        try:
            for step in steps:
                subprocess.run(step, check=True, timeout=max(1.0, end - time.monotonic()), capture_output=True)
        except subprocess.CalledProcessError as error:
            raise Missing(error.stderr.decode(errors="replace").strip().splitlines()[-1]) from error
        except subprocess.TimeoutExpired as error:
            raise Missing(f"could not be installed in {minutes:g} minutes") from error
        (folder / "complete").touch()
    return python


@dataclass(frozen=True)
class Run:
    """What one run took.

    Attributes:
        images: how many came out.
        whole: images/s from the command's start to its end.
        steady: images/s while its workers worked.
        cpu: images a second of processor time, of all its processes from start to end.
        early_mb: the largest process' resident memory, MB: the median over the second tenth of the run,
        late_mb: that over the last tenth,
        peak_mb: and its highest value.
    """

    images: int
    whole: float
    steady: float
    cpu: float
    early_mb: float
    late_mb: float
    peak_mb: float


def run(python: str, script: str, source: Path, target: Path, processes: int) -> Run:
    """Runs contestants/SCRIPT.py on the tree at `source`; what it wrote to `target` is removed.

    Raises:
        Missing: it failed.
    """
    start, used = time.perf_counter(), _used()
    command = [python, str(CONTESTANTS / f"{script}.py"), str(source), str(target), str(processes)]
    with open(f"{target}.log", "w+") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
        )
        memory: list[int] = []
        while child.poll() is None:
            memory.append(max((_resident(pid) for pid in tree(child.pid)), default=0))
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - start
        log.seek(0)
        lines = log.read().strip().splitlines() or [""]
    shutil.rmtree(target, ignore_errors=True)
    if child.returncode:
        raise Missing(f"failed: {lines[-1]}")
    said = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    tenth = max(1, len(memory) // 10)
    early, late = (statistics.median(part) / 1e6 for part in (memory[tenth : 2 * tenth] or memory, memory[-tenth:]))
    images = said["images"]
    return Run(images, images / seconds, said["steady"], images / (_used() - used), early, late, max(memory) / 1e6)


def _used() -> float:
    """Processor seconds of the children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tree(root: int) -> list[int]:
    """A process and all below it."""
    found = [root]
    for pid in found:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _resident(pid: int) -> int:
    """Resident memory, bytes; 0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
