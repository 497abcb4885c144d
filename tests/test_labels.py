"""How classes become numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from alexprep.shards.conversion import convert
from alexprep.shards.dataset_format import read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import Target
from alexprep.shards.plan import ShardOptions, class_order
from alexprep.shards.sources.base import Source
from alexprep.shards.storage import LocalFiles


def _devkit(path: Path, leaves: list[str], ancestors: list[str]) -> None:
    """A meta.mat with the fields of the 2012 devkit."""
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(n + 1, wnid, "w", "g", 0) for n, wnid in enumerate(leaves)]
    rows += [(n + 1 + len(leaves), wnid, "w", "g", 2) for n, wnid in enumerate(ancestors)]
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"synsets": np.array(rows, dtype=dtype).reshape(-1, 1)})


def _source(folder: Path) -> Source:
    return Source(LocalFiles(bytes(folder)))


def test_ilsvrc_id_is_the_devkit_s_order(tmp_path: Path) -> None:
    _devkit(tmp_path / "meta.mat", ["n07711080", "n01440764", "n04554684"], ["n00001740"])
    order = class_order("ilsvrc-id", {"n01440764", "n04554684"}, _source(tmp_path))
    assert order == ["n07711080", "n01440764", "n04554684"]
    with pytest.raises(AlexprepError, match="no number for 1 of 1 classes, among them 'n00001740'"):
        class_order("ilsvrc-id", {"n00001740"}, _source(tmp_path))
    (tmp_path / "meta.mat").write_bytes(b"junk")
    with pytest.raises(AlexprepError, match="not a devkit"):
        class_order("ilsvrc-id", {"n01440764"}, _source(tmp_path))
    with pytest.raises(AlexprepError, match="needs the devkit"):
        class_order("ilsvrc-id", {"n01440764"}, _source(tmp_path / "elsewhere"))


def test_the_devkit_is_found_beside_the_source(photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "imagenet"
    source.mkdir()
    for split in ("train", "val"):
        (source / split).symlink_to(photos / split)
    _devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat", ["class3", "class1", "class0", "class2"], [])
    convert(source, tmp_path / "out", ShardOptions(Target(size=64), labels="ilsvrc-id", limit=4), 1)
    dataset = read_dataset(tmp_path / "out")
    assert dataset["classes"] == ["class3", "class1", "class0", "class2"] and dataset["labels"] == "ilsvrc-id"


def test_a_file_may_give_the_order(tmp_path: Path) -> None:
    listing = tmp_path / "classes.txt"
    listing.write_text("b\na\n\n")
    assert class_order(str(listing), {"a"}, _source(tmp_path)) == ["b", "a"]
    listing.write_bytes(b"\xef\xbb\xbfb\r\n a \r\n\r\n")  # as Windows writes it; folders may begin or end in a space
    assert class_order(str(listing), {" a ", "b"}, _source(tmp_path)) == ["b", " a "]
    listing.write_text("b\na\nb\n")
    with pytest.raises(AlexprepError, match="names class 'b' twice"):
        class_order(str(listing), {"a"}, _source(tmp_path))
    with pytest.raises(AlexprepError, match="neither auto, sorted, ilsvrc-id, nor a text file"):
        class_order("srted", {"a"}, _source(tmp_path))


@pytest.mark.parametrize("rule", ["auto", "sorted"])
def test_sorted_is_by_bytes(rule: str, tmp_path: Path) -> None:
    assert class_order(rule, {"é", "z", "Z", "n2", "n10"}, _source(tmp_path)) == ["Z", "n10", "n2", "z", "é"]
