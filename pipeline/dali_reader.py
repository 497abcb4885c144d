"""DALI's own reader over a finished dataset, for `@pipeline_def`s of one's own: `reader` finds the shards, `label` makes their labels dense.

A `Loader` reads without it: it needs samples in any order, which DALI's reader does not give.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode

from alexprep.shards.dataset_format import read_dataset, split_record
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import folder_at, is_local

_DIGITS = 9  # of a class there are never more: their powers of ten are 32-bit constants, as DALI wants them


def reader(data: str | Path, split: str = "train", name: str = "shards", **options: Any) -> tuple[DataNode, DataNode]:
    """Reads the encoded images of a split and their labels with `fn.readers.webdataset`, by the indexes that lie beside the shards.

    Args:
        data: a finished dataset in a local folder, its images JPEG or PNG.
        split: "train", "val" or "test".
        name: of the reader, as `DALIGenericIterator(reader_name=…)` and `Pipeline.reader_meta` want it.
        options: of DALI's reader, such as random_shuffle, initial_fill, shard_id, num_shards, pad_last_batch.

    Returns:
        uint8 (bytes,), an encoded image, for `decode_crop`, `decode_window` or `fn.decoders.image`; uint8 (digits,), for `label`. Both
        on the CPU.

    Raises AlexprepError where there is no such split, it lies in a store, or its images are raw pixels.
    """
    folder = folder_at(data)
    dataset = read_dataset(folder)
    record = split_record(dataset, split, folder)
    if not is_local(folder):
        raise AlexprepError(
            f"{data} is remote, and DALI's reader wants files: use Loader, or copy the data to a local folder"
        )
    if dataset["image"]["format"] == "raw":
        raise AlexprepError(
            f"{data} holds raw pixels, which DALI has no decoder for: use Loader, or shard as JPEG or PNG"
        )
    shards = [str(folder / split / shard["name"]) for shard in record["shards"]]
    if dataset.get("unlabelled"):
        options = {"missing_component_behavior": "empty", **options}
    encoded, digits = fn.readers.webdataset(  # type: ignore[misc]  # DALI's stub says None
        paths=[f"{shard}.tar" for shard in shards],
        index_paths=[f"{shard}.idx" for shard in shards],
        ext=[dataset["image"]["extension"], "cls"],
        name=name,
        **options,
    )
    return encoded, digits


def label(digits: DataNode) -> DataNode:
    """Makes a number of the bytes of a `.cls`, ASCII digits and nothing else: int64 (), so that a batch is a dense tensor (N,).

    No bytes, of an image without a label, are -1. Takes and gives a node on the CPU.
    """
    count = digits.shape(dtype=types.INT32)
    # The last digits, behind as many zeros as are missing.
    wide = fn.slice(
        digits, start=count - _DIGITS, shape=[_DIGITS], axes=[0], out_of_bounds_policy="pad", fill_values=[ord("0")]
    )
    values = (fn.cast(wide, dtype=types.INT64) - ord("0")) * 10 ** np.arange(_DIGITS)[::-1]
    number = fn.reductions.sum(values, axes=[0], dtype=types.INT64)
    return number - fn.cast(count[0] == 0, dtype=types.INT64)
