"""A codec that misbehaves at inputs that end with a word, and tasks that misbehave as a whole: for workers to import."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alexprep.shards import worker_pool
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Target
from alexprep.shards.worker_pool import POLL_SECONDS, attending, reading

# What ends an input, and the reason for which it must be rejected; {} is the engine's `image_seconds`.
MISDEEDS = {
    "segv": "ends the process that reads it (SIGSEGV)",
    "abort": "ends the process that reads it (SIGABRT)",
    "exit": "ends the process that reads it (exit status 3)",
    "hang": "takes more than {} s",
    "hoard": "needs more memory than a worker may have",
    "malloc": "ends the process that reads it (SIGABRT)",
}


class Misbehaving(Codec):
    """Does what the last 8 bytes of an input say, after dots; else what the codec does."""

    def _convert(self, data: Any) -> Any:
        word = data[-8:].strip(b".")
        if word == b"segv":
            ctypes.string_at(0)
        if word == b"abort":
            os.abort()
        if word == b"exit":
            os._exit(3)
        while word == b"hang":
            _as_if_begun_earlier()
            time.sleep(1)
        held = []
        while word == b"hoard":
            held.append(bytearray(2**26))
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        while word == b"malloc":  # as a library in C does it
            place = libc.malloc(2**26)
            if not place:
                os.abort()
        return super()._convert(data)


def _as_if_begun_earlier(seconds: float = 10**6) -> None:
    """So that an engine with much patience, as busy machines need, loses it at once."""
    worker_pool._record["began_ns"] = time.monotonic_ns() - int(seconds * 1e9)


def stalled(argument: int, condemned: Mapping[int, str]) -> None:
    """Reads for ever, as from a file server that went away."""
    with attending(argument), reading("/server/n01/a.jpg"):
        _as_if_begun_earlier()
        time.sleep(10**6)


def slow(argument: int, condemned: Mapping[int, str]) -> str:
    """Each of three phases takes, as it seems, 500 seconds, and the engine looks in during each."""
    with attending(argument):
        for _ in range(2):
            with reading("/server/n01/a.jpg"):
                _as_if_begun_earlier(500)
                time.sleep(2 * POLL_SECONDS)
        _as_if_begun_earlier(500)
        time.sleep(2 * POLL_SECONDS)
    return condemned.get(argument, "fine")


class OddError(Exception):
    """Cannot be made again from what pickle keeps of it."""

    def __init__(self, one: int, other: int) -> None:
        """Two arguments, of which pickle keeps the message they make."""
        super().__init__(f"{one} is not {other}\nat all")


def odd(argument: int, condemned: Mapping[int, str]) -> None:
    """Raises it."""
    raise OddError(1, 2)


def fragile(argument: int, condemned: Mapping[int, str]) -> tuple[int, dict[int, str]]:
    """Its input number `argument` ends the process."""
    for row in range(4):
        with attending(row):
            if row == argument and row not in condemned:
                os.abort()
    return argument, dict(condemned)


def refusing(argument: int, condemned: Mapping[int, str]) -> None:
    raise AlexprepError(f"--thing {argument} is wrong")


def failing(argument: int, condemned: Mapping[int, str]) -> int:
    return 1 // argument


class Held(Codec):
    """Converts eight images; goes on with others once the file `go` is there, in the folder that the tickets are in."""

    def __init__(self, folder: str, target: Target) -> None:
        super().__init__(target)
        self.folder = Path(folder)

    def convert(self, data: Any) -> Any:
        for number in range(8):
            try:
                (self.folder / f"ticket-{number}").touch(exist_ok=False)
                break
            except FileExistsError:
                pass
        else:
            while not (self.folder / "go").exists():
                time.sleep(0.02)
        return super().convert(data)
