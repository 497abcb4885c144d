"""What each contestant of benchmarks/loader.py does with its batches: it waits for its turn. Standard library only.

A contestant is started as `python -m contestants.NAME FOLDER VARIANT THREADS DEVICE`. It makes its first batch, says that it is
ready, and then answers each line {"skip": n, "steps": m} on its standard input with the seconds that m batches took after n
uncounted ones. An end of its input ends it.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

BATCH, STORED, SIDE = 128, 256, 224
SCALE, RATIO = (
    (0.08, 1.0),
    (3 / 4, 4 / 3),
)  # of random resized crops: share of the area, and width / height; torchvision's


def serve(
    step: Callable[[], Any], work: str, packages: tuple[str, ...], finish: Callable[[], object] = lambda: None
) -> None:
    """Takes turns until there are no more.

    Args:
        step: makes the next batch: a tensor, or anything with a length.
        work: what is done to an image, in a line.
        packages: whose versions are told.
        finish: waits until the steps are really done.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    ready = {"work": work, "versions": {name: _version(name) for name in packages}, "delivers": describe(step())}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        skipped = sum(len(step()) for _ in range(asked["skip"]))
        finish()
        start = time.perf_counter()
        images = sum(len(step()) for _ in range(asked["steps"]))
        finish()
        seconds = time.perf_counter() - start
        print(json.dumps({"images": images, "seconds": seconds, "all": skipped + images}), file=answers)


def random_window() -> tuple[int, int, int, int]:
    """Left, top, width and height of a random resized crop of a stored image, pixels, as torchvision draws it."""
    while True:
        area, ratio = STORED**2 * random.uniform(*SCALE), math.exp(random.uniform(*map(math.log, RATIO)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= STORED and 0 < height <= STORED:
            return random.randint(0, STORED - width), random.randint(0, STORED - height), width, height


def describe(batch: Any) -> str:
    """The form of a batch and, of a tensor, its values' mean and spread: whether the same was done can be seen."""
    if not hasattr(batch, "stride"):
        return f"{len(batch)} × {type(batch).__name__}"
    values = batch.float()
    # Of NCHW, channels beside each other.
    order = "channels last" if batch.stride(1) == 1 else "channels first"
    spread = f"mean {values.mean():.1f}, standard deviation {values.std():.1f}"
    return f"{batch.dtype} {tuple(batch.shape)}, {order}, {batch.device.type}, {spread}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
