"""Computes the mean image and the eigenpairs of the RGB covariance of a split, publishes them in the dataset, and reads them back.

Sums of pixels and of products of pixels are integers, so that any split of the work gives the same bits; only the last division of
each number rounds. What a training subtracts or adds with them is decided in `alexprep.pipeline.augmentation`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import operator
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alexprep.shards.any_dataset import dataset_facts, is_dataset, is_tars, open_samples
from alexprep.shards.dataset_format import (
    FORMAT_VERSION,
    MEAN_IMAGE,
    MEAN_PICTURE,
    STATISTICS,
    read_dataset,
    read_json,
    split_record,
    versions,
)
from alexprep.shards.errors import AlexprepError
from alexprep.shards.image_codec import read_raw, shared_decoder
from alexprep.shards.storage import digest_json, folder_at, make_folder, publish_bytes, publish_json, remove_temporaries
from alexprep.shards.worker_pool import Engine, as_engine, attending

TRAINING = "train"  # section 2 of the paper: the mean over the training set is subtracted, whatever is read

# What shipped with the original code (cuda-convnet2, make-data/input_meta), rounded there: grey levels and unit columns.
IMAGENET_STDEVS = (121.78, 37.09, 19.72)
IMAGENET_AXES = ((0.5635, 0.5762, 0.5920), (-0.7126, -0.0235, 0.7012), (0.4180, -0.8170, 0.3973))

# 256 products of two pixels are at most 256 * 255**2 < 2**24, so their sum is exact in float32 in any order;
# 65,536 images are at most 65536 * 255 < 2**24, likewise.
_BLOCK = 256
_FLUSH = 65_536
_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))  # of channels


@dataclass(frozen=True)
class Statistics:
    """The statistics of a split, on the 0-255 scale.

    Attributes:
        data_digest: identity of the dataset that they describe.
        images: how many images they were computed from.
        mean_HWC: float64 (S, S, 3), the mean image, grey levels.
        channel_means: float64 (3,), grey levels.
        covariance: float64 (3, 3), of the pixels' RGB about the channel means, grey levels squared, over all pixels (÷ N).
        eigenvalues: float64 (3,), of the covariance, descending, grey levels squared.
        eigenvectors: float64 (3, 3), unit columns in that order, the component largest in size positive.
    """

    data_digest: str
    images: int
    mean_HWC: NDArray[np.float64]
    channel_means: NDArray[np.float64]
    covariance: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    eigenvectors: NDArray[np.float64]

    @property
    def stdevs(self) -> NDArray[np.float64]:
        """The principal standard deviations, grey levels, descending."""
        return np.sqrt(self.eigenvalues)

    @property
    def channel_stdevs(self) -> NDArray[np.float64]:
        """The standard deviations of R, G and B about their means, grey levels."""
        return np.sqrt(np.diag(self.covariance))

    def angles_to_imagenet(self) -> NDArray[np.float64]:
        """Degrees between each principal axis and that of the original ImageNet statistics; signs do not count."""
        axes = np.array(IMAGENET_AXES)
        cosines = np.abs((self.eigenvectors.T * axes).sum(axis=1)) / np.linalg.norm(axes, axis=1)
        degrees: NDArray[np.float64] = np.degrees(np.arccos(np.clip(cosines, 0.0, 1.0)))
        return degrees


def pca_stats(
    data: Path | str,
    split: str,
    engine: Engine | int,
    progress: Callable[[int, int], None] = lambda finished, total: None,
    on_bad: Literal["error", "skip"] = "error",
) -> Statistics:
    """Computes the statistics of a split in one pass: the same to the last bit for any number of workers.

    Other people's tars may hold images of several sizes: then the mean image is one pixel, the channel means over all pixels.

    Args:
        data: a dataset, or a folder of tars, a tar, or a pattern of tars.
        split: of it.
        engine: runs the work, one task a shard; a number stands for so many worker processes on this machine.
        progress: called with (finished images, all images).
        on_bad: "skip" leaves out samples of other people's tars that have no usable image or label.

    Raises:
        AlexprepError: there is no such dataset or split, or an image cannot be decoded; it is named.
    """
    data, engine = folder_at(data), as_engine(engine)
    facts = dataset_facts(data)
    split_record(facts, split, data)
    opened = open_samples(data, split)
    if opened.bad and on_bad == "error":
        raise AlexprepError(
            f"{len(opened.bad):,} samples cannot be used, the first: {opened.bad[0]}; leave such samples out with on_bad='skip' (--on-bad skip)"
        )
    task = functools.partial(_shard_moments, data, split, opened.digest)
    total = len(opened.samples)
    parts = engine.run(
        task, np.unique(opened.samples.index["shard"]).tolist(), lambda finished: progress(finished, total)
    )
    moments = functools.reduce(operator.add, parts)
    progress(total, total)
    return _from_moments(moments, facts["digest"])


def publish_statistics(statistics: Statistics, data: Path | str, split: str) -> None:
    """Writes the folder stats/ of a dataset: mean_image.npy, mean_image.png and, last, stats.json, which holds their hashes.

    `statistics` are what `pca_stats` computed of `split`. Raises OSError where a file cannot be written.
    """
    data = folder_at(data)
    make_folder((data / STATISTICS).parent)
    remove_temporaries((data / STATISTICS).parent)
    mean, picture = io.BytesIO(), io.BytesIO()
    np.save(mean, statistics.mean_HWC, allow_pickle=False)
    Image.fromarray(np.rint(statistics.mean_HWC).astype(np.uint8)).save(picture, "PNG")
    publish_bytes(data / MEAN_IMAGE, mean.getvalue())
    publish_bytes(data / MEAN_PICTURE, picture.getvalue())
    document = {
        "format": "alexprep statistics",
        "format_version": FORMAT_VERSION,
        "data_digest": statistics.data_digest,
        "split": split,
        "images": statistics.images,
        "size": len(statistics.mean_HWC),
        "channels": "RGB",
        "scale": "0-255; covariance and eigenvalues in its square, over all pixels (divided by N)",
        "channel_means": statistics.channel_means.tolist(),
        "covariance": statistics.covariance.tolist(),
        "eigenvalues": statistics.eigenvalues.tolist(),
        "eigenvectors_in_columns": statistics.eigenvectors.tolist(),
        "mean_image_sha256": hashlib.sha256(mean.getvalue()).hexdigest(),
        "mean_picture_sha256": hashlib.sha256(picture.getvalue()).hexdigest(),
        "versions": versions("alexprep", "nvimgcodec", "numpy"),
    }
    publish_json(data / STATISTICS, document | {"digest": digest_json(document)})


def read_statistics(data: Path | str, data_digest: str | None = None) -> Statistics:
    """The statistics of the training split, as they were published in a dataset's folder.

    They must describe the shards with the identity `data_digest`, by default those of the dataset itself; a folder that has statistics
    and no shards is taken as it is. Raises AlexprepError where there are none, they are damaged, or they describe other shards or another
    split than "train".
    """
    data = folder_at(data)
    again = f"run `alexprep pca-stats` on {data}"
    if is_tars(data) and not data.is_dir():
        again += " with --out FOLDER, and name that folder with --statistics"
    if not is_dataset(data) and not (data / STATISTICS).exists():
        read_dataset(data)  # says what the folder lacks
    document = read_json(data / STATISTICS, again)
    if document.pop("digest", None) != digest_json(document):
        raise AlexprepError(f"{data / STATISTICS} was changed since it was written: {again}")
    if data_digest is None:
        data_digest = str(dataset_facts(data)["digest"] if is_dataset(data) else document.get("data_digest"))
    if document.get("data_digest") != data_digest:
        raise AlexprepError(f"{data / STATISTICS} describes other shards: {again}")
    if document.get("split") != TRAINING:
        raise AlexprepError(
            f"{data / STATISTICS} describes the split {document.get('split')!r}, not {TRAINING!r}, whose mean all splits have "
            f"subtracted: {again}"
        )
    try:
        raw = (data / MEAN_IMAGE).read_bytes()
        if hashlib.sha256(raw).hexdigest() != document["mean_image_sha256"]:
            raise AlexprepError(f"{data / MEAN_IMAGE} is not the file that {STATISTICS.name} was written with: {again}")
        return Statistics(
            data_digest=data_digest,
            images=document["images"],
            mean_HWC=np.load(io.BytesIO(raw), allow_pickle=False),
            channel_means=np.array(document["channel_means"]),
            covariance=np.array(document["covariance"]),
            eigenvalues=np.array(document["eigenvalues"]),
            eigenvectors=np.array(document["eigenvectors_in_columns"]),
        )
    except (OSError, KeyError, ValueError) as error:
        raise AlexprepError(f"{data / STATISTICS} or its mean image is damaged ({error}): {again}") from None


_opened = functools.lru_cache(maxsize=1)(open_samples)  # one a process, for all its shards


def _shard_moments(data: Path, split: str, digest: str, shard: int, condemned: Mapping[int, str]) -> Moments:
    """The exact sums over one shard."""
    opened = _opened(data, split)
    if opened.digest != digest:  # an engine may run this on another machine
        raise AlexprepError(f"{platform.node()} has another data set at {data}: DATA must be one folder that all share")
    samples, side = opened.samples, opened.size
    accumulator: Accumulator | MixedAccumulator = MixedAccumulator() if side is None else Accumulator(side)
    for row in samples.rows_of(shard):
        with attending(row):
            planes = None if row in condemned else _planes(samples.encoded(row), opened.raw)
            if planes is None or planes.shape != (3, *opened.sizes_N2[row].tolist()):
                raise AlexprepError(
                    f"{samples.where(row)} holds no image of {' x '.join(map(str, opened.sizes_N2[row][::-1]))} pixels that can be decoded: "
                    "`alexprep verify --decode` tells more of data sets of `alexprep shard`"
                )
            accumulator.add(planes)
    return accumulator.moments()


def _planes(encoded: NDArray[np.uint8], raw: bool) -> NDArray[np.uint8] | None:
    """uint8 (3, H, W), or None where it cannot be decoded."""
    if raw:
        pixels = read_raw(encoded.tobytes())
        return None if pixels is None or pixels.ndim != 3 else pixels.transpose(2, 0, 1)
    return shared_decoder().decode(encoded.tobytes(), planar=True)


def _from_moments(moments: Moments, data_digest: str) -> Statistics:
    """The statistics of exact sums; only the last division of each number rounds."""
    count = moments.pixels
    # Python's integers: the difference of two numbers near 1e26 would lose the digits that matter.
    totals, products = moments.sums.sum(axis=(1, 2)).astype(object), moments.products.astype(object)
    covariance = ((count * products - np.outer(totals, totals)) / count**2).astype(np.float64)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)  # ascending
    eigenvalues, eigenvectors = np.maximum(eigenvalues[::-1], 0.0), eigenvectors[:, ::-1]
    largest = np.abs(eigenvectors).argmax(axis=0)
    eigenvectors = eigenvectors * np.sign(eigenvectors[largest, np.arange(3)])
    return Statistics(
        data_digest=data_digest,
        images=moments.images,
        mean_HWC=np.ascontiguousarray(np.moveaxis(moments.sums / (count // moments.sums[0].size), 0, 2)),
        channel_means=(totals / count).astype(np.float64),
        covariance=covariance,
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors,
    )


@dataclass(frozen=True)
class Moments:
    """Exact sums over a set of images."""

    images: int
    pixels: int  # of all images together
    sums: NDArray[
        np.int64
    ]  # (3, S, S), over the images at each pixel, planes R, G, B; (3, 1, 1), over all pixels of images of several sizes
    products: NDArray[np.int64]  # (3, 3), over all pixels of all images, of x xᵀ; fits for up to 2**47 pixels

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.images + other.images,
            self.pixels + other.pixels,
            self.sums + other.sums,
            self.products + other.products,
        )


class Accumulator:
    """Adds images of size x size pixels one by one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._images = 0
        blocks = -(-size * size // _BLOCK)
        self._planes = np.zeros((3, blocks, _BLOCK), np.float32)  # zeros beyond the last pixel add nothing
        self._flat = self._planes.reshape(3, -1)[:, : size * size]
        self._recent = np.zeros((3, size * size), np.float32)
        self._sums = np.zeros((3, size * size), np.int64)
        # Per pair of channels and block. float64 holds integers up to 2**53: 5 * 10**8 images.
        self._products = np.zeros((len(_PAIRS), blocks, 1, 1))
        self._recent_products = np.empty((len(_PAIRS), blocks, 1, 1), np.float32)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Adds one image, uint8 (3, S, S)."""
        self._flat[:] = image.reshape(3, -1)
        self._recent += self._flat
        for (i, j), products in zip(_PAIRS, self._recent_products, strict=True):
            np.matmul(self._planes[i][:, None, :], self._planes[j][:, :, None], out=products)
        self._products += self._recent_products
        self._images += 1
        if self._images % _FLUSH == 0:
            self._flush()

    def moments(self) -> Moments:
        """All that was added so far."""
        self._flush()
        products = np.zeros((3, 3), np.int64)
        for (i, j), blocks in zip(_PAIRS, self._products.astype(np.int64), strict=True):
            products[i, j] = products[j, i] = blocks.sum()
        sums = self._sums.reshape(3, self._size, self._size).copy()
        return Moments(self._images, self._images * self._size**2, sums, products)

    def _flush(self) -> None:
        self._sums += self._recent.astype(np.int64)
        self._recent[:] = 0


class MixedAccumulator:
    """Adds images of several sizes: what is left of them are sums over all pixels."""

    def __init__(self) -> None:
        self._images = self._pixels = 0
        self._sums, self._products = np.zeros(3, np.int64), np.zeros((3, 3), np.int64)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Adds one image, uint8 (3, H, W); one of fewer than 10^11 pixels has sums below 2^53, which float64 holds in any order."""
        flat = image.reshape(3, -1).astype(np.float64)
        self._sums += flat.sum(axis=1).astype(np.int64)
        self._products += (flat @ flat.T).astype(np.int64)
        self._images += 1
        self._pixels += flat.shape[1]

    def moments(self) -> Moments:
        """All that was added so far."""
        return Moments(self._images, self._pixels, self._sums.reshape(3, 1, 1).copy(), self._products.copy())
