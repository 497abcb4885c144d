"""A `Loader` as the source of a torchdata graph, whose state, taken in the middle of an epoch, brings back the rest of the stream.

    pip install "torchdata>=0.11"
    python docs/examples/torchdata_nodes.py alexprep-data

Loop to the end of an epoch: nodes that prefetch have taken more from the loader than they gave you, so a pass begun anew after a
`break` leaves those samples out. `load_state_dict` knows what was really delivered.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from torchdata.nodes import IterableWrapper, ParallelMapper, Prefetcher
from torchdata.nodes import Loader as Nodes

from alexprep.pipeline import Augmentation, Batch, Loader


def scaled(batch: Batch) -> Batch:
    """Any function of a batch."""
    return batch._replace(images=batch.images / 64)


def graph(loader: Loader) -> Nodes[Batch]:
    """The loader's batches, scaled by two threads, three ahead."""
    source = IterableWrapper(loader)  # finds state_dict and load_state_dict by itself
    return Nodes(Prefetcher(ParallelMapper(source, scaled, num_workers=2, method="thread"), prefetch_factor=3))


def main() -> None:
    """Stops after two batches of the second epoch and goes on in a new graph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()

    def fresh() -> Loader:
        return Loader(options.data, batch_size=options.batch_size, augmentation=Augmentation(crop=options.crop))

    with fresh() as first, fresh() as second:
        nodes = graph(first)
        assert len(list(nodes)) == len(first)  # the first epoch
        epoch = iter(nodes)
        list(islice(epoch, 2))
        state = nodes.state_dict()  # plain numbers: torch.save or json
        rest = list(epoch)

        resumed = graph(second)
        resumed.load_state_dict(state)
        again = list(resumed)
        assert len(again) == len(rest) and all(
            torch.equal(a.images, b.images) for a, b in zip(again, rest, strict=True)
        )
    print(f"{len(rest)} batches left, the same after the resume: {[batch.indices.tolist()[:3] for batch in again]}")


if __name__ == "__main__":
    main()
