"""The table of what a network says of images: one row an image, with its label and the five best classes; written and read back.

`alexprep eval --predictions` and `alexprep predict` write the same table, so that one can be held against the other; a report reads it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import publish_bytes

ENDINGS = (".csv", ".parquet")


@dataclass(frozen=True)
class PredictionTable:
    """What a network, or several as one, say of N images.

    Attributes:
        keys: of samples, their keys in the split; of photos, their names.
        sources: where each image came from, as the ledger or the command line names it.
        labels: int64 (N,), -1 where nobody tells it.
        label_probabilities: float64 (N,), what the network gives the label; NaN where that is not known.
        best: int32 (N, 5), or fewer where there are fewer classes: the best classes, best first; among equals the lower label first.
        probabilities: float64, of these.
        classes: names, by label.
    """

    keys: list[str]
    sources: list[str]
    labels: NDArray[np.int64]
    label_probabilities: NDArray[np.float64]
    best: NDArray[np.int32]
    probabilities: NDArray[np.float64]
    classes: list[str]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.keys)

    @property
    def columns(self) -> list[str]:
        """The names of the columns of a file: key, source, label, class, label_probability, then label1, class1, probability1, and so on."""
        ranks = range(1, 1 + self.best.shape[1])
        own = ["key", "source", "label", "class", "label_probability"]
        return [*own, *(f"{name}{rank}" for rank in ranks for name in ("label", "class", "probability"))]

    def rows(self) -> Iterator[list[Any]]:
        """The values of each image in the order of `columns`; None where a label is not known."""
        for n, label in enumerate(self.labels.tolist()):
            known = label >= 0
            row: list[Any] = [self.keys[n], self.sources[n], label if known else None, self._name(label)]
            row.append(float(self.label_probabilities[n]) if known else None)
            for guess, probability in zip(self.best[n].tolist(), self.probabilities[n].tolist(), strict=True):
                row += [guess, self._name(guess), probability]
            yield row

    def as_json(self) -> list[dict[str, Any]]:
        """The same with the best classes as a list, for `--json`."""
        ranks = range(5, len(self.columns), 3)
        return [
            dict(zip(self.columns[:5], row[:5], strict=True))
            | {"best": [dict(zip(("label", "class", "probability"), row[at : at + 3], strict=True)) for at in ranks]}
            for row in self.rows()
        ]

    def as_csv(self) -> str:
        """The table as text with a header; every number with all its digits, so that it reads back as it was."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if value is None else value for value in row] for row in self.rows())
        return text.getvalue()

    def _name(self, label: int) -> str | None:
        return self.classes[label] if label >= 0 else None


def check_table_file(path: Path) -> None:
    """Refuses, with AlexprepError, a file that a table could not be written to, before the work begins."""
    if path.suffix not in ENDINGS:
        raise AlexprepError(f"{path}: name a file that ends in {' or '.join(ENDINGS)} for the predictions")
    if not path.parent.is_dir():
        raise AlexprepError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise AlexprepError(f"{path} is a folder: name a file in it")


def write_predictions(table: PredictionTable, path: Path) -> None:
    """Writes a table to a .csv or .parquet file, whole or not at all. Raises OSError where that fails."""
    if path.suffix == ".csv":
        publish_bytes(path, table.as_csv().encode("utf-8", "surrogateescape"))
        return
    kinds = {"label": pa.int32(), "class": pa.string(), "probability": pa.float64(), "label_probability": pa.float64()}
    fields = [(name, kinds.get(name.rstrip("12345"), pa.string())) for name in table.columns]
    columns = list(zip(*table.rows(), strict=True)) or [()] * len(fields)
    arrays = [pa.array(column, kind) for column, (_, kind) in zip(columns, fields, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.table(arrays, schema=pa.schema(fields)), buffer, compression="zstd")
    publish_bytes(path, buffer.getvalue())


def read_predictions(path: Path, classes: Sequence[str]) -> PredictionTable:
    """Reads a table that `write_predictions` wrote; `classes` are the names by label.

    Raises AlexprepError where there is no such table, or it names classes by other names.
    """
    again = "write it again with `alexprep eval --predictions`"
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}
        else:
            columns = pq.read_table(io.BytesIO(path.read_bytes())).to_pydict()
            header = list(columns)
        count = (len(header) - 5) // 3
        ranks = range(1, 1 + count)
        columns = columns or {name: [] for name in header}
        labels = np.array([-1 if value in ("", None) else int(value) for value in columns["label"]], np.int64)
        known = [math.nan if value in ("", None) else float(value) for value in columns["label_probability"]]
        best = np.array([columns[f"label{rank}"] for rank in ranks], np.int32).reshape(count, -1).T
        table = PredictionTable(
            columns["key"],
            columns["source"],
            labels,
            np.array(known, np.float64),
            best,
            np.array([columns[f"probability{rank}"] for rank in ranks], np.float64).reshape(count, -1).T,
            list(classes),
        )
        if header != table.columns or not count:
            raise AlexprepError(f"{path} has other columns than predictions have: {again}")
        names = {
            (label, name)
            for rank in ranks
            for label, name in zip(best[:, rank - 1].tolist(), columns[f"class{rank}"], strict=True)
        }
        if any(not 0 <= label < len(classes) or classes[label] != name for label, name in names):
            raise AlexprepError(f"{path} has other classes than the dataset: {again}")
        return table
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:  # pa.ArrowInvalid is a ValueError
        raise AlexprepError(f"{path} cannot be read ({error}): {again}") from None
