"""Finds the rows of an array that are nearest to queries: by Euclidean distance, or by the Hamming distance of binary codes.

Both searches look at every row, so what they find is exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError

_SPARE = 16  # more rows than wanted, whose order the exact distances decide


def nearest(
    outputs_ND: NDArray[np.float32], queries_QD: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The Euclidean distances to the nearest rows and their numbers, both (Q, count), nearest first.

    Raises AlexprepError where scikit-learn is not installed.
    """
    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError as error:
        raise AlexprepError(f'similar images need scikit-learn ({error}): pip install "alexprep[report]"') from None
    search = NearestNeighbors(n_neighbors=min(count + _SPARE, len(outputs_ND)), algorithm="brute", metric="euclidean")
    rows_QM: NDArray[np.int64] = search.fit(outputs_ND).kneighbors(queries_QD, return_distance=False)
    # It multiplies matrices in float32, which leaves small distances inexact: those of the nearest are measured once more.
    found = outputs_ND[rows_QM].astype(np.float64) - queries_QD[:, None].astype(np.float64)
    distances_QM = np.sqrt((found * found).sum(axis=2))
    order = np.lexsort((rows_QM, distances_QM))[:, :count]
    return np.take_along_axis(distances_QM, order, axis=1), np.take_along_axis(rows_QM, order, axis=1)


def nearest_codes(
    codes_NB: NDArray[np.uint8], queries_QB: NDArray[np.uint8], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The Hamming distances, in bits, to the nearest codes and their rows, both (Q, count); among equals the lower row first.

    A code is an even number of bytes. scikit-learn's "hamming" would need a number for each bit, and forty times as long.
    """
    codes, queries = (np.ascontiguousarray(each).view(np.uint16) for each in (codes_NB, queries_QB))
    ones = _ones()
    distances = np.zeros((len(queries), count))
    rows = np.zeros((len(queries), count), np.int64)
    for number, query in enumerate(queries):
        bits = ones[codes ^ query].sum(axis=1, dtype=np.uint16)
        rows[number] = np.argsort(bits, kind="stable")[:count]
        distances[number] = bits[rows[number]]
    return distances, rows


def _ones() -> NDArray[np.uint8]:
    """How many bits are set in each number of 16 bits. (numpy.bitwise_count would say so from numpy 2 on.)"""
    ones: NDArray[np.uint8] = np.unpackbits(
        np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1
    ).sum(axis=1, dtype=np.uint8)
    return ones
