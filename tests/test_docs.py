"""Every command line and every snippet in README.md and docs/ runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alexprep.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, photos: Path, tmp_path: Path) -> None:
    """Where a page says /imagenet, a small tree of photos stands; a training is cut to two steps."""
    lines = [line[2:] for block in _blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    make = (ROOT / "Makefile").read_text()
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert re.search(rf"^{words[0]}:", make, re.MULTILINE), line
            continue
        if program == "python":
            script = ROOT / words[0]
            done = subprocess.run(
                [sys.executable, script, "--help"], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr
            for option in (word for word in words if word.startswith("--")):
                assert option in done.stdout, line
            continue
        assert program == "alexprep", line
        words = [str(photos) if word == "/imagenet" else word for word in words]
        if words[0] == "train" and "--steps" not in words:
            words += ["--steps", "2", "--batch-size", "4"]
        done = subprocess.run(
            [sys.executable, "-m", "alexprep.cli", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, data: Path, tmp_path: Path) -> None:
    """A page's Python blocks, one after the other, beside a data set named alexprep-data."""
    snippets = _blocks(page, "python")
    if not snippets:
        return
    shutil.copytree(data, tmp_path / "alexprep-data")
    (tmp_path / "snippets.py").write_text("\n".join(snippets))
    done = subprocess.run(
        [sys.executable, "snippets.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_and_option_exists() -> None:
    """Options that the pages mention in backticks are options of some command."""
    known = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    for page in PAGES:
        for option in re.findall(r"`(--[a-z0-9-]+)", page.read_text()):
            assert option in known, f"{page.name}: {option}"
        for name in re.findall(r"`alexprep ([a-z-]+)", page.read_text()):
            assert name in cli.commands, f"{page.name}: {name}"
