"""Labels: one rule for tables, for .cls and .json of webdatasets, and for the index of other people's tars."""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alexprep.shards.errors import AlexprepError
from alexprep.shards.listing import list_inputs
from alexprep.shards.sources.base import ARCHIVE, BESIDE, HIDDEN, SAMPLE_PART, SIDECAR, Account
from alexprep.shards.sources.labels import LABEL_COLUMNS, LABEL_FIELDS, MAX_LABEL
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.webdataset_index import TarIndex, index_tars
from tests.source_checks import found, listed, write_tar

Stored = dict[str, Any]


@pytest.fixture(scope="module")
def jpg(photos: Path) -> bytes:
    return (photos / "train/class0/000.JPEG").read_bytes()


def in_csv(folder: Path, values: list[Any], jpg: bytes) -> list[str]:
    rows = "".join(
        f'{n}.jpg,"{value.decode() if isinstance(value, bytes) else value}"\n' for n, value in enumerate(values)
    )
    (folder / "list.csv").write_text("path,label\n" + rows)
    return by_path(folder / "list.csv")


def in_parquet(folder: Path, values: list[Any], jpg: bytes) -> list[str]:
    paths = [f"{n}.jpg" for n in range(len(values))]
    pq.write_table(pa.table({"path": paths, "label": pa.array(values)}), folder / "list.parquet")
    return by_path(folder / "list.parquet")


def in_cls(folder: Path, values: list[Any], jpg: bytes) -> list[str]:
    raw = [value if isinstance(value, bytes) else str(value).encode() for value in values]
    return in_both_readers(folder, {f"{n}.cls": value for n, value in enumerate(raw)}, jpg)


def in_json(folder: Path, values: list[Any], jpg: bytes) -> list[str]:
    return in_both_readers(folder, {f"{n}.json": json.dumps({"label": v}).encode() for n, v in enumerate(values)}, jpg)


def in_both_readers(folder: Path, labels: dict[str, bytes], jpg: bytes) -> list[str]:
    """The labels as the source for `alexprep shard` reads them, which must be those of the index for `Loader`."""
    members = [
        member for name, label in labels.items() for member in ((name.split(".")[0] + ".jpg", jpg), (name, label))
    ]
    tar = write_tar(folder / "set.tar", members)
    try:
        read = by_path(tar)
        list_inputs(found(tar, "webdataset"))  # the classes, of which some sets are refused as a whole
    except AlexprepError:
        with pytest.raises(AlexprepError):
            _whole(index_tars(tar, cache=folder / "cache"))
        raise
    index = _whole(index_tars(tar, cache=folder / "cache"))
    assert [index.classes[label] for label in index.records["label"]] == read
    return read


def _whole(index: TarIndex) -> TarIndex:
    if index.bad:
        raise AlexprepError(str(index.bad[0]))
    return index


def by_path(place: Path) -> list[str]:
    """The class names in the order of the paths."""
    inputs = (
        listed(found(place, "table")) if place.suffix != ".tar" else list(found(place, "webdataset").inputs(Account()))
    )
    return [i.class_name for i in sorted(inputs, key=lambda i: (i.location.path, i.location.member))]


WAYS = (in_csv, in_parquet, in_cls, in_json)


@pytest.mark.parametrize(
    ("values", "expected", "ways"),
    [
        ([3.0, 0.0, 10.0], ["3", "0", "10"], WAYS),
        (["3.0", "0.0", "10.000"], ["3", "0", "10"], WAYS),
        (["3", "03", "3."], ["3", "3", "3"], WAYS),
        (["7.000000000000000000e+00", "1.2e+01"], ["7", "12"], WAYS),  # numpy.savetxt
        ([7, 12], ["7", "12"], WAYS),
        (["tench, Tinca tinca", "3 spine stickleback"], ["tench, Tinca tinca", "3 spine stickleback"], WAYS),
        ([True, False], ["true", "false"], (in_parquet, in_json)),
        ([b"7", b"12\n"], ["7", "12"], (in_parquet, in_cls)),
        ([b"cat", b"dog"], ["cat", "dog"], WAYS[:3]),
        ([struct.pack("<q", n) for n in (7, 0, 999)], ["7", "0", "999"], (in_parquet, in_cls)),
        ([np.int64(65).tobytes()], ["65"], (in_parquet, in_cls)),
        (["31415926"[n] * 8 for n in range(2)], None, WAYS),  # eight digits are text, here above the bound
        (["3.5", "1"], None, WAYS),
        ([3.5, 1.0], None, WAYS),
        ([-1, 2], None, WAYS),
        (["-1.0", "2"], None, WAYS),
        ([float("nan"), 1.0], None, WAYS),
        ([float("inf"), 1.0], None, WAYS[1:2]),
        ([MAX_LABEL + 1, 2], None, WAYS),
        (["", "2"], None, WAYS),
        (["dog|cat", "2"], None, WAYS),
        (["1 2", "2"], None, WAYS),
        (["[1]", "2"], None, WAYS),
        (["3.0", "dog"], None, WAYS),
        (["x" * 1001, "y"], None, WAYS),
        (["do\tg", "y"], None, WAYS),
        ([[1, 0], [0, 1]], None, (in_parquet, in_json)),
        ([struct.pack("<q", MAX_LABEL + 1)], None, (in_parquet, in_cls)),
        ([struct.pack(">q", 7)], None, (in_parquet, in_cls)),
        ([struct.pack("<d", 7)], None, (in_parquet, in_cls)),
        ([struct.pack("<i", 7)], None, (in_parquet, in_cls)),
        ([b"\x07"], None, (in_parquet, in_cls)),
        ([b"\x80\x04K\x03."], None, (in_parquet, in_cls)),  # a pickled number
    ],
)  # fmt: skip
def test_a_label_is_the_same_however_it_is_stored(
    values: list[Any],
    expected: list[str] | None,
    ways: tuple[Callable[[Path, list[Any], bytes], list[str]], ...],
    jpg: bytes,
    tmp_path: Path,
) -> None:
    for way in ways:
        if expected is None:
            with pytest.raises(AlexprepError):
                way(tmp_path, values, jpg)
        else:
            assert way(tmp_path, values, jpg) == expected, way


def test_the_same_names_tell_the_label_in_tables_and_json(jpg: bytes, tmp_path: Path) -> None:
    for name in ("label", "cls", "class", "class_id", "wnid", "target", "category", "y"):
        (tmp_path / "list.csv").write_text(f"path,{name.upper()}\na.jpg,4\n")
        tar = write_tar(tmp_path / "set.tar", {"a.jpg": jpg, "a.json": json.dumps({"width": 3, name: 4}).encode()})
        assert by_path(tmp_path / "list.csv") == by_path(tar) == ["4"], name
    assert len(LABEL_COLUMNS) == 8 and set(LABEL_COLUMNS) == set(LABEL_FIELDS)
    document = {name: None if name == "label" else n for n, name in enumerate(LABEL_FIELDS)}
    tar = write_tar(tmp_path / "set.tar", {"a.jpg": jpg, "a.json": json.dumps(document).encode()})
    assert by_path(tar) == ["1"]  # the first that holds something
    tar = write_tar(tmp_path / "set.tar", {"a.jpg": jpg, "a.json": b'{"x": 3, "y": 4}'})  # a place in the image
    with pytest.raises(AlexprepError, match=r"sample a has no label in its \.json: expected a field label, cls"):
        by_path(tar)
    (tmp_path / "list.csv").write_text("path,x,y\na.jpg,3,4\n")
    with pytest.raises(AlexprepError, match="no column for the label among 'path', 'x', 'y'"):
        by_path(tmp_path / "list.csv")


def test_a_column_that_tables_did_not_know_before_does_not_go_before_one_that_they_did(tmp_path: Path) -> None:
    for known in ("label", "class", "wnid", "target", "category", "y"):
        for later in ("class_id", "cls"):
            (tmp_path / "list.csv").write_text(f"path,{later},{known}\na.jpg,3,4\n")
            assert by_path(tmp_path / "list.csv") == ["4"], (known, later)


def test_names_that_are_numbers_stay_names_among_names_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n1.jpg,7\n2.jpg,07\n3.jpg,A\n4.jpg,99999999\n")
    assert by_path(tmp_path / "list.csv") == ["7", "07", "A", "99999999"]
    (tmp_path / "list.csv").write_text("path,label\n1.jpg,7\n2.jpg,7.0\n3.jpg,A\n")
    with pytest.raises(AlexprepError, match=r"line 3: the label 7\.0 is a number with a point among names such as 'A'"):
        by_path(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("path,label\n1.jpg,7\n2.jpg,7.0\n3.jpg,2\n")
    listing = list_inputs(found(tmp_path / "list.csv", "table"))
    assert listing.classes == [str(n) for n in range(8)] and listing.counts("train").tolist() == [
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        2,
    ]


def test_every_row_and_every_member_is_accounted_for(data: Path, jpg: bytes, tmp_path: Path) -> None:
    """Counted by `tarfile` and by hand."""
    (tmp_path / "list.csv").write_text("path,label\n1.jpg,7\n\n2.jpg,7\n")
    assert accounted(tmp_path / "list.csv") == (2, {})
    members = [
        ("a.jpg", jpg),
        ("a.cls", b"1"),
        ("a.txt", b"a caption"),
        ("d/", b""),
        ("d/._a.jpg", b"x"),
        (".DS_Store", b"x"),
    ]
    for split in ("train", "val"):
        write_tar(tmp_path / f"set/{split}/0.tar", [*members, ("b.json", b'{"label": 2}'), ("b.jpg", jpg)])
    for name in ("README.md", "train/0.idx", "train/sizes.json", "val/more/x.jpg"):
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    parts = {SAMPLE_PART: (6, ["train/0.tar/a.cls", "val/0.tar/a.cls"])}
    hidden = {
        HIDDEN: (4, [f"{split}/0.tar/{name}" for split in ("train", "val") for name in ("d/._a.jpg", ".DS_Store")])
    }
    beside = {
        SIDECAR: (2, ["README.md", "train/sizes.json"]),
        ARCHIVE: (1, ["train/0.idx"]),
        BESIDE: (1, ["val/more/x.jpg"]),
    }
    assert accounted(tmp_path / "set") == (18, parts | hidden | beside)
    own = {SAMPLE_PART: (3, ["0.tar/a.cls"]), HIDDEN: (2, ["0.tar/d/._a.jpg", "0.tar/.DS_Store"])}
    assert accounted(tmp_path / "set/val/{0..0}.tar") == (7, own)
    found_files, passed = accounted(data)
    tars = list(data.glob("*/*.tar"))
    members_in_tars = 0
    for path in tars:
        with tarfile.open(path) as tar:
            members_in_tars += len(tar.getnames())
    other_files = sum(path.is_file() for path in data.rglob("*")) - len(tars)
    assert found_files == members_in_tars + other_files
    assert passed.pop(SAMPLE_PART)[0] == members_in_tars // 2 == 68
    assert sum(count for count, _ in passed.values()) == other_files


def accounted(place: Path) -> tuple[int, dict[str, tuple[int, list[str]]]]:
    """What a listing found, and what it passed over."""
    account = list_inputs(find_source(str(place))).account
    prefix = f"{str(place).partition('{')[0].rstrip('/')}/"
    rules = {
        rule: (passed.count, [name.removeprefix(prefix) for name in passed.names])
        for rule, passed in account.passed_over.items()
    }
    return account.found, rules
