"""What a pipeline is built for, and which inputs it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.dali_ops import Dtype, Layout
from alexprep.shards.errors import AlexprepError


@dataclass(frozen=True)
class Settings:
    """What the pipelines need to know beside the augmentation.

    Attributes:
        raw: whether samples come as pixels rather than as encoded images.
        size: side of the stored images where all are squares of one side, pixels; otherwise None.
        batch_size: the largest batch that will be fed.
        threads: of DALI.
        device: where images come out, "cpu" or "cuda".
        device_id: which GPU; None for "cpu".
        decode: where they are decoded, "cpu" or "cuda".
        hw_decoder_load: see `graph.decode_crop`.
        dtype: of the images that come out.
        layout: of the images that come out; the N is the batch.
    """

    raw: bool
    size: int | None
    batch_size: int
    threads: int
    device: str
    device_id: int | None
    decode: str
    hw_decoder_load: float
    dtype: Dtype
    layout: Layout

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, choices in (("dtype", get_args(Dtype)), ("layout", get_args(Layout))):
            if getattr(self, name) not in choices:
                raise AlexprepError(f"{name} {getattr(self, name)!r} is not one of {', '.join(choices)}")

    @property
    def by_rows(self) -> bool:
        """Whether numbers are fed as rows and windows of pixels, for passes that read and write least: on a CPU, axes HWC."""
        return self.device == "cpu" and self.layout != "NCHW" and self.dtype != "uint8"


def fed(augmentation: Augmentation, settings: Settings) -> frozenset[str]:
    """The inputs of `single_view_pipeline`, one entry a sample.

    "encoded": uint8 bytes; of raw shards the pixels, HWC. "start", "shape": int32 (2,), see `graph.decode_window`. "mirror": int32.
    By rows, "window", "minus" and "divisor": see `graph.subtract_image` and `graph.subtract_rows`. Otherwise "shift", float32 (3,),
    see `graph.to_tensor`; "anchor", int32 (2,), see `graph.subtract_mean_window`; "factor", float32, to multiply by at the end.
    """
    names = {"encoded", "start", "mirror"}
    noise = augmentation.noise != "none"
    if not augmentation.fixed_windows:
        names.add("shape")
    if settings.by_rows and (augmentation.crop or settings.size) and not augmentation.keeps_bytes:
        if augmentation.windowed_mean:
            names.add("window")
        if noise or augmentation.std != "none" or not augmentation.windowed_mean:
            names |= {"minus", "divisor"}
    else:
        names |= {"shift"} if noise else set()
        names |= {"anchor"} if augmentation.windowed_mean else set()
        names |= {"factor"} if noise and augmentation.noise_rescale != 1 else set()
    return frozenset(names)
