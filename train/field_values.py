"""Words that fields of recipes and networks may hold, apart from what they stand for, which needs torch; and fields that came later."""

from __future__ import annotations

from typing import Literal

Activation = Literal["relu", "tanh"]
Loss = Literal["softmax", "sigmoid", "euclidean"]
Pool = Literal["max", "average", "l2", "stochastic"]
PAPER = "paper"  # the name of `alexprep.train.optimizer.MomentumSGD` among optimizers

# Metadata of a dataclass's field: the value that runs have which are older than the field, if not its default; or a function that gives it,
# of what the run recorded of the other fields.
BEFORE = "before"
