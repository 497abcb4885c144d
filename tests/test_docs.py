"""Every command line and every snippet in README.md and docs/ runs."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from alexprep.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(page.read_text()) if kind == language]


def _pack(path: Path, members: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def _stand_ins(root: Path, photos: Path) -> dict[str, str]:
    """A few images in each layout of docs/sources.md, under the names that the page uses; those that need another path."""
    images = {str(path.relative_to(photos)): path.read_bytes() for path in sorted(photos.rglob("*.JPEG"))}
    _pack(root / "photos.tar", images)
    synsets: dict[str, dict[str, bytes]] = {}
    for name, content in images.items():
        split, class_name, file = name.split("/")
        if split == "train":
            synsets.setdefault(f"{class_name}.tar", {})[file] = content
    (root / "ilsvrc").mkdir()
    packed = {name: _pack(root / "synset.tar", members) for name, members in synsets.items()}
    _pack(root / "ilsvrc/ILSVRC2012_img_train.tar", packed)
    shutil.copytree(photos / "train", root / "kaggle/ILSVRC/Data/CLS-LOC/train")
    rows = [f"{photos / name},{name.split('/')[1]}" for name in images]
    (root / "photos.csv").write_text("\n".join(["path,label", *rows]))
    record = bytes([3]) + bytes(3072)
    batches = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    names = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck"
    cifar = {f"cifar-10-batches-bin/{batch}": record * 2 for batch in batches}
    _pack(root / "cifar-10-binary.tar.gz", {**cifar, "cifar-10-batches-bin/batches.meta.txt": names}, "w:gz")
    (root / "mnist").mkdir()
    (root / "mnist/train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 2, 28, 28) + bytes(2 * 784))
    (root / "mnist/train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 2) + bytes([1, 0]))
    (root / "norb").mkdir()
    for part in ("training", "testing"):
        base = f"norb/smallnorb-{'5x46789' if part == 'training' else '5x01235'}x9x18x6x2x96x96-{part}"
        (root / f"{base}-dat.mat").write_bytes(struct.pack("<6I", 0x1E3D4C55, 4, 1, 2, 96, 96) + bytes(2 * 96 * 96))
        (root / f"{base}-cat.mat").write_bytes(struct.pack("<5I", 0x1E3D4C54, 1, 1, 1, 1) + struct.pack("<I", 4))
    return {"/imagenet": str(photos), "/downloads/ilsvrc": str(root / "ilsvrc"), "/kaggle": str(root / "kaggle")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a page names a source, a small one of its kind stands; a training is cut to two steps, a measurement to seconds."""
    stand_ins = _stand_ins(tmp_path, photos)
    monkeypatch.chdir(tmp_path)
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
        words = [stand_ins.get(word, word) for word in words]
        if words[0] == "train" and "--steps" not in words:
            words += ["--steps", "2", "--batch-size", "4"]
        if words[0] == "tune":
            words += ["--batch-size", "4", "--seconds", "4"]
        if "ray" in words:  # Ray is for a process of its own
            command = [sys.executable, "-m", "alexprep.cli", *words]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
        else:
            result = CliRunner().invoke(cli, words)
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


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
