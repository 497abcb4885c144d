"""The order of an epoch and a rank's part of it: pure, uniform, the same on every machine."""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
import threading
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from alexprep.pipeline import sampler
from alexprep.pipeline.sampler import Order, StepPlan, block_order, epoch_order, shuffle_quality
from alexprep.shards.plan import permutation


def test_orders_stay_as_they_are() -> None:
    """A change of these numbers changes every data set and every run that was begun before it."""
    assert permutation((0, 0), 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    digest = hashlib.sha256(epoch_order(7, 3, 1000).astype("<i8").tobytes()).hexdigest()
    assert digest == "d9cb4a068f23b4226391233a641d7302e027e85df4b9b99e6c85f8bdb16d3fca"


def test_each_epoch_and_seed_has_its_own_permutation() -> None:
    orders = [epoch_order(seed, epoch, 100) for seed in range(4) for epoch in range(4)]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 16


@pytest.mark.parametrize("block_shards", [1, 2, 3, 50])
def test_blocks_read_few_shards_at_a_time(block_shards: int) -> None:
    """Each row once; a block's rows are all rows of its shards; another deal each epoch."""
    lengths = [7, 7, 7, 1, 7, 7, 5]
    shards = np.repeat([0, 1, 2, 3, 5, 6, 8], lengths)  # numbers may have gaps
    orders = [block_order(3, epoch, shards, block_shards) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(shards)))
        seen, at = [], 0
        while at < len(order):
            block = list(dict.fromkeys(shards[order[at:]].tolist()))[:block_shards]
            size = int(np.isin(shards, block).sum())
            assert set(shards[order[at : at + size]].tolist()) <= set(block)
            seen += block
            at += size
        assert sorted(seen) == [0, 1, 2, 3, 5, 6, 8]
    assert len({order.tobytes() for order in orders}) == 3
    np.testing.assert_array_equal(orders[1], block_order(3, 1, shards, block_shards))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("order", ["shuffle", "blocks"])
def test_the_next_epochs_order_is_made_ahead(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread, in an epoch's second half; what comes is the same, also where a state was loaded or a child of `fork` goes on."""
    monkeypatch.setattr(sampler, "_WORTH_A_THREAD", 1)
    makers: list[str] = []
    made = StepPlan._made

    def watched(plan: StepPlan, epoch: int) -> NDArray[np.int64]:
        makers.append(threading.current_thread().name)
        return made(plan, epoch)

    def plan() -> StepPlan:
        return StepPlan(np.arange(100) // 7, 13, order, 2, seed=3, rank=0, world_size=1)

    steps = [(epoch, step) for epoch in (0, 1, 2, 5) for step in range(8)]
    expected = [plan().part(*step)[0].tolist() for step in steps]
    monkeypatch.setattr(StepPlan, "_made", watched)
    used = plan()
    assert [used.part(*step)[0].tolist() for step in steps] == expected
    mains = [name == "MainThread" for name in makers]
    assert mains == [True, False, False, False, True, False]  # epoch 3 was made and not used
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=lambda: theirs.send(used.part(6, 0)[0].tolist()))
    child.start()
    try:
        assert ours.poll(60), "the child does not answer"
        assert ours.recv() == plan().part(6, 0)[0].tolist()
    finally:
        child.kill()


def test_shuffle_quality_tells_orders_apart() -> None:
    """Against the definition, computed pair by pair; and the values that its description promises."""
    order = epoch_order(0, 0, 3000)
    place = {row: n for n, row in enumerate(order.tolist())}
    entropies = []
    for sequence, lag in itertools.product((order.tolist(), [place[row] for row in range(3000)]), range(1, 17)):
        counts = Counter((b - a) % 3000 * 93 // 3000 for a, b in zip(sequence, sequence[lag:], strict=False))
        shares = [count / (3000 - lag) for count in counts.values()]
        entropies.append(-sum(share * math.log2(share) for share in shares) / math.log2(93))
    assert shuffle_quality(order) == pytest.approx(min(entropies))
    shards = np.arange(100_000) // 1000
    blocks = [shuffle_quality(block_order(0, 0, shards, count)) for count in (1, 4, 16)]
    assert 0 == shuffle_quality(np.arange(100_000)) < blocks[0] < blocks[1] < blocks[2] < 0.9
    dealt = np.stack([np.arange(0, 100_000, 2), np.random.default_rng(1).permutation(50_000) * 2 + 1], axis=1)
    assert shuffle_quality(dealt.ravel()) < 0.7  # every other row as stored
    buffer = np.arange(100_000).reshape(-1, 1000)
    rng = np.random.default_rng(0)
    assert shuffle_quality(np.concatenate([rng.permutation(part) for part in buffer])) < 0.4


@pytest.mark.parametrize("order", ["shuffle", "blocks", "sequential"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_sample_once_an_epoch_on_any_ranks(world_size: int, order: Order) -> None:
    """All ranks count the same steps, their parts make the step of one rank, and the positions say where each row stands."""
    for samples, batch_size in itertools.product((1, 7, 64, 101), (1, 3, 8, 64, 300)):
        shards = np.arange(samples) // 10
        alone = StepPlan(shards, batch_size, order, 3, 5, 0, 1)
        ranks = [StepPlan(shards, batch_size, order, 3, 5, rank, world_size) for rank in range(world_size)]
        for epoch in range(2):
            rows: list[int] = []
            for step in range(len(alone)):
                parts = [rank.part(epoch, step) for rank in ranks]
                whole, places = alone.part(epoch, step)
                np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), whole)
                np.testing.assert_array_equal(np.concatenate([place for _, place in parts]), places)
                sizes = [len(part) for part, _ in parts]
                assert max(sizes) - min(sizes) <= 1 and max(sizes) <= ranks[0].largest_part
                rows += whole.tolist()
            assert sorted(rows) == list(range(samples))
        assert {len(rank) for rank in ranks} == {len(alone)} == {-(-samples // batch_size)}
