"""C sources of alexprep, compiled: as they were installed, or made here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def library(source: Path, folder: Path) -> Path:
    """The library of a C source; where it was not installed, made in `folder`. Skips the test where there is no compiler."""
    for installed in source.parent.glob(f"{source.stem}*.so"):
        return installed
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    made = folder / f"{source.stem}.so"
    command = [compiler, "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(made), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return made
