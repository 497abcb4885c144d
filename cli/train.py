"""`alexprep train`: its options and what it prints. The training itself is `alexprep.train.trainer`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

import click

from alexprep.cli.options import (
    AT_LEAST_1,
    batch_size_option,
    computing_options,
    data_option,
    device_option,
    folder,
    json_option,
    model_option,
    on_bad_option,
    on_command_line,
    runs_option,
    settings_option,
    store_options,
    threads_option,
)

# The names in alexprep.train.RECIPES, in its order; importing that here would import torch for --help.
RECIPES = (
    *("alexnet", "alexnet-2012", "alexnet-1gpu", "alexnet-6conv", "alexnet-6conv-tune", "alexnet-owt"),
    *("cifar10-fast", "cifar10-quick", "cifar10-13pct", "cifar10-11pct", "cifar10-relu", "cifar10-tanh", "tiny"),
    *("mnist-column", "mnist-column-fast", "norb-column", "cifar-column", "lenet5", "small-net"),
)
KEEP, CHECKPOINT_STEPS = 3, 1000  # likewise those of alexprep.train.config
# Options for fields of the recipe: --clip 1 is --set clip=1.
SYNONYMS = ("optimizer", "label_smoothing", "clip", "accumulate", "average")


@click.command("train", short_help="Train a network on shards.")
@data_option
@click.option(
    "--statistics",
    type=folder,
    metavar="FOLDER",
    help="A folder with stats/, whose mean image and eigenpairs are used.  [default: the data set's]",
)
@click.option(
    "--order",
    type=click.Choice(["shuffle", "blocks", "streams", "sequential"]),
    help="Of the training images: all shuffled, in blocks of shards, in streams of them, as stored.  [default: shuffle; streams of a store]",
)
@on_bad_option
@click.option(
    "--recipe",
    metavar="NAME | FILE.py[:FUNCTION]",
    help=f"What to train: {', '.join(RECIPES)}; or a recipe of your own.  [default: alexnet]",
)
@model_option
@click.option("--hook", metavar="FILE.py:FUNCTION", help="A DALI operation of your own in the augmentation.")
@click.option(
    "--hook-after", type=click.Choice(["decode", "augment", "tensor"]), help="After what it comes.  [default: augment]"
)
@click.option("--epochs", type=AT_LEAST_1, help="Stop after this many epochs of the run.  [default: the recipe's]")
@click.option(
    "--steps",
    type=AT_LEAST_1,
    help="Stop after this many steps of the run. With --resume, --epochs or --steps take the place of both.",
)
@batch_size_option
@click.option(
    "--lr",
    type=click.FloatRange(min=0),
    help="Highest learning rate. With --resume, from now on.  [default: the recipe's]",
)
@settings_option
@click.option(
    "--optimizer",
    metavar="NAME",
    help="paper, sgd, nesterov, adamw, or a class of torch.optim such as RMSprop.  [default: the recipe's]",
)
@click.option("--label-smoothing", metavar="SHARE", help="Of the target, spread over all classes.")
@click.option("--clip", metavar="LENGTH", help="That no step's gradient exceeds.")
@click.option("--accumulate", metavar="PARTS", help="That a batch goes through the network in, to save memory.")
@click.option("--average", metavar="DECAY", help="Evaluate an exponential mean of the weights: 0.999.")
@click.option(
    "--schedule",
    metavar="NAME",
    help="Of the rate: constant, linear, cosine, one-cycle, plateau, steps:8,9, or a recipe's name.  [default: the recipe's]",
)
@click.option(
    "--warmup",
    metavar="EPOCHS",
    type=click.FloatRange(0, 100_000),
    help="In which the rate rises, in front of the schedule.",
)
@click.option(
    "--early-stop",
    metavar="EPOCHS",
    type=click.IntRange(min=0),
    help="End when the error has not fallen for so many; 0: never. See RUN@best.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="Of initial weights, order, augmentation, dropout.  [default: 0]"
)
@click.option(
    "--init-from",
    metavar="RUN | FILE",
    help="Begin with the weights of another run (RUN, RUN@STEP or RUN@best) or of a .safetensors or .pt file, for fine-tuning.",
)
@click.option(
    "--init-layers",
    metavar="PATTERNS",
    help="Which layers of these: names and patterns, such as conv*,fc6.  [default: all that match in shape]",
)
@runs_option
@click.option(
    "--name", help="The run's name.  [default: that of the recipe or of the model's file, with a number if it is taken]"
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run --name, or with the one last active, on its data and as it began.",
)
@click.option("--checkpoint-steps", type=AT_LEAST_1, help=f"Steps between checkpoints.  [default: {CHECKPOINT_STEPS}]")
@click.option(
    "--evaluate-every",
    metavar="EPOCHS",
    type=AT_LEAST_1,
    help="Between evaluations; the last epoch is always evaluated.  [default: 1]",
)
@click.option("--keep", type=AT_LEAST_1, help=f"Newest checkpoints to keep, besides the best.  [default: {KEEP}]")
@click.option(
    "--gpus",
    "ranks",
    type=AT_LEAST_1,
    default=1,
    show_default=True,
    help="Processes that share the run, one a GPU (or on CPUs).",
)
@click.option(
    "--scheme",
    type=click.Choice(["towers", "ddp", "hybrid"]),
    help="How they share it.  [default: as the run did; else towers, the paper's, for two, if the network can be split so; else ddp]",
)
@click.option(
    "--rank-seconds",
    type=click.FloatRange(min=0, min_open=True, max=1_000_000),
    default=60,
    show_default=True,
    help="How long they wait for one another; saving a checkpoint must not take longer. With data or runs in a store at least 20 s longer than --store-patience.",
)
@click.option(
    "--trace",
    metavar="STEPS",
    type=click.IntRange(1, 200),
    help="Record this many steps, after the first 10, for Perfetto or chrome://tracing: RUN/trace.",
)
@click.option("--tensorboard", is_flag=True, help="Write the log for TensorBoard too: RUN/tensorboard.")
@computing_options
@threads_option
@store_options
@device_option
@json_option
def train(as_json: bool, **options: Any) -> None:
    """Train a network on a data set made by `alexprep shard` and `alexprep pca-stats`, or on anyone's webdataset tars.

    Writes ./runs/NAME: config.json, log.jsonl, checkpoints, summary.json. Ctrl-C, SIGTERM or a closed terminal (SIGHUP) finishes the step and saves;
    after a kill, --resume goes on from the last checkpoint. On a CPU the result is the same to the last bit. A run remembers its data and
    its options, but for --gpus, --device, and how it is watched; what is given with --resume holds from then on.

    \b
    Example: alexprep train --recipe cifar10-quick --data /data/cifar10
    """
    from alexprep.cli import output
    from alexprep.shards.any_dataset import is_tars
    from alexprep.shards.dataset_format import read_dataset

    if options["resume"] and not on_command_line("data"):
        options["data"] = None  # the run's own, whatever the default
    elif not is_tars(options["data"]) and os.environ.get("WORLD_SIZE", "1") == "1":  # torchrun's ranks tell each other
        read_dataset(options["data"])  # a wrong folder is told at once: what follows loads torch, which takes seconds
    from alexprep.train.config import TrainConfig
    from alexprep.train.launch import launch_training, leads

    summary = launch_training(TrainConfig(**with_synonyms(options)))
    if leads():
        output.table(f"Run {summary['run']}", _rows(summary, options))
        output.json_line(summary, as_json)
    output.leave_if_stopped(summary["stopped_by"])


def _rows(summary: Mapping[str, Any], options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a summary tells, in words: how far it went, what was measured, where things lie, and what comes next."""
    from alexprep.train.logger import duration

    where = f"{summary['device']} in {summary['precision']}" + (f", {n} ranks" if (n := summary["ranks"]) > 1 else "")
    taken = f"{duration(summary['seconds'])} in this process" if options["resume"] else duration(summary["seconds"])
    rows = [
        ("trained", f"{summary['recipe']}, {summary['epochs']:,} epochs, {summary['steps']:,} steps; {taken}, {where}")
    ]
    if summary["train_loss"] is not None:
        rows.append(("training loss", f"{summary['train_loss']:.4f}, the mean of the last epoch"))
    if summary["val_top1_error"] is not None:
        errors = "top-1 {val_top1_error:.2f} %, top-5 {val_top5_error:.2f} %; loss {val_loss:.4f}".format(**summary)
        rows.append((f"{summary['val_split']} error", errors))
    if summary["best_step"] is not None:
        rows.append(
            ("best", "top-1 {best_top1_error:.2f} %, after epoch {best_epoch}, step {best_step:,}".format(**summary))
        )
    if summary["step_ms"] is not None:
        speed = "{images_per_second:,.0f} images/s; a step waits {data_wait_ms:.1f} ms for data, works {step_ms:.1f} ms"
        rows.append(("speed", speed.format(**summary)))
    if summary["skipped_steps"]:
        rows.append(("skipped", f"{summary['skipped_steps']:,} steps, of which a gradient overflowed in fp16"))
    rows.append(("its folder", "checkpoints, config.json, log.jsonl, summary.json"))
    if summary["stopped_by"]:
        return [*rows, ("stopped by", f"{summary['stopped_by']}; the line above says how to go on")]
    commands = _next_commands(summary, options)
    return [*rows, *((("next" if n == 0 else ""), command) for n, command in enumerate(commands))]


def _next_commands(summary: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Commands for what was trained; with what it takes to find the run, and the user's own recipe or network."""
    from alexprep.shards.storage import folder_at
    from alexprep.train.run_dir import read_config, runs_option
    from alexprep.train.user_code import is_reference

    run = folder_at(summary["run"])
    shown = read_config(run)["identity"]["recipe"]["augmentation"]
    # Ten views mirror, which makes another thing of a digit.
    views = ["--views", "ten"] if shown.get("mirror") and shown.get("normalised_width") is None else []
    runs = runs_option(options["runs"])  # as it was given: ranks have it as an absolute path
    own = [
        word
        for name in ("recipe", "model")
        if options[name] is not None and is_reference(options[name])
        for word in (f"--{name}", options[name])
    ]
    best = f"{run.name}@best" if summary["best_step"] is not None else run.name
    split = [] if summary["val_split"] is not None else ["--split", "train"]  # there is no other with labels
    words = (
        ["eval", best, *split, *views, *runs, *own],
        ["predict", best, "photo.jpg", *runs, *own],
        ["report", run.name, *runs],
    )
    return [shlex.join(["alexprep", *each]) for each in words]


def with_synonyms(options: dict[str, Any]) -> dict[str, Any]:
    """The options with those of `SYNONYMS` among the settings."""
    given = {name: options.pop(name) for name in SYNONYMS}
    given = {name: value for name, value in given.items() if value is not None}
    if twice := [name for name in given if any(text.startswith(f"{name}=") for text in options["settings"])]:
        raise click.UsageError(f"--{twice[0].replace('_', '-')} and --set {twice[0]}=… say the same: give one.")
    return options | {"settings": (*(f"{name}={value}" for name, value in given.items()), *options["settings"])}
