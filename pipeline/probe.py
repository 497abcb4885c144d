"""Which image of a step DALI cannot decode: it does not say, so each is tried alone."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alexprep.pipeline.dali_graph import probe_pipeline
from alexprep.pipeline.feed import Feed, Inputs


def decodes(feed: Feed, image: NDArray[np.uint8], inputs: Inputs) -> bool:
    """Whether an image can be decoded by itself.

    Args:
        feed: of the pipeline that failed.
        image: uint8 (bytes,), encoded.
        inputs: for this image alone: with a window, only that is decoded where a window can be.
    """
    if feed.settings.raw:
        return True
    try:
        probe = probe_pipeline(feed.augmentation, feed.settings, windowed="start" in inputs)
        probe.feed_input("encoded", [image])  # DALI reads it in place
        if "start" in inputs:
            for name in {"start", "shape"} & inputs.keys():
                probe.feed_input(name, inputs[name])
        probe.run()
    except RuntimeError:
        return False
    return True


def decodes_a_sound_image(feed: Feed) -> bool:
    """Whether there is a decoder that works: if not, for lack of a GPU's memory say, images are not to blame."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return decodes(feed, np.frombuffer(buffer.getvalue(), np.uint8), {})
