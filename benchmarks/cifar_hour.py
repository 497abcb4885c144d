"""The paper's two CIFAR-10 nets, 13 % and 11 %, in at most an hour each on two cores instead of their 520 epochs, in bf16.

    python benchmarks/cifar_hour.py DATA --runs RUNS [--save]         DATA: CIFAR-10, `alexprep shard --size 32` and `pca-stats`

or one by one, since each is a recipe:

    alexprep train --data DATA --recipe benchmarks/cifar_hour.py:thirteen --precision bf16
    alexprep eval thirteen --recipe benchmarks/cifar_hour.py:thirteen --views ten

A run that was broken off goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from alexprep.train.lr_schedule import Steps
from alexprep.train.recipes import Recipe, recipe


def thirteen() -> Recipe:
    """Without normalisation."""
    return replace(recipe("cifar10-13pct"), name="thirteen", lr=0.002, schedule=Steps(after=(72, 84)), epochs=90)


def eleven() -> Recipe:
    """With it."""
    return replace(recipe("cifar10-11pct"), name="eleven", lr=0.002, schedule=Steps(after=(37, 42)), epochs=45)


def measured(data: Path, runs: Path, recipe: Callable[[], Recipe]) -> dict[str, Any]:
    """Trains and evaluates."""
    from alexprep.train.config import TrainConfig
    from alexprep.train.evaluation import evaluate
    from alexprep.train.run_dir import Place
    from alexprep.train.trainer import train

    name = recipe.__name__
    reference, run = f"{Path(__file__).resolve()}:{name}", runs / name
    resume = (run / "config.json").exists()
    train(TrainConfig(data, reference, precision="bf16", runs=runs, name=name, resume=resume))
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in records if record["kind"] == "epoch"]
    found: dict[str, Any] = {
        "epochs": len(epochs),
        "minutes in training steps": sum(record["seconds"] for record in epochs) / 60,
        "seconds an epoch, the quickest": min(record["seconds"] for record in epochs),
    }
    for views in ("centre", "ten"):
        document = evaluate([Place(run)], data=data, views=views, recipe=reference).document
        found[f"test error, percent, views {views}"] = document["top1_error"]
    found["test error of each epoch, percent"] = [record["val"]["top1_error"] for record in epochs]
    found["training error of each epoch, percent"] = [record["top1_error"] for record in epochs]
    return {f"{name}: {key}": value for key, value in found.items()}


def main() -> None:
    """The command line."""
    from common import command_line, report

    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs-cifar-hour"))
    given = parser.parse_args()
    report(
        "cifar-hour", measured(given.data, given.runs, thirteen) | measured(given.data, given.runs, eleven), given.save
    )


if __name__ == "__main__":
    main()
