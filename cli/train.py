"""alexprep train"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from alexprep.cli.options import data_option, json_option

# The registry is alexprep.train.recipes.RECIPES, which this list must equal; importing it here would import torch for --help.
RECIPES = ("alexnet", "cifar10-quick", "tiny")
AT_LEAST_1 = click.IntRange(min=1)


@click.command("train")
@data_option
@click.option("--recipe", type=click.Choice(RECIPES), help="What to train.  [default: alexnet]")
@click.option("--epochs", type=AT_LEAST_1, help="Stop after this many epochs of the run.  [default: the recipe's]")
@click.option("--steps", type=AT_LEAST_1, help="Stop after this many steps of the run.")
@click.option("--batch-size", type=AT_LEAST_1, help="Images a step.  [default: the recipe's]")
@click.option("--lr", type=click.FloatRange(min=0), help="First learning rate.  [default: the recipe's]")
@click.option(
    "--seed", type=click.IntRange(min=0), help="Of initial weights, order, augmentation, dropout.  [default: 0]"
)
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs",
    show_default=True,
    help="Folder of runs.",
)
@click.option("--name", help="The run's name.  [default: the recipe's name, with a number if it is taken]")
@click.option("--resume", is_flag=True, help="Go on with the run --name, or with the one last active.")
@click.option("--checkpoint-steps", type=AT_LEAST_1, default=1000, show_default=True, help="Steps between checkpoints.")
@click.option("--keep", type=AT_LEAST_1, default=3, show_default=True, help="Checkpoints to keep.")
@click.option("--threads", type=AT_LEAST_1, help="Threads for decoding.  [default: one a core]")
@click.option("--device", help="cpu or cuda.  [default: cuda where there is a GPU]")
@json_option
def train(as_json: bool, **options: Any) -> None:
    """Train a network on a data set made by `alexprep shard` and `alexprep pca-stats`.

    Writes ./runs/NAME: config.json, log.jsonl, checkpoints, summary.json. Ctrl-C or SIGTERM finishes the step and saves;
    after a kill, --resume goes on from the last checkpoint. On a CPU the result is the same to the last bit.

    \b
    Example: alexprep train --recipe cifar10-quick --data /data/cifar10
    """
    from alexprep.cli import report
    from alexprep.train.config import TrainConfig
    from alexprep.train.loop import train as train_run

    summary = train_run(TrainConfig(**options))
    report.table(f"Run {summary['run']}", [(name.replace("_", " "), _shown(value)) for name, value in summary.items()])
    report.json_line(summary, as_json)
    if summary["stopped_by"]:
        import signal

        click.get_current_context().exit(128 + signal.Signals[summary["stopped_by"]])  # as shells report it


def _shown(value: object) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
