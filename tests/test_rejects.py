"""Too many rejects stop what should stop: nothing is published, nothing that is finished is lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from alexprep.shards.conversion import RejectLimit, convert
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.verification import repair, verify
from alexprep.shards.worker_pool import InProcessEngine

OPTIONS = ShardOptions(Target(size=32), shard_samples=5)
ENGINE = InProcessEngine()
BAD, ALL = 6, 20  # inputs


class CountingEngine(InProcessEngine):
    """Counts the shards that were asked for and made."""

    made = 0

    def run(self, task: Any, arguments: Sequence[Any], progress: Any = lambda finished: None) -> Iterator[Any]:
        def counted(argument: Any, condemned: Mapping[int, str]) -> Any:
            self.made += 1
            return task(argument, condemned)

        yield from super().run(counted, arguments, progress)


@pytest.fixture(scope="module")
def table(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows: five pages of a web server, one file that is not there, 14 photos."""
    folder = tmp_path_factory.mktemp("rejects")
    rows = ["path,label"]
    for n in range(ALL):
        if n < BAD - 1:
            (folder / f"{n}.jpg").write_text("<!DOCTYPE html><title>404 Not Found</title>")
        elif n >= BAD:
            shutil.copy(photos / f"train/class{n % 4}/{n:03d}.JPEG", folder / f"{n}.jpg")
        rows.append(f"{n}.jpg,{n % 4}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


@pytest.fixture(scope="module")
def published(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset that comes of it."""
    folder = tmp_path_factory.mktemp("published")
    assert convert(table, folder, OPTIONS, ENGINE).rejected.total() == BAD
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [BAD, str(BAD), "30%", "30.0%", "50%", "100%", 10**6])
def test_as_many_as_are_allowed_are_published(limit: int | str, table: Path, published: Path, tmp_path: Path) -> None:
    shutil.copytree(published, tmp_path / "out")
    (tmp_path / "out/dataset.json").unlink()
    report = convert(table, tmp_path / "out", OPTIONS, ENGINE, max_rejects=limit)
    assert (report.written, report.made_inputs) == (ALL - BAD, 0)
    assert contents(tmp_path / "out") == contents(published)


@pytest.mark.parametrize(("limit", "allowed"), [(BAD - 1, 5), ("29.999%", 5), ("25%", 5), (0, 0), ("0%", 0)])
def test_more_than_are_allowed_are_an_error(
    limit: int | str, allowed: int, table: Path, published: Path, tmp_path: Path
) -> None:
    engine, out = CountingEngine(), tmp_path / "out"
    words = rf"of 20 inputs are rejected, more than the {allowed} that --max-rejects {limit} allows: "
    for _ in range(2):  # the second finds it in what is finished, and makes no more
        with pytest.raises(AlexprepError, match=words) as error:
            convert(table, out, OPTIONS, engine, max_rejects=limit)
        made = contents(out)
        assert not any(name.endswith(("dataset.json", "_info.json", "index.npy", "samples.parquet")) for name in made)
        assert engine.made == len([name for name in made if name.startswith("train/") and name.endswith(".json")])
    assert re.search(r"allows: .* \([1-5], such as [0-5]\.jpg\)", str(error.value)), error.value
    assert "allow more by --max-rejects" in str(error.value)
    report = convert(table, out, OPTIONS, engine, max_rejects="100%")
    assert engine.made == 4 and report.rejected.total() == BAD
    assert contents(out) == contents(published)  # also plan.json: the limit is no part of it


def test_it_stops_as_soon_as_it_is_certain(table: Path, tmp_path: Path) -> None:
    engine = CountingEngine()
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"none-{n}.jpg,0\n" for n in range(80)))
    for expected in (9, 9):
        with pytest.raises(AlexprepError, match=r"45 of 80 inputs are no pictures, .* --max-rejects 50%"):
            convert(tmp_path / "list.csv", tmp_path / "out", OPTIONS, engine)
        assert engine.made == expected == len(list((tmp_path / "out/train").glob("train-*.json")))
    with pytest.raises(AlexprepError, match="none of the 80 inputs is a usable image"):
        convert(tmp_path / "list.csv", tmp_path / "out", OPTIONS, engine, max_rejects="100%")


def test_repair_is_not_stopped(table: Path, tmp_path: Path) -> None:
    lines = table.read_text().splitlines()
    (table.parent / "bad.csv").write_text("\n".join([*lines[:8], ""]))  # 6 of 7 rows are bad
    convert(table.parent / "bad.csv", tmp_path, OPTIONS, ENGINE, max_rejects=6)
    next(tmp_path.glob("train/*.json")).unlink()
    problems = verify(tmp_path, ENGINE).problems
    assert problems
    repair(tmp_path, find_source(str(table.parent / "bad.csv")), problems, ENGINE)
    assert not verify(tmp_path, ENGINE).problems


@pytest.mark.parametrize("limit", ["abc", -1, "-1", "101%", "100.1%", "-5%", "%", "", "5 %", "1e3", 0.5, True])
def test_limits_that_make_no_sense_are_refused_before_any_work(limit: Any, table: Path, tmp_path: Path) -> None:
    with pytest.raises(AlexprepError, match=r"--max-rejects .* is neither a number of inputs, .* from 0% to 100%"):
        convert(table, tmp_path / "out", OPTIONS, ENGINE, max_rejects=limit)
    assert not (tmp_path / "out").exists()


def test_shares_are_exact() -> None:
    inputs = 10**9 + 7
    assert RejectLimit.of("0.1%", inputs).count == inputs // 1000 and RejectLimit.of("100%", inputs).count == inputs
    assert RejectLimit.of("33.333333333%", 3).count == 0 and RejectLimit.of("50%", 3).count == 1


def test_the_command_has_the_option(command: Callable[..., tuple[int, str, str]], table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("shard", str(table), "--out", str(out), "--size", "32", "--shard-samples", "5", "--workers", "1")
    status, _, said = command(*arguments, "--max-rejects", "0")  # worker processes are ended in the midst of it
    assert status == 1 and "more than the 0 that --max-rejects 0 allows" in said and "Traceback" not in said
    assert not list(out.glob("train/.*"))
    assert convert(table, out, OPTIONS, ENGINE).rejected.total() == BAD
    assert command(*arguments, "--max-rejects", "abc")[0] == 1


def test_damaged_pictures_count_only_against_a_limit_that_is_given(photos: Path, tmp_path: Path) -> None:
    """The default asks whether SOURCE is what its user takes it for; a cut photo is one."""
    good = (photos / "train/class0/000.JPEG").read_bytes()
    for n in range(6):
        place = tmp_path / f"source/class{n % 2}/{n}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(good if n < 2 else good[: len(good) * 2 // 3])
    report = convert(tmp_path / "source", tmp_path / "out", OPTIONS, ENGINE)
    assert (report.written, report.rejected.total()) == (2, 4)
    with pytest.raises(
        AlexprepError, match="4 of 6 inputs are rejected, more than the 3 that --max-rejects 50% allows"
    ):
        convert(tmp_path / "source", tmp_path / "again", OPTIONS, ENGINE, max_rejects="50%")
    for n in range(2, 6):
        (tmp_path / f"source/class{n % 2}/{n}.jpg").write_bytes(b"<!DOCTYPE html><title>404</title>")
    words = r"4 of 6 inputs are no pictures, more than the 3 that --max-rejects 50% \(the default\) allows"
    with pytest.raises(AlexprepError, match=words):
        convert(tmp_path / "source", tmp_path / "pages", OPTIONS, ENGINE)


def test_classes_that_are_left_without_a_picture_are_named(
    command: Callable[..., tuple[int, str, str]], photos: Path, tmp_path: Path
) -> None:
    good = (photos / "train/class0/000.JPEG").read_bytes()
    for name, bad in (("train/a", 2), ("train/b", 1), ("train/c", 0), ("val/a", 0), ("val/b", 2), ("val/c", 2)):
        (tmp_path / "source" / name).mkdir(parents=True)
        for n in range(2):
            (tmp_path / "source" / name / f"{n}.jpg").write_bytes(b"no image" if n < bad else good)
    words = [
        "no picture left in train: 1 of 3 classes, such as 'a'; all of theirs were rejected",
        "no picture left in val: 2 of 3 classes, such as 'b'; all of theirs were rejected",
    ]
    options = ("--size", "32", "--workers", "1", "--max-rejects", "90%", "--json")
    for _ in range(2):  # also where nothing was missing
        status, said, shown = command("shard", str(tmp_path / "source"), "--out", str(tmp_path / "out"), *options)
        document = json.loads(said.splitlines()[-1])
        assert status == 0 and document["warnings"][-2:] == words and document["rejected"] == 7
        assert "no picture left in val: 2 of 3 classes" in " ".join((said + shown).split())
    assert convert(photos, tmp_path / "sound", OPTIONS, ENGINE).warnings == []
