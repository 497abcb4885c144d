"""`alexprep ablate`: its options, and the comparison as it is printed. It is made in `alexprep.train.ablation`."""

from __future__ import annotations

from typing import Any

import click

from alexprep.cli.options import (
    AT_LEAST_1,
    Setting,
    computing_options,
    device_option,
    json_option,
    local_data_option,
    local_folder,
    model_option,
    settings_option,
    threads_option,
)


@click.command("ablate", short_help="Train variants of a recipe with several seeds, and compare them.")
@click.argument("variants", metavar="[FIELD=VALUE | 'FIELD=VALUE FIELD=VALUE …']...", type=Setting(), nargs=-1)
@local_data_option
@click.option(
    "--recipe", metavar="NAME | FILE.py[:FUNCTION]", help="What is varied, as for `alexprep train`.  [default: alexnet]"
)
@model_option
@settings_option
@click.option("--epochs", type=AT_LEAST_1, help="Of each run.  [default: the recipe's]")
@click.option("--seeds", type=AT_LEAST_1, default=3, show_default=True, help="Runs of each variant.")
@click.option(
    "--runs",
    type=local_folder,
    metavar="FOLDER",
    default="ablation",
    show_default=True,
    help="Folder of the runs and the tables.",
)
@computing_options
@threads_option
@device_option
@json_option
def ablate(variants: tuple[str, ...], seeds: int, as_json: bool, **options: Any) -> None:
    """Train a recipe, and variants of it, with the same seeds, and tell what each costs or gains, with its standard error.

    A variant is one or more settings that differ from the recipe; those of --set are common to all. What is trained is kept: the same
    command goes on where it was broken off, and with other variants or more seeds trains what is missing. Writes ablation.json and
    ablation.csv, with all that is trained, beside the runs.

    \b
    Example: alexprep ablate --recipe cifar10-quick augmentation.mirror=false 'lr=0.004 schedule=linear'
    """
    from alexprep.cli import output
    from alexprep.train.ablation import ablate as ablated
    from alexprep.train.ablation import table_rows
    from alexprep.train.config import TrainConfig

    found = ablated(TrainConfig(**options), variants, seeds, output.note)
    if found["variants"]:
        output.columns(table_rows(found))
    output.json_line(found, as_json)
    if found["stopped_by"]:
        output.note("Stopped: run the same command again to go on.")
    output.leave_if_stopped(found["stopped_by"])
