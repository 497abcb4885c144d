"""What Hugging Face's datasets reads of a data set that was pushed to the hub, by a stand-in for it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexprep.shards.hub import push
from alexprep.shards.sample_reader import Samples
from alexprep.shards.worker_pool import InProcessEngine
from tests.support.hub import Hub, hub

__all__ = ["hub"]  # a fixture
datasets: Any = pytest.importorskip("datasets", reason="datasets is not installed: `make ecosystem` has it")


@pytest.mark.filterwarnings("ignore")  # these libraries warn of each other
def test_load_dataset_streams_a_pushed_set(
    hub: Hub, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(data, "hf://datasets/user/photos", InProcessEngine())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    splits = datasets.load_dataset("user/photos", streaming=True)
    assert list(splits) == ["train", "val"]
    for split, table in splits.items():
        samples, rows = Samples(data, split), list(table)
        assert table.features["cls"].names == samples.dataset["classes"] and len(rows) == len(samples)
        for number, row in enumerate(rows):
            assert row["__key__"] == samples.key(number) and row["cls"] == samples.labels[number]
            ours = Image.open(io.BytesIO(samples.encoded(number).tobytes()))
            np.testing.assert_array_equal(np.array(row["jpg"]), np.array(ours))
