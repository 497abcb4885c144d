"""docs/examples/ray_train.py: two workers of Ray Train, and the weights of `alexprep train --gpus 2`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.train", reason="Ray Train is not installed: `make ecosystem` has it", exc_type=ImportError)

EXAMPLE = (Path(__file__).parents[2] / "docs" / "examples" / "ray_train").with_suffix(".py")
SECONDS = 600


def _run(*words: str | Path) -> str:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS - 20,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_workers_of_ray_train_share_a_run(data: Path, tmp_path: Path) -> None:
    ours, theirs, same = tmp_path / "ours", tmp_path / "theirs", ("--recipe", "tiny", "--steps", "3")
    said = _run(EXAMPLE, data, "--workers", "2", *same, "--runs", theirs, "--storage", tmp_path / "ray")
    ranks = ("--gpus", "2", "--scheme", "ddp", "--device", "cpu")
    _run("-m", "alexprep.cli", "train", "--data", data, "--runs", ours, *same, *ranks)
    right, found = (json.loads((runs / "tiny" / "summary.json").read_text()) for runs in (ours, theirs))
    assert (found["ranks"], found["steps"]) == (2, 3)
    assert found["weights_sha256"] == right["weights_sha256"]
    assert "'ranks': 2, 'steps': 3" in said
