"""plan.parquet: what each shard is made of, one row group a shard."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from alexprep.shards.dataset_format import PLAN_TABLE
from alexprep.shards.errors import AlexprepError
from alexprep.shards.storage import is_local, published

TABLE = pa.schema(
    [
        ("split", pa.string()),
        ("shard", pa.uint32()),
        ("row", pa.uint32()),
        ("label", pa.int32()),
        ("path", pa.large_binary()),
        ("member", pa.large_binary()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)


class PlanTable:
    """plan.parquet, opened: row groups in the order of the plan's shards.

    Attributes:
        path: the file.
        num_row_groups: how many shards it describes.
    """

    def __init__(self, path: Path) -> None:
        """Reads the footer.

        Raises:
            AlexprepError: it cannot be read.
        """
        self.path = path
        try:
            # Not by name, which pyarrow would take for a URL where it has a colon.
            self._file = pq.ParquetFile(
                pa.OSFile(os.fsencode(path)) if is_local(path) else io.BytesIO(path.read_bytes())
            )
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None
        self.num_row_groups: int = self._file.num_row_groups

    def rows(self, group: int) -> int:
        """How many inputs a shard has."""
        return int(self._file.metadata.row_group(group).num_rows)

    def read_row_group(self, group: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of one shard.

        Raises:
            AlexprepError: they cannot be read.
        """
        try:
            return self._file.read_row_group(group, columns)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from None

    def holds(self, tables: Sequence[pa.Table]) -> bool:
        """Whether its rows are those of `tables`, one a row group; one group is in memory at a time."""
        if self.num_row_groups != len(tables):
            return False
        return all(self.read_row_group(group).equals(table) for group, table in enumerate(tables))

    def _unreadable(self, error: Exception) -> AlexprepError:
        why = str(error).partition("\n")[0]
        return AlexprepError(
            f"{self.path} cannot be read ({why}): mend the disk, or delete it and run the same command again"
        )


@functools.lru_cache(maxsize=1)
def kept_table(folder: Path, digest: str) -> PlanTable:
    """plan.parquet, opened once a process and plan: its footer grows with the number of shards."""
    return PlanTable(folder / PLAN_TABLE)


def publish_table(folder: Path, tables: Sequence[pa.Table]) -> None:
    """Writes plan.parquet, one row group for each of `tables`."""
    with published(folder / PLAN_TABLE) as file, pq.ParquetWriter(file, TABLE, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    kept_table.cache_clear()
