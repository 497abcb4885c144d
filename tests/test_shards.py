"""The face of alexprep.shards: every public name is there, told in a docstring, and costs nothing until it is asked for."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import alexprep.shards


def test_importing_the_face_loads_no_decoder_and_no_numpy() -> None:
    program = "import sys, alexprep.shards; print(*{'numpy', 'PIL', 'pyarrow', 'nvidia', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_every_public_name_is_there_and_told() -> None:
    assert dir(alexprep.shards) == sorted(alexprep.shards.__all__)
    for name in alexprep.shards.__all__:
        found = getattr(alexprep.shards, name)
        assert not inspect.ismodule(found) and inspect.getdoc(found), name
    with pytest.raises(AttributeError, match="no attribute 'conjure'"):
        alexprep.shards.conjure  # noqa: B018
