"""Runs a contestant as a command of its own, in an environment of its own."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CONTESTANTS = Path(__file__).parent / "contestants"


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


class Run(NamedTuple):
    """What a run took: seconds, and processor seconds of all its processes, from start to end."""

    seconds: float
    cpu: float


def run(python: str, script: str, source: Path, target: Path, processes: int, variant: str) -> Run:
    """Runs contestants/SCRIPT.py on the tree at `source`; what it writes is below `target`.

    Raises:
        Missing: it failed.
    """
    command = [python, str(CONTESTANTS / f"{script}.py"), str(source), str(target), str(processes), variant]
    told = {"NO_ALBUMENTATIONS_UPDATE": "1", "VIPS_CONCURRENCY": "1", "OMP_NUM_THREADS": "1"}
    start, used = time.perf_counter(), _used()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | told, check=False)
    taken = Run(time.perf_counter() - start, _used() - used)
    if done.returncode:
        raise Missing(f"failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return taken


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
