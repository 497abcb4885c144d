"""`alexprep similar`: the images nearest to a photo, by `alexprep.train.similar_images`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alexprep.cli.options import (
    AT_LEAST_1,
    check_picture,
    device_option,
    json_option,
    picture_option,
    precision_option,
    store_options,
    threads_option,
    trained_data_option,
    trained_run_options,
)

if TYPE_CHECKING:
    from alexprep.train.binary_codes import BinaryCodes
    from alexprep.train.layer_outputs import LayerOutputs
    from alexprep.train.precision import Precision
    from alexprep.train.similar_images import Similar


@click.command(short_help="The images of a split nearest to a photo.")
@click.argument("run")
@click.argument("photos", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--count", type=AT_LEAST_1, default=10, show_default=True, help="Neighbours an image.")
@click.option("--layer", help="Whose outputs are compared.  [default: the last hidden one]")
@click.option("--split", default="train", show_default=True, help="Where neighbours are looked for.")
@click.option(
    "--features",
    "outputs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What `alexprep features` wrote.  [default: RUN/features-LAYER-SPLIT.npy]",
)
@click.option("--codes", is_flag=True, help="Compare binary codes, made once by an autoencoder of the features.")
@click.option("--bits", type=AT_LEAST_1, default=256, show_default=True, help="Of a code, a multiple of 64.")
@trained_data_option
@picture_option
@trained_run_options
@click.option("--batch-size", type=AT_LEAST_1, default=128, show_default=True, help="Images at a time.")
@precision_option
@threads_option
@store_options
@device_option
@json_option
def similar(
    run: str,
    photos: tuple[str, ...],
    count: int,
    layer: str | None,
    split: str,
    outputs: Path | None,
    codes: bool,
    bits: int,
    picture: Path | None,
    runs: Path,
    precision: Precision | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Print the images of a split that are nearest to each IMAGE (a photo, folder or tar) by what a layer of RUN gives for them.

    The distance is Euclidean, or with --codes the number of bits in which two codes differ. What the layer gives for the split, `alexprep
    features` writes first.

    \b
    Example: alexprep similar alexnet elephant.jpg --count 6
    """
    from alexprep.cli import output
    from alexprep.shards.contact_sheet import publish_picture
    from alexprep.shards.errors import AlexprepError
    from alexprep.train.binary_codes import check_bits, write_codes
    from alexprep.train.classifier import Classifier
    from alexprep.train.layer_outputs import last_hidden_layer, outputs_file, read_outputs
    from alexprep.train.run_dir import place_named
    from alexprep.train.similar_images import draw_similar, find_similar, outputs_command

    if picture is not None:
        check_picture(picture)
    check_bits(bits)
    with Classifier(place_named(runs, run), precision=precision or "fp32", **options) as classifier:
        layer = layer or last_hidden_layer(classifier.net.network)
        path = outputs or outputs_file(classifier.net.run, layer, split)
        if outputs is None and not path.exists():
            own = [word for name in ("recipe", "model") if options[name] for word in (f"--{name}", options[name])]
            raise AlexprepError(
                f"{path} does not exist: make it with {outputs_command(classifier, layer, split, *own)}"
            )
        features = read_outputs(path)
        compared: LayerOutputs | BinaryCodes = features
        if codes:
            with output.progress("codes") as progress:
                compared = write_codes(features, bits, progress=progress)
        found = find_similar(classifier, compared, photos, count)
    for sentence in [*classifier.notes, *(f"{name}: {reason}" for name, reason in found.refused)]:
        click.echo(sentence, err=True)
    if codes and not as_json:
        click.echo(_told(compared.facts))
    if not found.neighbours:
        raise AlexprepError(f"none of the {len(found.refused):,} photos can be decoded")
    if not as_json:
        _print(found, "4.0f" if codes else "10.4f")
    if picture is not None:
        publish_picture(draw_similar(found), picture)
        click.echo(f"Contact sheet: {picture}")
    document = {
        "run": str(classifier.net.run),
        "step": classifier.net.step,
        "layer": layer,
        "split": split,
        "distance": "hamming" if codes else "euclidean",
        **(
            {name: compared.facts[name] for name in ("bits", "recall@10 among 10", "recall@10 among 100")}
            if codes
            else {}
        ),
        "photos": found.as_json(),
        "refused": [{"key": name, "reason": reason} for name, reason in found.refused],
        "notes": classifier.notes,
    }
    output.json_line(document, as_json)


def _print(found: Similar, form: str) -> None:
    from alexprep.shards.dataset_format import shown_classes

    names = [*shown_classes(found.dataset), ""]  # -1, no label, is the last one
    width = max(len(names[one.label]) for near in found.neighbours.values() for one in near)
    for photo, near in found.neighbours.items():
        click.echo(photo)
        for one in near:
            click.echo(f"  {one.distance:{form}}  {names[one.label]:<{width}}  {one.source}")


def _told(facts: dict[str, Any]) -> str:
    """What the codes are, and how well they do."""
    values = math.prod(facts["shape"])
    words = f"Codes of {facts['bits']} bits: {facts['bits'] // 8:,} bytes an image instead of {4 * values:,}"
    recalls = [
        f"{facts[f'recall@10 among {among}']:.3f} among the {among}"
        for among in (10, 100)
        if facts[f"recall@10 among {among}"] is not None
    ]
    return (
        f"{words}; of the ten exact neighbours a share of {' and '.join(recalls)} nearest codes" if recalls else words
    )
