"""Lists of images in other forms than CSV: lines of JSON, `path label`, MXNet's; columns that are named; ids; the hub's image folders."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import Listing, list_inputs
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.base import Account, Choices
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.verification import source_of
from alexprep.shards.worker_pool import InProcessEngine
from tests.source_checks import fails, found, listed

ENGINE = InProcessEngine()
Rows = list[dict[str, Any]]


def as_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def labels(place: Path | str, **choices: str) -> list[tuple[str, str, bytes]]:
    """(split, class, path) of the inputs."""
    source = find_source(str(place), choices=Choices(columns=tuple(sorted(choices.items()))))
    return [(item.split, item.class_name, item.location.path) for item in source.inputs(Account())]


ROWS: Rows = [
    {"file_name": "im/a b.jpg", "label": "tench, Tinca tinca", "split": "train"},
    {"file_name": "im/c.jpg", "label": "goldfish", "split": "validation"},
    {"file_name": "im/é.jpg", "label": "goldfish", "split": "train"},
]
TRUTH = [
    ("train", "goldfish", "im/é.jpg".encode()),
    ("train", "tench, Tinca tinca", b"im/a b.jpg"),
    ("val", "goldfish", b"im/c.jpg"),
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.jsonl.gz"])
def test_lines_of_json_are_a_table(name: str, tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + as_lines(ROWS) + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = found(tmp_path / name, "table")
    assert [(item.split, item.class_name, item.location.path) for item in listed(source)] == TRUTH
    fsspec.filesystem("memory").pipe_file(f"/lists/{name}", (tmp_path / name).read_bytes())
    assert labels(f"memory://lists/{name}") == TRUTH


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: it needs a row for each image"),
        (b'{"path": "a.jpg", "label": 1}\n{"path": "b.jpg"', "line 2: no JSON ("),
        (b'{"path": "a.jpg", "label": 1}\n[1]\n', "line 2: '[1]' is no object"),
        (b'{"path": "a.jpg", "label": 1}\n{"path": "b.jpg"}\n', "line 2: the label is missing"),
        (b'{"path": "a.jpg", "label": 1}\n{"label": 2}\n', "line 2: the path is missing"),
        (b'{"path": {"x": 1}, "label": 1}\n', "line 1: the path \"{'x': 1}\" is no text"),
        (b'{"path": "a.jpg", "label": [1, 2]}\n', "line 1: it has several labels; one is needed"),
        (b'{"path": "a.jpg", "label": 1.5}\n', "line 1: the label 1.5 is no whole number"),
        (b'{"path": "a.jpg", "label": NaN}\n', "line 1: the label is missing"),
        (b'{"path": "\\ud800.jpg", "label": 1}\n', "line 1: "),
        (b'{"path": "a.jpg", "boxes": []}\n', "line 1: no column for the label among 'path', 'boxes'"),
        (b'{"path": "a.jpg", "label": 1, "split": "fold 3"}\n', "line 1: the split 'fold 3' is not one of"),
        (b"[" * 200_000 + b"\n", "line 1: no JSON ("),
    ],
)
def test_lines_of_json_that_make_no_sense_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    fails(tmp_path / "x.jsonl", words)


@pytest.mark.parametrize(
    ("name", "content", "truth"),
    [
        ("train.txt", "im/a.jpg 3\nim/b.jpg 12\n", {"im/a.jpg": "3", "im/b.jpg": "12"}),
        ("train.txt", "im/a b.jpg\t3\r\n\r\n  im/b.jpg   12", {"im/a b.jpg": "3", "im/b.jpg": "12"}),
        (
            "x.txt",
            "im/a.jpg great white shark\nim/b.jpg tench\n",
            {"im/a.jpg": "great white shark", "im/b.jpg": "tench"},
        ),
        ("x.lst", "0\t3.000000\tim/a b.jpg\n7\t12\tim/b.jpg\n", {"im/a b.jpg": "3", "im/b.jpg": "12"}),
        ("x.txt", "im/a 3\nim/b 12\n", {"im/a": "3", "im/b": "12"}),
    ],
)
def test_lists_of_lines(name: str, content: str, truth: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, newline="")
    inputs = listed(found(tmp_path / name, "table"))
    assert {item.location.path.decode(): item.class_name for item in inputs} == truth
    assert {item.split for item in inputs} == {"train"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", "im/a.jpg 3\n" * 21 + "im/b.jpg\n", "line 22: the label is missing"),
        ("x.txt", "im/a.jpg 3 4\n", "several labels; one is needed"),
        ("x.txt", "im/a.jpg b.jpg 3\n", "line 1: where the path ends in 'im/a.jpg b.jpg 3' cannot be told"),
        ("x.txt", "im/a b 3\n", "line 1: where the path ends in 'im/a b 3' cannot be told"),
        ("x.txt", "im/a.jpg 3\nim/a.jpg 4\n", "lines 1 and 2 both name 'im/a.jpg', with the labels '3' and '4'"),
        ("x.lst", "0\t3\tim/a.jpg\n" * 21 + "im/b.jpg 4\n", "line 22: 'im/b.jpg 4' is not `index label path` between tabs"),
        ("x.lst", "0\t3\t0.1\t0.2\tim/a.jpg\n", "line 1: 3 labels; one is needed"),
        ("x.txt", "path,label\na.jpg,1\n", "a text in columns: give it a name that ends in .csv"),
        ("x.txt", "apple_pie/1\napple_pie/2\n", "a list of paths without labels"),
        ("x.txt", "some prose here\n", "is a file of no known layout"),
        ("x.lst", "", "is a file of no known layout: name a folder, a tar, or a list: .csv, .tsv, .jsonl or"),
    ],
)  # fmt: skip
def test_lists_of_lines_that_make_no_sense_are_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    fails(tmp_path / name, words)


def test_columns_are_named(tmp_path: Path) -> None:
    rows: Rows = [
        {"key": "a.jpg", "label": "id 7", "breed": "pug", "part": "dev"},
        {"key": "b.jpg", "label": "id 8", "breed": "boxer", "part": "train"},
    ]
    truth = [("train", "boxer", b"b.jpg"), ("val", "pug", b"a.jpg")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(as_lines(rows))
    for place in (as_csv(tmp_path / "x.csv", rows), tmp_path / "x.jsonl", tmp_path / "x.parquet"):
        assert labels(place, path="key", label="Breed", split="part") == truth
        with pytest.raises(
            AlexprepError, match=r"--columns label=bread: .*x\..* has no such column; it has 'key', 'label', 'breed'"
        ):
            labels(place, path="key", label="bread")
    (tmp_path / "x.txt").write_text("im/a.jpg 3\n")
    with pytest.raises(AlexprepError, match="a list without a header, so it has no columns for --columns to name"):
        labels(tmp_path / "x.txt", label="1")


def test_is_valid_tells_the_split(tmp_path: Path) -> None:
    for yes, no in (("True", "False"), (1, 0), (True, False)):
        rows: Rows = [{"name": f"{n}.jpg", "label": "x", "is_valid": yes if n % 2 else no} for n in range(4)]
        truth = [("train", "x", b"0.jpg"), ("train", "x", b"2.jpg"), ("val", "x", b"1.jpg"), ("val", "x", b"3.jpg")]
        (tmp_path / "x.jsonl").write_bytes(as_lines(rows))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
        for place in (
            as_csv(tmp_path / "x.csv", rows),
            tmp_path / "x.jsonl",
            *([tmp_path / "x.parquet"] if no != "False" else []),
        ):
            assert labels(place, path="name") == truth
    as_csv(tmp_path / "x.csv", [{"name": "a.jpg", "label": 1, "is_valid": "maybe"}])
    with pytest.raises(AlexprepError, match="line 2: the split 'maybe' is not one of"):
        labels(tmp_path / "x.csv", path="name")


def test_ids_are_the_pictures_that_they_name(photos: Path, tmp_path: Path) -> None:
    """As Kaggle's lists have them: without ending, without folder, and the folder of the row's split where there are two."""
    for n in range(3):
        (tmp_path / "train").mkdir(exist_ok=True)
        shutil.copy(photos / "train/class0/000.JPEG", tmp_path / f"train/x{n}.jpg")
    table = as_csv(tmp_path / "labels.csv", [{"id": f"x{n}", "breed": "pug" if n % 2 else "boxer"} for n in range(4)])
    truth = [
        ("train", "boxer", b"train/x0.jpg"),
        ("train", "boxer", b"train/x2.jpg"),
        ("train", "pug", b"train/x1.jpg"),
    ]
    assert sorted(labels(table, label="breed")) == [*truth, ("train", "pug", b"x3")]
    source = find_source(str(table), choices=Choices(columns=(("label", "breed"),)))
    listing = list_inputs(source)
    assert listing.account.warnings == ["paths in the list have no folder or ending: 'x0' is 'train/x0.jpg', and so on"]
    report = convert(source, tmp_path / "out", ShardOptions(Target(size=64)), ENGINE)
    assert report.samples == {"train": 3} and report.rejected.total() == 1  # x3, which is not there
    assert source_of(tmp_path / "out", str(table)) == source
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    assert sorted(labels(table, label="breed"))[:3] == truth
    assert [split for split, *_ in labels(table.rename(tmp_path / "test.csv"), label="breed")] == ["test"] * 4
    (tmp_path / "test").rename(tmp_path / "more")
    with pytest.raises(AlexprepError, match=r"line 2: 'x0' may be more/x0.jpg and train/x0.jpg: write the folder"):
        labels(tmp_path / "test.csv", label="breed")
    numbers = as_csv(tmp_path / "n.csv", [{"image_id": 7, "label": 1}])
    (tmp_path / "more/7.png").write_bytes(b"")
    assert labels(numbers) == [("train", "1", b"more/7.png")]


def image_folder(root: Path, photos: Path, form: str) -> Path:
    """`photos` as a repository of the hub has them, with a list in each split's folder, or one in the root."""
    everything: Rows = []
    for split, folder in (("train", "train"), ("val", "validation")):
        rows: Rows = []
        (root / folder).mkdir(parents=True)
        for path in sorted((photos / split).rglob("*.JPEG")):
            shutil.copy(path, root / folder / path.name)
            rows.append({"file_name": path.name, "caption": "a picture", "label": path.parent.name})
        everything += [row | {"file_name": f"{folder}/{row['file_name']}"} for row in rows]
        if form == "csv":
            as_csv(root / folder / "metadata.csv", rows)
        elif form == "jsonl":
            (root / folder / "metadata.jsonl").write_bytes(as_lines(rows))
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(everything), root / "metadata.parquet")
    return root


def counts(listing: Listing) -> dict[str, list[int]]:
    return {split: listing.counts(split).tolist() for split in listing.splits}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_image_folders_have_the_labels_of_their_lists(form: str, photos: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", photos, form)
    shutil.copy(photos / "train/class0/000.JPEG", root / "train/more.jpg")
    (root / "README.md").write_text("")
    listing, truth = list_inputs(find_source(str(root))), list_inputs(find_source(str(photos)))
    assert listing.source.layout == "imagefolder"
    assert (listing.classes, counts(listing)) == (truth.classes, counts(truth))
    for item in listing.source.inputs(Account()):
        name = item.location.path.decode().rpartition("/")[2]
        assert listing.source.read(item.location) == (photos / item.split / item.class_name / name).read_bytes()
    passed = {rule: passed.count for rule, passed in listing.account.passed_over.items()}
    assert passed.pop("a picture that no list names") == 1
    assert passed.pop("a list that was read") == (1 if form == "parquet" else 2) and sum(passed.values()) == 1
    fsspec.filesystem("memory").put(str(root), f"/folders/{form}", recursive=True)
    there = list_inputs(find_source(f"memory://folders/{form}"))
    assert there.digest == listing.digest


def test_image_folders_that_leave_a_doubt(photos: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", photos, "csv")
    choices = Choices(columns=(("label", "caption"),))
    source = find_source(str(root), choices=choices)
    assert list_inputs(source).classes == ["a picture"] and source.choices == choices
    for path in root.rglob("metadata.csv"):
        path.write_text(path.read_text().replace("label", "words"))
    fails(root, "no column for the label among 'file_name', 'caption', 'words'")
    both = tmp_path / "both"
    shutil.copytree(photos / "train", both)
    as_csv(both / "metadata.csv", [{"file_name": "class0/000.JPEG", "label": "x"}])
    with pytest.raises(
        AmbiguousSourceError, match=r"has the list .*metadata.csv, and beside it 48 pictures in 4 folders"
    ) as asked:
        find_source(str(both))
    for (way, _), count in zip(asked.value.ways, (1, 48), strict=True):
        assert sum(map(len, list_inputs(find_source(str(both), way.split()[1])).splits.values())) == count
    as_csv(both / "metadata.csv", [{"file_name": "class0/000.JPEG", "caption": "x"}])
    assert find_source(str(both)).layout == "folders"


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_list_may_be_named_itself(name: str, photos: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", photos, "jsonl")
    place = root / name / "metadata.jsonl"
    assert {split for split, *_ in labels(place)} == {"val" if name == "validation" else "train"}
