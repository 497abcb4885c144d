"""Sums of pixels and of products of pixels, exact in integers, so that any split of the work gives the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# 256 products of two pixels are at most 256 * 255**2 < 2**24, so their sum is exact in float32 in any order;
# 65,536 images are at most 65536 * 255 < 2**24, likewise.
_BLOCK = 256
_FLUSH = 65_536
_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))  # of channels


@dataclass(frozen=True)
class Moments:
    """Exact sums over a set of images of one size.

    Attributes:
        images: how many.
        sums: int64 (3, S, S), the sum over the images at each pixel, planes R, G, B.
        products: int64 (3, 3), the sum over all pixels of all images of x xᵀ. Fits for up to 2**47 pixels.
    """

    images: int
    sums: NDArray[np.int64]
    products: NDArray[np.int64]

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        return Moments(self.images + other.images, self.sums + other.sums, self.products + other.products)


class Accumulator:
    """Adds images one by one.

    >>> images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    >>> accumulator = Accumulator(5)
    >>> for image in images:
    ...     accumulator.add(image)
    >>> pixels = images.transpose(1, 0, 2, 3).reshape(3, -1).astype(np.int64)
    >>> moments = accumulator.moments()
    >>> bool((moments.products == pixels @ pixels.T).all()), bool((moments.sums == images.sum(0)).all())
    (True, True)
    """

    def __init__(self, size: int) -> None:
        """For images of size x size."""
        self._size = size
        self._images = 0
        self._pending = 0
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
        self._pending += 1
        if self._pending == _FLUSH:
            self._flush()

    def moments(self) -> Moments:
        """All that was added so far."""
        self._flush()
        products = np.zeros((3, 3), np.int64)
        for (i, j), blocks in zip(_PAIRS, self._products.astype(np.int64), strict=True):
            products[i, j] = products[j, i] = blocks.sum()
        return Moments(self._images, self._sums.reshape(3, self._size, self._size).copy(), products)

    def _flush(self) -> None:
        self._sums += self._recent.astype(np.int64)
        self._recent[:] = 0
        self._pending = 0
