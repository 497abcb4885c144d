"""Every command line and every snippet in README.md and docs/ runs."""

from __future__ import annotations

import collections
import gc
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from alexprep.cli.main import cli
from alexprep.shards.worker_pool import InProcessEngine, LocalEngine
from alexprep.train import recipes
from alexprep.train.settings import recipe_of
from tests.support.record_files import (
    a_datum,
    an_example,
    database,
    gzipped_tar,
    image_record,
    recordio,
    save_to_disk,
    tfrecord,
)

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
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        for name, content in images.items():
            archive.writestr(name, content)
    synsets: dict[str, dict[str, bytes]] = {}
    for name, content in images.items():
        split, class_name, file = name.split("/")
        if split == "train":
            synsets.setdefault(f"{class_name}.tar", {})[file] = content
    (root / "ilsvrc").mkdir()
    packed = {name: _pack(root / "synset.tar", members) for name, members in synsets.items()}
    _pack(root / "ilsvrc/ILSVRC2012_img_train.tar", packed)
    shutil.copytree(photos / "train", root / "kaggle/ILSVRC/Data/CLS-LOC/train")
    lines = [f"{photos / name},{name.split('/')[1]}" for name in images]
    (root / "photos.csv").write_text("\n".join(["path,label", *lines]))
    for split in ("train", "val"):
        rows = [(images[name], name.split("/")[1]) for name in images if name.startswith(split)]
        table = pa.table({"image": [{"bytes": data} for data, _ in rows], "label": [label for _, label in rows]})
        (root / "hub/data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / f"hub/data/{split}-00000-of-00001.parquet", row_group_size=10)
        (root / "pets" / split).mkdir(parents=True)
        for n, (data, _) in enumerate(rows):
            (root / "pets" / split / f"{n}.jpg").write_bytes(data)
        told = [json.dumps({"file_name": f"{n}.jpg", "label": c, "caption": f"{n}"}) for n, (_, c) in enumerate(rows)]
        (root / "pets" / split / "metadata.jsonl").write_text("\n".join(told))
    _stand_ins_of_records(
        root, [(images[name], name.split("/")[1]) for name in sorted(images) if name.startswith("train")][::6]
    )
    (root / "pets.txt").write_text("class0\ta class of photos\n")
    record = bytes([3]) + bytes(3072)
    batches = [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    names = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck"
    cifar = {f"cifar-10-batches-bin/{batch}": record * 2 for batch in batches}
    _pack(root / "cifar-10-binary.tar.gz", {**cifar, "cifar-10-batches-bin/batches.meta.txt": names}, "w:gz")
    (root / "mnist").mkdir()
    for part in ("train", "t10k"):
        (root / f"mnist/{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 10, 28, 28) + bytes(10 * 784))
        (root / f"mnist/{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 10) + bytes(range(10)))
    (root / "norb").mkdir()
    for part in ("training", "testing"):
        base = f"norb/smallnorb-{'5x46789' if part == 'training' else '5x01235'}x9x18x6x2x96x96-{part}"
        (root / f"{base}-dat.mat").write_bytes(struct.pack("<6I", 0x1E3D4C55, 4, 1, 2, 96, 96) + bytes(2 * 96 * 96))
        (root / f"{base}-cat.mat").write_bytes(struct.pack("<5I", 0x1E3D4C54, 1, 1, 1, 1) + struct.pack("<I", 4))
    for example in (ROOT / "docs/examples/own_nets").iterdir():
        if example.is_file():
            shutil.copy(example, root)
    (root / "photo.jpg").write_bytes(next(iter(images.values())))
    shutil.copytree(photos / "val" / "class1", root / "holidays")
    tars = str(root / "alexprep-data/train")  # of which nothing else is read
    return {
        "/wds": tars,
        "/imagenet": str(photos),
        "/downloads/ilsvrc": str(root / "ilsvrc"),
        "/kaggle": str(root / "kaggle"),
    }


def _stand_ins_of_records(root: Path, rows: list[tuple[bytes, str]]) -> None:
    """A few pictures, each with its class, in files of records and gzipped tars."""
    numbered = [(data, sorted({name for _, name in rows}).index(name)) for data, name in rows]
    wnids = [f"n0000000{number}" for _, number in numbered]
    named = {f"{wnid}_{n}_{wnid}.JPEG": data for n, (wnid, (data, _)) in enumerate(zip(wnids, numbered, strict=True))}
    (root / "imagenet-1k").mkdir()
    gzipped_tar(root / "imagenet-1k/train_images_0.tar.gz", list(named.items()))
    images = [{"bytes": data, "path": None} for data, _ in rows]
    save_to_disk(root / "saved", [pa.table({"image": images, "label": [label for _, label in rows]})], "train")
    tfrecord(root / "records/train.tfrecord", [an_example(image=data, label=label) for data, label in numbered])
    (root / "faces").mkdir()
    recordio(root / "faces/train.rec", [image_record(label, n, data) for n, (data, label) in enumerate(numbered)])
    database(
        root / "train_lmdb",
        {b"%d" % n: a_datum(data=data, label=label, encoded=True) for n, (data, label) in enumerate(numbered)},
    )


@pytest.fixture
def script_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """What a program of benchmarks/ or tests/stress says to --help, in this process: most import torch, which takes long."""

    def told(script: Path) -> str:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.syspath_prepend(script.parent)
            patch.setattr(sys, "argv", [str(script), "--help"])
            runpy.run_path(str(script), run_name="__main__")
        assert left.value.code == 0
        return capsys.readouterr().out

    return told


@pytest.fixture
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet has an eighth of its kernels, and shards are made in this process, since a worker's start takes longer."""
    narrow = replace(recipes.RECIPES["alexnet"], width=0.125)
    monkeypatch.setitem(recipes.RECIPES, "alexnet", narrow)
    here = InProcessEngine()
    monkeypatch.setattr(LocalEngine, "run", lambda engine, task, arguments, *more: here.run(task, arguments, *more))
    for name in [name for name in sys.modules if name.startswith("alexprep.shards")]:
        for value in list(vars(sys.modules[name]).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()  # as new workers begin: another page has another alexprep-data


def _lines(page: Path) -> list[str]:
    return [line[2:] for block in _blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.usefixtures("patient_search", "small_work")
@pytest.mark.parametrize("page", [page for page in PAGES if _lines(page)], ids=lambda page: page.name)
def test_commands_run(
    page: Path,
    script_help: Callable[[Path], str],
    photos: Path,
    whole: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a page names a source, a small one of its kind stands; a training is cut to two steps, a measurement to a second.

    Of a page's lines that start ranks themselves, or write reports, the first runs, and the others are read: all run in `make stress`.
    """
    stand_ins = _stand_ins(tmp_path, photos)
    monkeypatch.chdir(tmp_path)
    make = (ROOT / "Makefile").read_text()
    long = collections.Counter[str]()
    launchers: list[subprocess.Popen[str]] = []
    for line in _lines(page):
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert re.search(rf"^{words[0]}:", make, re.MULTILINE), line
            continue
        if program == "python":
            module = words[0] == "-m"
            told = script_help(ROOT / words[1].replace(".", "/") / "__main__.py" if module else ROOT / words[0])
            options = {word for word in words[1 + module :] if word.startswith("--")}
            campaigns = itertools.takewhile(lambda word: not word.startswith("--"), words[2:] if module else [])
            assert all(word in told for word in (*options, *campaigns)), line
            continue
        if program == "torchrun":
            launchers.append(_torchrun(line, words, tmp_path))
            if "--nnodes" not in words or len(launchers) == int(words[words.index("--nnodes") + 1]):
                _all_end_well(line, launchers)
                launchers = []
            continue
        assert program == "alexprep", line
        words = [stand_ins.get(word, word) for word in words]
        if words[0] == "train" and "--steps" not in words:
            words += ["--steps", "2", "--batch-size", "4"]
        if page.name == "ablations.md" and words[0] == "ablate":
            words = _cut_ablation(words)
            if "night" in words:
                continue
        if words[0] == "tune":
            words += ["--batch-size", "4", "--seconds", "0.5"]
        if words[0] == "bench":
            words += ["--batch-size", "4", "--steps", "2", "--rounds", "1"]
        kind = "ranks" if "--gpus" in words else words[0]
        long[kind] += kind in ("ranks", "report", "tune")
        if long[kind] > 1 and not whole:
            cli.commands[words[0]].make_context(words[0], words[1:])
        elif "ray" in words:  # Ray is for a process of its own
            command = [sys.executable, "-m", "alexprep.cli", *words]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
        else:
            result = CliRunner().invoke(cli, words)
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


def _cut_ablation(words: list[str]) -> list[str]:
    """An epoch of the recipe and its first variant with one seed; of all it is made sure that they can be trained."""
    options = cli.commands["ablate"].make_context("ablate", words[1:]).params
    variants = options["variants"]
    for variant in variants:
        settings = (*options["settings"], *shlex.split(variant))
        made = recipe_of({"recipe": options["recipe"], "settings": settings})
        made.make_optimizer(made.make_network(2, 0))
    cut = [word for word in words if word not in variants[1:]]
    return [*cut, "--epochs", "1", *(["--seeds", "1"] if variants else [])]


def _torchrun(line: str, words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Two steps. A host but the first is a folder of its own, with a copy of the data."""
    program = words.index("alexprep")
    assert words[program - 1] == "--no-python", line
    started = [*words[: program - 1], "-m", "alexprep.cli", *words[program + 1 :], "--steps", "2", "--batch-size", "4"]
    if "--node-rank" in words:
        started[started.index("--master-addr") + 1] = "127.0.0.1"
        if (host := words[words.index("--node-rank") + 1]) != "0":
            shutil.copytree(folder / "alexprep-data", folder / f"host{host}" / "alexprep-data")
            folder = folder / f"host{host}"
    command = [sys.executable, "-m", "torch.distributed.run", *started]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _all_end_well(line: str, launchers: list[subprocess.Popen[str]]) -> None:
    """Only the first rank speaks, and writes."""
    said = []
    for launcher in launchers:
        out, err = launcher.communicate(timeout=500)
        assert launcher.returncode == 0, f"{line}\n{err}"
        said.append(out)
    assert "".join(said).count("its folder") == said[0].count("its folder") == 1, said
    assert not list(Path().glob("host*/runs"))


@pytest.mark.filterwarnings("ignore")  # as where a reader runs them
@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=lambda page: page.name)
def test_snippets_run(page: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's Python blocks, one after the other, beside a data set named alexprep-data."""
    shutil.copytree(data, tmp_path / "alexprep-data")
    (tmp_path / "snippets.py").write_text("\n".join(_blocks(page, "python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "set again by a snippet")
    runpy.run_path("snippets.py", run_name="__main__")
    gc.collect()  # here, where what they left open is no error


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def _names(parameter: click.Parameter) -> list[str]:
    """Of an option, also those that turn it off."""
    return [*parameter.opts, *parameter.secondary_opts]


def test_every_command_and_option_exists() -> None:
    """Options that the pages mention in backticks are options of some command."""
    groups = [command for command in cli.commands.values() if isinstance(command, click.Group)]
    commands = [*cli.commands.values(), *(command for group in groups for command in group.commands.values())]
    known = {option for command in commands for parameter in command.params for option in _names(parameter)}
    for page in PAGES:
        for option in re.findall(r"`(--[a-z0-9-]+)", page.read_text()):
            assert option in known, f"{page.name}: {option}"
        for name in re.findall(r"`alexprep ([a-z-]+)", page.read_text()):
            assert name in cli.commands, f"{page.name}: {name}"
