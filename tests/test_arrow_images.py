"""Datasets as `save_to_disk` writes them: by pyarrow's own writers, with the lists that the library datasets puts beside the files."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.listing import list_inputs
from alexprep.shards.plan import ShardOptions
from alexprep.shards.sources import grouped
from alexprep.shards.sources.base import Account, Choices
from alexprep.shards.sources.columnar_files import columnar
from alexprep.shards.sources.layout_detection import find_source
from alexprep.shards.storage import files_at
from alexprep.shards.verification import verify
from alexprep.shards.worker_pool import InProcessEngine
from tests.source_checks import fails, flipped, pictures
from tests.support.record_files import save_to_disk, write_arrow
from tests.test_parquet_images import NAMES, hub_table, rows_of

ENGINE = InProcessEngine()
OPTIONS = ShardOptions(Target(size=64, format="png"), shard_samples=7)


@pytest.fixture(scope="module")
def saved(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` as a DatasetDict: train in two files. Not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    rows = rows_of(photos, "train")
    save_to_disk(root / "train", [hub_table(rows[:24]), hub_table(rows[24:])], "train")
    save_to_disk(root / "validation", [hub_table(rows_of(photos, "val"))], "validation")
    (root / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    return root


def test_pictures_labels_and_names_are_those_of_class_folders(saved: Path, photos: Path, tmp_path: Path) -> None:
    report = convert(saved, tmp_path / "a", OPTIONS, ENGINE)
    assert (report.samples, report.found) == ({"train": 48, "val": 20}, 73)  # and five lists
    convert(photos, tmp_path / "b", OPTIONS, ENGINE)
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    assert read_dataset(tmp_path / "a")["classes"] == NAMES
    assert verify(tmp_path / "a", ENGINE).problems == []


def test_one_split_and_one_file_and_a_store(saved: Path, tmp_path: Path) -> None:
    alone = list_inputs(find_source(str(saved / "validation")))
    assert {split: len(table) for split, table in alone.splits.items()} == {"val": 20}
    table = columnar(*files_at(str(saved / "validation/data-00000-of-00001.arrow"))).read(["label", "image"])
    assert table.column_names == ["label", "image"]
    for new in (pa.ipc.new_stream, pa.ipc.new_file):
        place = write_arrow(tmp_path / "test.arrow", table.select(["image"]).combine_chunks(), 3, new)
        listing = list_inputs(find_source(str(place), None, Choices(unlabelled=True)))
        assert [len(table) for table in listing.splits.values()] == [20] and listing.classes == []
        row = listing.splits["test"].to_pylist()[19]
        assert row["offset"] == 6 and row["size"] == 1
        held = table.column("image").to_pylist()[19]["bytes"]
        grouped._groups.clear()
        location = next(item for n, item in enumerate(listing.source.inputs(listing.account)) if n == 19).location
        assert listing.source.read(location) == held
    store = fsspec.filesystem("memory")
    store.put(str(saved / "validation"), "/saved", recursive=True)
    remote = list_inputs(find_source("memory://saved"))
    assert remote.splits["val"].drop(["path"]).equals(alone.splits["val"].drop(["path"]))
    assert [remote.source.read(item.location) for item in remote.source.inputs(remote.account)][19] == held


def test_damage_is_told(saved: Path, tmp_path: Path) -> None:
    name = "data-00000-of-00001.arrow"
    whole = (saved / "validation" / name).read_bytes()
    place = tmp_path / name
    for data, words in [
        (whole[: len(whole) // 2], "goes beyond the end of the file, which was cut short"),
        (whole[:-8], "so it was cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid 1", "is a pointer of Git LFS"),
        (b"x" * 100, "no message of Arrow begins at byte 0 of 100"),
        (whole[:4] + b"\xff\xff\xff\x7f" + whole[8:], "is cut short"),
    ]:
        place.write_bytes(data)
        fails(place, words)
    compressed = pa.ipc.IpcWriteOptions(compression="lz4")
    table = pa.ipc.open_stream(whole).read_all()
    with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, table.schema, options=compressed) as writer:
        writer.write_table(table)
    fails(place, "its buffers are compressed")


def test_a_damaged_batch_costs_its_own_rows(saved: Path, tmp_path: Path) -> None:
    """Offsets of a batch that lead elsewhere are seen before a byte is read by them."""
    name = "data-00000-of-00001.arrow"
    place = tmp_path / name
    whole = (saved / "validation" / name).read_bytes()
    table = pa.ipc.open_stream(whole).read_all()
    image = table.column("image").chunk(1).field("bytes")
    offsets = image.buffers()[1].to_pybytes()[: 4 * (len(image) + 1)]
    at = whole.index(offsets)
    place.write_bytes(whole[: at + 8] + b"\xff\xff\xff\x7f" + whole[at + 12 :])
    report = convert(str(place), tmp_path / "out", ShardOptions(Target(size=64), shard_samples=7), ENGINE)
    assert (report.written, report.rejected.total()) == (15, 5)
    assert "row group N is damaged" in next(iter(report.rejected))


def test_lists_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "x", [pa.table({"image": [b"x"], "label": [1]})] * 2, "train")
    (folder / "data-00001-of-00002.arrow").unlink()
    fails(folder, "data-00001-of-00002.arrow is missing, with 0 others")
    (folder / "state.json").write_text("{")
    fails(folder, "cannot be read")
    for name in ("../x/data-00000-of-00002.arrow", "..", "", "\\ud800", "\\n"):
        (folder / "state.json").write_text(f'{{"_data_files": [{{"filename": "{name}"}}]}}')
        fails(folder, "lists no files of data")
        (tmp_path / "dataset_dict.json").write_text(f'{{"splits": ["{name}"]}}')
        fails(tmp_path, "names no splits")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["x", "y"]}')
    with pytest.raises(AlexprepError, match="'x' means no split: name the folder of one split as SOURCE"):
        find_source(str(tmp_path))
    save_to_disk(tmp_path / "z", [pa.table({"text": ["x"]})], "train")
    fails(tmp_path / "z", "no column that is surely of pictures")


def test_no_flipped_bits_end_the_process(seed: int, tmp_path: Path) -> None:
    """pyarrow takes a file at its word; what a batch says is looked at before anything in it is touched."""
    rng = np.random.default_rng(seed)
    table = hub_table([(rng.bytes(200), f"{n}.jpg", n % 4) for n in range(8)])
    whole = write_arrow(tmp_path / "whole.arrow", table, 4).read_bytes()
    ends = Counter[str]()
    for n in range(80):
        data = whole
        for _ in range(3):
            data = flipped(data, int(rng.integers(len(whole))), int(rng.integers(8)))
        place = tmp_path / f"{n}.arrow"
        place.write_bytes(data)
        try:
            source = find_source(str(place))
            for item in list(source.inputs(Account())):
                with contextlib.suppress(OSError):
                    source.read(item.location)
            ends["read"] += 1
        except AlexprepError as error:
            assert str(place) in str(error)
            ends["refused"] += 1
    assert min(ends["read"], ends["refused"]) > 5
