"""What a caller chooses for a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alexprep.shards.errors import AlexprepError
from alexprep.train.distributed.tensor_parallel import SCHEMES, Scheme
from alexprep.train.distributed.world import TIMEOUT
from alexprep.train.precision import Precision
from alexprep.train.recipes.recipe import MOST_EPOCHS

MOST_TRACED = 200  # steps
MOST_SECONDS = 1_000_000  # that ranks wait for one another: eleven days; system clocks take no more than some 10^9
KEEP, CHECKPOINT_STEPS = 3, 1000  # unless the run began with others
OPTIONS = (
    "recipe",
    "model",
    "seed",
    "batch_size",
    "lr",
    "init_from",
    "init_layers",
    "precision",
    "channels_last",
    "compile",
)  # what a resumed run takes from its beginning
LENGTH = ("epochs", "steps")
REMEMBERED = (*LENGTH, "keep", "checkpoint_steps")  # likewise; what is given on resuming holds from then on
DECODING = ("decode", "hw_decoder_load")  # likewise, as it was tuned then


@dataclass(frozen=True)
class TrainConfig:
    """What a caller may choose. None means: as the recipe has it, or when resuming, as the run began.

    Args:
        data: folder of the data set; only a resumed run has one of its own.
        recipe: name in the registry, "alexnet" by default; or a user's own: FILE.py, FILE.py:FUNCTION or MODULE:FUNCTION.
        model: the user's own network in the recipe's stead, likewise; see `alexprep.train.own.network`.
        seed: of the initial weights, dropout, order and augmentation; 0 by default.
        batch_size: images a step.
        lr: learning rate of the first epoch.
        init_from: run (RUN or RUN@STEP) whose weights the network begins with; its own initial weights by default.
        init_layers: which layers of it, see `alexprep.train.saved.init_from.init_from`; "matching" or patterns with commas.
        epochs: stop after this many, counted from the run's beginning.
        steps: stop after this many optimizer steps, likewise. On resuming, epochs or steps take the place of both.
        runs: folder of all runs.
        name: of this run; that of the recipe or of the model's file, with a number if that is taken, by default.
        resume: continue the named run, or the one last active.
        keep: checkpoints kept, 3 by default.
        checkpoint_steps: steps between checkpoints, 1000 by default; one more is made at every epoch's end.
        log_steps: steps between records in log.jsonl.
        threads: for decoding; as `alexprep tune` found, or one a core, by default.
        device: "cpu" or "cuda"; the GPU if there is one by default.
        ranks: processes that share the run, one a GPU where there are any.
        precision: "fp32" by default, "tf32", "bf16" or "fp16": see `alexprep.train.precision`.
        channels_last: whether the values of a pixel lie side by side in memory; by default on a CPU, where it is faster.
        compile: whether steps are compiled by torch.compile; not by default.
        rank_seconds: that ranks wait for one another: no step, evaluation's step or checkpoint may take one of them longer.
        scheme: how they share it: "towers" as in the paper (the default for two, where it can split the network), "ddp" (the default
            otherwise), "hybrid"; alone "single".
        trace: steps to record for a trace viewer, see `alexprep.train.profiler`.
        tensorboard: whether the log's records are written for TensorBoard too, see `alexprep.train.watching.board`.

    Raises:
        AlexprepError: a number is out of its range.
    """

    data: Path | None = None
    recipe: str | None = None
    model: str | None = None
    seed: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    init_from: str | None = None
    init_layers: str | None = None
    precision: Precision | None = None
    channels_last: bool | None = None
    compile: bool | None = None
    epochs: int | None = None
    steps: int | None = None
    runs: Path = Path("runs")
    name: str | None = None
    resume: bool = False
    keep: int | None = None
    checkpoint_steps: int | None = None
    log_steps: int = 20
    threads: int | None = None
    device: str | None = None
    ranks: int = 1
    rank_seconds: float = TIMEOUT
    scheme: Scheme | None = None
    trace: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuses values out of bounds, with AlexprepError."""
        if self.data is None and not self.resume:
            raise AlexprepError("data is None: name the folder of a data set; only a resumed run has one of its own")
        for name in ("epochs", "steps", "keep", "checkpoint_steps", "log_steps", "threads", "ranks", "trace"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise AlexprepError(f"{name} is {value!r}: it must be a whole number, at least 1")
        if self.epochs is not None and self.epochs > MOST_EPOCHS:
            raise AlexprepError(f"epochs is {self.epochs}: it must be at most {MOST_EPOCHS}")
        if self.trace is not None and self.trace > MOST_TRACED:
            raise AlexprepError(
                f"trace is {self.trace}: at most {MOST_TRACED} steps are recorded, since all stay in memory until the last one"
            )
        if not 0 < self.rank_seconds <= MOST_SECONDS:
            raise AlexprepError(f"rank_seconds is {self.rank_seconds}: it must be above 0, and at most {MOST_SECONDS}")
        if self.scheme not in (None, *SCHEMES):
            raise AlexprepError(f"scheme {self.scheme!r} is not one of {', '.join(SCHEMES)}")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise AlexprepError(f"seed is {self.seed!r}: it must be a whole number within 0 to 2^63 - 1")


def resumed(config: TrainConfig, began: Mapping[str, Any], data: Path) -> TrainConfig:
    """What a run goes on with: what is given now, else what held before.

    Epochs and steps are one choice, how long to train: a run of 3 epochs that is given 10,000 steps now has no other end.

    Args:
        config: as given now.
        began: the run's options, see `alexprep.train.run_dir.read_config`; older ones lack some.
        data: the run's.
    """
    unless_given = [*OPTIONS, *REMEMBERED]
    if config.epochs is not None or config.steps is not None:
        unless_given = [name for name in unless_given if name not in LENGTH]
    taken: dict[str, Any] = {name: began.get(name) for name in unless_given if getattr(config, name) is None}
    return replace(config, data=data, **taken)
