"""How well each order mixes, beside DALI's own reader: `alexprep.pipeline.shuffle_quality` of one epoch, 0 to 1.

python benchmarks/shuffle.py [--shards 128] [--save]      on shards of 1,000 samples that hold nothing but their number
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import webdataset
from common import command_line, report
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn

from alexprep.pipeline.sampler import STREAMS, block_order, epoch_order, shuffle_quality, stream_order

SHARD_SAMPLES, BATCH = 1000, 1000


def main() -> None:
    """Measures every order on the same shards."""
    parser = command_line(__doc__)
    parser.add_argument("--shards", type=int, default=128)
    arguments = parser.parse_args()
    samples = arguments.shards * SHARD_SAMPLES
    shards = np.arange(samples) // SHARD_SAMPLES
    figures: dict[str, Any] = {"samples": samples, "shards": arguments.shards}
    figures["alexprep, order shuffle"] = shuffle_quality(epoch_order(0, 0, samples))
    for block_shards in (4, 16, 64):
        order = block_order(0, 0, shards, block_shards)
        figures[f"alexprep, order blocks, {block_shards} shards"] = shuffle_quality(order)
    for block_shards in (16, 32, 64):
        order = stream_order(0, 0, shards, 256, STREAMS, block_shards).row_N
        figures[f"alexprep, order streams, {STREAMS} of them, {block_shards} shards"] = shuffle_quality(order)
    figures["alexprep, order sequential"] = shuffle_quality(np.arange(samples))
    with tempfile.TemporaryDirectory() as folder:
        tars = _write(Path(folder), arguments.shards)
        for fill in (1024, 16 * 1024):
            figures[f"DALI's reader, random_shuffle, initial_fill {fill}"] = shuffle_quality(_dali(tars, samples, fill))
        figures["webdataset, shardshuffle and shuffle(1000)"] = shuffle_quality(_webdataset(tars))
    report("shuffle", figures, arguments.save)


def _write(folder: Path, shards: int) -> list[str]:
    paths = [folder / f"{n:06d}.tar" for n in range(shards)]
    for n, path in enumerate(paths):
        with webdataset.TarWriter(str(path), mtime=0) as tar:
            for row in range(n * SHARD_SAMPLES, (n + 1) * SHARD_SAMPLES):
                tar.write({"__key__": f"{row:08d}", "cls": f"{row:08d}".encode()})
    return [str(path) for path in paths]


def _dali(tars: list[str], samples: int, fill: int) -> NDArray[np.int64]:
    pipeline = Pipeline(BATCH, 1, None)
    with pipeline:
        options: Any = {"ext": ["cls"], "random_shuffle": True, "initial_fill": fill}
        pipeline.set_outputs(cast("Any", fn.readers.webdataset(paths=tars, **options)))
    rows = []
    for _ in range(samples // BATCH):
        (numbers,) = cast("Any", pipeline.run())
        rows += [int(np.array(numbers[n]).tobytes()) for n in range(BATCH)]
    return np.array(rows)


def _webdataset(tars: list[str]) -> NDArray[np.int64]:
    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000)
    return np.array([int(sample["cls"]) for sample in dataset])


if __name__ == "__main__":
    main()
