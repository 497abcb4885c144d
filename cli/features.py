"""`alexprep features`: a layer's outputs for a split, by `alexprep.train.layer_outputs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alexprep.cli.options import (
    AT_LEAST_1,
    device_option,
    folder,
    json_option,
    precision_option,
    store_options,
    threads_option,
    trained_run_options,
)

if TYPE_CHECKING:
    from alexprep.train.precision import Precision


@click.command(short_help="A layer's outputs for a split, as .npy or Parquet.")
@click.argument("run")
@click.argument("data", type=folder, required=False)
@click.option("--layer", help="As the network names it; a wrong name lists them.  [default: the last hidden one]")
@click.option("--split", default="train", show_default=True, help="Of DATA.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The .npy; or a .parquet, written beside the default .npy.  [default: RUN/features-LAYER-SPLIT.npy]",
)
@trained_run_options
@click.option("--batch-size", type=AT_LEAST_1, default=128, show_default=True, help="Images at a time.")
@precision_option
@threads_option
@store_options
@device_option
@json_option
def features(
    run: str,
    layer: str | None,
    out: Path | None,
    runs: Path,
    precision: Precision | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write what a layer of RUN gives for every image of a split: float32 (images, values), in the order of the split's index.

    RUN is a name in ./runs, or RUN@STEP; DATA by default what it was trained on. Run again, an interrupted command goes on where it was.

    \b
    Example: alexprep features alexnet --layer relu7 --split val
    """
    from alexprep.cli import output
    from alexprep.shards.errors import AlexprepError
    from alexprep.train.layer_outputs import write_outputs, write_outputs_table
    from alexprep.train.run_dir import place_named

    if out is not None and (out.suffix not in (".npy", ".parquet") or not out.parent.is_dir()):
        raise AlexprepError(f"--out {out}: name a file that ends in .npy or .parquet, in a folder that exists")
    table = out if out is not None and out.suffix == ".parquet" else None
    with output.progress("features") as progress:
        found = write_outputs(
            place_named(runs, run),
            layer,
            out=None if table else out,
            precision=precision or "fp32",
            progress=progress,
            **options,
        )
    if table is not None:
        with output.progress("table") as progress:
            write_outputs_table(found, table, progress)
    facts = found.facts
    shape = " x ".join(map(str, facts["shape"]))
    click.echo(
        f"{facts['layer']} of {facts['images']:,} images of {facts['split']!r}, {shape} values each, in {found.path}"
    )
    if table is not None:
        click.echo(f"The same as a table: {table}")
    output.json_line(facts | {"file": str(found.path), "table": None if table is None else str(table)}, as_json)
