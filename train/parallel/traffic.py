"""Bytes that a rank sends to others, counted where they are sent."""

from __future__ import annotations

from collections import Counter
from typing import Literal

Phase = Literal["forward", "backward", "gradients"]
Bytes = dict[tuple[str, Phase], int]  # by layer ("logits", "labels" and "images" too) and phase


class Traffic:
    """What this rank has sent, by layer and phase. Zeros are left out, control messages (24 bytes a step) not counted.

    forward: activations that a layer reads and another rank has; backward: their gradients on the way back; gradients: of weights that
    every rank holds, by what a ring needs, 2 (R - 1) / R of their size.

    >>> traffic = Traffic()
    >>> traffic.add("conv3", "forward", 100)
    >>> traffic.since_last(), traffic.since_last()
    ({('conv3', 'forward'): 100}, {})
    """

    def __init__(self) -> None:
        """Nothing was sent yet."""
        self.sent: Counter[tuple[str, Phase]] = Counter()

    def add(self, layer: str, phase: Phase, size: int) -> None:
        """Counts `size` bytes."""
        if size:
            self.sent[layer, phase] += size

    def since_last(self) -> Bytes:
        """What was sent since this was last asked."""
        sent = dict(self.sent)
        self.sent.clear()
        return sent


def ring_bytes(size: int, ranks: int) -> int:
    """Bytes that each rank sends when `ranks` ranks add up `size` bytes in a ring.

    >>> ring_bytes(1000, 2), ring_bytes(1000, 4)
    (1000, 1500)
    """
    return 2 * (ranks - 1) * size // ranks
