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

    A code is a whole number of 64 bits. scikit-learn's "hamming" would need a byte for each bit, and a hundred times as long.
    """
    codes, queries = (np.ascontiguousarray(each).view(np.uint64) for each in (codes_NB, queries_QB))
    count = min(count, len(codes))
    distances = np.zeros((len(queries), count))
    rows = np.zeros((len(queries), count), np.int64)
    for number, query in enumerate(queries):
        bits = np.zeros(len(codes), np.uint16)
        for column, word in zip(codes.T, query, strict=True):
            bits += np.bitwise_count(column ^ word)
        near = np.flatnonzero(bits <= np.partition(bits, count - 1)[count - 1])
        rows[number] = near[np.argsort(bits[near], kind="stable")[:count]]
        distances[number] = bits[rows[number]]
    return distances, rows
