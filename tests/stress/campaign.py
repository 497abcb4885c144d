"""What the campaigns share: their time and their counts, sets to shard, runs of all kinds, and the comparison with an undisturbed run.

No faults are made here: each campaign makes its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import Refused
from alexprep.shards.plan import ShardOptions
from alexprep.shards.storage import is_temporary
from alexprep.shards.worker_pool import InProcessEngine

OPTIONS = ShardOptions(Target(size=64), shard_samples=8)
SMALL = ("--size", "64", "--shard-samples", "8", "--workers", "1")  # the same, for the command
HURRY_SECONDS = 60  # of a campaign
DEADLINE_SECONDS = 300  # of any one run
Fingerprint = dict[str, str]
Item = TypeVar("Item")


class Campaign:
    """Faults of one kind, again and again, until there were enough or the time is up.

    Attributes:
        work: an empty folder of its own.
        rng: what all chance comes from.
        photos: a tree of real or drawn photos, in class folders.
        hurried: whether there is no time for large sets.
        counts: of what came about, by name.
        broken: promises that were not kept, in words.
    """

    def __init__(self, work: Path, seed: int, seconds: float, photos: Path) -> None:
        """Begins; `seconds` may be infinite."""
        self.work, self.rng, self.photos = work, random.Random(seed), photos
        self.counts: Counter[str] = Counter()
        self.broken: list[str] = []
        self.hurried = seconds < HURRY_SECONDS
        self._end = time.monotonic() + seconds

    def rounds(self, most: int) -> Iterator[int]:
        """Numbers from 0, `most` of them or as many as there is time for, at least one."""
        for number in range(most):
            if number and time.monotonic() > self._end:
                return
            yield number

    def some(self, items: Sequence[Item], most: int = sys.maxsize) -> Iterator[Item]:
        """The items in random order, `most` of them or as many as there is time for."""
        order = self.rng.sample(range(len(items)), len(items))
        for number in self.rounds(min(len(items), most)):
            yield items[order[number]]

    def promise(self, kept: bool, name: str, words: object = "") -> None:
        """Counts a promise, kept or broken."""
        self.counts[name] += kept
        if not kept:
            self.broken.append(f"{name}: {words}")
            print("BROKEN:", self.broken[-1], flush=True)

    def no_partial_files(self, folder: Path, reference: Fingerprint) -> None:
        """The promise that whatever bears a final name is the undisturbed run's."""
        bad = wrong(folder, reference)
        self.promise(not bad, "times that every file with a final name was whole", bad)


def draw_pictures(folder: Path, count: int, side: int = 64) -> Path:
    """Class folders with `count` pictures of about `side` pixels, a quarter of them for validation, 2 of them unreadable."""
    rng = np.random.default_rng(0)
    for n in range(count):
        place = folder / ("val" if n % 4 == 3 else "train") / f"class{n % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(rng.integers(0, 256, (60 + n % 9, 64, 3), dtype=np.uint8))
        pixels.resize((side, pixels.height * side // 64)).save(place / f"{n:03d}.jpg", quality=85)
        if n in (5, 21):
            (place / f"{n:03d}.jpg").write_bytes(b"no image")
    return folder


def with_metadata(photos: Path) -> Path:
    """Puts a KEY.json beside every second picture of a tree, which goes along with it."""
    pictures = sorted(path for path in photos.rglob("*") if path.is_file())
    for number, path in enumerate(pictures[::2]):
        document = {"caption": f"picture {number} " * (number % 20), "boxes": [[number, 1, 2.5, 3]]}
        path.with_suffix(".json").write_text(json.dumps(document))
    return photos


def repeated(photos: Path, folder: Path, times: int) -> Path:
    """A tree with every file of `photos` several times, as links."""
    for path in (path for path in photos.rglob("*") if path.is_file()):
        place = folder / path.relative_to(photos).parent
        place.mkdir(parents=True, exist_ok=True)
        for n in range(times):
            (place / f"{n}-{path.name}").symlink_to(path.resolve())
    return folder


def fingerprint(folder: Path) -> Fingerprint:
    """The sha256 of every file below a folder, temporary ones too."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def wrong(folder: Path, reference: Fingerprint) -> list[str]:
    """The files with final names that are not the undisturbed run's."""
    found = fingerprint(folder).items()
    return [name for name, digest in found if not is_temporary(Path(name).name) and reference.get(name) != digest]


# Commands in processes of their own.


def command(source: Path, out: Path, *words: str) -> list[str]:
    """`alexprep shard`."""
    return [sys.executable, "-m", "alexprep.cli", "shard", str(source), "--out", str(out), *words]


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    """A process in a group of its own, whose stderr can be read."""
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and the last line of its stderr; past the deadline it is killed."""
    try:
        words = process.communicate(timeout=DEADLINE_SECONDS)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -1, f"took more than {DEADLINE_SECONDS} s"
    return process.returncode, (words.strip().splitlines() or [""])[-1]


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process and all that it started in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE_SECONDS)


def until(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> bool:
    """Waits for a condition; False where it did not come about in time."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.001)
    return bool(met)


# Runs in forked children, which start faster than commands.


class Unchanged(Codec):
    """Keeps bytes as they are and opens no library, so that a run takes milliseconds."""

    def __init__(self, target: Target) -> None:
        """Takes what every codec takes."""
        self.target = target

    def convert(self, data: bytes | NDArray[np.uint8]) -> Converted | Refused:
        """The bytes; empty files are refused."""
        return Converted(bytes(data), 1, 1, (1, 1), kept=True) if len(data) else Refused("empty file")


def load_modules(source: Path, out: Path) -> None:
    """Loads what a run loads lazily, so that forked children need not; each opens a codec of its own."""
    convert(source, out, OPTIONS, InProcessEngine(), make_codec=Unchanged)
    shutil.rmtree(out)


def convert_here(source: Path, out: Path, options: ShardOptions = OPTIONS) -> None:
    """A run without worker processes, always in the same order (a run begins at a shard picked at random)."""
    secrets.randbelow = lambda exclusive_upper_bound: 0
    convert(source, out, options, InProcessEngine())


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does `work`.

    It ends with 0, with 1 (AlexprepError), 2 (OSError) or 3, never later than the deadline. Use `exit_status` to wait for it;
    its last words are in `said`.
    """
    child = os.fork()
    if child:
        return child
    signal.alarm(DEADLINE_SECONDS)
    status = 3
    try:
        work()
        status = 0
    except (AlexprepError, OSError) as error:
        status = 1 if isinstance(error, AlexprepError) else 2
        _say(str(error))
    except BaseException as error:  # noqa: BLE001
        _say(repr(error))
    finally:
        os._exit(status)


_words = mmap.mmap(-1, 4096)  # shared with children, since their files may fail


def _say(text: str) -> None:
    _words[:] = text.encode()[:4096].ljust(4096, b"\0")


def said() -> str:
    """The last words of the child that ended last, and forgets them."""
    text = _words[:].rstrip(b"\0").decode(errors="replace")
    _say("")
    return text


def exit_status(child: int) -> int:
    """Of a child, once it has ended; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
