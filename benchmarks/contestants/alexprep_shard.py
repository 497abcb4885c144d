"""alexprep: `convert`, as `alexprep shard` runs it; exactly, or with large JPEGs decoded to a part of their size. The last word is a filter."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from alexprep.shards.conversion import convert
from alexprep.shards.image_codec import Codec, Converted, Target
from alexprep.shards.plan import ShardOptions


def main(source: str, target: str, processes: str, variant: str) -> None:
    """Shards the tree at `source`; with 0 processes, writes the pixels that would be encoded, as PATH.npy."""
    options: Any = {"decode": "scaled"} if variant.endswith("-scaled") else {}
    options |= {"filter": "lanczos"} if variant.endswith("-lanczos") else {}
    if int(processes):
        convert(source, Path(target), ShardOptions(Target(**options)), int(processes))
        return
    codec = Codec(Target(format="raw", **options))
    for path in (path for path in Path(source).rglob("*") if path.is_file()):
        converted = codec.convert(path.read_bytes())
        assert isinstance(converted, Converted), converted
        place = Path(target) / f"{path.relative_to(source)}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, np.load(io.BytesIO(converted.data)))


if __name__ == "__main__":
    main(*sys.argv[1:])
