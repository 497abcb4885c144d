"""`alexprep export`: a run for use without alexprep, written by `alexprep.train.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from alexprep.cli.options import json_option, patience_option, trained_data_option, trained_run_options

# Those of alexprep.train.export; importing that here would import torch for --help.
FORMATS, OPSETS = ("safetensors", "pt", "pt2", "onnx"), (18, 23)


class Formats(click.ParamType):  # type: ignore[type-arg]
    """Names of formats with commas."""

    name = "formats"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of them, each once."""
        if not isinstance(value, str):
            return value
        named = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        for each in named:
            if each not in FORMATS:
                self.fail(f"{each!r} is none of {', '.join(FORMATS)}", param, ctx)
        return named


@click.command(short_help="A run as weights, torch.export and ONNX.")
@click.argument("run", metavar="[RUN | RUN@STEP | RUN@best]", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Where the files go.  [default: RUN/export]",
)
@click.option(
    "--formats",
    type=Formats(),
    metavar="NAME,…",
    default=FORMATS,
    help=f"Which are written.  [default: {','.join(FORMATS)}]",
)
@click.option(
    "--names",
    type=click.Choice(["own", "torchvision"]),
    default="own",
    show_default=True,
    help="Of the layers in .safetensors and .pt: torchvision's are for alexnet-owt.",
)
@click.option("--opset", type=click.IntRange(*OPSETS), default=OPSETS[0], show_default=True, help="Of ONNX.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@trained_data_option
@trained_run_options
@patience_option
@json_option
def export(run: str | None, runs: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Write the network of RUN for use without alexprep; of the run last active by default.

    RUN/export/NAME.safetensors and .pt have the weights, NAME.pt2 a graph for torch.export.load, NAME.onnx one for ONNX, and NAME.json the
    preprocessing and the classes. The graphs take any number of images, and are run and compared with the network before anything is
    written.

    \b
    Example: alexprep export alexnet@best --out /models
    """
    from alexprep.cli import output
    from alexprep.train.export import export_run
    from alexprep.train.run_dir import place_named

    written = export_run(place_named(runs, run), out, **options)
    for note in written.notes:
        click.echo(note, err=True)
    document = written.document
    rows = [(name, f"{size:,} bytes") for name, size in written.files.items()]
    for name, title in (("pt2", "torch.export"), ("onnx", "ONNX")):
        if name in document["checked"]:
            apart = document["checked"][name]["largest_difference"]
            rows.append((f"{title} against the run", f"logits differ by {apart:.1e} of the largest"))
    output.table(f"{document['run']}@{document['step']} in {written.folder}", rows)
    output.json_line({"folder": str(written.folder), **document}, as_json)
