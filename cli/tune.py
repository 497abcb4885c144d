"""alexprep tune"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from alexprep.cli import output
from alexprep.cli.options import AT_LEAST_1, SECONDS, device_option, json_option, store_options

if TYPE_CHECKING:
    from alexprep.pipeline.autotune import Found

_BAR = 30  # characters
_TITLES = {
    "decode": "Where images are decoded",
    "threads": "Threads",
    "prefetch": "Steps worked on ahead",
    "batch size": "The default and the choice by batch size",
}


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
@click.option("--seconds", type=SECONDS, default=60.0, show_default=True, help="How long measuring may take.")
@store_options
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
    from alexprep.pipeline.autotune import tune as measure
    from alexprep.pipeline.device import choose_device
    from alexprep.pipeline.loader_settings import save_tuning

    chosen = str(choose_device(device))
    found, entry = measure(data, chosen, batch_sizes, augmentation, seconds, lambda line: click.echo(line, err=True))
    path, notes = save_tuning(data, entry["machine"], entry)
    notes = [*found.notes, *notes]
    for note in notes:
        click.echo(f"Note: {note}", err=True)
    saved = str(path) if path else None
    if not as_json:
        click.echo(f"{entry['samples']:,} images of 'train' in {data}, on {entry['machine']}.")
        _show_curves(found, entry["batch_size"])
        rows = [
            ("settings", found.settings.words(chosen)),
            ("speed", f"{found.rate:,.0f} images/s, {found.rate / found.default_rate:.2f} × the default's"),
            ("this run", f"{entry['seconds']:.1f} s"),
            ("written to", saved or "nowhere: `alexprep train` uses its defaults"),
        ]
        output.table("Chosen.", rows)
    output.json_line({**entry, "data": data, "saved_to": saved, "notes": notes}, as_json)


def _show_curves(found: Found, batch_size: int) -> None:
    """A table for each setting: its values' rates, with bars as long as their share of the fastest one."""
    for compared, title in _TITLES.items():
        trials = [trial for trial in found.trials if trial.compared == compared]
        fastest = max((trial.rate for trial in trials), default=0.0) or 1.0
        rows = []
        for trial in trials:
            bar = f"{'█' * round(_BAR * trial.rate / fastest):<{_BAR}}"
            mark = "  chosen" if trial.settings == found.settings and compared != "batch size" else ""
            row = f"{trial.rate:>8,.0f} images/s  {bar}{mark}" if trial.rounds else "not measured"
            rows.append((trial.value, row.rstrip()))
        if rows:
            at = "" if compared == "batch size" else f", batches of {batch_size}"
            output.table(f"{title}{at}:", rows)
