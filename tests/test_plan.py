"""A plan: what a release wrote stays readable and resumable, whatever options later ones have."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from alexprep.cli.main import cli
from alexprep.shards import conversion, dataset_format
from alexprep.shards import plan as plans
from alexprep.shards.conversion import convert, make_plan
from alexprep.shards.dataset_format import INDEX_DTYPE, INDEX_DTYPES, read_dataset, read_index
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import Listing
from alexprep.shards.plan import DEFAULTS, ShardOptions, draw_up, options_of
from alexprep.shards.sample_reader import Samples
from alexprep.shards.sources import base
from alexprep.shards.sources.base import Choices
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.storage import LocalFiles, digest_json, json_bytes
from alexprep.shards.verification import repair, verify
from alexprep.shards.worker_pool import InProcessEngine

RELEASED = Path(__file__).parent / "fixtures" / "release-0.1.0"
PHOTOS, ENGINE = RELEASED / "photos", InProcessEngine()
OPTIONS = ShardOptions(Target(size=64), shard_samples=4)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document


@pytest.fixture(autouse=True)
def _its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoders that the release was made with, whichever are installed: other ones would be refused, and rightly."""
    recorded = _json(RELEASED / "alexprep-data/plan.json")["versions"]
    monkeypatch.setattr(plans, "versions", lambda *names: {name: recorded.get(name, "1.9.0") for name in names})


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A copy of the dataset that release 0.1.0 finished."""
    return Path(shutil.copytree(RELEASED / "alexprep-data", tmp_path / "data"))


def test_what_release_0_1_0_finished_is_sound_and_left_alone(released: Path) -> None:
    before = _files(released)
    assert verify(released, ENGINE, decode=True).problems == []
    assert options_of(_json(released / "plan.json")) == replace(OPTIONS, metadata="none")
    report = convert(PHOTOS, released, OPTIONS, ENGINE)
    assert (report.made_inputs, report.inputs, report.written) == (0, 19, 18)
    assert _files(released) == before


def test_what_release_0_1_0_left_unfinished_is_finished(tmp_path: Path) -> None:
    """Its pixels may be another decoder's; all else is what that release would have made."""
    out = Path(shutil.copytree(RELEASED / "partial", tmp_path / "out"))
    kept = _files(out)
    assert 0 < convert(PHOTOS, out, OPTIONS, ENGINE).made_inputs < 19
    assert verify(out, ENGINE).problems == []
    assert {name: content for name, content in _files(out).items() if name in kept} == kept
    for split in ("train", "val"):
        theirs, ours = (Samples(folder, split) for folder in (RELEASED / "alexprep-data", out))
        assert theirs.labels.tolist() == ours.labels.tolist()
        # The index stays as that release reads it; here it is filled up.
        assert np.load(out / split / "index.npy").dtype == INDEX_DTYPES[1]
        assert read_index(out, split).dtype == INDEX_DTYPE and ours.common_size == OPTIONS.target.common_size


def test_a_recorded_shard_that_is_not_made_again_may_be_of_other_rules(released: Path, tmp_path: Path) -> None:
    """Among the reasons is that the earlier release read damaged and odd files otherwise, where it was one that did."""
    source = Path(shutil.copytree(PHOTOS, tmp_path / "source"))
    photos = sorted(source.glob("train/bars/*.JPEG"))
    photos[0].write_bytes(photos[0].read_bytes()[:-300] + b"\xff\xd9")
    for file in (released / "train").glob("train-*"):
        file.unlink()
    with pytest.raises(AlexprepError, match=r"does not become what .* records: .* had other rules: that release makes"):
        convert(source, released, OPTIONS, ENGINE)


def test_a_released_default_never_changes() -> None:
    """An option that is new has its line here; what stands here stays."""
    assert DEFAULTS == {
        "size": 256,
        "filter": "area",
        "format": "jpg",
        "reencode": "needed",
        "quality": 95,
        "subsampling": "420",
        "orient": False,
        "device": "cpu",
        "seed": 0,
        "labels": "auto",
        "limit": None,
        "class_names": None,
        "on_damaged": None,
        "fit": None,
        "only_shrink": None,
        "lossless": None,
        "webp_method": None,
        "pad": None,
        "decode": None,
        "metadata": None,
    }
    assert ShardOptions().shard_samples is None


def _with_options(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Makes the dataset one whose release had other options: plan.json, and whatever names the plan."""
    plan, dataset = _json(folder / "plan.json"), _json(folder / "dataset.json")
    change(plan["options"])
    (folder / "plan.json").write_bytes(json_bytes(plan))
    for path in folder.glob("*/*-*.json"):
        path.write_bytes(json_bytes(_json(path) | {"plan": digest_json(plan)}, None))
    dataset |= {"plan": digest_json(plan), "options": plan["options"]}
    (folder / "dataset.json").write_bytes(json_bytes(dataset))


@pytest.mark.parametrize("change", [{"reencode": ...}, {"limit": ...}, {"newer": None}, {"newer": False}], ids=str)
def test_an_option_at_its_default_counts_as_absent(change: dict[str, Any], released: Path) -> None:
    """Whether an older release did not have it yet, or a later one has it. The plan stays as it was written."""

    def as_another_release(options: dict[str, Any]) -> None:
        options |= change
        for name in [name for name, value in options.items() if value is ...]:
            del options[name]

    _with_options(released, as_another_release)
    before = _files(released)
    assert verify(released, ENGINE).problems == []
    assert convert(PHOTOS, released, OPTIONS, ENGINE).made_inputs == 0
    assert _files(released) == before
    # The shard is made anew of what was decoded here, so nothing may have recorded its bytes.
    for name in ("train/train-000001.json", "dataset.json"):
        (released / name).unlink()
    assert convert(PHOTOS, released, OPTIONS, ENGINE).made_inputs == 4
    assert verify(released, ENGINE).problems == []
    plan = (released / "plan.json").read_bytes()
    assert plan == before["plan.json"]
    (released / "plan.json").write_bytes(b"{")
    repair(released, find_source(str(PHOTOS)), verify(released, ENGINE).problems, ENGINE)
    assert (released / "plan.json").read_bytes() == plan and verify(released, ENGINE).problems == []


def test_an_unknown_option_is_refused_in_words(released: Path) -> None:
    _with_options(released, lambda options: options.update(newer=3))
    before = _files(released)
    assert verify(released, ENGINE).problems == []  # what was recorded can be checked all the same
    with pytest.raises(AlexprepError, match="begun differently: --newer was 3, which this alexprep does not know"):
        convert(PHOTOS, released, OPTIONS, ENGINE)
    with pytest.raises(AlexprepError, match="made with --newer 3, which this alexprep does not know: use the release"):
        repair(released, find_source(str(PHOTOS)), [], ENGINE)
    assert _files(released) == before


def test_a_release_goes_on_with_what_another_of_the_same_bytes_began(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, recorded = _files(released), read_dataset(released)["versions"]
    monkeypatch.setattr(plans, "versions", lambda *names: recorded | {"alexprep": "0.9.0"})
    with pytest.raises(AlexprepError, match=r"alexprep was 0\.1\.0, now is 0\.9\.0"):
        convert(PHOTOS, released, OPTIONS, ENGINE)
    monkeypatch.setattr(dataset_format, "_SAME_SHARDS", ("0.1.0", "0.9.0"))
    assert convert(PHOTOS, released, OPTIONS, ENGINE).made_inputs == 0
    assert _files(released) == before


def _without_account(listing: Listing, options: ShardOptions) -> tuple[dict[str, Any], list[pa.Table]]:
    document, tables = draw_up(listing, options)
    return {key: value for key, value in document.items() if key not in ("account", "choices")}, tables


def _as_earlier(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, choices: Choices = base.NO_CHOICES) -> None:
    """A dataset as releases made it that numbered all names by their bytes, had no account, and asked nothing."""
    with monkeypatch.context() as then:
        then.setattr(base, "sorted_names", lambda present: sorted(present, key=str.encode))
        then.setattr(conversion, "draw_up", _without_account)
        convert(find_source(str(source), "folders", choices), out, OPTIONS, ENGINE)


def _class_folders(root: Path, names: Iterable[str]) -> Path:
    photos = sorted(PHOTOS.glob("train/*/*.JPEG"))[:2]
    for n, name in enumerate(names):
        (root / name).mkdir(parents=True)
        shutil.copy(photos[n % 2], root / name / f"{n}.jpg")
    return root


def test_classes_are_numbered_as_the_release_did_that_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = _class_folders(tmp_path / "source", map(str, range(11))), tmp_path / "out"
    _as_earlier(source, out, monkeypatch)
    before = _files(out)
    assert _json(out / "plan.json")["classes"][:3] == ["0", "1", "10"]
    seen: list[Listing] = []
    assert convert(source, out, OPTIONS, ENGINE, announce=seen.append).made_inputs == 0
    assert seen[0].classes == _json(out / "plan.json")["classes"]
    assert not any("numbered in their order" in sentence for sentence in seen[0].account.warnings)
    assert _files(out) == before
    next(out.glob("train/*.tar")).unlink()
    repair(out, find_source(str(source)), verify(out, ENGINE).problems, ENGINE)
    assert _files(out) == before
    (out / "plan.json").unlink()  # dataset.json tells it too
    repair(out, find_source(str(source)), verify(out, ENGINE).problems, ENGINE)
    assert _files(out) == before
    assert convert(source, tmp_path / "new", OPTIONS, ENGINE, announce=seen.append).made_inputs == 11
    assert seen[1].classes == list(map(str, range(11)))
    assert any("numbered in their order" in sentence for sentence in seen[1].account.warnings)
    with pytest.raises(AlexprepError, match="begun differently: --labels was auto, now is sorted"):
        convert(source, out, replace(OPTIONS, labels="sorted"), ENGINE)
    (source / "10").rename(source / "11")
    with pytest.raises(
        AlexprepError, match=r"begun differently: the files in SOURCE have changed \(11 inputs then, 11"
    ):
        convert(source, out, OPTIONS, ENGINE)


@pytest.mark.parametrize("first", [base.NO_CHOICES, Choices(class_depth=1)], ids=["found", "chosen"])
def test_another_choice_that_reads_the_same_goes_on(first: Choices, tmp_path: Path) -> None:
    source, out = _class_folders(tmp_path / "source", ["cat", "dog"]), tmp_path / "out"
    convert(find_source(str(source), choices=first), out, OPTIONS, ENGINE)
    before = _files(out)
    for choices in (Choices(class_depth=1), Choices(class_depth="leaf"), Choices((), 1), base.NO_CHOICES):
        assert convert(find_source(str(source), choices=choices), out, OPTIONS, ENGINE).made_inputs == 0
    assert convert(source, out, replace(OPTIONS, class_names="exact"), ENGINE).made_inputs == 0
    assert _files(out) == before


def test_a_choice_that_reads_otherwise_is_named(tmp_path: Path) -> None:
    source = _class_folders(tmp_path / "source", ["a/cat", "a/dog", "b/cat", "b/owl"])
    convert(find_source(str(source), choices=Choices(class_depth=1)), tmp_path / "out", OPTIONS, ENGINE)
    words = r"SOURCE was read with --class-depth 1, now with --class-depth 2; the files in SOURCE have changed \(4 "
    with pytest.raises(AlexprepError, match=f"begun differently: {words}"):
        convert(find_source(str(source), choices=Choices(class_depth=2)), tmp_path / "out", OPTIONS, ENGINE)


def test_what_is_a_question_now_is_repaired_with_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a release that asked nothing, and so recorded no choice."""
    source, out = _class_folders(tmp_path / "source", ["images/a", "images/b", "label/c"]), tmp_path / "out"
    _as_earlier(source, out, monkeypatch, Choices(class_depth=1))
    before = _files(out)
    next(out.glob("train/*.tar")).unlink()

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["verify", str(out), "--workers", "1", *words])
        return done.exit_code, done.stderr + str(done.exception or "")

    status, said = run("--repair", str(source))
    assert status != 0 and "--class-depth 1" in said
    assert run("--repair", str(source), "--class-depth", "2")[0] != 0 and _files(out) != before
    assert run("--repair", str(source), "--class-depth", "1")[0] == 0
    assert _files(out) == before
    status, said = run("--class-depth", "1")
    assert status == 2 and "--class-depth says what SOURCE is: it needs --repair SOURCE" in said


def test_a_worker_that_sees_another_folder_or_source_is_named(tmp_path: Path) -> None:
    """/proc/self/fd/N is a folder that only this process has, as another machine's disk would be."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    here = f"/proc/self/fd/{descriptor}"
    try:
        with pytest.raises(AlexprepError, match=f"does not see {here}/out/plan.json as .* does"):
            convert(PHOTOS, Path(f"{here}/out"), OPTIONS, 1)
        shutil.copytree(PHOTOS, tmp_path / "source")
        source = replace(find_source(str(tmp_path / "source")), files=LocalFiles(f"{here}/source".encode()))
        words = r"does not see /proc/.* as .* does \(\d+ bytes there, FileNotFoundError"
        with pytest.raises(AlexprepError, match=words):
            convert(source, tmp_path / "out", OPTIONS, 1)
    finally:
        os.close(descriptor)


def test_another_machine_with_other_software_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(PHOTOS, tmp_path, OPTIONS, ENGINE)
    source = find_source(str(PHOTOS))
    plan = make_plan(source, OPTIONS, tmp_path)
    check = replace(plans.MachineCheck.prepared_here(plan, source, plan.table()), machine="elsewhere")
    check.run()
    monkeypatch.setattr(plans, "versions", lambda *names: dict.fromkeys(names, "0.0.1"))
    with pytest.raises(AlexprepError, match=r"is 0\.0\.1 on .*, .* on elsewhere: install the same version"):
        check.run()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target": Target(size=0)}, "--size 0"),
        ({"target": Target(quality=101)}, "--quality 101"),
        ({"seed": -1}, "--seed -1"),
        ({"shard_samples": 0}, "--shard-samples 0"),
        ({"limit": 0}, "--limit 0"),
    ],
)
def test_options_out_of_bounds(values: dict[str, object], words: str) -> None:
    with pytest.raises(AlexprepError, match=words):
        ShardOptions(**values)  # type: ignore[arg-type]
