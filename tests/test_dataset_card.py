"""The dataset card: what it says to a parser of YAML, and when it is written, kept and judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_card import dataset_card
from alexprep.shards.dataset_format import CARD
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.storage import json_bytes
from alexprep.shards.verification import repair, verify
from alexprep.shards.worker_pool import InProcessEngine

ODD = ["no", "1e3", 'a "b": c', "café\x85\u2028\x7f", "猫😀", "\\xff", "null", "- x", "", "#", "\t\n'"]


def _front(card: bytes) -> Any:
    before, front, _ = card.decode().split("---\n", 2)
    assert not before
    return yaml.safe_load(front)


@pytest.mark.parametrize(
    ("target", "column"),
    [
        (Target(), {"name": "jpg", "dtype": "image"}),
        (Target(format="webp", fit="none"), {"name": "webp", "dtype": "image"}),
        (
            Target(size=(8, 6), format="raw"),
            {"name": "npy", "dtype": {"array3_d": {"shape": [8, 6, 3], "dtype": "uint8"}}},
        ),
        (Target(format="raw", fit="longer"), {"name": "npy", "list": {"list": {"list": "uint8"}}}),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_parser_of_yaml_finds_splits_columns_and_class_names(
    target: Target, column: dict[str, Any], labelled: bool
) -> None:
    found = _front(
        dataset_card({"train": 3, "val": 0, "test": 1}, ODD, target, labelled, ["caption"] if labelled else [])
    )
    files = [{"split": split, "path": f"{split}/{split}-*.tar"} for split in ("train", "test")]
    assert found["configs"] == [{"config_name": "default", "data_files": files}]
    names = {str(label): name for label, name in enumerate(ODD)}
    more = [{"name": "cls", "dtype": {"class_label": {"names": names}}}, {"name": "json", "dtype": "json"}]
    assert found["dataset_info"]["features"] == [
        column,
        *(more if labelled else []),
        {"name": "__key__", "dtype": "string"},
    ]


@pytest.fixture
def source(photos: Path, tmp_path: Path) -> Path:
    for label in range(2):
        (tmp_path / "source" / f"c{label}").mkdir(parents=True)
        shutil.copy(photos / "train" / f"class{label}" / f"{label:03d}.JPEG", tmp_path / "source" / f"c{label}")
    return tmp_path / "source"


def _shard(source: Path, folder: Path) -> Path:
    convert(source, folder, ShardOptions(Target(size=16)), InProcessEngine())
    return folder


def _wrong(folder: Path) -> list[str]:
    return [problem.file for problem in verify(folder, InProcessEngine()).problems]


def test_what_becomes_of_a_card(source: Path, tmp_path: Path) -> None:
    out = _shard(source, tmp_path / "out")
    card, dataset = (out / CARD).read_bytes(), (out / "dataset.json").read_bytes()
    assert not _wrong(out)
    for harm in (lambda: (out / CARD).unlink(), lambda: (out / CARD).write_bytes(card.replace(b"c0", b"c9"))):
        harm()
        problems = verify(out, InProcessEngine()).problems
        assert [problem.file for problem in problems] == [CARD]
        repair(out, find_source(str(source)), problems, InProcessEngine())
        assert (out / CARD).read_bytes() == card and (out / "dataset.json").read_bytes() == dataset and not _wrong(out)
    (out / "dataset.json").unlink()  # as a kill between the two leaves it
    _shard(source, out)
    assert (out / CARD).read_bytes() == card and (out / "dataset.json").read_bytes() == dataset


def test_sets_finished_without_a_card_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    """And a README.md that lies beside one is not touched, be the set finished or not."""
    out = _shard(source, tmp_path / "out")
    (out / CARD).unlink()
    document = json.loads((out / "dataset.json").read_bytes())
    digest = document["digest"]
    del document["files"][CARD]
    (out / "dataset.json").write_bytes(json_bytes(document))
    before = (out / "dataset.json").read_bytes()
    assert not _wrong(out)
    _shard(source, out)
    assert not (out / CARD).exists() and (out / "dataset.json").read_bytes() == before

    (out / CARD).write_text("mine")
    (out / "dataset.json").unlink()
    _shard(source, out)
    document = json.loads((out / "dataset.json").read_bytes())
    assert (out / CARD).read_text() == "mine" and CARD not in document["files"] and document["digest"] == digest
    assert _wrong(out) == [CARD]  # a file that belongs to nothing
