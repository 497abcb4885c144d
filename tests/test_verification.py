"""`verify` finds any damage and names it; clean sets give no alarm; `--repair` makes exactly what is damaged."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from alexprep.cli.main import cli
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import FORMATS
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.image_header import Refused
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.verification import Problem, repair, verify
from alexprep.shards.webdataset_index import index_tars
from alexprep.shards.worker_pool import InProcessEngine, LocalEngine
from tests.source_checks import flipped

ENGINE = InProcessEngine()


@pytest.fixture(scope="module")
def small(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with one reject, and statistics; damaged in place and mended again."""
    root = tmp_path_factory.mktemp("small")
    for n in range(5):
        target = root / "source" / f"class{n % 2}" / f"{n}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / f"train/class{n % 4}/{n:03d}.JPEG", target)
    (root / "source/class0/bad.jpg").write_bytes(b"no image")
    convert(root / "source", root / "data", ShardOptions(Target(size=24), shard_samples=3), ENGINE)
    rgb_statistics.publish_statistics(rgb_statistics.pca_stats(root / "data", "train", ENGINE), root / "data", "train")
    return root / "data"


@pytest.fixture
def out(small: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(small, tmp_path / "data"))


def _files(data: Path) -> list[Path]:
    return sorted(path for path in data.rglob("*") if path.is_file())


def _found(data: Path, decode: bool = False) -> list[Problem]:
    return verify(data, ENGINE, decode).problems


@pytest.mark.parametrize("form", ["jpg", "png", "raw"])
def test_a_clean_set_gives_no_alarm(
    form: Literal["jpg", "png", "raw"], photos: Path, data: Path, tmp_path: Path
) -> None:
    verdict = verify(data, LocalEngine(2), decode=form == "jpg")
    assert (verdict.problems, verdict.samples, verdict.shards) == ([], 68, 10)
    convert(photos, tmp_path, ShardOptions(Target(size=20, format=form), limit=6), ENGINE)
    assert _found(tmp_path, decode=True) == []


def test_every_flipped_bit_and_every_cut_is_found_and_its_file_named(small: Path, seed: int, whole: bool) -> None:
    """Random ones of every file. dataset.json and the file that it describes may each be named."""
    rng = random.Random(seed)
    assert _found(small) == []
    for path in _files(small):
        good = path.read_bytes()
        for n in range(60 if whole else 12):
            position, bit = rng.randrange(len(good)), rng.randrange(8)
            path.write_bytes(flipped(good, position, bit) if n % 6 else good[:position])
            problems, name = _found(small), str(path.relative_to(small))
            # Of a file and the checksum of it, nobody can say which was changed: the message then names both.
            assert any(name == p.file or name in p.what for p in problems), (n, bit, position, name)
        path.write_bytes(good)
    assert _found(small) == []


def test_a_flip_in_the_tar_names_the_member(small: Path) -> None:
    tar = small / "train/train-000000.tar"
    good = tar.read_bytes()
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    for member in members:
        for position, words in (
            (member.offset + 3, "header"),
            (member.offset_data + member.size // 2, "its bytes"),
            (member.offset_data + member.size, "zeros behind it"),
        ):
            tar.write_bytes(flipped(good, position, 4))
            (problem,) = _found(small)
            assert problem.member == member.name and words in problem.what
    tar.write_bytes(good)


def _swap(*suffixes: str) -> Callable[[Path], None]:
    def swap(data: Path) -> None:
        for suffix in suffixes:
            one, other = (data / f"train/train-00000{n}{suffix}" for n in range(2))
            content = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(content)

    return swap


def _copy(name: str, other: str) -> Callable[[Path], object]:
    return lambda data: shutil.copy(data / name, data / other)


def _lost(name: str, words: str = "is missing") -> tuple[Callable[[Path], None], str, str]:
    return (lambda data: (data / name).unlink()), name, words


def _foreign(name: str, words: str) -> tuple[Callable[[Path], None], str, str]:
    return (lambda data: (data / name).touch()), name, words


def _edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(data: Path) -> None:
        document = json.loads((data / name).read_bytes())
        change(document)
        text = json.dumps(document, indent=None if name.startswith("train/") else 1)
        (data / name).write_text(text + "\n")

    return edit


def _edited(name: str, words: str, change: Callable[[dict[str, Any]], None]) -> tuple[Callable[[Path], None], str, str]:
    return _edit_json(name, change), name, words


def _other_label(sidecar: dict[str, Any]) -> None:
    entry = next(entry for entry in sidecar["inputs"] if entry["status"] == "written")
    entry["label"] = 1 - entry["label"]


def _edit_index(data: Path) -> None:
    index = np.load(data / "train/index.npy")
    index["label"][2] ^= 1
    np.save(data / "train/index.npy", index)


def _edit_ledger(data: Path) -> None:
    table = pq.read_table(data / "train/samples.parquet")
    column = table.schema.get_field_index("width")
    wrong = pa.array([999, *table["width"].to_pylist()[1:]], pa.int32())
    pq.write_table(table.set_column(column, "width", wrong), data / "train/samples.parquet")


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        *map(_lost, ("train/train-000001.tar", "train/train-000001.idx", "train/index.npy")),
        *map(_lost, ("plan.json", "plan.parquet", "_info.json", "stats/mean_image.npy")),
        _lost("train/train-000001.json", "does not count"),
        _lost("dataset.json", "unfinished"),
        _foreign("train/.train-000000.tar.tmp-1-ab", "interrupted"),
        _foreign("notes.txt", "no file of this data set"),
        (_copy("train/train-000000.tar", "train/train-000002.tar"), "train/train-000002.tar", "no file of this"),
        (_copy("train/train-000000.idx", "train/train-000001.idx"), "train/train-000001.idx", "not the index"),
        (_swap(".tar"), "train/train-000000.tar", "is the tar of train-000001"),
        (_swap(".tar", ".idx", ".json"), "train/train-000000.json", "inputs[0].key is"),
        _edited("train/train-000000.json", "label is", _other_label),
        (_edit_index, "train/index.npy", "record 2"),
        (_edit_ledger, "train/samples.parquet", "width is 999, must be"),
        _edited("dataset.json", "train.samples is 4, must be 5", lambda d: d["splits"]["train"].update(samples=4)),
        _edited("dataset.json", "files has the fields []", lambda d: d["files"].clear()),
        _edited("plan.json", "was changed", lambda d: d["options"].update(quality=90)),
        _edited("stats/stats.json", "was changed", lambda d: d["eigenvalues"].reverse()),
        _edited(
            "train/train-000001.json", "inputs[0].status is 'lost'", lambda d: d["inputs"][0].update(status="lost")
        ),
    ],
)
def test_damage_is_named_and_repaired(
    damage: Callable[[Path], object], file: str, words: str, small: Path, out: Path
) -> None:
    good = {path.relative_to(out): path.read_bytes() for path in _files(out)}
    damage(out)
    problems = _found(out)
    assert any(problem.file == file and words in str(problem) for problem in problems), problems
    repair(out, find_source(str(small.parent / "source")), problems, ENGINE)
    left = _found(out)
    if file.startswith("stats") or "no file" in words or "interrupted" in words:  # not for repair to judge
        assert {problem.file for problem in left} <= {file}
    else:
        assert left == []
        assert {path.relative_to(out): path.read_bytes() for path in _files(out)} == good


@pytest.mark.parametrize("told_by", ["dataset.json", "sidecars"])
def test_repair_from_another_source_touches_nothing(told_by: str, small: Path, out: Path, tmp_path: Path) -> None:
    """Files are missing from SOURCE, and plan.json, which would tell, is the damaged file."""
    source = tmp_path / "source"
    shutil.copytree(small.parent / "source", source)
    (source / "class0/2.jpg").unlink()
    if told_by == "sidecars":
        (out / "dataset.json").unlink()
        _edit_json("plan.json", lambda d: d.update(inputs="0" * 64))(out)
    else:
        (out / "plan.json").write_bytes(b"{")
    before = {path: path.read_bytes() for path in _files(out)}
    problems = _found(out)
    assert problems
    words = "6 inputs then, 5 now" if told_by == "dataset.json" else "the options or the versions differ"
    with pytest.raises(AlexprepError, match=words + r".*Nothing was touched"):
        repair(out, find_source(str(source)), problems, ENGINE)
    assert {path: path.read_bytes() for path in _files(out)} == before


@pytest.mark.parametrize("form", ["jpg", "png", "raw"])
@pytest.mark.parametrize(
    ("side", "words"), [(0, "cannot be decoded"), (17, "uint8 of shape (17, 17, 3), not 16 x 16 pixels")]
)
def test_decode_finds_what_checksums_cannot(
    side: int, words: str, form: Literal["jpg", "png", "raw"], tmp_path: Path, encoded: Callable[..., bytes]
) -> None:
    """One image was written wrongly, so all that is recorded of the shard agrees with it."""
    for n in range(3):
        path = tmp_path / "source" / f"class{n % 2}" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.new("RGB", (20, 20 + n)), "PNG"))

    class Careless(Codec):
        def convert(self, data: bytes | NDArray[np.uint8]) -> Converted | Refused:
            made = super().convert(data)
            assert isinstance(made, Converted)
            wrong = self.encode(np.zeros((side, side, 3), np.uint8)) if side else b"no image"
            return replace(made, data=wrong) if made.height == 21 else made

    out = tmp_path / "data"
    convert(tmp_path / "source", out, ShardOptions(Target(size=16, format=form)), ENGINE, make_codec=Careless)
    sidecar = json.loads((out / "train/train-000000.json").read_bytes())
    (key,) = (entry["key"] for entry in sidecar["inputs"] if entry["height"] == 21)
    assert _found(out) == []
    assert _found(out, decode=True) == [Problem("train/train-000000.tar", f"{key}.{FORMATS[form]}", ANY)]
    assert words in _found(out, decode=True)[0].what
    if (side, form) == (0, "jpg"):
        command = ["verify", str(out), "--workers", "1"]
        assert [CliRunner().invoke(cli, [*command, *more]).exit_code for more in ([], ["--decode"])] == [0, 3]


def test_a_file_that_cannot_be_read_is_named(out: Path) -> None:
    """A folder in its place gives an error on reading, as a bad sector does; the rest is checked all the same."""
    (out / "train/train-000001.tar").write_bytes(b"")
    for path in _files(out):
        name, good = str(path.relative_to(out)), path.read_bytes()
        path.unlink()
        path.mkdir()
        problems = _found(out)
        assert any(problem.file == name and "cannot be read (Is a directory)" in problem.what for problem in problems)
        own = ("plan.json", "train/train-000001.json")  # without which nothing is known of that tar
        assert name in own or any(problem.file == "train/train-000001.tar" for problem in problems), name
        path.rmdir()
        path.write_bytes(good)


@pytest.mark.parametrize("content", ["{}", '{"files": null}', '{"plan": "x", "splits": 3}', "[]", "null"])
def test_a_dataset_json_of_another_shape_is_named(content: str, small: Path, out: Path) -> None:
    (out / "dataset.json").write_text(content)
    assert "dataset.json" in {problem.file for problem in _found(out)}
    repair(out, find_source(str(small.parent / "source")), _found(out), ENGINE)
    assert _found(out) == []


@pytest.mark.parametrize("again", ["repair", "shard"])
def test_a_shard_is_never_made_of_other_images(again: str, small: Path, out: Path, tmp_path: Path) -> None:
    """The same names, other pixels: a set of both would pass for sound."""
    source = tmp_path / "source"
    shutil.copytree(small.parent / "source", source)
    photos = sorted(source.rglob("[0-9].jpg"))
    for path, other in zip(photos, photos[::-1], strict=True):
        shutil.copy(small.parent / "source" / other.relative_to(source), path)
    for suffix in (".tar", ".idx", ".json"):
        (out / f"train/train-000001{suffix}").unlink()
    before = {path: path.read_bytes() for path in _files(out)}
    options = ShardOptions(Target(size=24), shard_samples=3)
    with pytest.raises(AlexprepError, match=r"train-000001 does not become what .* decodes differently\. Nothing"):
        repair(out, find_source(str(source)), _found(out), ENGINE) if again == "repair" else convert(
            source, out, options, ENGINE
        )
    assert {path: path.read_bytes() for path in _files(out)} == before
    convert(small.parent / "source", out, options, ENGINE)
    assert _found(out) == []


@pytest.mark.parametrize(("decode", "total"), [(False, 2), (True, 6)], ids=["shards", "images"])
def test_progress_counts_what_is_checked(decode: bool, total: int, small: Path) -> None:
    shown: list[tuple[int, int]] = []
    verify(small, LocalEngine(1), decode, lambda *pair: shown.append(pair))
    assert {pair[1] for pair in shown} == {total} and shown == sorted(shown)


def test_an_index_of_tars_belongs_to_their_readers(out: Path) -> None:
    """Reading our shards as other people's tars leaves an index beside them."""
    index_tars(out / "train", "train")
    assert any((out / "train/.alexprep").iterdir()) and _found(out) == []


@pytest.mark.parametrize("given", ["a file", "names"])
def test_repair_needs_no_list_of_classes(
    given: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has the names: the file that gave them may be anywhere, or gone."""
    source, listing = find_source(str(small.parent / "source")), tmp_path / "classes.txt"
    listing.write_text("class1\nclass0\n")
    monkeypatch.chdir(tmp_path)
    labels = "classes.txt" if given == "a file" else ("class1", "class0")
    convert(source, tmp_path / "data", ShardOptions(Target(size=24), labels=labels, shard_samples=3), ENGINE)
    before = {path: path.read_bytes() for path in _files(tmp_path / "data")}
    (tmp_path / "data/train/train-000001.tar").write_bytes(b"")
    listing.unlink()
    repair(tmp_path / "data", source, _found(tmp_path / "data"), ENGINE)
    assert {path: path.read_bytes() for path in _files(tmp_path / "data")} == before


def test_the_command(small: Path, out: Path, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        done = CliRunner().invoke(cli, ["verify", str(out), "--workers", "1", "--json", *words])
        return done.exit_code, json.loads(done.stdout.splitlines()[-1]), done.stderr

    status, document, _ = run()
    assert status == 0 and document["sound"] is True
    tar = out / "train/train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-700])
    status, document, errors = run()
    assert status == 3 and document["problems"][0]["file"] == "train/train-000001.tar" in errors
    status, document, _ = run("--repair", str(small.parent / "source"))
    assert status == 0 and document["repaired_inputs"] == 3
    with pytest.raises(AlexprepError, match="holds no data set"):
        verify(tmp_path, 1)
