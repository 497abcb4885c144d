"""The part of a report on the statistics: mean image, principal axes and eigenvalues beside ImageNet's, and what colour noise does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.augmentation import Augmentation, noise_stdevs
from alexprep.shards.rgb_statistics import IMAGENET_STDEVS, Statistics, read_statistics
from alexprep.shards.sample_reader import Samples
from alexprep.train.report.blocks import Block, Facts, Picture, Section, Table, enlarged, tiled
from alexprep.train.report.data_section import decoded, typical_row

_RAMP = (32, 480)  # height and width of a ramp, pixels
_STEPS = (-3, -2, -1, 0, 1, 2, 3)  # standard deviations


def statistics_section(data: Path | None) -> Section:
    """The section of a dataset's statistics, those of its training split."""
    section = Section("statistics", "Statistics")
    if data is None:
        return section
    section.add(lambda: _all(data, read_statistics(data)), "table of the statistics")
    return section


def _all(data: Path, found: Statistics) -> list[Block]:
    facts = Facts(
        [
            ("images", f"{found.images:,} of 'train'"),
            ("channel means R G B", _numbers(found.channel_means) + " grey levels"),
            ("channel standard deviations", _numbers(found.channel_stdevs) + " grey levels"),
            ("angles to ImageNet's axes", _numbers(found.angles_to_imagenet(), 1) + " degrees"),
        ]
    )
    return [facts, *_mean_image(found), _table(found), _ramps(found), *_noisy_photo(data, found)]


def _mean_image(found: Statistics) -> list[Block]:
    """None where images have different sizes."""
    if found.mean_HWC is None:
        return []
    height, width = found.mean_HWC.shape[:2]
    pixels = np.rint(found.mean_HWC).astype(np.uint8)
    words = f"The mean image, {width} x {height} pixels."
    return [
        Picture("mean_image", f"The mean of {found.images:,} images.", words, pixels, max(1, 256 // max(height, width)))
    ]


def _table(found: Statistics) -> Table:
    noise = {name: noise_stdevs(found, Augmentation(noise=name)) for name in ("eigenvalue", "stdev")}
    rows = [
        [
            axis + 1,
            float(found.eigenvalues[axis]),
            float(found.eigenvalues[axis] / 255**2),
            float(found.stdevs[axis]),
            IMAGENET_STDEVS[axis],
            float(noise["eigenvalue"][axis]),
            float(noise["stdev"][axis]),
        ]
        for axis in range(3)
    ]
    columns = [
        "axis",
        "eigenvalue, (0-255)²",
        "on the 0-1 scale",
        "standard deviation, grey levels",
        "ImageNet's",
        "noise α λ (paper)",
        "noise α √λ (2012 code)",
    ]
    caption = "Eigenvalues of the RGB covariance, and the colour noise that they give: its standard deviation along each axis in grey levels, for α ~ N(0, 0.1²)"
    return Table(caption, columns, rows, formats={"on the 0-1 scale": ".4f"})


def _ramps(found: Statistics) -> Picture:
    """A row for each axis, from three standard deviations below the mean colour to three above."""
    height, width = _RAMP
    along = np.linspace(-3, 3, width)[:, None]
    rows = []
    for axis in range(3):
        colours = found.channel_means + along * found.stdevs[axis] * found.eigenvectors[:, axis]
        rows.append([np.tile(_pixels(colours)[None], (height, 1, 1))])
    words = "The principal axes of colour: the mean colour less three to plus three standard deviations along each, the first axis on top."
    return Picture("axes", words, words, tiled(rows))


def _noisy_photo(data: Path, found: Statistics) -> list[Block]:
    samples = Samples(data, "train")
    photo = decoded(samples, typical_row(samples)).astype(np.float64)
    step = max(1, len(photo) // 128)
    photo = photo[::step, ::step]
    sigmas = noise_stdevs(found, Augmentation(noise="stdev"))
    rows = [[_pixels(photo + n * sigmas[axis] * found.eigenvectors[:, axis]) for n in _STEPS] for axis in range(3)]
    words = "One photo under colour noise of -3, -2, -1, 0, 1, 2 and 3 standard deviations along each axis, as the 2012 code scales it (α √λ, α ~ N(0, 0.1²))."
    return [Picture("noise", words, words, tiled(rows), enlarged(photo))]


def _pixels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _numbers(values: NDArray[np.float64], digits: int = 2) -> str:
    return "  ".join(f"{value:,.{digits}f}" for value in values)
