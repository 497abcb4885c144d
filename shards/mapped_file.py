"""Files mapped into memory for reading: without a copy, and without an open file.

A file that has become shorter since is noticed by `MappedFile.shrunk`. Whoever reads what the system cannot bring any more, because the file
was cut within the second before or the disk fails, is ended by it (SIGBUS).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Python's own mmap keeps a file open for each mapping. A data set has thousands of shards, and a process is often allowed 1,024 files.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
if hasattr(_libc, "process_madvise"):
    _libc.process_madvise.restype = ctypes.c_ssize_t
    _libc.process_madvise.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint]
_MOST_PLACES = 1024  # of one such call (IOV_MAX)
_LOOK_SECONDS = 1.0  # after which a file's length is asked for again: that costs 2 µs, more where a disk is far away
_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """The bytes of a file that was opened once.

    Attributes:
        contents: uint8 (bytes,), not to be written to; it and what is cut out of it stay readable after the object itself is gone.
        address: of its first byte.
        sound_until: until when it need not be asked again whether the file has `shrunk`, by `time.monotonic()`.
    """

    def __init__(self, path: str) -> None:
        """Maps all of it; OSError where there is none, or it cannot be mapped."""
        self._path, self.sound_until = path, time.monotonic() + _LOOK_SECONDS
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
            pages = _Pages(file, size) if size else None
        finally:
            os.close(file)
        self.address = 0 if pages is None else pages.address
        self.contents: NDArray[np.uint8] = np.empty(0, np.uint8) if pages is None else np.asarray(pages)

    def shrunk(self) -> bool:
        """Whether the file is shorter than it was, so that reading on would end the process; OSError where it is gone."""
        self.sound_until = time.monotonic() + _LOOK_SECONDS
        return os.stat(self._path).st_size < len(self.contents)


def expect(files: Sequence[MappedFile], offsets_N: NDArray[np.int64], sizes_N: NDArray[np.int64]) -> None:
    """Asks the disk for some bytes of each file, and returns at once. Places beyond a file's end are passed over."""
    starts, ends = (
        np.array([file.address for file in files], np.int64) + offsets for offsets in (offsets_N, offsets_N + sizes_N)
    )
    there = offsets_N + sizes_N <= np.array([len(file.contents) for file in files])
    pages = starts & -mmap.PAGESIZE
    places = np.ascontiguousarray(np.stack([pages, ends - pages], axis=1)[there])
    for first in range(0, len(places), _MOST_PLACES):
        _advise(places[first : first + _MOST_PLACES])


def _advise(places_N2: NDArray[np.int64]) -> None:
    """Asks for memory, addresses and sizes, by one call where the system has it: a call for each costs 1 µs more."""
    if hasattr(_libc, "process_madvise"):  # of glibc 2.36
        with contextlib.suppress(OSError):
            process = os.pidfd_open(os.getpid())
            try:
                advised = _libc.process_madvise(process, places_N2.ctypes.data, len(places_N2), mmap.MADV_WILLNEED, 0)
            finally:
                os.close(process)
            if advised >= 0:
                return
    for page, size in places_N2.tolist():
        _libc.madvise(page, size, mmap.MADV_WILLNEED)


class _Pages:
    """A mapping that ends with the last array of it."""

    def __init__(self, file: int, size: int) -> None:
        # Private to this process: some network file systems have no other, and nothing is written.
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, file, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.address: int = address
        self._size, self._unmap = size, _libc.munmap
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, True)}

    def __del__(self) -> None:
        if hasattr(self, "_unmap"):
            self._unmap(self.address, self._size)
