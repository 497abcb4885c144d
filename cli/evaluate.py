"""alexprep eval"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from alexprep.cli.options import device_option, json_option, runs_option, threads_option


@click.command("eval", short_help="Errors of a trained network.")
@click.argument("run", required=False)
@click.option(
    "--views", type=click.Choice(["centre", "ten"]), default="centre", show_default=True, help="Crops an image."
)
@click.option("--split", help="The split to evaluate on.  [default: val, or test]")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="The data set.  [default: the one it was trained on]",
)
@runs_option
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Crops at a time.")
@threads_option
@device_option
@json_option
def evaluate(
    run: str | None,
    views: Literal["centre", "ten"],
    split: str | None,
    data: Path | None,
    runs: Path,
    batch_size: int,
    threads: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Evaluate the newest checkpoint of RUN, a name in ./runs; the run last active by default.

    Prints top-1 and top-5 error and cross-entropy; --views ten averages the softmax over the paper's ten views.

    \b
    Example: alexprep eval alexnet --views ten
    """
    from alexprep.cli import report
    from alexprep.train.evaluate_run import evaluate_run
    from alexprep.train.runs import find_run

    result = evaluate_run(
        find_run(runs, run), data=data, split=split, views=views, batch_size=batch_size, threads=threads, device=device
    )
    for sentence in result["skipped"]:
        click.echo(sentence, err=True)
    report.table(
        f"{result['run']} after step {result['step']}, {result['samples']} images of {result['split']!r} in {result['data']}",
        [
            ("top-1 error", f"{result['top1_error']:.2f} %"),
            ("top-5 error", f"{result['top5_error']:.2f} %"),
            ("cross-entropy", f"{result['loss']:.4f} nats"),
            ("views", views),
            ("seconds", f"{result['seconds']:.1f} on {result['device']}"),
        ],
    )
    report.json_line(result, as_json)
