"""Pictures inside Parquet files: recognised, read group by group, in a stated order; what is damaged or doubtful is told."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import list_inputs
from alexprep.shards.plan import Plan, ShardOptions, grouped_order
from alexprep.shards.sources import grouped
from alexprep.shards.sources.base import Account, Choices
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.sources.parquet_images import ParquetImages
from alexprep.shards.verification import repair, source_of, verify
from alexprep.shards.worker_pool import InProcessEngine, Progress, Task
from tests.source_checks import fails, flipped, pictures, tars

ENGINE = InProcessEngine()
NAMES = ["class2", "class0", "class3", "class1"]  # in no order of their own
PNG = Target(size=64, format="png")
Row = tuple[bytes, str, int]  # bytes, name, label


def hub_table(rows: list[Row], names: list[str] | None = NAMES) -> pa.Table:
    """As `datasets` writes it; without `names`, as pyarrow alone does."""
    images = pa.array(
        [{"bytes": data, "path": name} for data, name, _ in rows], pa.struct([("bytes", "binary"), ("path", "string")])
    )
    table = pa.table({"image": images, "label": pa.array([label for *_, label in rows], pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return (
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}) if names else table
    )


def write_table(path: Path, table: pa.Table, rows: int = 5, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


def rows_of(photos: Path, split: str) -> list[Row]:
    """The pictures of a split of `photos`, as a publisher would mix them."""
    paths = sorted((photos / split).rglob("*.JPEG"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    return [(path.read_bytes(), path.name, NAMES.index(path.parent.name)) for path in paths]


@pytest.fixture(scope="module")
def hub(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` as a repository of the hub has them: train in two files, groups of 5 rows. Not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    rows = rows_of(photos, "train")
    for n in range(2):
        write_table(root / f"data/train-{n:05d}-of-00002.parquet", hub_table(rows[n * 24 : n * 24 + 24]))
    write_table(root / "data/validation-00000-of-00001.parquet", hub_table(rows_of(photos, "val")), compression="none")
    (root / "README.md").write_text("a card")
    return root


class Backwards:
    """Runs tasks from the last to the first, with nothing kept in memory between them, as other workers would."""

    def run(self, task: Task[Any], arguments: Sequence[Any], progress: Progress) -> Iterator[Any]:
        for argument in reversed(arguments):
            grouped._groups.clear()
            yield task(argument, {})


def test_pictures_labels_and_names_are_those_of_class_folders(hub: Path, photos: Path, tmp_path: Path) -> None:
    options = ShardOptions(PNG, shard_samples=7)
    report = convert(hub, tmp_path / "a", options, ENGINE)
    assert report.samples == {"train": 48, "val": 20}
    assert {rule.split(":")[0]: passed.count for rule, passed in report.passed_over.items()} == {
        "no picture by its ending, such as lists, readmes and annotations": 1
    }
    convert(photos, tmp_path / "b", options, ENGINE)
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    assert read_dataset(tmp_path / "a")["classes"] == NAMES
    ledger = pq.read_table(tmp_path / "a/train/samples.parquet").to_pylist()
    truth = {name: label for _, name, label in rows_of(photos, "train")}
    assert {row["source"].rpartition("/")[2]: row["label"] for row in ledger} == truth
    assert verify(tmp_path / "a", ENGINE, decode=True).problems == []


def test_shards_are_the_same_for_any_workers_and_after_any_kill(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of two shards, of which a kill has left one here, and none there."""
    monkeypatch.setattr("alexprep.shards.plan._MANY", 4)
    options = ShardOptions(Target(size=64), shard_samples=6)
    convert(hub, tmp_path / "a", options, ENGINE)
    assert [
        shard.window for shard in Plan(tmp_path / "a", json.loads((tmp_path / "a/plan.json").read_bytes())).each_shard()
    ] == [
        *(0, 0, 1, 1, 2, 2, 3, 3),
        *(0, 1, 2, 3),
    ]
    first = tars(tmp_path / "a")
    for name in ("train-000003", "train-000004", "val-000001"):
        (tmp_path / "a" / name[:-7] / f"{name}.json").unlink()
        (tmp_path / "a" / name[:-7] / f"{name}.tar").unlink()
    assert verify(tmp_path / "a", ENGINE).problems
    repair(tmp_path / "a", source_of(tmp_path / "a", str(hub)), verify(tmp_path / "a", ENGINE).problems, ENGINE)
    convert(hub, tmp_path / "b", options, Backwards())
    assert first == tars(tmp_path / "a") == tars(tmp_path / "b")
    with monkeypatch.context() as patch:  # the window decides the order, so it is in the plan
        patch.setattr("alexprep.shards.plan._MANY", 1)
        with pytest.raises(
            AlexprepError, match="begun differently: the groups in which SOURCE has its inputs have other sizes"
        ):
            convert(hub, tmp_path / "a", options, ENGINE)


@pytest.mark.parametrize("window_bytes", [40_000, 2**28])
def test_each_group_is_read_about_once(
    hub: Path, window_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each window that has a part of it, however few groups are kept in memory: those of one window, and no more."""
    monkeypatch.setattr(grouped, "WINDOW_BYTES", window_bytes)
    monkeypatch.setattr("alexprep.shards.plan._MANY", 1)
    monkeypatch.setattr(ParquetImages, "_kept_bytes", lambda source: max(1, 2 * window_bytes))
    reads: list[tuple[bytes, int]] = []
    real = ParquetImages.read_group

    def counted(source: ParquetImages, path: bytes, number: int) -> pa.ChunkedArray:
        reads.append((path, number))
        return real(source, path, number)

    monkeypatch.setattr(ParquetImages, "read_group", counted)
    convert(hub, tmp_path / "out", ShardOptions(Target(size=64), shard_samples=8), ENGINE)
    plan = Plan(tmp_path / "out", json.loads((tmp_path / "out/plan.json").read_bytes()))
    window = plan.document["splits"]["train"]["window_inputs"]
    rows = pq.read_table(tmp_path / "out/plan.parquet").to_pylist()
    allowed = len({(row["split"], row["row"] // window, row["path"], row["offset"]) for row in rows})
    assert len(set(reads)) == 14 <= len(reads) <= allowed
    if window_bytes == 2**28:
        assert len(reads) == 14 and [len({(s.split, s.window) for s in plan.each_shard()})] == [2]


@pytest.mark.parametrize(("sizes", "window"), [([3, 1, 4, 1, 5, 9, 2], 6), ([100] * 30, 250), ([7], 3), ([2] * 9, 100)])
def test_the_order_of_groups_is_the_stated_one(sizes: list[int], window: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    order = grouped_order((5, 0), groups, window)
    words = [np.random.Philox(np.random.SeedSequence((5, 0, n))).random_raw(len(groups)).tolist() for n in (1, 2)]
    starts = np.cumsum([0, *sizes])
    laid = [
        row for g in sorted(range(len(sizes)), key=lambda g: words[0][g]) for row in range(starts[g], starts[g + 1])
    ]
    want = []
    for begin in range(0, len(laid), window):
        places = range(begin, min(begin + window, len(laid)))
        want += [laid[place] for place in sorted(places, key=lambda place: words[1][place])]
    assert order.tolist() == want
    assert sorted(want) == list(range(len(groups)))


def test_a_damaged_group_costs_its_rows_and_no_others(hub: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    shutil.copytree(hub, root)
    path = root / "data/train-00001-of-00002.parquet"
    table = pq.read_table(path)
    write_table(path, table, write_page_checksum=True)
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
    begin = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
    path.write_bytes(flipped(path.read_bytes(), begin + chunk.total_compressed_size // 2, 3))
    report = convert(root, tmp_path / "out", ShardOptions(Target(size=64), shard_samples=7), ENGINE)
    assert report.samples == {"train": 43, "val": 20}
    ((reason, count),) = report.rejected.items()
    assert reason.startswith("cannot be read: row group N is damaged (") and count == 5
    ledger = pq.read_table(tmp_path / "out/train/samples.parquet").to_pylist()
    lost = {row["source"] for row in ledger if row["status"] == "rejected"}
    assert lost == {f"data/train-00001-of-00002.parquet/row {n}/{table['image'][n]['path']}" for n in range(10, 15)}


def test_rows_without_a_picture_are_rejected_by_name(photos: Path, tmp_path: Path) -> None:
    rows = rows_of(photos, "val")
    table = hub_table([*rows, (b"", "empty.jpg", 0), (b"no picture", "odd.jpg", 1)])
    table = pa.concat_tables([table, table.slice(0, 1).set_column(0, table.field(0), pa.nulls(1, table.field(0).type))])
    report = convert(
        write_table(tmp_path / "some.parquet", table), tmp_path / "out", ShardOptions(Target(size=64)), ENGINE
    )
    assert (
        report.samples == {"train": 20} and report.rejected["cannot be read: the row holds no bytes of a picture"] == 2
    )
    assert report.rejected.total() == 3


def test_what_is_no_whole_set_of_files_is_refused(hub: Path, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    shutil.copytree(hub, root)
    first, second = (root / f"data/train-0000{n}-of-00002.parquet" for n in range(2))
    good = first.read_bytes()
    second.rename(tmp_path / "aside")
    fails(root, "train-00001-of-00002.parquet is missing, with 0 others of 2: download what is missing")
    assert find_source(str(first)).layout == "parquet"
    for content, words in (
        (good[:-100], "train-00001-of-00002.parquet is no Parquet file, or is damaged"),
        (good[: len(good) // 2], "is no Parquet file, or is damaged"),
        (b"", "is empty or no regular file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
    ):
        second.write_bytes(content)
        fails(root, words)
    write_table(second, pa.table({"text": ["a"]}))
    fails(root, "train-00001-of-00002.parquet has no column 'image' of pictures, as other files have")
    write_table(second, hub_table([(b"a", "a", 0)], ["other", "names"]))
    fails(root, "gives the labels in 'label' other names than the first file does")
    write_table(second, hub_table([(b"a", "a", 4)]))
    fails(root, "row 0: the label 4 in 'label' is not between -1 (none) and 3")
    shutil.copy(tmp_path / "aside", second)
    shutil.copy(first, root / "data/train_small-00000-of-00001.parquet")
    fails(root, "holds files of data/train and data/train_small, which both mean 'train'")
    (root / "data/train_small-00000-of-00001.parquet").rename(root / "data/more.parquet")
    fails(root, "data/more.parquet names no split, as other files do")


def test_a_group_too_large_is_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "MAX_GROUP_BYTES", 10_000)
    fails(hub, "above the limit of 10,000 that are read at once: write the file anew in smaller groups")


def asked(place: Path, words: str, *ways: str) -> None:
    with pytest.raises(AmbiguousSourceError, match=words) as question:
        list(find_source(str(place)).inputs(Account()))
    assert tuple(way for way, _ in question.value.ways) == ways


def test_doubts_are_questions_that_columns_and_folders_answer(photos: Path, tmp_path: Path) -> None:
    rows = rows_of(photos, "val")
    table = hub_table(rows)
    for config in ("plain", "augmented"):
        write_table(tmp_path / "two" / config / "train/0000.parquet", table)
    places = [str(tmp_path / "two" / config) for config in ("augmented", "plain")]
    asked(tmp_path / "two", "holds 2 datasets, each in a folder of its own", *(f"SOURCE {place}" for place in places))
    assert {item.split for item in find_source(places[0]).inputs(Account())} == {"train"}
    features = {
        "left": {"_type": "Image"},
        "right": {"_type": "Image"},
        "sound": {"_type": "Audio"},
        "fine": {"_type": "ClassLabel", "names": ["b", "a"]},
        "coarse": {"_type": "ClassLabel", "names": ["x"]},
    }
    columns = {
        "left": table["image"],
        "right": table["image"],
        "sound": table["image"],
        "fine": [n % 2 for n in range(20)],
        "coarse": [0] * 20,
    }
    doubtful = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = write_table(tmp_path / "doubt.parquet", doubtful)
    asked(path, "has 2 columns of pictures", "--columns image=left", "--columns image=right")
    with pytest.raises(AmbiguousSourceError, match="has 2 columns of classes"):
        find_source(str(path), choices=Choices(columns=(("image", "left"),)))
    choices = Choices(columns=(("image", "right"), ("label", "fine")))
    listing = list_inputs(find_source(str(path), choices=choices))
    assert listing.classes == ["b", "a"] and listing.counts("train").tolist() == [10, 10]
    convert(find_source(str(path), choices=choices), tmp_path / "out", ShardOptions(Target(size=64)), ENGINE)
    assert source_of(tmp_path / "out", str(path)).choices == choices
    with pytest.raises(AlexprepError, match=r"--columns label=fein: .* has no such column; it has 'left', 'right'"):
        find_source(str(path), choices=Choices(columns=(("label", "fein"),)))
    with pytest.raises(
        AlexprepError, match="holds no columns, of which --columns image=right,label=fine could speak: leave it out"
    ):
        find_source(str(photos), choices=choices)


def test_class_folders_beside_the_files_are_a_question(hub: Path, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "both"
    shutil.copytree(hub, root)
    shutil.copytree(photos / "train", root / "pictures")
    asked(
        root,
        "has the layout 'parquet', and beside it 48 pictures in 4 folders",
        "--layout parquet",
        "--layout folders",
        "--layout folders --unlabelled",
    )
    report = list_inputs(find_source(str(root), "parquet"))
    assert report.account.passed_over["beside what this layout reads"].count == 48


def test_columns_of_other_makers(photos: Path, tmp_path: Path) -> None:
    rows = rows_of(photos, "val")
    columns: dict[str, Any] = {
        "img": [data for data, *_ in rows],
        "class": [NAMES[label] for *_, label in rows],
        "split": ["train", "valid"] * 10,
    }
    path = write_table(tmp_path / "all.parquet", pa.table(columns))
    listing = list_inputs(find_source(str(path)))
    assert listing.classes == sorted(NAMES)
    assert {split: len(table) for split, table in listing.splits.items()} == {"train": 10, "val": 10}
    source = find_source(str(path))
    for item in source.inputs(Account()):
        data, _, label = rows[int(item.location.member[4:])]
        assert source.read(item.location) == data and item.class_name == NAMES[label]
        assert item.split == ("train", "val")[int(item.location.member[4:]) % 2]
    numbers = pa.table({"image": columns["img"], "y": [7] * 20}).cast(
        pa.schema([("image", pa.large_binary()), ("y", pa.uint8())])
    )
    assert list_inputs(find_source(str(write_table(tmp_path / "test.parquet", numbers)))).classes == [
        str(n) for n in range(8)
    ]
    for values, words in (
        ([1.5] * 20, "row 0: the label 1.5 is no whole number"),
        ([{"a": 1}] * 20, "but a label is a text or a whole number: name another with --columns label=NAME"),
        ([10**6 + 1] * 20, "row 0: the label 1000001 is above 1,000,000"),
        (["a", "b", "a, b"] + ["a"] * 17, "the cell 'a, b' gives one image several labels"),
        ([[1, 2]] * 20, "gives one picture several labels"),
        ([-2] * 20, "row 0: the label -2 is below 0"),
        (["a|b"] * 20, "row 0: the cell 'a|b' gives one image several labels"),
    ):
        fails(write_table(tmp_path / "odd.parquet", pa.table({"image": columns["img"], "label": values})), words)
    columns["split"] = ["fold 1"] * 20
    fails(write_table(path, pa.table(columns)), "row 0: the split 'fold 1' is not one of train")


def test_rows_without_labels(photos: Path, tmp_path: Path) -> None:
    rows = rows_of(photos, "val")
    none = [(data, name, -1) for data, name, _ in rows]
    write_table(tmp_path / "train.parquet", hub_table([*rows, *none[:3]]))
    write_table(tmp_path / "test.parquet", hub_table(none))
    listing = list_inputs(find_source(str(tmp_path)))
    assert {split: len(table) for split, table in listing.splits.items()} == {"train": 20, "test": 20}
    assert set(listing.label_of[listing.splits["test"]["class"].to_numpy()].tolist()) == {-1}
    assert [(rule[:20], passed.count) for rule, passed in listing.account.passed_over.items()] == [
        ("a row without a labe", 3)
    ]
    assert "3 of 23 rows of train have no label: they are passed over" in listing.account.warnings
    write_table(tmp_path / "train.parquet", hub_table(none))
    fails(tmp_path, "no row of train has a label in 'label': name the column with --columns label=NAME")


def test_stores_and_our_own_datasets_beside_the_files(hub: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(hub), "/modern-hub", recursive=True)
    here, there = find_source(str(hub)), find_source("memory://modern-hub")
    inputs = list(there.inputs(Account()))
    assert inputs == list(here.inputs(Account())) and there.files.remote
    assert [there.read(item.location) for item in inputs[:7]] == [here.read(item.location) for item in inputs[:7]]
    convert(there, tmp_path / "a", ShardOptions(Target(size=64), shard_samples=20), ENGINE)
    root = tmp_path / "hub"
    shutil.copytree(hub, root)
    convert(root, root / "alexprep-data", ShardOptions(Target(size=64), shard_samples=20), ENGINE)
    assert (
        convert(root, root / "alexprep-data", ShardOptions(Target(size=64), shard_samples=20), ENGINE).made_inputs == 0
    )
    assert tars(root / "alexprep-data") == tars(tmp_path / "a")
    with pytest.raises(AlexprepError, match="lies among the images"):
        convert(root, root / "data", ShardOptions(), ENGINE)


def test_groups_are_kept_up_to_a_bound() -> None:
    kept, reads = grouped._Groups(), list[int]()

    def get(number: int, bound: int = 3 * 800) -> None:
        def read() -> pa.ChunkedArray:
            reads.append(number)
            return pa.chunked_array([pa.array(np.arange(100))])

        kept.get(number, read, bound)

    for number in (0, 1, 2, 0, 3, 0, 2, 1):  # 3 takes the room of 1, which was used longest ago; then 1 that of 3
        get(number)
    assert reads == [0, 1, 2, 3, 1]
    get(5, 0)
    get(5, 0)
    assert reads[5:] == [5]

    def fail(error: Exception) -> Callable[[], pa.ChunkedArray]:
        def read() -> pa.ChunkedArray:
            reads.append(9)
            raise error

        return read

    for error, times in ((OSError(5, "once"), 2), (grouped.DamagedGroupError("for good"), 1)):
        reads.clear()
        for _ in range(2):
            with pytest.raises(OSError, match=str(error.args[-1])):
                kept.get(str(error), fail(error), 800)
        assert len(reads) == times


def test_a_url_of_the_hub_reaches_its_files(hub: Path) -> None:
    """By a stand-in for huggingface_hub's file system, which fsspec knows by the same name."""

    class Hub(MemoryFileSystem):  # type: ignore[misc]
        protocol = "hf"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("hf://").strip("/")

    registry = importlib.import_module("fsspec.registry")  # whose name in fsspec is another thing
    known = registry.known_implementations["hf"]
    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        fsspec.filesystem("hf").put(str(hub), "/datasets/user/photos", recursive=True)
        here, there = (list_inputs(find_source(place)) for place in (str(hub), "hf://datasets/user/photos"))
        assert (there.classes, there.account.found) == (here.classes, here.account.found)
        assert {split: table.equals(here.splits[split]) for split, table in there.splits.items()} == {
            "train": True,
            "val": True,
        }
        item = next(iter(there.source.inputs(Account())))
        assert there.source.read(item.location) == here.source.read(item.location)
    finally:
        registry._registry.pop("hf", None)
        registry.known_implementations["hf"] = known
