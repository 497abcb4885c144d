"""What feeding costs the thread that trains: all that a Loader does for a batch, but nothing is decoded.

python benchmarks/feed.py DATA [--batches 200] [--batch-size 256] [--save]      DATA: shards and statistics of 256-pixel images

The order of samples, reading, drawing, and handing over to DALI are what they are in a training; DALI's pipeline gives its inputs back as
they are. Time is that of the feeding thread alone, so that what else the machine does hardly counts; medians of rounds in turn.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from common import command_line, report
from nvidia.dali import Pipeline

from alexprep.pipeline import Loader
from alexprep.pipeline.dali_graph import Graph
from alexprep.pipeline.loader import PipelineRunner, Step

FORMS: dict[str, dict[str, Any]] = {
    "the paper's augmentation, NCHW": {"augmentation": "paper"},
    "the paper's augmentation, channels last": {"augmentation": "paper", "memory_format": "channels_last"},
    "random resized crops, NCHW": {"augmentation": "resized"},
}


class _Undecoded(Graph):
    """Takes the inputs of a view, and gives them back."""

    def pipeline(self) -> Pipeline:
        pipeline = self._empty_pipeline(self.batch_size, self.threads)
        with pipeline:
            pipeline.set_outputs(*(self._input(name) for name in ("encoded", *sorted(self.input_names))))
        return pipeline


class _Feeder(PipelineRunner):
    def _outputs(self, step: Step) -> torch.Tensor:
        self._pipeline.outputs()
        step.read_in_place = None
        return torch.empty(len(step.rows))


class _FeedingLoader(Loader):
    """A loader whose batches have no images."""

    def _running(self) -> PipelineRunner:
        if self._runner is None:
            graph = _Undecoded(**{field.name: getattr(self._graph, field.name) for field in fields(Graph)})
            self._runner = _Feeder(self._dataset, graph, self._on_bad)
        return self._runner


def main() -> None:
    """Measures every form in turn."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batches", type=int, default=200, help="of a round")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaders = {
        name: _FeedingLoader(arguments.data, batch_size=arguments.batch_size, threads=1, **form)
        for name, form in FORMS.items()
    }
    endless = {
        name: itertools.chain.from_iterable(iter(loader) for _ in itertools.count()) for name, loader in loaders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(arguments.rounds + 1):  # the first, which opens the shards, is not counted
        for name, batches in endless.items():
            start, images = time.thread_time(), 0
            for batch in itertools.islice(batches, arguments.batches if number else 8):
                images += len(batch.indices)
            seconds[name] += [(time.thread_time() - start) / images] if number else []
    figures: dict[str, Any] = {"batches": arguments.batches, "batch size": arguments.batch_size}
    for name, loader in loaders.items():
        loader.close()
        middle = statistics.median(seconds[name])
        figures[f"{name}: microseconds an image"] = 1e6 * middle
        figures[f"{name}: images/s fed by one thread"] = 1 / middle
    report("feed", figures, arguments.save)


if __name__ == "__main__":
    main()
