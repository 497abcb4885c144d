"""Makes a submission to ILSVRC of what nets say of a split: a line an image in the order of the file names, five ILSVRC IDs, best first.

It asks no network: the guesses come from `alexprep.train.evaluation`.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexprep.shards.dataset_format import LEDGER, read_dataset
from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import ILSVRC_ID
from alexprep.train.metrics import TOP


def check_submission(data: Path, split: str) -> None:
    """Makes sure that labels are ILSVRC IDs less 1, that the split is whole, and its names are all different, before hours of work."""
    dataset = read_dataset(data)
    if dataset["labels"] != ILSVRC_ID:
        raise AlexprepError(
            f"--submission needs labels that are ILSVRC IDs less 1, those of {data} are {dataset['labels']!r}: shard with "
            f"`--labels {ILSVRC_ID}`, and train on that"
        )
    if len(dataset["classes"]) < TOP:
        raise AlexprepError(f"--submission needs {TOP} guesses an image, {data} has {len(dataset['classes'])} classes")
    if dataset["options"]["limit"] is not None:
        raise AlexprepError(
            f"--submission needs every image of {split!r}, {data} was made with --limit {dataset['options']['limit']}"
        )
    names, _ = _ledger(data, split)
    _in_order(data, split, names)


def make_submission(
    data: Path, split: str, best: NDArray[np.int32], rows: NDArray[np.int64]
) -> tuple[bytes, list[str], list[str]]:
    """Makes the submission for a split of the data set in a folder; file names come from its ledger.

    Labels (N, 5), the best guess first, and the rows (N,) of the split's index that they belong to -> the file's content; the images of
    its lines; those of them without a prediction, whose lines are a placeholder.
    """
    names, written = _ledger(data, split)
    places = np.flatnonzero(written)
    if len(rows) != len(places) or not np.array_equal(np.sort(rows), np.arange(len(places))):
        raise AlexprepError(
            f"{data / split / LEDGER} lists {len(places)} images, {len(rows)} were predicted: run `alexprep verify`"
        )
    guesses = np.tile(np.arange(TOP, dtype=np.int64), (len(names), 1))  # 1 2 3 4 5 where an image was rejected
    guesses[places[rows]] = best
    order = _in_order(data, split, names)
    content = "".join(" ".join(map(str, row)) + "\n" for row in (guesses[order] + 1).tolist())
    missing = [names[place] for place in order if not written[place]]
    return content.encode(), [names[place] for place in order], missing


def _in_order(data: Path, split: str, names: list[str]) -> list[int]:
    """The places of the images in the order of their file names, which must all be different."""
    files = [PurePosixPath(name).name for name in names]
    order = sorted(range(len(files)), key=files.__getitem__)
    for one, other in itertools.pairwise(order):
        if files[one] == files[other]:
            raise AlexprepError(
                f"{data} has two images named {files[one]} in {split!r} ({names[one]}, {names[other]}): a submission is in the "
                "order of the names, so each must be there once"
            )
    return order


def _ledger(data: Path, split: str) -> tuple[list[str], NDArray[np.bool_]]:
    """The source of every input, in the order of the index, and whether it became a sample."""
    path = data / split / LEDGER
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()), columns=["source", "status"])
    except (OSError, pa.ArrowInvalid) as error:
        raise AlexprepError(f"{path} cannot be read ({error}): run the same `alexprep shard` again") from None
    written = np.array([status == "written" for status in table["status"].to_pylist()], np.bool_)
    return table["source"].to_pylist(), written
