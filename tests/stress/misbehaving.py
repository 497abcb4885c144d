"""A codec that misbehaves at inputs that end with a word, and tasks that misbehave as a whole: for workers to import."""

import ctypes
import os
import time
from collections.abc import Mapping

from alexprep.shards.image_codec import Codec
from alexprep.shards.worker_pool import attending, reading


class Planted(Codec):
    def _convert(self, data):
        word = data[-8:].strip(b".")
        if word == b"segv":
            ctypes.string_at(0)
        if word == b"abort":
            os.abort()
        if word == b"exit":
            os._exit(3)
        while word == b"hang":
            time.sleep(1)
        hoard = []
        while word == b"hoard":
            hoard.append(bytearray(2**26))
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        while word == b"malloc":  # as a library in C does it
            place = libc.malloc(2**26)
            if not place:
                os.abort()
            ctypes.memset(place, 1, 2**26)
        return super()._convert(data)


def stalled(argument: int, condemned: Mapping[int, str]) -> None:
    """Reads for ever, as from a file server that went away."""
    with attending(argument), reading("/server/n01/a.jpg"):
        time.sleep(60)


def slow(argument: int, condemned: Mapping[int, str]) -> str:
    """Each phase takes most of the time that an input has."""
    with attending(argument):
        for _ in range(2):
            with reading("/server/n01/a.jpg"):
                time.sleep(0.6)
        time.sleep(0.6)
    return condemned.get(argument, "fine")


class OddError(Exception):
    """Cannot be made again from what pickle keeps of it."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} is not {other}\nat all")


def odd(argument: int, condemned: Mapping[int, str]) -> None:
    raise OddError(1, 2)
