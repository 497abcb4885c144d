"""The error that a value which is NaN or infinite is, and the words for where the first such value was found.

How that value is searched for is in `alexprep.train.divergence`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from alexprep.shards.errors import AlexprepError

What = Literal["weight", "images", "output", "loss", "gradient", "update"]


class NotFinite(AlexprepError):
    """A loss, a weight or a velocity became NaN or infinite. Nothing of it was saved."""

    def __init__(self, what: str, next_step: str = "") -> None:
        """Says what is not finite."""
        super().__init__(f"{what}: {next_step}" if next_step else what)
        self.what = what  # without the next step


class Origin(NamedTuple):
    """The first value of a training that was not finite."""

    step: int
    what: What
    name: str  # of a layer or a parameter; "" where there is but one such value
    value: str  # "nan" or "inf"

    def sentence(self) -> str:
        """For people."""
        words = {
            "weight": f"{self.name} held {self.value} before the step",
            "images": f"the images held {self.value}",
            "output": f"the output of {self.name} became {self.value}",
            "loss": f"the loss became {self.value}",
            "gradient": f"the gradient of {self.name} became {self.value}",
            "update": f"{self.name} became {self.value} when it was updated",
        }
        return f"it began in step {self.step}, where {words[self.what]}"
