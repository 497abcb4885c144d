"""alexprep pca-stats"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from alexprep.cli.options import data_folder, engine_options, json_option, on_bad_option, store_options

if TYPE_CHECKING:
    from alexprep.shards.worker_pool import Engine


@click.command("pca-stats", short_help="Mean image and eigenpairs of the RGB covariance.")
@data_folder
@click.option(
    "--split", default="train", show_default=True, help="The split to describe; training reads train's alone."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="The folder of stats/; for `alexprep train --statistics`.  [default: DATA]",
)
@on_bad_option
@engine_options
@store_options
@json_option
def pca_stats(
    data: Path, split: str, out: Path | None, on_bad: Literal["error", "skip"] | None, engine: Engine, as_json: bool
) -> None:
    """Compute the mean image and the eigenpairs of the RGB covariance of DATA, exactly.

    DATA is a data set, or anyone's webdataset: a folder of tars, a tar, or a pattern such as "train-{000..146}.tar". One pass; integer
    sums, so any number of workers gives the same bits. Results go to DATA/stats.

    \b
    Example: alexprep pca-stats /data/imagenet-256
    """
    from alexprep.cli import output
    from alexprep.pipeline.augmentation import Augmentation, noise_stdevs
    from alexprep.shards import rgb_statistics
    from alexprep.shards.any_dataset import is_tars
    from alexprep.shards.dataset_format import MEAN_PICTURE, STATISTICS

    folder = out or data
    if out is None and is_tars(data) and not data.is_dir():
        raise click.UsageError(f"{data} is no folder that could take the result: name one with --out")
    with output.progress("statistics") as show:
        found = rgb_statistics.pca_stats(data, split, engine, show, on_bad or "error")
    rgb_statistics.publish_statistics(found, folder, split)

    def numbers(values: object, digits: int = 2) -> str:
        return "  ".join(f"{value:,.{digits}f}" for value in values)  # type: ignore[attr-defined]

    eigenvalue, stdev = (noise_stdevs(found, Augmentation(noise=name)) for name in ("eigenvalue", "stdev"))
    output.table(
        f"Statistics of {found.images:,} images of {split!r} in {data}.",
        [
            ("channel means R G B, grey levels", numbers(found.channel_means)),
            ("eigenvalues of the RGB covariance, (0-255)²", numbers(found.eigenvalues)),
            ("  the same on the 0-1 scale", numbers(found.eigenvalues / 255**2, 4)),
            ("principal standard deviations, grey levels", numbers(found.stdevs)),
            ("  those of the original ImageNet statistics", numbers(rgb_statistics.IMAGENET_STDEVS)),
            ("angles to the original principal axes, degrees", numbers(found.angles_to_imagenet())),
            ("colour noise along the axes, σ = 0.1, grey levels:", ""),
            ("  α λ, the paper (train's default)", numbers(eigenvalue)),
            ("  α √λ, the 2012 code", numbers(stdev)),
            (
                "mean image",
                "none: images have different sizes" if found.mean_HWC is None else str(folder / MEAN_PICTURE),
            ),
            ("written to", str(folder / STATISTICS)),
        ],
    )
    if found.mean_HWC is None:
        click.echo(
            "The images are of several sizes, so there is no mean image: recipes that subtract one cannot train on them."
        )
    output.json_line(
        {
            "images": found.images,
            "split": split,
            "channel_means": found.channel_means.tolist(),
            "eigenvalues": found.eigenvalues.tolist(),
            "eigenvectors_in_columns": found.eigenvectors.tolist(),
            "stdevs": found.stdevs.tolist(),
            "angles_to_imagenet_degrees": found.angles_to_imagenet().tolist(),
            "data": str(data),
        },
        as_json,
    )
