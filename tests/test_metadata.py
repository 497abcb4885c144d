"""What goes along with images: from every kind of source into KEY.json and the ledger, and back; and what is known of each input."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

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
from alexprep.shards.dataset_format import read_dataset, recorded_shards
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.metadata import MAX_BYTES, MetadataError, document_bytes, joined
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sample_reader import Samples
from alexprep.shards.sources.base import Account
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.verification import repair, verify
from alexprep.shards.worker_pool import InProcessEngine
from tests.conftest import encode, make_photo

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


@pytest.mark.parametrize("kind", SOURCES)
def test_what_goes_in_comes_out(kind: str, pictures: dict[str, bytes], tmp_path: Path) -> None:
    """And nothing of it changes pictures or labels: without it the shards are those of class folders."""
    source, expected = SOURCES[kind](tmp_path / "source", pictures)
    out = shard(source, tmp_path / "out")
    assert by_name(out) == expected
    assert verify(out, ENGINE, decode=True).problems == []
    samples = Samples(out, "train")
    for row in range(len(samples)):
        assert samples.dataset["classes"][samples.labels[row]] in CLASSES
    plain, bare = (
        shard(source, tmp_path / "none", metadata="none"),
        shard(folders(tmp_path / "f", pictures), tmp_path / "b"),
    )
    assert set(tars(plain)) == set(tars(bare)) or kind == "parquet"
    assert read_dataset(plain)["options"]["metadata"] is None and Samples(plain, "train").metadata(0) == {}
    some = by_name(shard(source, tmp_path / "some", metadata=("caption", "none such")))
    assert some == {name: {"caption": d["caption"]} if "caption" in d else {} for name, d in expected.items()}
