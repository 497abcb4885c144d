"""A checkpoint's save dies at each of its system calls, one after the other; `make test` does not collect this file.

python -m pytest tests/stress/checkpoint_system_calls.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from alexprep.train.checkpoint import newest, save
from tests.test_checkpoint import assert_is, marks_and_tensors, save_steps, tensors


@pytest.mark.parametrize("call", ["open", "fsync", "rename", "unlink"])
def test_dying_at_any_system_call_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Saves over an existing checkpoint of the same step, with the n-th call failing, for all n; `keep` also deletes one."""

    class Died(BaseException):
        pass

    original = getattr(os, call)
    for n in range(1, 50):
        folder = tmp_path / f"{call}{n}"
        save_steps(folder, 1, 2)
        save(folder, 3, tensors(33), {"note": "old"}, keep=10)
        count = 0

        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= n:  # noqa: B023
                raise Died
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                save_steps(folder, 3, keep=2)
            except Died:
                died = True
            else:
                died = False
        found, sentences = newest(folder)
        assert found is not None
        assert sentences == []
        if found.facts == {"note": "old"}:
            assert torch.equal(found.tensors["weights"], tensors(33)["weights"])
            assert died
        else:
            assert_is(found, 3)
        save_steps(folder, 4, keep=2)  # the next save cleans up
        assert marks_and_tensors(folder) == [3, 3, 4, 4]
        if not died:
            assert n > 1
            return
    pytest.fail(f"{call} was still called after 50 times")
