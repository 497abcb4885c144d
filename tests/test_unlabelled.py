"""Pictures without labels: read from wherever they lie, written without KEY.cls, read back with the label -1."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alexprep.pipeline import Augmentation, Loader, webdataset_pipeline
from alexprep.shards import rgb_statistics
from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import list_inputs
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources.base import Choices
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.tar_format import members, reader_of
from alexprep.shards.verification import repair, source_of, verify
from alexprep.shards.worker_pool import InProcessEngine
from alexprep.train.data import data_facts
from tests.source_checks import make_idx, pictures, tars, write_tar

ENGINE = InProcessEngine()
UNLABELLED = Choices(unlabelled=True)
OPTIONS = ShardOptions(Target(size=64, format="png"), shard_samples=9)


@pytest.fixture(scope="module")
def flat(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures in one folder, and a paper beside them. Not to be changed."""
    root = tmp_path_factory.mktemp("flat")
    for path in (photos / "val").rglob("*.JPEG"):
        (root / path.name).write_bytes(path.read_bytes())
    (root / "README.txt").write_text("pictures")
    return root


@pytest.fixture(scope="module")
def made(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    convert(find_source(str(flat), None, UNLABELLED), out, OPTIONS, ENGINE)
    return out


def names_in(tar: Path) -> list[str]:
    data = tar.read_bytes()
    return [member.name.decode() for member in members(reader_of(data), len(data), str(tar))]


def test_a_flat_folder_is_a_question_and_then_read(flat: Path, made: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(AmbiguousSourceError) as asked:
        find_source(str(flat))
    assert [way for way, _ in asked.value.ways] == ["--unlabelled"]
    convert(photos, tmp_path / "labelled", OPTIONS, ENGINE)
    pixels = {pixels for pixels, _ in pictures(tmp_path / "labelled")["val"]}
    found = pictures(made)
    assert found == {"train": {(each, ""): 1 for each in pixels}}
    assert read_dataset(made)["classes"] == [] and read_dataset(made)["account"]["found"] == 21


def test_shards_hold_pictures_alone_and_everything_reads_them(made: Path) -> None:
    shards = sorted((made / "train").glob("*.tar"))
    assert [names_in(tar) for tar in shards] == [
        [f"{n:08d}.png" for n in range(first, min(20, first + 9))] for first in (0, 9, 18)
    ]
    for tar in shards:
        ours = tar.with_suffix(".idx").read_text()
        assert ours == make_idx(tar).read_text()  # by DALI's own tool
    assert verify(made, ENGINE, decode=True).problems == []
    statistics = rgb_statistics.pca_stats(made, "train", 1)
    assert statistics.images == 20
    loader = Loader(
        made, "train", batch_size=20, augmentation=Augmentation(crop=32, mean="none", noise="none"), threads=1
    )
    (batch,) = loader
    assert batch.labels.tolist() == [-1] * 20 and sorted(batch.indices.tolist()) == list(range(20))
    assert [label for label, _ in webdataset_pipeline(made, "train", parts=("label", "key"), shuffle=False)] == [
        -1
    ] * 20


def test_training_says_what_is_missing(made: Path) -> None:
    with pytest.raises(
        AlexprepError, match="was made with --unlabelled and has no labels, which training a network needs"
    ):
        data_facts(made)


def test_a_damaged_shard_is_seen_and_mended(flat: Path, made: Path, tmp_path: Path) -> None:
    convert(find_source(str(flat), None, UNLABELLED), tmp_path / "a", OPTIONS, ENGINE)
    tar = tmp_path / "a/train/train-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    problems = verify(tmp_path / "a", ENGINE).problems
    assert [(problem.file, problem.member) for problem in problems] == [("train/train-000001.tar", "00000009.png")]
    repair(tmp_path / "a", source_of(tmp_path / "a", str(flat)), problems, ENGINE)
    assert tars(tmp_path / "a") == tars(made) and verify(tmp_path / "a", ENGINE).problems == []


def test_the_same_pictures_packed_give_the_same_shards(flat: Path, made: Path, tmp_path: Path) -> None:
    content = {path.name: path.read_bytes() for path in sorted(flat.glob("*.JPEG"))}
    write_tar(tmp_path / "pictures.tar", content)
    rows = [{"image": {"bytes": data, "path": name}} for name, data in content.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pictures.parquet")
    first = {name: hashlib.sha256(data).hexdigest() for name, data in tars(made).items()}
    for place in ("pictures.tar", "pictures.parquet"):
        with pytest.raises(AlexprepError, match="--unlabelled" if place.endswith("tar") else "no column"):
            list_inputs(find_source(str(tmp_path / place)))
        out = tmp_path / f"{place}.out"
        convert(find_source(str(tmp_path / place), None, UNLABELLED), out, OPTIONS, ENGINE)
        assert pictures(out) == pictures(made)
        if place.endswith(".tar"):
            assert {name: hashlib.sha256(data).hexdigest() for name, data in tars(out).items()} == first


@pytest.mark.parametrize("options", [(), ("--unlabelled",)])
def test_our_own_shards_without_labels_are_a_source(made: Path, options: tuple[str, ...], tmp_path: Path) -> None:
    source = find_source(str(made), None, UNLABELLED if options else Choices())
    assert source.layout == "webdataset"
    convert(source, tmp_path / "again", OPTIONS, ENGINE)
    assert pictures(tmp_path / "again") == pictures(made)
    assert names_in(tmp_path / "again/train/train-000000.tar")[1].endswith(".png")


def test_splits_stay_and_labels_do_not_count(photos: Path, tmp_path: Path) -> None:
    listing = list_inputs(find_source(str(photos), None, UNLABELLED))
    assert {split: len(table) for split, table in listing.splits.items()} == {"train": 48, "val": 20}
    assert listing.classes == [] and listing.names == [""]
    alone = Choices((("val", "val"),), unlabelled=True)
    assert {
        split: len(table) for split, table in list_inputs(find_source(str(photos), None, alone)).splits.items()
    } == {"val": 20}
    pairs = [(f"{n}.{end}", data) for n in range(3) for end, data in (("jpg", b"x"), ("txt", b"a caption"))]
    write_tar(tmp_path / "set" / "00000.tar", pairs)
    write_tar(tmp_path / "set" / "00001.tar", [(f"1{name}", data) for name, data in pairs])
    listing = list_inputs(find_source(str(tmp_path / "set"), None, UNLABELLED))
    assert (listing.source.layout, len(listing.splits["train"])) == ("webdataset", 6)


def test_what_contradicts_itself_is_refused(
    photos: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, said = command("inspect", str(photos), "--unlabelled", "--class-depth", "1")
    assert status == 1 and "give one of them" in said
    status, out, _ = command("inspect", str(photos), "--unlabelled", "--json")
    assert status == 0 and "classes  none is known: every label is -1" in out
    assert json.loads(out.splitlines()[-1])["splits"]["val"]["unlabelled"] == 20
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "a.parquet")
    status, _, said = command("inspect", str(tmp_path / "a.parquet"), "--unlabelled", "--columns", "label=label")
    assert status == 1 and "give one of them" in said
    labelled = tmp_path / "labelled"
    convert(photos, labelled, OPTIONS, ENGINE)
    with pytest.raises(AlexprepError, match=re.escape("SOURCE was read as found, now with --unlabelled")):
        convert(find_source(str(photos), None, UNLABELLED), labelled, OPTIONS, ENGINE)
