"""alexprep tune"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from alexprep.cli.options import AT_LEAST_1, Seconds, device_option, json_option

if TYPE_CHECKING:
    from alexprep.pipeline.autotune import Trial, Tuned
    from alexprep.pipeline.loader_settings import Tuning

_BAR = 30  # characters


@click.command("tune", short_help="Measure how this machine loads fastest.")
@click.option(
    "--data",
    default="alexprep-data",
    envvar="ALEXPREP_DATA",
    show_default=True,
    show_envvar=True,
    help="The data set's folder; or anyone's webdataset: a folder of tars, a tar, a pattern like \"train-{000..146}.tar\".",
)
@device_option
@click.option(
    "--batch-size",
    "batch_sizes",
    type=AT_LEAST_1,
    multiple=True,
    help="Images a step; give several for a curve, the first is searched at.  [default: 128, on a GPU 256, 512 and 1024 too]",
)
@click.option(
    "--augmentation",
    type=click.Choice(["paper", "2012-code", "resized", "none"]),
    help="What is done to the images.  [default: as in training; resized for other people's tars]",
)
@click.option(
    "--seconds",
    type=Seconds(),
    default=60.0,
    show_default=True,
    help="How long measuring may take.",
)
@json_option
def tune(
    data: str,
    device: str | None,
    batch_sizes: tuple[int, ...],
    augmentation: str | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Measure how images are loaded fastest on this machine, print the curve, and keep the settings for `alexprep train`.

    Threads, steps ahead and, on a GPU, the share of its JPEG engines, one after the other. The settings go to DATA/tuning.json,
    one entry a kind of machine; where DATA is other people's or cannot be written, to ~/.cache/alexprep. With --json
    nothing else goes to stdout.

    \b
    Example: alexprep tune --data /data/imagenet-256 --seconds 120
    """
    from alexprep.cli import output
    from alexprep.pipeline.autotune import tune as measure
    from alexprep.pipeline.device import choose_device
    from alexprep.pipeline.loader_settings import save_tuning

    chosen = str(choose_device(device))
    tuned = measure(data, chosen, batch_sizes, augmentation, seconds, lambda line: click.echo(line, err=True))
    entry = tuned.entry()
    path, notes = save_tuning(data, tuned.machine, entry)
    for note in [*tuned.found.notes, *notes]:
        click.echo(f"Note: {note}", err=True)
    saved = str(path) if path else None
    if not as_json:
        _show(tuned, data, saved)
    output.json_line({**entry, "data": data, "saved_to": saved, "notes": [*tuned.found.notes, *notes]}, as_json)


def _show(tuned: Tuned, data: str, saved: str | None) -> None:
    """The curves and the choice."""
    from alexprep.cli import output

    found, size = tuned.found, tuned.batch_sizes[0]
    click.echo(f"{tuned.samples:,} images of 'train' in {data}, on {tuned.machine}.")
    compared: dict[str, list[Trial]] = {}
    for trial in found.trials:
        compared.setdefault(trial.dimension, []).append(trial)
    for name, trials in compared.items():
        fastest = max(trial.rate for trial in trials)
        at = "" if name == "batch size" else f", batches of {size}"
        rows = [(trial.value, (_bar(trial, fastest) + _mark(trial, found.tuning)).rstrip()) for trial in trials]
        output.table(f"{_TITLES[name]}{at}:", rows)
    if tuned.shuffle_quality:
        rows = [(order, f"{quality:.3f}") for order, quality in tuned.shuffle_quality.items()]
        output.table("How well each order shuffles an epoch, 1 is a uniform permutation:", rows)
    memory = {name: count for name, count in tuned.memory.items() if count is not None}
    output.table(
        "Chosen.",
        [
            ("settings", found.tuning.words(tuned.machine.device)),
            ("speed", f"{found.rate:,.0f} images/s, {found.rate / found.default_rate:.2f} × the default's"),
            *((f"{name} memory, at most so far", output.size(count)) for name, count in memory.items()),
            ("this run", f"{tuned.seconds:.1f} s"),
            ("written to", saved or "nowhere: `alexprep train` uses its defaults"),
        ],
    )


def _bar(trial: Trial, fastest: float) -> str:
    """A rate, and a bar as long as its share of the fastest one."""
    if not trial.rates:
        return "not measured"
    share = trial.rate / fastest if fastest else 0.0
    return f"{trial.rate:>8,.0f} images/s  {'█' * round(_BAR * share):<{_BAR}}"


def _mark(trial: Trial, chosen: Tuning) -> str:
    return "  chosen" if trial.tuning == chosen and trial.dimension != "batch size" else ""


_TITLES = {
    "decode": "Where images are decoded",
    "threads": "Threads",
    "prefetch": "Steps worked on ahead",
    "batch size": "The default and the choice by batch size",
}
