"""What goes along with images: from every kind of source into KEY.json and the ledger, and back; and what is known of each input."""

from __future__ import annotations

import csv
import gc
import gzip
import hashlib
import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image

from alexprep.pipeline import Loader
from alexprep.shards import ledger
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.input_facts import facts_of
from alexprep.shards.metadata import MAX_BYTES, MetadataError, document_bytes, joined
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.sources.base import Account
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.verification import repair, verify
from alexprep.shards.worker_pool import InProcessEngine
from tests.conftest import encode, make_photo
from tests.support.record_files import an_example, tfrecord

ENGINE = InProcessEngine()
FORM = Target(size=16, format="png")
CLASSES = ("bird", "cat")
NAMES = [f"{CLASSES[n // 4]}-{n}" for n in range(8)]
Documents = dict[str, dict[str, Any]]  # by the picture's name
# Of every kind that JSON has; the last picture has none.
DOCUMENTS: Documents = {
    name: {
        "caption": f"a picture, „{n}“\nof two lines",
        "tags": ["a", "b"][: n % 3],
        "score": n / 7,
        "count": n if n % 2 else None,
        "box": {"y": [n, n + 1.5], "seen": n % 2 == 0},
    }
    for n, name in enumerate(NAMES)
}


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    return {name: encode(make_photo(20 + n, 17, n), "PNG") for n, name in enumerate(NAMES)}


def folders(root: Path, pictures: dict[str, bytes]) -> Path:
    for name, data in pictures.items():
        path = root / name.partition("-")[0] / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def beside(root: Path, pictures: dict[str, bytes]) -> tuple[Path, Documents]:
    folders(root, pictures)
    expected = {name: dict(document) for name, document in DOCUMENTS.items()}
    for name, document in list(expected.items())[:-1]:
        place = root / name.partition("-")[0] / name
        place.with_suffix(".json").write_text(json.dumps(document))
        place.with_suffix(".TXT").write_text(f"{name}\n")
        document["txt"] = f"{name}\n"
    expected[NAMES[-1]] = {}
    return root, expected


def packed(ending: str) -> Callable[[Path, dict[str, bytes]], tuple[Path, Documents]]:
    def make(root: Path, pictures: dict[str, bytes]) -> tuple[Path, Documents]:
        tree, expected = beside(root / "tree", pictures)
        return Path(shutil.make_archive(str(root / "packed"), ending, tree)), expected

    return make


def a_webdataset(root: Path, pictures: dict[str, bytes]) -> tuple[Path, Documents]:
    expected: Documents = {}
    root.mkdir()
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for name, data in pictures.items():
            document, text = DOCUMENTS[name], f"\ufeff{name}".encode()
            parts = {"json": json.dumps(document).encode(), "png": data, "cls": name.partition("-")[0].encode()}
            parts |= {"txt": text, "npy": b"\x93NUMPY\0", "more.json": b"[1]"}
            for ending, content in parts.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            bytes_as_json = {"base64": "k05VTVBZAA=="}
            expected[name] = {**document, "txt": name, "npy": bytes_as_json, "more.json": [1]}
    return root, expected


def a_parquet(root: Path, pictures: dict[str, bytes]) -> tuple[Path, Documents]:
    day, moment = date(2026, 2, 3), datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
    columns = {
        "image": [{"bytes": data, "path": f"{name}.png"} for name, data in pictures.items()],
        "label": [CLASSES.index(name.partition("-")[0]) for name in pictures],
        **{key: [DOCUMENTS[name][key] for name in pictures] for key in DOCUMENTS[NAMES[0]]},
        "day": [day] * len(pictures),
        "moment": [moment] * len(pictures),
        "exact": pa.array([10**18 + 1] * len(pictures), pa.timestamp("ns")),
        "price": [Decimal("1.50")] * len(pictures),
        "raw": [b"\xff\0"] * len(pictures),
        "nan": pa.array([math.nan] * len(pictures), pa.float32()),
        "thumbnail": [{"bytes": b"x", "path": ""}] * len(pictures),
    }
    features = {
        "image": {"_type": "Image"},
        "thumbnail": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": list(CLASSES)},
    }
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = root / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    # In the order of the class folders, since groups are mixed in an order of their own.
    pq.write_table(table, path, row_group_size=3)
    more = {
        "day": "2026-02-03",
        "moment": "2026-02-03T04:05:06+00:00",
        "exact": "2001-09-09 01:46:40.000000001",
        "price": "1.50",
        "raw": {"base64": "/wA="},
        "nan": None,
    }
    return root, {name: document | more for name, document in DOCUMENTS.items()}


def an_arrow(root: Path, pictures: dict[str, bytes]) -> tuple[Path, Documents]:
    """The same rows as `save_to_disk` writes them."""
    source, expected = a_parquet(root / "parquet", pictures)
    table = pq.read_table(next(source.rglob("*.parquet")))
    path = root / "data-00000-of-00001.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path, expected


def a_tfrecord(root: Path, pictures: dict[str, bytes]) -> tuple[Path, Documents]:
    """Whose features are lists; those of a document that JSON alone has stay out."""
    examples, expected = [], {}
    for n, (name, data) in enumerate(pictures.items()):
        lists: dict[str, Any] = {"caption": ["ä", f"{n}"], "score": [0.5, n / 4], "count": [n, -1, 2**40]}
        expected[name] = lists | {"raw": [{"base64": "/wA="}]}
        texts = [text.encode() for text in lists["caption"]]
        features = lists | {
            "caption": texts,
            "raw": b"\xff\0",
            "image__encoded": data,
            "label": n // 4,
        }
        examples.append(an_example(**features, image__filename=f"{name}.png".encode()))
    root.mkdir()
    return tfrecord(root / "train-00000-of-00001", examples), expected


def a_table(ending: str, in_folder: bool = False) -> Callable[[Path, dict[str, bytes]], tuple[Path, Documents]]:
    def make(root: Path, pictures: dict[str, bytes]) -> tuple[Path, Documents]:
        folders(root, pictures)
        rows = [
            {"file_name": f"{name.partition('-')[0]}/{name}.png", "label": name.partition("-")[0], **DOCUMENTS[name]}
            for name in reversed(NAMES)  # in another order than the plan's
        ]
        expected = DOCUMENTS
        path = root / (f"metadata.{ending}" if in_folder else f"list.{ending}")
        if "sv" in ending:
            texts = [
                {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
                for row in rows
            ]
            expected = {
                row["file_name"].rpartition("/")[2][:-4]: {k: row[k] for k in DOCUMENTS[NAMES[0]]} for row in texts
            }
            file = io.StringIO(newline="")
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ending.startswith("t") else ",")
            writer.writeheader()
            writer.writerows(texts)
            content = b"\xef\xbb\xbf" + file.getvalue().encode()
            path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
        elif ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        else:
            path.write_text("\n\n".join(map(json.dumps, rows)))
        return root if in_folder else path, expected

    return make


SOURCES: dict[str, Callable[[Path, dict[str, bytes]], tuple[Path, Documents]]] = {
    "files beside pictures": beside,
    "tar": packed("tar"),
    "zip": packed("zip"),
    "webdataset": a_webdataset,
    "parquet": a_parquet,
    "arrow": an_arrow,
    "tfrecord": a_tfrecord,
    "csv": a_table("csv"),
    "csv.gz": a_table("csv.gz"),
    "tsv": a_table("tsv"),
    "jsonl": a_table("jsonl"),
    "list in parquet": a_table("parquet"),
    "image folder": a_table("csv", in_folder=True),
    "image folder, jsonl": a_table("jsonl", in_folder=True),
}


def shard(source: Path, out: Path, **options: Any) -> Path:
    # KEY.png and KEY.json in a tar are taken for a webdataset, and a list beside folders is a question.
    layout = "tar" if source.name == "packed.tar" else "imagefolder" if any(source.glob("metadata.*")) else None
    convert(find_source(str(source), layout), out, ShardOptions(FORM, shard_samples=5, **options), ENGINE)
    return out


def tars(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("train/*.tar"))]


def by_name(folder: Path) -> Documents:
    """The metadata of every sample by the name of its picture, as the shards have them."""
    samples, rows = Samples(folder, "train"), pq.read_table(folder / "train" / "samples.parquet").to_pylist()
    found = {samples.key(row): samples.metadata(row) for row in range(len(samples))}
    return {row["source"].rpartition("/")[2].rpartition(".")[0]: found[row["key"]] for row in rows}


@pytest.fixture(scope="module")
def bare(pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The shards of class folders."""
    root = tmp_path_factory.mktemp("bare")
    return tars(shard(folders(root / "source", pictures), root / "out"))


@pytest.mark.parametrize("kind", SOURCES)
def test_what_goes_in_comes_out(kind: str, pictures: dict[str, bytes], bare: list[bytes], tmp_path: Path) -> None:
    """And nothing of it changes pictures or labels: without it the shards are those of class folders."""
    source, expected = SOURCES[kind](tmp_path / "source", pictures)
    out = shard(source, tmp_path / "out")
    assert by_name(out) == expected
    assert verify(out, ENGINE).problems == []
    plain = shard(source, tmp_path / "none", metadata="none")
    assert tars(plain) == bare or kind in ("parquet", "arrow")  # whose groups are mixed in an order of their own
    assert read_dataset(plain)["options"]["metadata"] is None and Samples(plain, "train").metadata(0) == {}
    if kind in ("webdataset", "csv"):
        some = by_name(shard(source, tmp_path / "some", metadata=("caption", "none such")))
        assert some == {name: {"caption": d["caption"]} if "caption" in d else {} for name, d in expected.items()}


# The document


def test_every_kind_of_value_has_a_form() -> None:
    values = {
        "z": [float("inf"), -math.inf, math.nan, 1e300, -0.0],
        "bytes": b"\xff\0",
        "time": timedelta(minutes=1, milliseconds=1),
        "nested": {"b": (1, 2), "a": np.arange(2), "c": np.float32(0.5)},
        "half": "\ud800",
        "text": "ä",
        "big": 2**80,
    }
    written = document_bytes(values)
    assert written == document_bytes(dict(reversed(values.items()))) == document_bytes(json.loads(written))
    assert json.loads(written) == {
        "z": ["Infinity", "-Infinity", None, 1e300, 0.0],
        "bytes": {"base64": "/wA="},
        "time": 60.001,
        "nested": {"a": [0, 1], "b": [1, 2], "c": 0.5},
        "half": "\ud800",
        "text": "ä",
        "big": 2**80,
    }
    assert document_bytes({"text": "ä"}) == '{"text":"ä"}'.encode()
    assert document_bytes({"a": 1}, {"b"}) == document_bytes({}) == b""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": "x" * MAX_BYTES, "b": 1}, r"262,158 bytes are more than the limit of 262,144 \('a' has 262,146\)"),
        ({"a": object()}, "a value of the type object has no form in JSON"),
    ],
)
def test_what_has_no_form_is_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(MetadataError, match=words):
        document_bytes(values)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([("json", b"{")], r"\.json is no JSON"),
        ([("json", b"[" * 10**5)], r"\.json is no JSON"),
        ([("json", b'{"txt": 1}'), ("txt", b"a")], "'txt' is both a field"),
        ([("txt", bytes(2**22 + 1))], r"\.txt has more than"),
    ],
)
def test_a_damaged_part_is_told(parts: list[tuple[str, bytes]], words: str) -> None:
    with pytest.raises(MetadataError, match=words):
        joined(parts)


# What is begun, damaged, changed


@pytest.fixture(scope="module")
def source(pictures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside(tmp_path_factory.mktemp("beside"), pictures)[0]


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` as a dataset. Not to be changed."""
    return shard(source, tmp_path_factory.mktemp("made"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("began", [None, "none", ("caption",)])
def test_what_is_begun_goes_on_as_it_began(began: Any, source: Path, tmp_path: Path) -> None:
    """A plan of a release without metadata says nothing of it, as one with none."""
    out = shard(source, tmp_path / "out", metadata=began)
    before = contents(out)
    for name in ("train/train-000001.json", "train/train-000001.tar", "dataset.json"):
        (out / name).unlink()
    shard(source, out)
    assert contents(out) == before
    other, words = ("none", "all") if began is None else ("all", "none|caption")
    with pytest.raises(AlexprepError, match=f"--metadata was ({words}), now is {other}"):
        shard(source, out, metadata=other)
    assert contents(out) == before


def test_bad_metadata_cost_the_picture_by_name_and_no_other(source: Path, made: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    (broken / "bird" / "bird-1.json").write_text('{"caption": "cut')
    (broken / "cat" / "cat-4.json").write_text(json.dumps({"long": "x" * MAX_BYTES}))
    out = shard(broken, tmp_path / "out")
    rows = {row["source"]: row for row in pq.read_table(out / "train" / "samples.parquet").to_pylist()}
    assert {name for name, row in rows.items() if row["status"] == "rejected"} == {"bird/bird-1.png", "cat/cat-4.png"}
    assert rows["bird/bird-1.png"]["reason"].startswith("metadata: .json is no JSON")
    assert "limit of 262,144 ('long' has" in rows["cat/cat-4.png"]["reason"]
    assert (rows["cat/cat-4.png"]["width"], rows["cat/cat-4.png"]["height"]) == (24, 17)
    sound = {name: document for name, document in by_name(made).items() if name not in ("bird-1", "cat-4")}
    left = {name: document for name, document in by_name_written(out).items()}
    assert left == sound and verify(out, ENGINE).problems == []
    shard(broken, tmp_path / "none", metadata="none")  # the reason's next step
    assert Samples(tmp_path / "none", "train").index.shape == (8,)


def by_name_written(folder: Path) -> Documents:
    samples, rows = Samples(folder, "train"), pq.read_table(folder / "train" / "samples.parquet").to_pylist()
    names = {row["key"]: row["source"].rpartition("/")[2][:-4] for row in rows}
    return {names[samples.key(row)]: samples.metadata(row) for row in range(len(samples))}


def test_metadata_that_change_are_another_plan(pictures: dict[str, bytes], tmp_path: Path) -> None:
    table, _ = a_table("jsonl")(tmp_path / "source", pictures)
    out = shard(table, tmp_path / "out")
    table.write_text(table.read_text().replace("picture", "photograph"))
    with pytest.raises(AlexprepError, match="the metadata in SOURCE have changed"):
        shard(table, out)
    shard(table, out / "none", metadata="none")


def test_room_is_asked_for_metadata_too(
    pictures: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times the room that the pixels could take is not enough for long captions."""
    folders(tmp_path, pictures)
    rows = [
        {"path": f"{name.partition('-')[0]}/{name}.png", "label": "cat", "caption": "word " * 20_000}
        for name in pictures
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    usage = shutil.disk_usage(tmp_path)
    free = len(pictures) * 10 * (3 * 16**2 + 4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(AlexprepError, match=rf"{len(pictures)} inputs will need about .* are free: make room"):
        shard(tmp_path / "list.jsonl", tmp_path / "all")
    shard(tmp_path / "list.jsonl", tmp_path / "none", metadata="none")


def test_a_table_that_changed_is_read_anew_in_the_same_process(tmp_path: Path) -> None:
    """Also one that is gzipped though its name does not say so."""
    (tmp_path / "a.png").write_bytes(b"x")
    for word in ("first", "second"):
        (tmp_path / "list.csv").write_bytes(gzip.compress(f"path,label,word\na.png,cat,{word}\n".encode()))
        pq.write_table(pa.table({"path": ["a.png"], "label": ["cat"], "word": [word]}), tmp_path / "list.parquet")
        for name in ("list.csv", "list.parquet"):
            source = find_source(str(tmp_path / name))
            (image,) = source.inputs(Account())
            assert source.metadata(image.location, image.metadata) == {"word": word}


def test_a_damaged_shard_is_found_and_repaired(source: Path, made: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    tar, sidecar = out / "train" / "train-000000.tar", out / "train" / "train-000000.json"
    before = contents(out)
    tar.write_bytes(before["train/train-000000.tar"].replace(b'"score":', b'"scare":', 1))
    (problem,) = verify(out, ENGINE).problems
    assert problem.member.endswith(".json") and problem.what == "its bytes were changed"
    tar.write_bytes(before["train/train-000000.tar"])
    for change in (("a picture", "no picture"), ('"bytes":', '"Bytes":'), ('"sha256": "', '"sha256": "0')):
        sidecar.write_bytes(before["train/train-000000.json"].replace(change[0].encode(), change[1].encode(), 2))
        problems = verify(out, ENGINE).problems
        assert {problem.file for problem in problems} <= {"train/train-000000.json", "dataset.json"}, change
    sidecar.unlink()
    repair(out, find_source(str(source)), verify(out, ENGINE).problems, ENGINE)
    assert contents(out) == before


# The ledger


def test_the_ledger_has_a_column_for_each_name_and_the_facts(source: Path, made: Path) -> None:
    table = pq.read_table(made / "train" / "samples.parquet")
    kinds = {name: str(table.schema.field(f"metadata.{name}").type) for name in (*DOCUMENTS[NAMES[0]], "txt")}
    assert kinds == {
        "caption": "string",
        "tags": "string",
        "score": "double",
        "count": "int64",
        "box": "string",
        "txt": "string",
    }
    documents = by_name(made)
    for row in table.to_pylist():
        document, file = documents[row["source"].rpartition("/")[2][:-4]], source / row["source"]
        assert row["metadata.score"] == document.get("score") and row["metadata.caption"] == document.get("caption")
        assert row["metadata.tags"] is None or json.loads(row["metadata.tags"]) == document["tags"]
        facts = ("PNG", file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest(), 1)
        assert tuple(row[name] for name in ("format", "bytes", "sha256", "orientation")) == facts


def test_columns_hold_what_fits_together() -> None:
    values: dict[str, list[Any]] = {
        "bool": [True, None],
        "int64": [1, 2**60],
        "double": [1, 0.5],
        "string": ["a", "b"],
        "json int": [2**60, 0.5],
        "json big": [2**70, 1],
        "json mixed": [1, "a"],
        "json half": ["\ud800", "a"],
    }
    made_of = ledger.Ledger()
    made_of._kinds = {name: {ledger._kind(value) for value in two if value is not None} for name, two in values.items()}
    columns = dict(
        zip(
            [field.name for field in made_of._columns()],
            made_of._along([{name: two[n] for name, two in values.items()} for n in range(2)]),
            strict=True,
        )
    )
    for name, two in values.items():
        column = columns[f"metadata.{name}"]
        if name.startswith("json"):
            assert [json.loads(text) for text in column.to_pylist()] == two
        else:
            assert str(column.type) == name and column.to_pylist() == two


def test_of_too_many_names_one_column_has_all(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_COLUMNS", 3)
    monkeypatch.setattr(ledger, "_GROUP_ROWS", 1)
    out = shard(source, tmp_path / "out")
    table = pq.read_table(out / "train" / "samples.parquet")
    assert [name for name in table.column_names if name.startswith("metadata")] == ["metadata"]
    documents = [json.loads(text) for text in table["metadata"].to_pylist() if text]
    assert sorted(map(str, documents)) == sorted(str(each) for each in by_name(out).values() if each)


def test_pixels_and_orientations_are_recorded(pictures: dict[str, bytes], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    photo = folders(tmp_path / "source", {"cat-0": encode(make_photo(20, 16, 1), "JPEG", exif=exif)})
    (row,) = pq.read_table(shard(photo, tmp_path / "out") / "train" / "samples.parquet").to_pylist()
    assert (row["format"], row["orientation"]) == ("JPEG", 6)
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)[:, ::-1]
    known = {"format": "pixels", "bytes": 12, "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
    assert facts_of(pixels) == known and facts_of(b"?")["format"] is None


# Those who read the shards


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_readers_find_the_members(made: Path) -> None:
    """webdataset all of them; DALI, by its index, those that it asks for. What comes first is the picture."""
    shards = [str(path) for path in sorted(made.glob("train/*.tar"))]
    expected = {str(each) for each in by_name(made).values()}
    found = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert {str(json.loads(sample.get("json", b"{}"))) for sample in found} == expected and len(found) == 8
    gc.collect()  # webdataset leaves the shards open, which Python notices only now
    labels = Samples(made, "train").labels.tolist()
    assert [int(sample["cls"]) for sample in found] == labels

    @pipeline_def(batch_size=8, num_threads=1, device_id=None)
    def read():
        indexes = [path.replace(".tar", ".idx") for path in shards]
        return tuple(cast("Any", fn.readers.webdataset(paths=shards, index_paths=indexes, ext=["png", "cls"])))

    pipeline = read()
    pipeline.build()
    _, got = pipeline.run()
    assert [int(bytes(got.at(n)).decode()) for n in range(8)] == labels


def test_a_loader_gives_keys_and_metadata(made: Path) -> None:
    with Loader(made, batch_size=3, augmentation="none") as loader:
        for batch in loader:
            keys = loader.keys(batch.indices)
            samples = Samples(made, "train")
            assert keys == [samples.key(row) for row in batch.indices.tolist()] and len(keys[0]) == 8
            assert loader.metadata(batch.indices) == [samples.metadata(row) for row in batch.indices.tolist()]
        with pytest.raises(AlexprepError, match=r"index 8 is not in \[0, 7\]"):
            loader.keys([8])
    with Loader(made / "train", batch_size=3, augmentation="none") as loader:  # as somebody's tars
        assert loader.keys(range(8)) == [samples.key(row) for row in range(8)]
        with pytest.raises(AlexprepError, match="make one of these tars"):
            loader.metadata([0])


def test_our_own_shards_are_sharded_anew_with_all_that_they_have(made: Path, tmp_path: Path) -> None:
    again = shard(made, tmp_path / "again")
    samples = Samples(again, "train")
    first = {str(document) for document in by_name(made).values()}
    assert {str(samples.metadata(row)) for row in range(len(samples))} == first


# Words


def test_words_stand_beside_the_classes_and_in_no_digest(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    from scipy.io import savemat

    wnids = ("n01440764", "n02123045")
    picture = pictures[NAMES[0]]
    root = folders(tmp_path / "source", {f"{wnid}-0": picture for wnid in wnids})
    bare = shard(root, tmp_path / "bare")
    assert "words" not in read_dataset(bare)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [
        (n + 1, wnid, words, 0) for n, (wnid, words) in enumerate(zip(wnids, ("tench, Tinca", "tabby"), strict=True))
    ]
    devkit = tmp_path / "meta.mat"
    savemat(devkit, {"synsets": np.array(rows, kind)})
    own = tmp_path / "own.txt"
    own.write_text("n02123045\ta cat\n")
    for place, content, option, expected in (
        ("meta.mat", devkit.read_bytes(), None, ["tench, Tinca", "tabby"]),
        ("meta.mat", b"damaged", None, None),
        ("LOC_synset_mapping.txt", b"n01440764 tench, Tinca tinca\nn00000001 x\n", None, ["tench, Tinca tinca", ""]),
        ("words.txt", b"n02123045\ttabby\n", own, ["", "a cat"]),
    ):
        (root / place).write_bytes(content)
        out = shard(root, tmp_path / f"{place}{len(content)}", class_words=option)
        (root / place).unlink()
        dataset = read_dataset(out)
        assert dataset.get("words") == expected
        assert (dataset["digest"], dataset["plan"]) == tuple(read_dataset(bare)[key] for key in ("digest", "plan"))
        assert verify(out, ENGINE).problems == []
        assert (read_dataset(shard(out, tmp_path / f"again{len(content)}")).get("words")) == expected
    shard(root, out)  # without the words, which it keeps
    assert read_dataset(out)["words"] == ["", "a cat"]
    with pytest.raises(AlexprepError, match=r"has other words than .* was begun with, and those stay"):
        shard(root, bare, class_words=own)
    with pytest.raises(AlexprepError, match="names none of the 2 classes, such as 'n01440764'"):
        own.write_text("cat\tx\n")
        shard(root, tmp_path / "wrong", class_words=own)


def test_the_option_of_the_command(command: Callable[..., tuple[int, str, str]], source: Path) -> None:
    arguments = ("shard", str(source), "--size", "16", "--workers", "1", "--limit", "2", "--metadata")
    assert command(*arguments, "caption,,x")[0] == 2
    assert command(*arguments, " caption, tags", "--out", "out")[0] == 0
    assert read_dataset("out")["options"]["metadata"] == ["caption", "tags"]
    _, account, _ = command(*arguments, "caption,none such", "--out", "other")
    assert "no picture has metadata named 'none such'" in " ".join(account.split())
    status, _, messages = command(*arguments, "none", "--out", "out")
    assert status == 1 and "--metadata was caption,tags, now is none" in messages
