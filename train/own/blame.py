"""Errors in code of the user's own become one sentence, with the file and line in it that they came by."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from alexprep.shards.errors import TRACEBACK, AlexprepError


@contextlib.contextmanager
def blamed(what: str, folder: Path | None, only: bool = False) -> Iterator[None]:
    """Inside the block, an exception of the user's code becomes one sentence: what failed, in which file and line, and how.

    Args:
        what: the sentence's beginning.
        folder: of the user's code; None for an installed library.
        only: leave exceptions alone that did not come by way of a file in `folder`.

    Raises:
        AlexprepError: instead of any other exception, unless the environment variable ALEXPREP_TRACEBACK is set.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place = _place(error, folder)
        if os.environ.get(TRACEBACK) or (only and place is None):
            raise
        kind = "" if isinstance(error, AlexprepError) else f"{type(error).__name__}: "
        if isinstance(error, SyntaxError):
            words = error.msg
        else:
            words = next(iter(str(error).splitlines()), "")
        said = f"{kind}{words}".removesuffix(": ")
        raise AlexprepError(f"{what}: {said}" if place is None else f"{what}: {place}: {said}") from error


def _place(error: BaseException, folder: Path | None) -> str | None:
    """File and line of the user's code that an exception last came by."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [
        f"{frame.f_code.co_filename}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_own(frame.f_code.co_filename, frame.f_globals.get("__name__", ""), folder)
    ]
    return frames[-1] if frames else None


def _is_own(file: str | None, module: str, folder: Path | None) -> bool:
    """Whether code is the user's: in that folder, and neither installed there nor Python's or alexprep's own."""
    if folder is None or file is None or "site-packages" in file:
        return False
    top = module.partition(".")[0]
    return Path(file).is_relative_to(folder) and top != "alexprep" and top not in sys.stdlib_module_names
