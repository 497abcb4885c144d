"""What the graph is fed: encoded images and, beside them, the draws as numbers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from alexprep.pipeline.augment import channel_means, channel_stdevs, colour_shifts, mean_corners
from alexprep.pipeline.augmentation import Augmentation
from alexprep.pipeline.dali_ops import mean_anchor
from alexprep.pipeline.draws import Draws, centred, draw, ten_windows
from alexprep.pipeline.settings import Settings, fed
from alexprep.shards.errors import AlexprepError
from alexprep.shards.rgb_statistics import Statistics

Views = Literal["random", "centre", "ten"]
Inputs = dict[str, "NDArray[Any] | list[NDArray[np.float32]]"]

_STRIP_BYTES = 128 * 2**20  # of windows of the mean image that are kept ready


@dataclass(frozen=True)
class Feed:
    """Turns the rows of a step into what a pipeline of `alexprep.pipeline.dali_graph` takes, apart from the images.

    Attributes:
        augmentation: what is done.
        statistics: of the data set, where they are needed.
        views: "random" draws; "centre" and "ten" are without chance.
        seed: of the draws.
        settings: of the pipeline.
    """

    augmentation: Augmentation
    statistics: Statistics | None
    views: Views
    seed: int
    settings: Settings

    def __post_init__(self) -> None:
        """Refuses values that do not go together, with AlexprepError."""
        if self.views not in get_args(Views):
            raise AlexprepError(f"views {self.views!r} is not one of {', '.join(get_args(Views))}")
        if self.settings.dtype == "uint8" and not self.augmentation.keeps_bytes:
            raise AlexprepError("dtype uint8 holds grey levels as they are: it needs mean, std and noise 'none'")

    def inputs(
        self, epoch: int, rows: NDArray[np.int64], sizes: NDArray[np.integer], positions: NDArray[np.int64]
    ) -> Inputs:
        """The named inputs of a step, one entry a sample; for the arguments see `draws.draw`."""
        if self.views == "ten":
            windows = ten_windows(self.augmentation, sizes).astype(np.int32)
            starts = {f"start{n}": np.ascontiguousarray(windows[:, n, :2]) for n in range(5)}
            return {**starts, **self._shape(windows[:, 0])}
        if self.views == "random":
            draws = draw(self.augmentation, self.seed, epoch, rows, sizes, positions)
        else:
            draws = centred(self.augmentation, sizes)
        return self._single(draws, self.views == "random" and self.augmentation.noisy(epoch))

    def _single(self, draws: Draws, noisy: bool) -> Inputs:
        augmentation, statistics = self.augmentation, self.statistics
        windows, count = draws.windows_N4.astype(np.int32), len(draws.mirror_N)
        names = fed(augmentation, self.settings)
        inputs: Inputs = {
            "start": np.ascontiguousarray(windows[:, :2]),
            "mirror": draws.mirror_N.astype(np.int32),
            **self._shape(windows),
        }
        shift = np.tile(-channel_means(statistics, augmentation), (count, 1))
        if noisy and statistics is not None:
            shift += colour_shifts(draws.alpha_N3, statistics, augmentation)
        rescale = augmentation.noise_rescale if noisy else 1.0
        if "shift" in names:
            inputs["shift"] = shift.astype(np.float32)
        if "factor" in names:
            inputs["factor"] = np.full(count, 1 / rescale, np.float32)
        if "minus" in names:
            side = augmentation.crop or self.settings.size or 0
            divisor = channel_stdevs(statistics, augmentation) * rescale
            inputs["minus"] = np.tile(-shift.astype(np.float32), (1, side))[:, None]
            inputs["divisor"] = np.tile(divisor.astype(np.float32), (count, 1, side))
        if statistics is not None and names & {"window", "anchor"}:
            size = len(statistics.mean_HWC)
            corners = mean_corners(augmentation, windows, size)
            reflected = draws.mirror_N & (augmentation.mean == "crop")
            if "window" in names:
                inputs["window"] = self._mean_windows(corners, reflected)
            else:
                inputs["anchor"] = mean_anchor(corners, reflected, size, augmentation.crop or 0)
        return inputs

    def _shape(self, windows_N4: NDArray[np.int32]) -> dict[str, NDArray[np.int32]]:
        return {} if self.augmentation.fixed_windows else {"shape": np.ascontiguousarray(windows_N4[:, 2:])}

    def _mean_windows(self, corners: NDArray[np.int64], reflected: NDArray[np.bool_]) -> list[NDArray[np.float32]]:
        side = self.augmentation.crop or 0
        strip = self._strip
        return [
            strip(left, flag)[top : top + side]
            for (top, left), flag in zip(corners.tolist(), reflected.tolist(), strict=True)
        ]

    @functools.cached_property
    def _strip(self) -> Any:
        """The columns of the mean image from `left` on, as wide as a crop: float32, contiguous, so any window of them is."""
        assert self.statistics is not None
        mean = self.statistics.mean_HWC.astype(np.float32)
        side = self.augmentation.crop or 0
        kept = max(1, _STRIP_BYTES // (len(mean) * side * 3 * 4))

        @functools.lru_cache(maxsize=kept)
        def strip(left: int, reflected: bool) -> NDArray[np.float32]:
            columns = mean[:, left : left + side]
            return np.ascontiguousarray(columns[:, ::-1] if reflected else columns)

        return strip
