"""alexprep's Loader, in the variants of benchmarks/modern_recipe.py."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

from contestants.serve import BATCH, SIDE, serve

from alexprep.pipeline import PRESETS, Blur, Jitter, Loader, Mixing, RandAugment

_PLAIN = replace(PRESETS["resized"], crop=SIDE)
_MIXED = replace(_PLAIN, mixing=Mixing(mixup=0.2))
VARIANTS = {
    "plain": (_PLAIN, "random resized crop, mirror, mean and deviation"),
    "rand": (replace(_MIXED, policy=RandAugment()), "the same with RandAugment (2 operations, strength 9) and mixup"),
    "jitter": (replace(_MIXED, jitter=Jitter(0.4, 0.4, 0.4, 0.1)), "the same with jitter 0.4 0.4 0.4 0.1 and mixup"),
    "simclr": (
        replace(_PLAIN, jitter=Jitter(0.8, 0.8, 0.8, 0.2, share=0.8), grey=0.2, blur=Blur()),
        "the same with jitter 0.8 0.8 0.8 0.2 of 0.8, grey 0.2, blur 0.1-2 of 0.5",
    ),
}


def main(folder: str, variant: str, threads: str, device: str) -> None:
    """Takes turns with one variant."""
    augmentation, work = VARIANTS[variant]
    form = {"batch_size": BATCH, "device": device, "threads": int(threads), "drop_last": True}
    loader = Loader(Path(folder) / "jpg", augmentation=augmentation, memory_format="channels_last", **form)  # type: ignore[arg-type]
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    serve(lambda: next(batches).images, f"{work}; float32", ("torch", "nvidia-dali-cuda120", "numpy"))


if __name__ == "__main__":
    main(*sys.argv[1:])
