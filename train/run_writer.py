"""Writes a run that is being trained, and keeps other processes from training it: on a disk, or in a store from a thread beside the training.

A run in a store has the files of one on a disk, so a copy of it is one. Checkpoints and summary.json go there whole. config.json, and what
grows, log.jsonl and TensorBoard's events, are kept in a folder of this machine, and uploaded as they stand before each checkpoint: so the log
in the store tells of every step that a checkpoint there has.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shlex
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import is_local
from alexprep.train import checkpoint
from alexprep.train.checkpoint import publish, writing
from alexprep.train.run_dir import CHECKPOINTS, CONFIG, LOCK, LOG, check_not_commits, locked, resuming

BEAT = 10.0  # seconds after which a claim on a run in a store is renewed
SILENT = 30.0  # seconds without that, after which it counts as left behind
WORK = "alexprep-run-"  # begins the names of folders on this machine

_log = logging.getLogger("alexprep")


class RunWriter:
    """Writes a run on a disk. Use it as a context manager: inside, no other process trains the run.

    Attributes:
        run: the run's folder.
        folder: where the training writes its files that grow, and config.json: the same, or one on this machine.
    """

    def __init__(self, run: Path) -> None:
        """Nothing is read or written yet."""
        self.run = self.folder = run
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RunWriter:
        """Takes the run for this process; AlexprepError where another one trains it."""
        self._stack.enter_context(locked(self.run))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets go of the run, when all of it is where it belongs."""
        self._stack.close()

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        facts: dict[str, Any],
        keep: int,
        best: int | None = None,
    ) -> None:
        """Saves a checkpoint, see `alexprep.train.checkpoint.save`."""
        checkpoint.save(self.run / CHECKPOINTS, step, tensors, facts, keep, best)

    def settle(self) -> None:
        """Returns when what was saved is where it belongs."""

    def publish(self, name: str, data: bytes) -> None:
        """Writes a file of the run whole, after all that was saved."""
        publish(self.run / name, data)


def writer_of(run: Path) -> RunWriter:
    """What writes a run, on a disk or in a store."""
    return RunWriter(run) if is_local(run) else StoreWriter(run)


class _Saved(NamedTuple):
    """A checkpoint on its way to a store: what `save_packed` takes, and the other files as they were then."""

    step: int
    data: bytes
    facts: dict[str, Any]
    keep: int
    best: int | None
    files: dict[str, bytes]


class StoreWriter(RunWriter):
    """Writes a run in a store: one checkpoint is under way while the training goes on, and a second one waits for it.

    Where the store cannot be written for longer than the patience lasts, the run is left whole in a folder of this machine, which the error
    names.
    """

    def __init__(self, run: Path) -> None:
        """Nothing is read or written yet."""
        super().__init__(run)
        self._claim = _Claim(run)
        self._uploading: threading.Thread | None = None
        self._failure: tuple[BaseException, _Saved] | None = None
        self._uploaded: dict[str, bytes] = {}  # sha256 of the files that are in the store, by name
        self._over = self._kept = False  # whether nothing more is to be uploaded, and the folder on this machine stays

    def __enter__(self) -> StoreWriter:
        """Claims the run, and fetches what of it is gone on with."""
        check_not_commits(self.run)
        with contextlib.ExitStack() as stack:
            self._claim.take()
            stack.callback(self._claim.withdraw)
            with writing(Path(tempfile.gettempdir()), next_step="run the same command again"):
                remove_left_behind()
                self._work = Path(tempfile.mkdtemp(prefix=WORK))
                stack.callback(self._clear)
                stack.enter_context(_owned(self._work))
                self.folder = self._work / (self.run.name or "run")  # a bucket itself has no name
                self.folder.mkdir()
                for name in (CONFIG, LOG):
                    with contextlib.suppress(FileNotFoundError):
                        (self.folder / name).write_bytes(_fetched(self.run / name))
            self._uploaded = {name: hashlib.sha256(data).digest() for name, data in self._files().items()}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is under way, and uploads the rest of the log; unless the training is left at once (a second Ctrl-C)."""
        try:
            if not self._over and (kind is None or issubclass(kind, Exception)):
                self.settle()
                self._upload_files(self._files())
        except AlexprepError as late:
            if kind is None:
                raise
            _log.warning("%s", late)  # beside the reason for which the training ended
        finally:
            self._stack.close()

    def save(
        self,
        step: int,
        tensors: dict[str, torch.Tensor],
        facts: dict[str, Any],
        keep: int,
        best: int | None = None,
    ) -> None:
        """Begins to save a checkpoint of what is now, when the one before is saved."""
        saved = _Saved(step, checkpoint.packed(tensors), copy.deepcopy(facts), keep, best, self._files())
        self.settle(saved)
        self._uploading = threading.Thread(target=self._upload, args=(saved,), name="alexprep-upload", daemon=True)
        self._uploading.start()

    def settle(self, newest: _Saved | None = None) -> None:
        """Returns when what was saved is in the store; AlexprepError where it could not be, with where the `newest` state is kept."""
        if self._uploading is not None:
            self._uploading.join()
            self._uploading = None
        if self._failure is not None:
            (error, saved), self._failure, self._over = self._failure, None, True
            raise self._rescued(error, newest or saved) if isinstance(error, AlexprepError) else error

    def publish(self, name: str, data: bytes) -> None:
        """Writes a file of the run whole, after all that was saved and the log."""
        self.settle()
        try:
            self._upload_files(self._files())
            publish(self.run / name, data)
        except AlexprepError:
            self._over = True
            raise

    def _upload(self, saved: _Saved) -> None:
        """Brings a checkpoint to the store, in a thread of its own."""
        try:
            self._claim.check()
            self._upload_files(saved.files)
            checkpoint.save_packed(self.run / CHECKPOINTS, *saved[:-1], check=self._claim.check)
        except BaseException as error:  # noqa: BLE001  (raised in the thread that trains)
            self._failure = error, saved

    def _files(self) -> dict[str, bytes]:
        """The files that grow, and config.json, as they stand."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}

    def _upload_files(self, files: Mapping[str, bytes]) -> None:
        """Brings those to the store that are not there yet; AlexprepError where another process has written the run meanwhile."""
        digests = {name: hashlib.sha256(data).digest() for name, data in files.items()}
        if new := [name for name, digest in digests.items() if self._uploaded.get(name) != digest]:
            self._claim.check()
        for name in new:
            publish(self.run / name, files[name])
            self._uploaded[name] = digests[name]

    def _rescued(self, error: AlexprepError, saved: _Saved) -> AlexprepError:
        """The reason, with where the run is kept on this machine."""
        if isinstance(error, _Taken):
            return error
        reason = getattr(error.__cause__, "strerror", None) or error
        try:
            checkpoint.save_packed(self.folder / CHECKPOINTS, *saved[:-1])
        except AlexprepError as second:
            return AlexprepError(f"{error}. Nor can it be kept here: {second}")
        self._kept = True
        options = shlex.join(resuming(self.folder))
        return AlexprepError(
            f"{self.run} cannot be written ({reason}): the run up to step {saved.step} is kept in {self.folder}. Go on there with {options}, or copy "
            "it to the store and go on with that"
        )

    def _clear(self) -> None:
        if not self._kept:
            shutil.rmtree(self._work, ignore_errors=True)


@contextlib.contextmanager
def _owned(work: Path) -> Iterator[None]:
    """Inside the block, others see by a lock that the folder's process lives: the kernel ends it with the process.

    The lock comes under its name when it is held, lest the folder be taken for one that was left behind.
    """
    made = work / f"{LOCK}.new"
    with open(made, "xb") as file:
        file.write(socket.gethostname().encode())
        file.flush()
        with contextlib.suppress(OSError):  # where there are no locks, none has that name, and the folder stays
            fcntl.flock(file, fcntl.LOCK_EX)
            made.rename(work / LOCK)
        yield


def remove_left_behind() -> None:
    """Removes this user's folders of runs in stores whose processes were killed on this machine; never one with a checkpoint, which is a rescued run."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if entry.name.startswith(WORK) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_left(Path(entry.path))


def _remove_if_left(work: Path) -> None:
    """Removes such a folder if nobody holds its lock, and no checkpoint is in it. One without a lock is not known to be left."""
    if os.lstat(work).st_uid != os.geteuid():
        return
    with open(os.open(work / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb+") as file:
        # On a file system that several machines share a lock may be known to one of them only.
        if file.read() != socket.gethostname().encode():
            return
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = [name for _, folders, files in os.walk(work, onerror=_raise) for name in (*folders, *files)]
        if CHECKPOINTS not in found:
            shutil.rmtree(work)


def _raise(error: OSError) -> None:
    raise error


class _Taken(AlexprepError):
    """Another process has the run, or had it meanwhile."""


class _Claim:
    """A file in a store that says who trains a run. It is renewed, and no lock: stores have none.

    A claim that is not renewed counts as left behind by a process that was killed. Who does not find its own when it is about to save ends.
    """

    def __init__(self, run: Path) -> None:
        """Nothing is claimed yet."""
        self._run, self._path = run, run / LOCK
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._mine: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        self._mine |= {"machine": _machine(), "token": secrets.token_hex(8), "beat": 0}
        self._over = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="alexprep-claim", daemon=True)

    def take(self) -> None:
        """Claims the run; AlexprepError where another process trains it."""
        found = _claim_in(_fetched(self._path, b""))
        if found is not None and not _has_ended(found):
            self._watch(found)
        publish(self._path, json.dumps(self._mine).encode())
        self.check()
        self._renewing.start()

    def check(self) -> None:
        """Raises AlexprepError where the claim does not hold any more."""
        found = _claim_in(_fetched(self._path, b""))
        if not self._is_mine(found):
            raise self._taken(found)

    def withdraw(self) -> None:
        """Ends the claim, if the store is there to be asked."""
        self._over.set()
        if self._renewing.is_alive():
            self._renewing.join(BEAT)
        with contextlib.suppress(Exception):
            if self._is_mine(_claim_in(self._asked())):
                self._path.fs.rm_file(self._path.path)  # type: ignore[attr-defined]

    def _watch(self, found: dict[str, Any]) -> None:
        """Sees whether the process of another claim still renews it."""
        _log.warning(
            "%s was being trained by %s: watching for %.0f s whether it still is", self._run, _who(found), SILENT
        )
        end = time.monotonic() + SILENT
        while time.monotonic() < end:
            time.sleep(min(1.0, SILENT / 10))
            now = _claim_in(_fetched(self._path, b""))
            if now is None:
                return
            if now != found:
                raise self._taken(now)

    def _renew(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(Exception):  # the store is away: the next time it may be there
                if not self._is_mine(_claim_in(self._asked())):
                    return
                self._mine["beat"] += 1
                self._path.fs.pipe_file(self._path.path, json.dumps(self._mine).encode())  # type: ignore[attr-defined]

    def _asked(self) -> bytes:
        """What the store holds now, asked once: for a claim that is too late nobody waits."""
        try:
            return bytes(self._path.fs.cat_file(self._path.path))  # type: ignore[attr-defined]
        except FileNotFoundError:
            return b""

    def _is_mine(self, found: Mapping[str, Any] | None) -> bool:
        return found is not None and found["token"] == self._mine["token"]

    def _taken(self, other: Mapping[str, Any] | None) -> _Taken:
        if other is None:
            return _Taken(
                f"{self._path} is gone: another process went on with the run, and ended, or it was deleted; go on with --resume"
            )
        return _Taken(
            f"another process is training {self._run}: {_who(other)}: wait for it, or start a new run without --resume"
        )


def _claim_in(data: bytes) -> dict[str, Any] | None:
    """The claim that a file holds; None where it is none, such as the lock of a run that was copied from a disk."""
    with contextlib.suppress(ValueError):
        found = json.loads(data)
        if isinstance(found, dict) and {"host", "pid", "since", "machine", "token"} <= found.keys():
            return found
    return None


def _who(claim: Mapping[str, Any]) -> str:
    return f"process {claim['pid']} on {claim['host']}, since {claim['since']}"


def _machine() -> str | None:
    """What tells this machine, since it was started, and the processes that can be seen from here from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _has_ended(claim: Mapping[str, Any]) -> bool:
    """Whether the process of a claim is known to have ended: it was of this machine."""
    if claim["machine"] is None or claim["machine"] != _machine():
        return False
    try:
        os.kill(int(claim["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _fetched(path: Path, instead: bytes | None = None) -> bytes:
    """A file of a run in a store; `instead`, or FileNotFoundError, where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if instead is None:
            raise
        return instead
