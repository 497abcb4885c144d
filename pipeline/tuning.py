"""How a machine is used: settings that change speed and memory, never results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alexprep.pipeline.graph import HW_DECODER_LOAD
from alexprep.shards.engines import cores
from alexprep.shards.errors import AlexprepError


@dataclass(frozen=True)
class Tuning:
    """Settings that `alexprep tune` finds for a machine.

    Attributes:
        threads: of DALI; None for one a core.
        prefetch: steps that are worked on ahead of the one being consumed.
        decode: where images are decoded: "cpu", "cuda", or None for the loader's device. What comes after happens on the
            device. The two decoders differ by a grey level here and there.
        hw_decoder_load: the share of a batch that a GPU's JPEG engines get, 0-1, where it has them.
    """

    threads: int | None = None
    prefetch: int = 2
    decode: Literal["cpu", "cuda"] | None = None
    hw_decoder_load: float = HW_DECODER_LOAD

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        for name, low, high in (("threads", 1, 4096), ("prefetch", 1, 64), ("hw_decoder_load", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise AlexprepError(f"{name} {value} is not in [{low}, {high}]")
        if self.decode not in ("cpu", "cuda", None):
            raise AlexprepError(f"decode {self.decode!r} is not one of cpu, cuda")

    @property
    def dali_threads(self) -> int:
        """`threads`, or one a core that this process may use."""
        return self.threads or cores()
