"""Sharding as a whole: the same bytes always, nothing lost, readable by others."""

from __future__ import annotations

import collections
import errno
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest

from alexprep.shards import shard_writer
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import INDEX_DTYPE, read_dataset, read_index
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.storage import LocalFiles
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine
from tests.source_checks import make_idx

OPTIONS = ShardOptions(Target(size=64), shard_samples=7)
ENGINE = InProcessEngine()


def fingerprint(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder but for the statistics, which `data` alone has."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "stats")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@pytest.fixture
def out(data: Path, tmp_path: Path) -> Path:
    """A copy of `data` without statistics."""
    return Path(shutil.copytree(data, tmp_path / "out", ignore=shutil.ignore_patterns("stats")))


def test_bytes_do_not_depend_on_the_number_of_workers(photos: Path, data: Path, tmp_path: Path) -> None:
    for name, engine in (("none", ENGINE), ("two", 2), ("three", 3)):
        convert(photos, tmp_path / name, OPTIONS, engine)
        assert fingerprint(tmp_path / name) == fingerprint(data)


def test_a_finished_set_is_left_alone(photos: Path, out: Path) -> None:
    def touched() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}

    before = touched()
    assert convert(photos, out, OPTIONS, ENGINE).made_inputs == 0
    assert touched() == before


@pytest.mark.parametrize(
    "damage",
    [
        *("no train/train-000003.json", "no train/train-000003.tar", "no train/train-000003.idx"),
        *("cut train/train-000003.tar", "no dataset.json", "cut dataset.json"),
        *("no train/index.npy", "cut train/index.npy"),
    ],
)
def test_a_rerun_does_only_what_is_missing(damage: str, photos: Path, out: Path) -> None:
    good = fingerprint(out)
    how, name = damage.split()
    if how == "no":
        (out / name).unlink()
    else:
        os.truncate(out / name, (out / name).stat().st_size - 512 if name.endswith(".tar") else 40)
    report = convert(photos, out, OPTIONS, ENGINE)
    assert report.made_inputs == (7 if "train-000003" in name else 0)
    assert fingerprint(out) == good


@pytest.mark.parametrize("change", [{"samples": None}, {"members": {}}, {"inputs": [1]}, {"more": 1}, {"inputs": []}])
def test_a_damaged_sidecar_is_named(change: dict[str, Any], photos: Path, out: Path) -> None:
    mark = out / "train" / "train-000003.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | change))
    with pytest.raises(AlexprepError, match=r"train-000003\.json (has other fields|is damaged|lists [01] of 7)"):
        convert(photos, out, OPTIONS, ENGINE)


def test_a_colon_in_a_name_makes_no_url(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert(photos, Path("imagenet:256"), ShardOptions(Target(size=16), limit=2), ENGINE)
    assert verify(Path("imagenet:256"), ENGINE).problems == []


def test_other_options_and_inputs_are_refused_and_named(photos: Path, data: Path, tmp_path: Path) -> None:
    for options, words in (
        (replace(OPTIONS, target=Target(size=64, quality=90)), "--quality was 95, now is 90"),
        (replace(OPTIONS, shard_samples=8), "--shard-samples was 7, now is 8"),
        (replace(OPTIONS, limit=3), "--limit was not given, now is 3"),
    ):
        with pytest.raises(AlexprepError, match=words):
            convert(photos, data, options, ENGINE)
    shutil.copytree(photos, tmp_path / "more")
    shutil.copy(tmp_path / "more/train/class0/000.JPEG", tmp_path / "more/train/class0/999.JPEG")
    with pytest.raises(AlexprepError, match="68 inputs then, 69 now"):
        convert(tmp_path / "more", data, OPTIONS, ENGINE)


def test_every_input_is_accounted_for(photos: Path, tmp_path: Path) -> None:
    """Written, rejected with a reason or passed over by a rule, each once: 9 of the odd files must be rejected."""
    root, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(photos, root)
    good = (root / "train/class0/000.JPEG").read_bytes()
    odd = root / "train/class1"
    (odd / "truncated.JPEG").write_bytes(good[: len(good) // 2])
    (odd / "empty.JPEG").write_bytes(b"")
    (odd / "note.txt").write_text("not an image")
    (odd / ".hidden.JPEG").write_bytes(good)
    (odd / "nested" / "deeper").mkdir(parents=True)
    (odd / "nested" / "deeper" / "fine.JPEG").write_bytes(good)
    (odd / "link.JPEG").symlink_to(root / "train/class0/000.JPEG")
    (odd / "dangling.JPEG").symlink_to(root / "nowhere")
    (odd / "loop").symlink_to(root)
    os.mkfifo(odd / "pipe.JPEG")
    for name in (b"new\nline.JPEG", b"-rf.JPEG", b"\xff\xfe.JPEG", b"a b'\".JPEG", b"x" * 240 + b".JPEG"):
        with open(os.path.join(os.fsencode(odd), name), "wb") as file:
            file.write(good)
    for n in range(5):
        (root / "val/class2" / f"junk{n}.jpg").write_bytes(os.urandom(50))
    report = convert(root, out, OPTIONS, 2)
    ledger = [row for file in out.glob("*/samples.parquet") for row in pq.read_table(file).to_pylist()]
    assert report.inputs == len(ledger) == 68 + 16
    assert report.written == sum(row["status"] == "written" for row in ledger) == 68 + 7
    assert report.rejected.total() == 9
    passed_over = {
        rule.split(":")[0].split(",")[0]: (passed.count, passed.names) for rule, passed in report.passed_over.items()
    }
    assert passed_over == {
        "hidden": (1, ["train/class1/.hidden.JPEG"]),
        "a link to a folder": (1, ["train/class1/loop"]),
        "no picture by its ending": (1, ["train/class1/note.txt"]),
    }
    assert read_dataset(out)["account"]["found"] == report.written + report.rejected.total() + 3
    sources = [row["source"] for row in ledger]
    assert len(set(sources)) == len(sources)
    reasons = {row["source"].rpartition("/")[2]: row["reason"] for row in ledger if row["status"] == "rejected"}
    assert "truncated" in reasons["truncated.JPEG"]
    assert reasons["empty.JPEG"] == "empty file"
    assert "No such file" in reasons["dangling.JPEG"]
    assert "regular file" in reasons["pipe.JPEG"]
    assert not any("hidden" in source or "/loop/" in source for source in sources)
    written = {row["source"].rpartition("/")[2]: row for row in ledger if row["status"] == "written"}
    assert {"new\nline.JPEG", "-rf.JPEG", "\\xff\\xfe.JPEG", "fine.JPEG", "link.JPEG"} <= written.keys()
    assert (written["000.JPEG"]["width"], written["000.JPEG"]["height"]) in {(90, 61), (61, 90)}


def test_a_shard_of_rejects_only_has_no_tar(tmp_path: Path, photos: Path) -> None:
    source = tmp_path / "source" / "junk"
    source.mkdir(parents=True)
    with pytest.raises(AlexprepError, match="holds no class folders"):
        convert(tmp_path / "source", tmp_path / "nothing", OPTIONS, ENGINE)
    for n in range(9):
        (source / f"{n}.jpg").write_bytes(b"junk")
    with pytest.raises(AlexprepError, match="none of the 9 inputs is a usable image"):
        convert(tmp_path / "source", tmp_path / "nothing", OPTIONS, ENGINE, max_rejects="100%")
    shutil.copy(photos / "train/class0/000.JPEG", source)
    options = ShardOptions(Target(size=64), shard_samples=1)
    report = convert(tmp_path / "source", tmp_path / "one", options, ENGINE, max_rejects=9)
    assert (report.written, report.rejected.total()) == (1, 9)
    assert len(list((tmp_path / "one/train").glob("*.tar"))) == 1
    assert len(list((tmp_path / "one/train").glob("train-*.json"))) == 10
    assert len(Samples(tmp_path / "one", "train")) == 1


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(photos: Path, data: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL to the command alone (its workers must notice) or to the whole group, each time after another shard or more."""
    rng = random.Random(seed)
    command = [sys.executable, "-m", "alexprep.cli", "shard", str(photos), "--out", str(tmp_path / "out")]
    command += ["--size", "64", "--shard-samples", "7", "--workers", "2"]
    statuses, deadline = [], time.monotonic() + 300
    for attempt in range(2):
        finished = len(list(tmp_path.glob("out/*/*.json")))
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while len(list(tmp_path.glob("out/*/*.json"))) <= finished and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL) if attempt % 2 else os.killpg(process.pid, signal.SIGKILL)
        statuses.append(process.wait(timeout=300))
    assert statuses == [-signal.SIGKILL] * 2
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert fingerprint(tmp_path / "out") == fingerprint(data)


@pytest.mark.usefixtures("cold_processes")
def test_ctrl_c_ends_all_and_leaves_no_temporary(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "alexprep.cli", "shard", str(photos), "--out", str(out), "--size", "64"]
    process = subprocess.Popen(
        [*command, "--shard-samples", "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("train/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (130, 0), errors  # 0 if it was done just then
    assert b"Traceback" not in errors
    report = convert(photos, out, ShardOptions(Target(size=64), shard_samples=4), ENGINE)
    assert report.written == 68
    assert not [path for path in out.rglob("*") if ".tmp-" in path.name]


@pytest.mark.parametrize(
    ("code", "times", "outcome"),
    [
        (errno.EIO, 2, "written"),
        (errno.ESTALE, 2, "written"),
        (errno.EIO, 99, "rejected"),
        (errno.ENOENT, 1, "rejected"),
        (errno.ESTALE, 99, "stopped"),
        (errno.ENOMEM, 99, "stopped"),
    ],
)
def test_a_failing_disk_costs_no_image(
    code: int, times: int, outcome: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes is waited for; what does not pass stops the run, unless it is the file's own fault."""
    left = {b"train/class1/001.JPEG": times}
    read = LocalFiles.read

    def failing(self: LocalFiles, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        if left.get(path, 0):
            left[path] -= 1
            raise OSError(code, os.strerror(code))
        return read(self, path, offset, size)

    monkeypatch.setattr(LocalFiles, "read", failing)
    monkeypatch.setattr(shard_writer, "PAUSES", (0.0, 0.0))
    if outcome == "stopped":
        words = r"train/class1/001\.JPEG cannot be read .* mend the disk or the network"
        with pytest.raises(AlexprepError, match=words):
            convert(photos, tmp_path, OPTIONS, ENGINE)
        left.clear()
        assert convert(photos, tmp_path, OPTIONS, ENGINE).written == 68
    else:
        report = convert(photos, tmp_path, OPTIONS, ENGINE)
        assert (report.written, report.rejected.total()) == ((68, 0) if outcome == "written" else (67, 1))


@pytest.mark.parametrize("gone", ["root", "all below the root", "a mount point", "a linked folder", "the archive"])
def test_a_source_that_goes_away_costs_no_image(
    gone: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOENT is the file's own fault only while its folder is there. When the source is back, the run goes on."""
    monkeypatch.setattr(shard_writer, "PAUSES", (0.0, 0.0))
    source, away = tmp_path / "source", tmp_path / "away"
    shutil.copytree(photos, source)
    if gone == "the archive":
        with tarfile.open(tmp_path / "photos.tar", "w") as tar:
            tar.add(source, "photos")
        source = tmp_path / "photos.tar"
    elif gone == "a linked folder":
        (source / "train/class1").rename(tmp_path / "disk")
        (source / "train/class1").symlink_to(tmp_path / "disk")
    hidden = {
        "all below the root": [source / "train", source / "val"],
        "a mount point": [source / "train" / f"class{n}" for n in range(4)],
        "a linked folder": [tmp_path / "disk"],
    }.get(gone, [source])
    read, left = LocalFiles.read, [20]

    def vanishing(self: LocalFiles, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        left[0] -= 1
        if not left[0]:
            away.mkdir()
            for n, path_there in enumerate(hidden):
                path_there.rename(away / str(n))
        return read(self, path, offset, size)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "read", vanishing)
        with pytest.raises(AlexprepError, match=r"cannot be read .*No such file.* mend the disk or the network"):
            convert(source, out, OPTIONS, ENGINE)
    for n, path_there in enumerate(hidden):
        (away / str(n)).rename(path_there)
    assert convert(source, out, OPTIONS, ENGINE).written == 68


def test_a_listed_file_that_never_was_is_rejected(photos: Path, tmp_path: Path) -> None:
    """Also with its folder: a list may name anything."""
    shutil.copytree(photos / "train/class0", tmp_path / "source/there")
    names = sorted(path.name for path in (tmp_path / "source/there").iterdir())
    rows = ["path,label", *(f"there/{name},a" for name in names), "there/never.jpg,a", "nowhere/never.jpg,a"]
    (tmp_path / "source/list.csv").write_text("\n".join(rows) + "\n")
    report = convert(tmp_path / "source/list.csv", tmp_path / "out", OPTIONS, ENGINE)
    assert (report.written, report.rejected.total()) == (len(names), 2)


def test_each_writer_begins_at_a_shard_of_its_own(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers on many machines all have the same process id."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    first = []

    class Looking(InProcessEngine):
        def run(self, task: Any, arguments: Any, progress: Any = None) -> Any:
            first.append(arguments[0][0])
            raise InterruptedError("enough")

    for _ in range(20):
        with pytest.raises(AlexprepError, match="enough"):
            convert(photos, tmp_path / "out", ShardOptions(Target(size=64), shard_samples=1), Looking())
    assert len(set(first)) > 5


def test_inputs_are_shuffled_globally(data: Path) -> None:
    """No shard holds the classes in the order of the folders, and each split has its own order."""
    labels = read_index(data, "train")["label"]
    assert sorted(labels.tolist()) == sorted(list(range(4)) * 12)
    assert (np.diff(labels[:7]) != 0).any()


def test_limit_takes_a_subset(photos: Path, tmp_path: Path) -> None:
    options = ShardOptions(Target(size=64), limit=5)
    assert convert(photos, tmp_path / "out", options, ENGINE).samples == {"train": 5, "val": 5}
    # One tree is for training.
    assert convert(photos / "val", tmp_path / "val", options, ENGINE).samples == {"train": 5}
    assert read_dataset(tmp_path / "val")["classes"] == ["class0", "class1", "class2", "class3"]


def test_a_source_s_own_shards_are_never_written_over(photos: Path, data: Path, tmp_path: Path) -> None:
    """A webdataset in train/ and val/, and class folders with a flat val, into the folder that holds them."""
    shutil.copytree(data, tmp_path / "wds", ignore=shutil.ignore_patterns("*.json", "*.idx", "*.parquet", "*.npy"))
    shutil.copytree(photos / "train", tmp_path / "flat/train")
    (tmp_path / "flat/val").mkdir()
    shutil.copy(photos / "val/class0/000.JPEG", tmp_path / "flat/val/000.JPEG")
    (tmp_path / "flat/val.txt").write_text("000.JPEG 0\n")
    for name in ("wds", "flat"):
        before = fingerprint(tmp_path / name)
        with pytest.raises(AlexprepError, match=f"would put shards into .*{name}/train, which lies among the images"):
            convert(tmp_path / name, tmp_path / name, OPTIONS, ENGINE)
        assert fingerprint(tmp_path / name) == before
    assert convert(tmp_path / "wds", tmp_path / "wds/alexprep-data", OPTIONS, ENGINE).inputs == 68


def test_a_plan_table_with_other_rows_is_never_worked_on(photos: Path, out: Path, tmp_path: Path) -> None:
    """It is written anew while no shard counts; afterwards nobody can tell what the shards were made from."""
    good, table = fingerprint(out), out / "plan.parquet"
    with pq.ParquetFile(table) as file, pq.ParquetWriter(tmp_path / "flipped", file.schema_arrow) as writer:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group)
            labels = rows["label"].to_numpy() ^ (group == 3)
            writer.write_table(rows.set_column(3, rows.schema.field(3), [labels]))
    shutil.copy(tmp_path / "flipped", table)
    with pytest.raises(AlexprepError, match=r"plan\.parquet has other rows .* mend it with `alexprep verify"):
        convert(photos, out, OPTIONS, ENGINE)
    (out / "dataset.json").unlink()
    with pytest.raises(AlexprepError, match="shards may have been made from it: shard again into a new --out"):
        convert(photos, out, OPTIONS, ENGINE)
    for sidecar in out.glob("*/*-*.json"):
        sidecar.unlink()
    convert(photos, out, OPTIONS, ENGINE)
    assert fingerprint(out) == good


def test_a_plan_table_without_its_plan_is_replaced(photos: Path, data: Path, out: Path, tmp_path: Path) -> None:
    """Someone deletes plan.json alone and starts again with other inputs; or an unreadable table is all there is."""
    (out / "plan.json").unlink()
    for folder in (out, tmp_path / "new"):
        assert convert(photos, folder, replace(OPTIONS, seed=1), ENGINE).made_inputs == 68
    assert fingerprint(out) == fingerprint(tmp_path / "new")
    (tmp_path / "third").mkdir()
    (tmp_path / "third/plan.parquet").write_bytes(b"PAR1 nothing PAR1")
    convert(photos, tmp_path / "third", OPTIONS, ENGINE)
    assert pq.read_table(tmp_path / "third/plan.parquet").equals(pq.read_table(data / "plan.parquet"))


# Other people's readers.


def _members(data: Path, split: str) -> dict[str, bytes]:
    members = {}
    for shard in sorted((data / split).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert (member.mtime, member.uid, member.gid, member.mode, member.pax_headers) == (0, 0, 0, 0o444, {})
                members[member.name] = file.read()
    return members


def test_index_equals_wds2idx(data: Path, tmp_path: Path) -> None:
    for shard in sorted(data.glob("*/*.tar")):
        theirs = make_idx(Path(shutil.copy(shard, tmp_path)))
        assert theirs.read_bytes() == shard.with_suffix(".idx").read_bytes()


def test_index_npy_points_at_the_members(data: Path) -> None:
    members, samples = list(_members(data, "train").values()), Samples(data, "train")
    index = read_index(data, "train")
    assert index.dtype == INDEX_DTYPE and len(index) == 48
    assert [samples.encoded(row).tobytes() for row in range(48)] == members[::2]
    assert samples.labels.tolist() == list(map(int, members[1::2]))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(data: Path) -> None:
    import webdataset as wds

    urls = [str(path) for path in sorted((data / "train").glob("*.tar"))]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls")
    seen = list(dataset)
    gc.collect()  # webdataset leaves the shards open, which Python notices only now
    assert len(seen) == 48 and all(image.shape == (64, 64, 3) for image, _ in seen)
    assert [label for _, label in seen] == read_index(data, "train")["label"].tolist()


def test_dali_s_own_reader_reads_the_shards(data: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    tars = sorted(str(path) for path in (data / "train").glob("*.tar"))

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def read():
        indexes = [tar.removesuffix(".tar") + ".idx" for tar in tars]
        options: Any = {"index_paths": indexes, "ext": ["jpg", "cls"], "missing_component_behavior": "error"}
        return tuple(cast("Any", fn.readers.webdataset(paths=tars, **options)))

    pipeline = read()
    found = [bytes(part.at(n)) for parts in (pipeline.run() for _ in range(8)) for n in range(6) for part in parts]
    assert found == list(_members(data, "train").values())


def test_timm_s_info_names_every_shard(data: Path) -> None:
    """The rule of timm's wds reader: `splits`, with a name, the samples, the files relative to the root, and their lengths."""
    info = json.loads((data / "_info.json").read_text())
    for split in ("train", "val"):
        record = info["splits"][split]
        assert sum(record["shard_lengths"]) == record["num_samples"] == len(Samples(data, split))
        for name, length in zip(record["filenames"], record["shard_lengths"], strict=True):
            with tarfile.open(data / name) as tar:
                stems = collections.Counter(member.name.partition(".")[0] for member in tar)
            assert len(stems) == length and set(stems.values()) == {2}


@pytest.mark.parametrize(
    ("number", "step"), [(errno.EACCES, "see to its permissions"), (errno.ENOSPC, "make room or mend the disk")]
)
def test_what_fails_is_named_with_what_helps(
    number: int, step: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number), b"/photos/train/\xe4")

    monkeypatch.setattr("alexprep.shards.conversion.make_plan", fails)
    words = rf"^/photos/train/\udce4: {os.strerror(number)}: {step}, then run the same command again"
    with pytest.raises(AlexprepError, match=words):
        convert(photos, tmp_path / "out", ShardOptions(), ENGINE)
