"""`alexprep bench`: measurements on this machine, printed; they are made in `alexprep.train.loader_overlap`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from alexprep.cli.options import (
    AT_LEAST_1,
    INTERRUPTED,
    batch_size_option,
    computing_options,
    device_option,
    json_option,
    local_data_option,
    model_option,
    settings_option,
    threads_option,
)


@click.group("bench", short_help="Measure on this machine, in turns.")
def bench() -> None:
    """Measure something on this machine and this data set. Contestants take turns in one process; nothing is written.

    \b
    Example: alexprep bench overlap --data /data/imagenet-256
    """


@bench.command("overlap", short_help="How well loading hides behind training.")
@local_data_option
@click.option(
    "--recipe",
    metavar="NAME | FILE.py[:FUNCTION]",
    help="Whose network and augmentation, as for `alexprep train`.  [default: alexnet]",
)
@model_option
@settings_option
@batch_size_option
@click.option("--steps", type=AT_LEAST_1, help="Steps a turn.  [default: as many as take 2 seconds, at least 5]")
@click.option("--rounds", type=AT_LEAST_1, default=3, show_default=True, help="Rounds of three turns.")
@computing_options
@threads_option
@device_option
@json_option
def overlap(data: Path, steps: int | None, rounds: int, as_json: bool, **options: Any) -> None:
    """Compare training with data, the same steps on one batch, and the loader alone; say which holds the other up.

    The overlap is the first over the second, in images/s: 1 where loading is hidden behind training altogether. On a GPU 0.98
    or more is aimed at; on a CPU both share the cores, and the table tells what one after the other would give.

    \b
    Example: alexprep bench overlap --data /data/cifar10 --recipe cifar10-quick
    """
    from alexprep.cli import output
    from alexprep.train.config import TrainConfig
    from alexprep.train.loader_overlap import measure

    try:
        found = measure(
            TrainConfig(data=data, **options), steps=steps, rounds=rounds, say=lambda line: click.echo(line, err=True)
        )
    except KeyboardInterrupt:
        click.echo("Interrupted: nothing was measured, and nothing was written.", err=True)
        click.get_current_context().exit(INTERRUPTED)
    _show(found)
    output.json_line(found, as_json)


def _show(found: dict[str, Any]) -> None:
    from rich.filesize import decimal

    from alexprep.cli import output
    from alexprep.pipeline.autotune import BUSY

    rates, rounds = found["images_per_second"], found["rounds_images_per_second"]

    def rate(kind: str) -> str:
        return f"{rates[kind]:>9,.0f} images/s  ({min(rounds[kind]):,.0f} to {max(rounds[kind]):,.0f})"

    serial, ratios = found["serial_images_per_second"], found["rounds_overlap"]
    rows = [
        ("training with data", rate("training")),
        ("the same steps on one batch", rate("cached_batch")),
        ("the loader alone", rate("loader")),
        ("one after the other", f"{serial:>9,.0f} images/s  (1 / (1 / one batch + 1 / loader))"),
        ("overlap", f"{found['overlap']:>9.3f}  ({min(ratios):.3f} to {max(ratios):.3f})"),
        ("a step", f"{found['data_wait_ms']:.1f} ms for data + {found['step_ms']:.1f} ms"),
    ]
    if found["gpu_memory_bytes"] is not None:
        memory = {name: decimal(count) for name, count in found["gpu_memory_bytes"].items()}
        rows.append(("GPU memory", f"{memory['torch_peak']} by torch at most, {memory['all']} with DALI's"))
    output.table(
        f"{found['recipe']}, batches of {found['batch_size']}, {found['precision']}, on {found['machine']}; medians of "
        f"{found['rounds']} rounds of {found['steps']['training']} steps.",
        rows,
    )
    click.echo(found["bottleneck"])
    if found["gpu_memory_bytes"] is None:
        click.echo(
            "On a CPU loader and step share the cores, so the overlap stays below 1: one after the other, each with all "
            f"cores, would give {found['serial_overlap']:.3f}."
        )
    apart = max((max(rounds[kind]) - min(rounds[kind])) / rates[kind] for kind in rates)
    if apart > BUSY:
        click.echo(f"Rounds differ by up to {100 * apart:.0f} %: try again when the machine is less busy.")
