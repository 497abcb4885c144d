"""alexprep shard"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alexprep.cli.options import (
    BOX,
    Metadata,
    class_words_option,
    data_folder_option,
    engine_options,
    json_option,
    labels_option,
    patience_option,
    source_options,
)

if TYPE_CHECKING:
    from alexprep.shards.conversion import Report
    from alexprep.shards.listing import ClassNames
    from alexprep.shards.sources.base import Choices
    from alexprep.shards.worker_pool import Engine


@click.command(short_help="Images to resized webdataset shards.", context_settings={"show_default": True})
@click.argument("source")
@data_folder_option("--out", "The data set's folder: made, or gone on with.")
@source_options
@click.option("--check-archive", is_flag=True, help="First compare the ILSVRC archives with their published MD5s.")
@click.option(
    "--fit",
    type=click.Choice(["square", "shorter", "longer", "none"]),
    default="square",
    help="What becomes --size: the centre square; the shorter or the longer side of the whole image; none, the image as it is.",
)
@click.option(
    "--size",
    type=BOX,
    default="256",
    metavar="N|WxH",
    help="In pixels: a side, or width and height of a box that is covered (longer: that holds it).",
)
@click.option(
    "--pad",
    type=BOX,
    default=None,
    metavar="N|WxH",
    help="Put each image in the middle of a black canvas so large: MNIST's 28 pixels on 29 or 32.",
)
@click.option("--only-shrink", is_flag=True, help="Images smaller than --size are not enlarged.")
@click.option(
    "--filter",
    type=click.Choice(["area", "bilinear", "bicubic", "lanczos"]),
    default="area",
    help="How to resample; area is what the original data had (cubic where it enlarges). All are antialiased.",
)
@click.option(
    "--decode",
    type=click.Choice(["exact", "scaled"]),
    default="exact",
    help="Of JPEGs much larger than --size: scaled decodes them to a half or less, at least twice what they become: faster, and not quite "
    "the same pixels.",
)
@click.option(
    "--format", type=click.Choice(["jpg", "png", "webp", "raw"]), default="jpg", help="Of the images; raw is pixels."
)
@click.option(
    "--reencode",
    type=click.Choice(["needed", "always"]),
    default="needed",
    help="Whether images that already have the wanted form are encoded anew.",
)
@click.option("--quality", type=int, default=95, help="Of JPEG and WebP, 1-100.")
@click.option("--subsampling", type=click.Choice(["420", "422", "444"]), default="420", help="Of a JPEG's chroma.")
@click.option("--lossless", is_flag=True, help="WebP that loses nothing.")
@click.option("--webp-method", type=int, default=4, help="WebP: 0 is fast, 6 small.")
@click.option("--orient", is_flag=True, help="Apply the EXIF orientation (the original did not).")
@click.option(
    "--on-damaged",
    type=click.Choice(["reject", "keep"]),
    default="reject",
    help="Of an image that is cut or damaged: leave it out, or take what the decoder gives; the ledger tells the damage.",
)
@labels_option
@class_words_option
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="What decodes, resizes and encodes; decoders differ by a grey level here and there.",
)
@click.option("--seed", type=int, default=0, help="Of the global shuffle before sharding.")
@click.option("--shard-samples", type=int, default=None, help="Inputs a shard.  [default: 1024, fewer for small sets]")
@click.option("--limit", type=int, default=None, help="At most so many inputs of each split, picked by the shuffle.")
@click.option(
    "--max-rejects",
    default=None,
    metavar="N|P%",
    help="How many inputs may be rejected, as a number or a share: more, and nothing is published. What is finished stays.  "
    "[default: half may be no pictures at all, damaged ones are not counted]",
)
@click.option(
    "--metadata",
    type=Metadata(),
    metavar="all|none|NAME,…",
    help="What goes along with the images as KEY.json and into samples.parquet: columns, files KEY.json and KEY.txt, members of a "
    "webdataset.  [default: all; in a folder that was begun as it was begun]",
)
@engine_options
@patience_option
@json_option
def shard(
    source: str,
    layout: str | None,
    choices: Choices,
    class_names: ClassNames | None,
    check_archive: bool,
    out: Path,
    labels: str,
    class_words: Path | None,
    seed: int,
    shard_samples: int | None,
    limit: int | None,
    max_rejects: str | None,
    metadata: str | tuple[str, ...] | None,
    engine: Engine,
    as_json: bool,
    **form: Any,
) -> None:
    """Turn the images under SOURCE into resized webdataset shards.

    SOURCE is a folder, a file or a URL: class folders, the ILSVRC archives as downloaded, Kaggle's folders, tars, zips, a
    webdataset, Parquet or Arrow with pictures, TFRecord, RecordIO, LMDB, a list in CSV, Parquet or JSON lines, an image folder
    with its list, CIFAR, MNIST or NORB (docs/sources.md). Images that cannot be decoded are listed
    with their reasons; only too many of them stop the run (--max-rejects). The same command again does only what is missing.

    \b
    Example: alexprep shard /imagenet --out /data/imagenet-256
    """
    from alexprep.cli import output
    from alexprep.shards.conversion import convert
    from alexprep.shards.image_codec import Target
    from alexprep.shards.inspection import Inspection, inspect_source
    from alexprep.shards.listing import Listing
    from alexprep.shards.plan import ShardOptions
    from alexprep.shards.sources.ilsvrc import check_archives
    from alexprep.shards.sources.layout_detection import find_source
    from alexprep.shards.worker_pool import LocalEngine

    options = ShardOptions(Target(**form), seed, shard_samples, labels, limit, class_names, class_words, metadata)
    if form["device"] == "cuda" and not isinstance(engine, LocalEngine):
        raise click.UsageError("--device cuda is for --engine local: Ray tasks ask for CPUs only.")
    found = find_source(source, layout, choices)
    if check_archive:
        click.echo(f"MD5 as published: {', '.join(check_archives(found.files))}", err=True)
    seen: list[Inspection] = []

    def announce(listing: Listing) -> None:
        seen.append(inspect_source(listing, sample=0))
        output.note(seen[0].opening())

    with output.progress("sharding") as show:
        done = convert(found, out, options, engine, show, announce=announce, max_rejects=max_rejects)
    output.table("Sharded.", _rows(done))
    output.json_line(
        {
            "layout": found.layout,
            "found": done.found,
            "inputs": done.inputs,
            "samples": done.samples,
            "written": done.written,
            "rejected": done.rejected.total(),
            "reasons": dict(done.rejected),
            "damaged": dict(done.damaged),
            "passed_over": {rule: asdict(passed) for rule, passed in done.passed_over.items()},
            "metadata": done.metadata,
            "warnings": [*seen[0].warnings, *done.warnings],
            "kept": done.kept,
            "bytes": done.bytes,
            "converted_in_this_run": done.made_inputs,
            "seconds": round(done.seconds, 3),
            "images_per_second": round(done.made_inputs / done.seconds, 1),
            "data": str(out),
        },
        as_json,
    )


def _rows(done: Report) -> list[tuple[str, str]]:
    """The account of a run, as a table."""
    from rich.filesize import decimal

    from alexprep.shards.inspection import passed_over_rows, printable

    rows = [("found", f"{done.found:,}"), ("written", f"{done.written:,}")]
    rows += [(f"  {split}", f"{count:,}") for split, count in done.samples.items()]
    rows += [("  bytes kept as they were", f"{done.kept:,}")] if done.kept else []
    rows += [("  metadata", ", ".join(map(printable, done.metadata)))] if done.metadata else []
    rows += [("rejected", f"{done.rejected.total():,}")]
    rows += [(f"  {count:,}", reason) for reason, count in done.rejected.most_common(10)]
    rows += [("written though damaged", f"{done.damaged.total():,}")] if done.damaged else []
    rows += [(f"  {count:,}", reason) for reason, count in done.damaged.most_common(10)]
    rows += [("warning", sentence) for sentence in done.warnings]
    rows += [*passed_over_rows(done.passed_over), ("shards", decimal(done.bytes))]
    made, rate = done.made_inputs, done.made_inputs / done.seconds
    rows += [("this run", f"{made:,} inputs in {done.seconds:.1f} s, {rate:,.0f}/s" if made else "nothing was missing")]
    rows += [("dataset", str(done.folder)), ("every input's fate", str(done.folder / "*" / "samples.parquet"))]
    return rows
