"""The endings that names of pictures have."""

from __future__ import annotations

import os

# Of pictures that are read, and of others that are pictures all the same, in lower case.
READ = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
_NOT_READ = ("avif", "heic", "heif", "j2k", "jfif", "jp2", "jpe", "jxl")
_ENDINGS = {f".{ending}".encode() for ending in (*READ, *_NOT_READ)}


def is_picture(name: bytes) -> bool:
    """Whether a file is a picture by its ending."""
    return name[name.rfind(b".") :].lower() in _ENDINGS


def without_ending(name: bytes) -> bytes:
    """A name without the ending of a picture; any other ending stays.

    >>> without_ending(b"a/1.JPEG"), without_ending(b"1.v2")
    (b'a/1', b'1.v2')
    """
    return os.path.splitext(name)[0] if is_picture(name) else name
