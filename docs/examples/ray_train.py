"""Training on the machines of a Ray cluster with Ray Train. Only the machine of rank 0, which Ray chooses, needs the folder of runs.

    pip install "ray[train]"
    python docs/examples/ray_train.py alexprep-data --workers 2

The data lie on every machine under this path. Ray starts the ranks and ends them all where one fails.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from alexprep.train import TrainConfig, from_environment, train


def train_as_rank(options: dict[str, Any]) -> None:
    """One of Ray's workers, in the process group that Ray made."""
    world = from_environment(options["device"])
    places = {name: Path(options[name]) for name in ("data", "runs")}
    summary = train(TrainConfig(**{**options, **places}, ranks=world.size), world=world)
    if world.leads:
        print(
            {name: summary[name] for name in ("run", "ranks", "steps", "val_top1_error")}
        )  # Ray shows it where main runs


def main() -> None:
    """A training as `alexprep train` begins it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="one for each worker")
    parser.add_argument("--recipe", default="alexnet")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--storage", type=Path, default=Path("ray"), help="where Ray keeps its own notes")
    options = parser.parse_args()
    chosen = {name: str(getattr(options, name).resolve()) for name in ("data", "runs")}
    chosen |= {"recipe": options.recipe, "steps": options.steps}
    TorchTrainer(
        train_as_rank,
        train_loop_config=chosen | {"device": "cuda" if options.gpus else "cpu", "scheme": "ddp"},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
        run_config=RunConfig(storage_path=str(options.storage.resolve())),
    ).fit()


if __name__ == "__main__":
    main()
