"""Tables as a source: what cells mean, and what is refused with its line."""

from __future__ import annotations

import csv
import gzip
import io
import os
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Account
from alexprep.shards.sources.layout_detection import find_source
from tests.source_checks import fails, found, listed, write

Columns = dict[str, list]


def as_csv(path: Path, columns: Columns) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if ".tsv" in path.name.lower() else ",")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return write(path, text.getvalue().encode())


def as_parquet(path: Path, columns: Columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


@pytest.mark.parametrize("name", ["list.csv", "list.TSV", "list.csv.gz", "list.tsv.gz", "list.parquet"])
def test_a_table_gives_path_label_and_split(name: str, tmp_path: Path) -> None:
    paths = [f"images/{n:03d}, ä.bin" for n in range(40)]
    (tmp_path / "images").mkdir()
    for path in paths:
        (tmp_path / path).write_bytes(path.encode())
    paths[7] = str(tmp_path / paths[7])
    words = ["train", "Training", "val", "validation", " test "]
    columns: Columns = {
        "width": [1] * 40,
        "Filename": paths,
        "CLASS": [f"class {n % 3}" for n in range(40)],
        "split": [words[n % 5] for n in range(40)],
    }
    table = (as_parquet if name.endswith("parquet") else as_csv)(tmp_path / name, columns)
    source = found(table, "table")
    inputs = listed(source)
    want = {"train": "train", "Training": "train", "val": "val", "validation": "val", " test ": "test"}
    truth = {path: (f"class {n % 3}", want[words[n % 5]]) for n, path in enumerate(paths)}
    assert {i.location.path.decode(): (i.class_name, i.split) for i in inputs} == truth
    for item in inputs:
        assert source.read(item.location) == b"images/" + item.location.path.rpartition(b"/")[2]
    assert source.classes({i.class_name for i in inputs}) == ["class 0", "class 1", "class 2"]


def test_whole_numbers_are_the_labels_themselves(tmp_path: Path) -> None:
    numbers = [10, 2, 0, 12]
    columns: Columns = {"path": ["a.png", "b.png", "c.png", "d.png"], "label": numbers}
    for table in (as_csv(tmp_path / "val.csv", columns), as_parquet(tmp_path / "my-val.parquet", columns)):
        source = found(table, "table")
        inputs = listed(source)
        assert {i.class_name: i.location.path for i in inputs} == {
            str(n): path.encode() for n, path in zip(numbers, columns["path"], strict=True)
        }
        assert {i.split for i in inputs} == {"val"}
        assert source.classes({i.class_name for i in inputs}) == [str(n) for n in range(13)]
    mixed = as_csv(tmp_path / "list.csv", {"path": ["a", "b", "c"], "label": ["1", "01", "A"]})
    source = found(mixed, "table")
    assert source.classes({i.class_name for i in listed(source)}) == ["01", "1", "A"]
    encoded = tmp_path / "list.parquet"
    pq.write_table(pa.table({"path": ["a", "b"], "y": pa.array(["t", "s"]).dictionary_encode()}), encoded)
    assert [i.class_name for i in listed(found(encoded, "table"))] == ["s", "t"]


def test_a_text_of_two_columns_needs_no_header(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_bytes(b'\xef\xbb\xbfa.png, great white shark\r\n\r\n"b,c.png","tench, Tinca tinca"\r\nd.png,label\r\n')
    inputs = listed(found(table, "table"))
    assert [(i.location.path, i.class_name) for i in inputs] == [
        (b"a.png", "great white shark"),
        (b"d.png", "label"),
        (b"b,c.png", "tench, Tinca tinca"),
    ]
    assert {i.split for i in inputs} == {"train"}
    table.write_text("name,kind\na.png,dog\n")
    fails(table, "line 1: no column for the path among 'name', 'kind': name it path, file, filename, image")
    table.write_text("img.path,label\na.png,dog\n")
    fails(table, "line 1: no column for the path among 'img.path', 'label'")
    table.write_text("a.png,dog,3\n")
    fails(table, "no column for the path")


def test_urls_are_read_where_they_point(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a.bin", b"far")
    (tmp_path / "b.bin").write_bytes(b"near")
    table = as_csv(tmp_path / "list.csv", {"url": ["memory://bucket/a.bin", "b.bin"], "label": ["x", "y"]})
    source = found(table, "table")
    assert source.files.remote
    assert [source.read(i.location) for i in listed(source)] == [b"far", b"near"]
    memory.pipe_file("/bucket/list.csv", b"path,label\na.bin,0\nmemory://bucket/a.bin,1\n")
    source = find_source("memory://bucket/list.csv")
    assert [source.read(i.location) for i in listed(source)] == [b"far", b"far"]
    memory.pipe_file("/bucket/list.csv", b"path,label\na.bin,0\n/etc/hostname,1\n")
    with pytest.raises(
        AlexprepError, match=r"line 3: the path '/etc/hostname' is absolute, but the table lies at a URL"
    ):
        list(find_source("memory://bucket/list.csv").inputs(Account()))


@pytest.mark.parametrize(
    ("label", "words"),
    [
        *((label, "the label is missing") for label in ("", "  ", "nan")),
        ("dog|cat", "the cell 'dog|cat' gives one image several labels"),
        *((label, "several labels") for label in ("dog; cat", "1,2", "1 2", "[1]", "['dog', 'cat']", "good, dog")),
        ("-1", "the label -1 is below 0: number the classes from 0"),
        ("3.5", "the label 3.5 is no whole number: write it without a point, or give the class a name"),
        ("3.0", "the label 3.0 is a number with a point among names such as 'dog': write it without a point"),
        ("do\tg", "holds a control character"),
        ("x" * 1001, "has 1,001 characters"),
    ],
)
def test_labels_that_make_no_sense_are_refused_with_the_line(label: str, words: str, tmp_path: Path) -> None:
    columns: Columns = {"path": ["a.png", "b.png", "c.png"], "label": ["dog", "good", label]}
    for table, place in (
        (as_csv(tmp_path / "l.csv", columns), "line 4: "),
        (as_parquet(tmp_path / "l.parquet", columns), "row 3: "),
    ):
        fails(table, words)
        fails(table, place)


def test_labels_are_bounded(tmp_path: Path) -> None:
    table = as_csv(tmp_path / "list.csv", {"path": ["a.png", "b.png"], "label": [10**6, 3]})
    assert len(found(table, "table").classes({i.class_name for i in listed(found(table, "table"))})) == 10**6 + 1
    as_csv(table, {"path": ["a.png", "b.png"], "label": [3, 10**6 + 1]})
    fails(table, "line 3: the label 1000001 is above 1,000,000")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: it needs a row for each image"),
        (b"path,label\na.png,1\n,2\n", "line 3: the path is missing"),
        (b"path,label\na.png,1\nb.png\n", "line 3: 1 cells, where the first line has 2"),
        (b"path,label\na.png,1\nb,png,1\n", "line 3: 3 cells"),
        (b"path,label\na.png,1\n\n\xe4.png,2\n", "line 4: byte 0xe4 is not UTF-8: save the table as UTF-8"),
        ("path,label\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b'path,label\n"a.png,1\nb.png,2\n', "line 3: unexpected end of data"),
        (b'path,label\n"a"b.png,1\n', "line 2: ',' expected after '\"'"),
        (b'path,label\n"' + b"a\n" * 80_000, "field larger than field limit"),
        (b"path,label\n" + b"a" * 2**20, "line 2: field larger than field limit"),
        (b"path,label\n" + b"a" * (2**20 + 1), "line 2: more than 1,048,576 bytes: this is no table of paths"),
        (b"path,label\na\0b.png,1\n", "line 2: "),
        (b"path,label\na,1\nb,2\na,1\n", "lines 2 and 4 both name 'a', with the same label: delete one"),
        (b"path,label\na,1\nb,2\na,3\n", "lines 2 and 4 both name 'a', with the labels '1' and '3'"),
        (b"path,label\na.jpg,cat\n./a.jpg,dog\n", "lines 2 and 3 both name 'a.jpg', with the labels 'cat' and 'dog'"),
        (b"path,label\nx//a.jpg,cat\nx/./a.jpg,dog\n", "lines 2 and 3 both name 'x/a.jpg'"),
        (b"path,label\n/x/a.jpg,cat\nfile:///x/a.jpg,dog\n", "lines 2 and 3 both name '/x/a.jpg'"),
        (b"path,label,set\na,1,train\na,1,val\n", "with the same label and in two splits"),
        (b"path,label,fold\na,1,0\n", "line 2: the split '0' is not one of train, training, val"),
        (b"path,label,fold\na,1,\n", "line 2: the split '' is not one of"),
        (b"path,label,label\na,1,2\n", "two columns are named 'label'"),
        (b"label,name\n1,a\n", "no column for the path among 'label', 'name'"),
        (b"path;label\na;1\n", "line 1: the separator is a semicolon, where a comma (.csv) was expected: put a comma"),
        (b"a.jpg;1\nb.jpg;2\n", "line 1: the separator is a semicolon"),
        (b"path\tlabel\na\t1\n", "the separator is a tab (.tsv), where a comma (.csv) was expected: give the file"),
    ],
)
def test_texts_that_make_no_sense_are_refused_with_the_line(content: bytes, words: str, tmp_path: Path) -> None:
    for name in ("list.csv", "list.csv.gz"):
        fails(write(tmp_path / name, content), words)


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_a_pipe_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    fails(tmp_path / name, "not a regular file")


def test_a_cut_table_is_refused(tmp_path: Path) -> None:
    columns: Columns = {"path": [f"{n * 7919 % 10_007}.png" for n in range(5000)], "label": [1] * 5000}
    table = as_csv(tmp_path / "list.csv.gz", columns)
    whole = table.read_bytes()
    table.write_bytes(whole + gzip.compress(b"last.png,2\n"))  # as `cat a.gz b.gz` makes them
    assert len(listed(found(table, "table"))) == 5001
    table.write_bytes(whole[: len(whole) // 2])
    fails(table, "cannot be read after line ")
    parquet = as_parquet(tmp_path / "list.parquet", columns)
    good = parquet.read_bytes()
    parquet.write_bytes(good[:-100])
    fails(parquet, "is no Parquet file, or cannot be read after row 0")
    parquet.write_bytes(good[:50] + bytes(2000) + good[2050:])
    fails(parquet, "cannot be read after row ")


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([["x"], ["y"]]), "the column 'label' gives one image several labels (list<"),
        (pa.array([1.0, 2.5]), "row 2: the label 2.5 is no whole number"),
        (
            pa.array([{"a": 1}, {"a": 2}]),
            "the column 'label' has the type struct<a: int64>, but a label is a string or a",
        ),
        (pa.array([None, "x"]), "row 1: the label is missing"),
        (pa.array([-3, 2]), "row 1: the label -3 is below 0"),
        (pa.array([b"\xff", b"a"]).view(pa.string()), "row 1: b'\\xff' is not UTF-8"),
    ],
)
def test_columns_that_make_no_sense_are_refused(column: pa.Array, words: str, tmp_path: Path) -> None:
    fails(as_parquet(tmp_path / "list.parquet", {"path": ["a", "b"], "label": column}), words)
    images = as_parquet(tmp_path / "list.parquet", {"image": [{"bytes": b"x", "path": "a"}], "label": [1]})
    fails(
        images,
        "list.parquet is a Parquet table with its images inside, in the column 'image' (struct<bytes: binary",
        "table",
    )


def test_a_table_s_order_is_that_of_bytes_in_any_order_of_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    names, splits = ("z", "é", "Z", "10", "9"), ("test", "val")
    rows = [(f"{split}/{name}/{n}.png", name, split) for n in range(30) for name in names for split in splits]
    results = []
    for n in range(3):
        order = rng.permutation(len(rows))
        columns: Columns = {key: [rows[i][k] for i in order] for k, key in enumerate(("path", "label", "split"))}
        inputs = listed(found(as_csv(tmp_path / f"{n}.csv", columns), "table"))
        results.append([(i.split, i.class_name.encode(), i.location.path) for i in inputs])
    assert results[0] == results[1] == results[2] == sorted((s, c.encode(), p.encode()) for p, c, s in rows)
