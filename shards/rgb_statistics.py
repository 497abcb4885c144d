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

_FORMAT_VERSION = 1  # of stats.json
TRAINING = "train"  # section 2 of the paper: the mean over the training set is subtracted, whatever is read

# What shipped with the original code (cuda-convnet2, make-data/input_meta), rounded there: grey levels and unit columns.
IMAGENET_STDEVS = (121.78, 37.09, 19.72)
IMAGENET_AXES = ((0.5635, 0.5762, 0.5920), (-0.7126, -0.0235, 0.7012), (0.4180, -0.8170, 0.3973))

# 256 products of two pixels are at most 256 * 255**2 < 2**24, so their sum is exact in float32 in any order;
# 65,536 images are at most 65536 * 255 < 2**24, likewise.
_BLOCK = 256
_FLUSH = 65_536
_CHUNK = 2**18  # pixels of a large image that are worked on at a time; a whole number of blocks
_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))  # of channels


@dataclass(frozen=True)
class Statistics:
    """The statistics of a split, on the 0-255 scale.

    Attributes:
        data_digest: identity of the dataset that they describe.
        images: how many images they were computed from.
        mean_HWC: float64 (H, W, 3), the mean image, grey levels; None where images have different sizes.
        channel_means: float64 (3,), grey levels.
        covariance: float64 (3, 3), of the pixels' RGB about the channel means, grey levels squared, over all pixels (÷ N).
        eigenvalues: float64 (3,), of the covariance, descending, grey levels squared.
        eigenvectors: float64 (3, 3), unit columns in that order, the component largest in size positive.
    """

    data_digest: str
    images: int
    mean_HWC: NDArray[np.float64] | None
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

    def mean_image(self) -> NDArray[np.float64]:
        """`mean_HWC`; AlexprepError where images of different sizes have none."""
        if self.mean_HWC is None:
            raise AlexprepError(
                "images of different sizes have no mean image, which mean 'crop' and 'centre' subtract: use mean 'channel', "
                "or shards with `alexprep shard --fit square`"
            )
        return self.mean_HWC

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

    Where images have different sizes there is no mean image.

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

    Where images have different sizes there is no mean image, and earlier ones are removed. `statistics` are what `pca_stats` computed of
    `split`. Raises OSError where a file cannot be written.
    """
    data = folder_at(data)
    make_folder((data / STATISTICS).parent)
    remove_temporaries((data / STATISTICS).parent)
    hashes, mean_HWC = {}, statistics.mean_HWC
    if mean_HWC is None:
        for path in (MEAN_IMAGE, MEAN_PICTURE):
            (data / path).unlink(missing_ok=True)
    else:
        mean, picture = io.BytesIO(), io.BytesIO()
        np.save(mean, mean_HWC, allow_pickle=False)
        Image.fromarray(np.rint(mean_HWC).astype(np.uint8)).save(picture, "PNG")
        publish_bytes(data / MEAN_IMAGE, mean.getvalue())
        publish_bytes(data / MEAN_PICTURE, picture.getvalue())
        hashes["mean_image_sha256"] = hashlib.sha256(mean.getvalue()).hexdigest()
        hashes["mean_picture_sha256"] = hashlib.sha256(picture.getvalue()).hexdigest()
    height, width = (None, None) if mean_HWC is None else mean_HWC.shape[:2]
    document = {
        "format": "alexprep statistics",
        "format_version": _FORMAT_VERSION,
        "data_digest": statistics.data_digest,
        "split": split,
        "images": statistics.images,
        "size": height if height == width else [height, width],
        "channels": "RGB",
        "scale": "0-255; covariance and eigenvalues in its square, over all pixels (divided by N)",
        "channel_means": statistics.channel_means.tolist(),
        "covariance": statistics.covariance.tolist(),
        "eigenvalues": statistics.eigenvalues.tolist(),
        "eigenvectors_in_columns": statistics.eigenvectors.tolist(),
        **hashes,
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
        raw = None
        if document["size"] is not None:
            raw = (data / MEAN_IMAGE).read_bytes()
            if hashlib.sha256(raw).hexdigest() != document["mean_image_sha256"]:
                raise AlexprepError(
                    f"{data / MEAN_IMAGE} is not the file that {STATISTICS.name} was written with: {again}"
                )
        return Statistics(
            data_digest=data_digest,
            images=document["images"],
            mean_HWC=None if raw is None else np.load(io.BytesIO(raw), allow_pickle=False),
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
    samples, size = opened.samples, opened.size
    accumulator = ColourAccumulator() if size is None else Accumulator(*size)
    if samples.remote:
        samples.fetch(shard)  # outside `attending`: no image is to blame for a slow store
    for row in samples.rows_of(shard):
        with attending(row):
            planes = None if row in condemned else _planes(samples.encoded(row), opened.raw)
            height, width = opened.sizes_N2[row].tolist()
            if planes is None or planes.shape != (3, height, width):
                raise AlexprepError(
                    f"{samples.where(row)} holds no image of {width} x {height} pixels that can be decoded: "
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
    count, sums = moments.pixels, moments.sums
    # Python's integers: the difference of two numbers near 1e26 would lose the digits that matter.
    totals, products = sums.reshape(3, -1).sum(axis=1).astype(object), moments.products.astype(object)
    covariance = ((count * products - np.outer(totals, totals)) / count**2).astype(np.float64)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)  # ascending
    eigenvalues, eigenvectors = np.maximum(eigenvalues[::-1], 0.0), eigenvectors[:, ::-1]
    largest = np.abs(eigenvectors).argmax(axis=0)
    eigenvectors = eigenvectors * np.sign(eigenvectors[largest, np.arange(3)])
    return Statistics(
        data_digest=data_digest,
        images=moments.images,
        mean_HWC=np.ascontiguousarray(np.moveaxis(sums / moments.images, 0, 2)) if sums.ndim == 3 else None,
        channel_means=(totals / count).astype(np.float64),
        covariance=covariance,
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors,
    )


@dataclass(frozen=True)
class Moments:
    """Exact sums over a set of images."""

    images: int
    pixels: int  # of all images
    # (3, H, W), over the images at each pixel, planes R, G, B; (3,), over all, where sizes differ.
    sums: NDArray[np.int64]
    products: NDArray[np.int64]  # (3, 3), over all pixels of all images, of x xᵀ; fits for up to 2**47 pixels

    def __add__(self, other: Moments) -> Moments:
        images, pixels = self.images + other.images, self.pixels + other.pixels
        return Moments(images, pixels, self.sums + other.sums, self.products + other.products)


class ColourAccumulator:
    """Adds images of any sizes one by one, without a mean image."""

    def __init__(self) -> None:
        self._moments = Moments(0, 0, np.zeros(3, np.int64), np.zeros((3, 3), np.int64))
        self._room = np.zeros((3, _CHUNK), np.float32)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Adds one image, uint8 (3, H, W)."""
        flat, products = image.reshape(3, -1), np.zeros((3, 3), np.int64)
        for start in range(0, flat.shape[1], _CHUNK):
            part = flat[:, start : start + _CHUNK]
            filled = -(-part.shape[1] // _BLOCK) * _BLOCK
            self._room[:, : part.shape[1]] = part
            self._room[:, part.shape[1] : filled] = 0
            planes = [plane[:filled].reshape(-1, _BLOCK) for plane in self._room]
            for i, j in _PAIRS:
                # Each is exact; their sum in float64, too.
                blocks = np.matmul(planes[i][:, None, :], planes[j][:, :, None])
                products[i, j] += int(blocks.sum(dtype=np.float64))
                products[j, i] = products[i, j]
        self._moments += Moments(1, flat.shape[1], flat.sum(axis=1, dtype=np.int64), products)

    def moments(self) -> Moments:
        """All that was added so far."""
        return self._moments


class Accumulator:
    """Adds images of height x width pixels one by one."""

    def __init__(self, height: int, width: int) -> None:
        self._size, pixels = (height, width), height * width
        self._images = 0
        blocks = -(-pixels // _BLOCK)
        self._planes = np.zeros((3, blocks, _BLOCK), np.float32)  # zeros beyond the last pixel add nothing
        self._flat = self._planes.reshape(3, -1)[:, :pixels]
        self._recent = np.zeros((3, pixels), np.float32)
        self._sums = np.zeros((3, pixels), np.int64)
        # Per pair of channels and block. float64 holds integers up to 2**53: 5 * 10**8 images.
        self._products = np.zeros((len(_PAIRS), blocks, 1, 1))
        self._recent_products = np.empty((len(_PAIRS), blocks, 1, 1), np.float32)

    def add(self, image: NDArray[np.uint8]) -> None:
        """Adds one image, uint8 (3, height, width)."""
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
        pixels = self._images * self._sums.shape[1]
        return Moments(self._images, pixels, self._sums.reshape(3, *self._size).copy(), products)

    def _flush(self) -> None:
        self._sums += self._recent.astype(np.int64)
        self._recent[:] = 0
