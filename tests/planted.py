"""A codec that misbehaves at inputs that end with a word."""

import ctypes
import os
import time

from alexprep.shards.codec import Codec


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
