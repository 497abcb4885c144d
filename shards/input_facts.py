"""What the ledger keeps of an input besides its fate: format, bytes, sha256 and orientation of the file as it was read."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.image_codec import exif_orientation
from alexprep.shards.image_header import PIXELS, format_name, tells_orientation


def facts_of(data: bytes | NDArray[np.uint8]) -> dict[str, Any]:
    """The facts of one input: its encoded bytes, or pixels, of which the bytes count row by row.

    `format` is that of the first bytes, None for none that is known; `orientation` is EXIF's, 2-8, and left out where it is upright.
    """
    if not isinstance(data, bytes):
        pixels = np.ascontiguousarray(data)
        return {"format": PIXELS, "bytes": pixels.nbytes, "sha256": hashlib.sha256(pixels.data).hexdigest()}
    facts: dict[str, Any] = {
        "format": format_name(data) or None,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    orientation = exif_orientation(data) if tells_orientation(data) else 1
    return facts if orientation == 1 else facts | {"orientation": orientation}
