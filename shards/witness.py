"""Whether a machine that works on a plan sees what the one that drew it up sees: the same folder, inputs and software."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

from alexprep.shards.dataset_format import PLAN
from alexprep.shards.errors import AlexprepError
from alexprep.shards.plan import Plan, locations
from alexprep.shards.plan_table import PlanTable
from alexprep.shards.sources.base import Source
from alexprep.shards.storage import digest_json, is_local
from alexprep.shards.versions import versions

_WANTED, _TRIED = 3, 16


@dataclass(frozen=True)
class Witness:
    """What a machine saw.

    Attributes:
        machine: its name.
        folder: the data set's folder.
        digest: of the plan in it.
        source: where the images are.
        sizes: a few files of it with their sizes: (path, bytes).
        versions: of what decides the bytes of a shard: (name, version).
    """

    machine: str
    folder: Path
    digest: str
    source: Source
    sizes: tuple[tuple[bytes, int], ...]
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def here(cls, plan: Plan, source: Source, table: PlanTable) -> Witness:
        """What this machine sees; the inputs are those of the first shard, a random choice."""
        sizes: dict[bytes, int] = {}
        for location in locations(table.read_row_group(0))[:_TRIED]:
            size = _size(source, location.path)
            if isinstance(size, int) and len(sizes) < _WANTED:
                sizes[location.path] = size
        return cls(
            platform.node(),
            plan.folder,
            plan.digest,
            source,
            tuple(sizes.items()),
            tuple(plan.document["versions"].items()),
        )

    def compare(self) -> None:
        """Compares it with what the machine sees that calls this.

        An input may vanish while the work goes on, so it takes all of them to be missing.

        Raises:
            AlexprepError: it sees another folder, none of the inputs, or runs other versions; both machines are named.
        """
        here = platform.node()
        path = self.folder / PLAN
        try:
            found = digest_json(json.loads(path.read_bytes()))
        except Exception as error:  # noqa: BLE001  (each store has its own kinds)
            found = f"{type(error).__name__}: {error}"
        if found != self.digest:
            place = path.absolute() if is_local(path) else path
            raise AlexprepError(
                f"{here} does not see {place} as {self.machine} does ({found}): --out must be one folder that all machines "
                "share under the same path, on a network file system, or a URL such as s3://…"
            )
        sizes = [(name, size, _size(self.source, name)) for name, size in self.sizes]
        if sizes and all(size != now for _, size, now in sizes):
            name, size, now = sizes[0]
            raise AlexprepError(
                f"{here} does not see {self.source.files.display(name)} as {self.machine} does ({size} bytes there, {now} here): "
                "SOURCE must be readable under the same path on every machine, or be a URL"
            )
        for library, version in self.versions:
            mine = versions(library)[library]
            if mine != version:
                raise AlexprepError(
                    f"{library} is {mine} on {here}, {version} on {self.machine}: install the same version on every machine, "
                    "since it decides the bytes of a shard"
                )


def _size(source: Source, path: bytes) -> int | str:
    """A file's size, or why it cannot be had."""
    try:
        return source.files.size(path)
    except Exception as error:  # noqa: BLE001  (each store has its own kinds)
        return f"{type(error).__name__}: {error}"
