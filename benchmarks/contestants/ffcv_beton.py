"""FFCV's writer in its JPEG mode. It bounds the longer side at 256 (fewer pixels than the others write) and does not crop."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Photos:
    """Decoded photos with a label, as FFCV wants them."""

    def __init__(self, source: str) -> None:
        """Lists the files below `source`."""
        self.paths = sorted(path for path in Path(source).rglob("*") if path.is_file())

    def __len__(self) -> int:
        """How many there are."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """A Pillow image, RGB, and 0."""
        from PIL import Image

        return Image.open(self.paths[index]).convert("RGB"), 0


def main(source: str, target: str, processes: str) -> None:
    """Converts the tree at `source` and prints what it took."""
    from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found]
    from ffcv.writer import DatasetWriter  # type: ignore[import-not-found]

    photos = Photos(source)
    Path(target).mkdir(parents=True, exist_ok=True)
    fields = {"image": RGBImageField(write_mode="jpg", max_resolution=256, jpeg_quality=95), "label": IntField()}
    start = time.perf_counter()
    DatasetWriter(f"{target}/photos.beton", fields, num_workers=int(processes)).from_indexed_dataset(photos)
    print(json.dumps({"images": len(photos), "steady": len(photos) / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
