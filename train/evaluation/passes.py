"""Nets going through splits together: each by itself, and all as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alexprep.shards.errors import AlexprepError
from alexprep.train.ensemble import Contest, mixture
from alexprep.train.evaluation.nets import Net
from alexprep.train.evaluation.scores import Scores
from alexprep.train.evaluation.sums import Pace
from alexprep.train.precision import Precision, float32_kernels
from alexprep.train.predictions import EvaluationViews, Kept, Predicted, open_readers, predictions

Progress = Callable[[int, int], None]
OpenSplit = Callable[..., Any]  # as `alexprep.pipeline.loader.Loader`


@dataclass(frozen=True)
class Passes:
    """How nets are shown a data set's images; of their outputs only the batch at hand is in memory.

    Attributes:
        nets: at least one.
        statistics: a net: the data set whose mean it is shown images without; None for the evaluated one's.
        data: the evaluated one.
        views: of each image.
        batch_size: crops at a time.
        threads: of each loader, for decoding; None for what the loader takes.
        device: of the nets.
        precision: that they compute in.
        open_loader: opens a split.
        progress: called with images done and images in all of a pass.
        pace: of all passes.
    """

    nets: Sequence[Net]
    statistics: Sequence[Path | None]
    data: Path
    views: EvaluationViews
    batch_size: int
    threads: int | None
    device: torch.device
    precision: Precision
    open_loader: OpenSplit
    progress: Progress | None
    pace: Pace = field(default_factory=Pace)

    def scores(
        self, split: str, fixed: list[float] | None, weights_from: str
    ) -> tuple[Scores, list[Scores], list[float]]:
        """Goes through a split.

        Args:
            split: of the images that count.
            fixed: a net's weight; None to search for the best ones.
            weights_from: the split to search on; where it is `split`, one pass does for both.

        Returns:
            Scores of all nets as one, with the best guesses; scores of each; the weights.

        Raises:
            AlexprepError: there is no image.
        """
        contest, whole = Contest(), Scores(guesses=True)
        single = [Scores() for _ in self.nets]
        with contextlib.closing(Kept()) as kept:

            def measure(predicted: Predicted) -> None:
                for number, scores in enumerate(single):
                    scores.add(predicted.logs[:, number], predicted)
                if fixed is None:
                    kept.add(predicted)
                    contest.add(predicted)
                else:
                    whole.add(mixture(predicted.logs, fixed), predicted)

            if fixed is None and weights_from != split:
                self._through(weights_from, contest.add)
                fixed = contest.search()
            self._through(split, measure)
            if not single[0].images:
                raise AlexprepError("there is no image to evaluate on: name another --split")
            if fixed is None:
                fixed = contest.search()
                for predicted in kept:
                    whole.add(mixture(predicted.logs, fixed), predicted)
        return whole, single, fixed

    def _through(self, split: str, take: Callable[[Predicted], None]) -> None:
        with (
            torch.inference_mode(),
            float32_kernels(self.precision),
            open_readers(
                self.nets,
                self.data,
                split,
                self.views,
                self.batch_size,
                self.threads,
                self.device,
                self.statistics,
                self.open_loader,
            ) as readers,
        ):
            for predicted in predictions(self.nets, readers, self.precision, self.pace, self.progress):
                take(predicted)
