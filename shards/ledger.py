"""Makes a split's ledger, `samples.parquet`: a row for every input of the plan, with what became of it and what goes along with it.

Metadata are read a second time from the shards' sidecars when the file is written, so that only one shard's are in memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import Shard, locations

PREFIX = "metadata."  # of the columns with metadata, since their names may be any
WHOLE = "metadata"  # the one column, JSON, of a split whose samples have too many names for a column each
MAX_COLUMNS = 256
_GROUP_ROWS, _GROUP_BYTES = 65_536, 2**26  # of a row group, where metadata go along
_EXACT = 2**53  # up to which every whole number is a float64
_FACTS = {"format": pa.string(), "bytes": pa.int64(), "sha256": pa.string(), "orientation": pa.int8()}
_TYPES = (
    ({"bool"}, pa.bool_()),
    ({"int", "long"}, pa.int64()),
    ({"int", "float"}, pa.float64()),
    ({"str"}, pa.string()),
)


class Ledger:
    """The ledger of one split; it takes in one finished shard after the other, in the plan's order."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._shards: list[Shard] = []
        self._kinds: dict[str, set[str]] = {}  # of the values of each name
        self._too_many = False

    def add(self, shard: Shard, planned: pa.Table, sidecar: dict[str, Any]) -> None:
        """Takes in a shard, given its rows of plan.parquet."""
        entries = sidecar["inputs"]
        if len(entries) != planned.num_rows:
            raise AlexprepError(
                f"{shard.name}.json lists {len(entries)} of {planned.num_rows} inputs: run `alexprep verify`"
            )
        self._tables.append(_fates(planned, entries))
        self._shards.append(shard)
        for entry in entries:
            for name, value in entry.get("metadata", {}).items():
                if value is not None and not self._too_many:
                    self._kinds.setdefault(name, set()).add(_kind(value))
                    self._too_many = len(self._kinds) > MAX_COLUMNS

    @property
    def names(self) -> list[str]:
        """Of the metadata that samples have; not all of them where they are too many for columns."""
        return list(self._kinds)

    def content(self, reread: Callable[[Shard], dict[str, Any]]) -> bytes:
        """The file; `reread` gives a shard's sidecar again."""
        file = io.BytesIO()
        if not self._kinds:
            table = pa.concat_tables(self._tables, promote_options="default")
            pq.write_table(table, file, compression="zstd")
            return file.getvalue()
        schema = pa.unify_schemas([table.schema for table in self._tables])
        for field in self._columns():
            schema = schema.append(field)
        waiting: list[pa.Table] = []
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for shard, table in zip(self._shards, self._tables, strict=True):
                along = self._along([entry.get("metadata", {}) for entry in reread(shard)["inputs"]])
                for field, column in zip(self._columns(), along, strict=True):
                    table = table.append_column(field, column)
                waiting.append(table)
                if sum(map(len, waiting)) >= _GROUP_ROWS or sum(each.nbytes for each in waiting) >= _GROUP_BYTES:
                    _write(writer, schema, waiting)
            _write(writer, schema, waiting)
        return file.getvalue()

    def _columns(self) -> list[pa.Field]:
        """The fields of the columns with metadata."""
        if self._too_many:
            return [pa.field(WHOLE, pa.string())]
        return [pa.field(PREFIX + name, _type(kinds)) for name, kinds in sorted(self._kinds.items())]

    def _along(self, documents: list[dict[str, Any]]) -> Iterable[pa.Array]:
        """The columns with metadata of one shard."""
        if self._too_many:
            yield pa.array([_json(document) if document else None for document in documents], pa.string())
            return
        for name, kinds in sorted(self._kinds.items()):
            values = [document.get(name) for document in documents]
            if _as_json(kinds):
                values = [None if value is None else _json(value) for value in values]
            yield pa.array(values, _type(kinds))


def _write(writer: pq.ParquetWriter, schema: pa.Schema, waiting: list[pa.Table]) -> None:
    if waiting:
        table = pa.concat_tables([schema.empty_table(), *waiting], promote_options="default")
        writer.write_table(table.select(schema.names), row_group_size=max(1, len(table)))
        waiting.clear()


def _fates(planned: pa.Table, entries: list[dict[str, Any]]) -> pa.Table:
    """What became of the inputs of one shard, in order; and what is known of their files, unless an earlier release made the shard."""
    columns = {
        "key": pa.array([entry["key"] for entry in entries], pa.string()),
        "shard": planned["shard"],
        "label": planned["label"],
        "source": pa.array(list(map(str, locations(planned))), pa.string()),
        "width": pa.array([entry["width"] for entry in entries], pa.int32()),
        "height": pa.array([entry["height"] for entry in entries], pa.int32()),
        "status": pa.array([entry["status"] for entry in entries], pa.string()),
        "kept": pa.array([entry.get("kept", False) for entry in entries], pa.bool_()),
        "reason": pa.array([entry.get("reason") for entry in entries], pa.string()),
    }
    if any("sha256" in entry for entry in entries):
        upright = {"orientation": 1}
        known = [upright | entry if "sha256" in entry else {} for entry in entries]
        columns |= {name: pa.array([entry.get(name) for entry in known], kind) for name, kind in _FACTS.items()}
    return pa.table(columns)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "json" if not -(2**63) <= value < 2**63 else "int" if abs(value) <= _EXACT else "long"
    if isinstance(value, str):
        return "str" if value.isascii() or value == value.encode("utf-8", "replace").decode() else "json"
    return "float" if isinstance(value, float) else "json"


def _as_json(kinds: set[str]) -> bool:
    """Whether values of these kinds have no type in common, so that the column holds them as JSON."""
    return not any(kinds <= together for together, _ in _TYPES)


def _type(kinds: set[str]) -> pa.DataType:
    return next((kind for together, kind in _TYPES if kinds <= together), pa.string())


def _json(value: Any) -> str:
    """As in KEY.json, but in ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
