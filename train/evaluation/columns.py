"""An array that grows by columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Columns:
    """What a pass over images leaves of each, in one piece of memory.

    A list with an array a batch would do as well, were it not for the allocator: those small arrays settle between the large ones of the
    networks and keep their memory from being used again, a gigabyte in 50,000 images.

    >>> columns = Columns(np.int64)
    >>> columns.add(np.arange(3)), columns.add(np.arange(2))
    (None, None)
    >>> columns.array.tolist(), len(columns)
    ([0, 1, 2, 0, 1], 5)
    """

    def __init__(self, dtype: DTypeLike) -> None:
        """No column yet; the first ones added decide how many rows there are."""
        self._dtype = dtype
        self._space: NDArray[Any] = np.empty(0, dtype)
        self._count = 0

    def __len__(self) -> int:
        """How many columns."""
        return self._count

    @property
    def array(self) -> NDArray[Any]:
        """(…, columns); it is valid until columns are added."""
        return self._space[..., : self._count]

    def add(self, columns: NDArray[Any]) -> None:
        """Appends (…, n): all dimensions but the last are the same each time."""
        end = self._count + columns.shape[-1]
        if end > self._space.shape[-1] or not self._count:
            space = np.empty((*columns.shape[:-1], max(4096, end + end // 2)), self._dtype)
            space[..., : self._count] = self.array
            self._space = space
        self._space[..., self._count : end] = columns
        self._count = end
