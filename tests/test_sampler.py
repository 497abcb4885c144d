"""The order of an epoch and a rank's part of it: pure, uniform, the same on every machine."""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
import random
import threading
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from alexprep.pipeline import sampler
from alexprep.pipeline.sampler import Epoch, Order, StepPlan, block_order, epoch_order, shuffle_quality, stream_order
from alexprep.shards.plan import permutation


def test_orders_stay_as_they_are() -> None:
    """A change of these numbers changes every data set and every run that was begun before it."""
    assert permutation((0, 0), 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    digest = hashlib.sha256(epoch_order(7, 3, 1000).astype("<i8").tobytes()).hexdigest()
    assert digest == "d9cb4a068f23b4226391233a641d7302e027e85df4b9b99e6c85f8bdb16d3fca"
    shards = np.repeat(np.arange(40), np.arange(40) % 7 + 20)
    digest = hashlib.sha256(block_order(7, 3, shards, 6).astype("<i8").tobytes()).hexdigest()
    assert digest == "430e91777d3002a6b62b0f28964ce595cf6c3194faa5053cfb9ffa6991272f58"
    digest = hashlib.sha256(stream_order(7, 3, shards, 32).row_N.astype("<i8").tobytes()).hexdigest()
    assert digest == "0946dc6943d8ff5782f241255f12322264ddf922e1c8071b0b08ef806deeacaa"


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
@pytest.mark.parametrize("order", ["shuffle", "blocks", "streams"])
def test_the_next_epochs_order_is_made_ahead(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread, in an epoch's second half; what comes is the same, also where a state was loaded or a child of `fork` goes on."""
    monkeypatch.setattr(sampler, "_WORTH_A_THREAD", 1)
    makers: list[str] = []
    made = StepPlan._made

    def watched(plan: StepPlan, epoch: int) -> Epoch:
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


def slow_streams(
    seed: int, lengths: list[int], batch_size: int, streams: int, block_shards: int
) -> list[list[tuple[int, int]]]:
    """The steps of epoch 2 as (stream, row), by the definition: in fractions, a row at a time."""
    shards = permutation((seed, 2, 0x626C_6F63), len(lengths)).tolist()
    ends = list(itertools.accumulate(lengths))
    rows = [(shard, row) for shard in shards for row in range(ends[shard] - lengths[shard], ends[shard])]
    bounds = [0, *itertools.accumulate(lengths[shard] for shard in shards)]
    cuts = []
    for even in (len(rows) * stream // streams for stream in range(streams + 1)):
        nearest = min(bounds, key=lambda bound: (abs(bound - even), -bound))
        cuts.append(nearest if abs(nearest - even) <= Fraction(len(rows), 4 * streams) else even)
    block, keyed = 1, []
    for stream in range(streams):
        pieces = [list(piece) for _, piece in itertools.groupby(rows[cuts[stream] : cuts[stream + 1]], lambda r: r[0])]
        pieces = pieces[:: -1 if stream % 2 else 1]
        mixed: list[int] = []
        while pieces:
            taken = [row for piece in pieces[: max(1, block_shards // streams)] for _, row in piece]
            del pieces[: max(1, block_shards // streams)]
            mixed += [taken[n] for n in permutation((seed, 2, 0x626C_6F63, block), len(taken))]
            block += 1
        for n, row in enumerate(mixed):
            middle = Fraction(2 * n + 1, 2) if batch_size % 2 else n - n % 2 + 1
            keyed.append((Fraction(middle) / len(mixed), stream, n, row))
    merged = [(stream, row) for _, stream, _, row in sorted(keyed)]
    steps = [merged[at : at + batch_size] for at in range(0, len(merged), batch_size)]
    return [sorted(step, key=lambda one: one[0]) for step in steps]


@pytest.mark.parametrize("seed", range(24))
def test_streams_are_as_defined_and_ranks_read_their_own(seed: int) -> None:
    """Shards of any sizes, fewer of them than streams too: each sample once, steps of one size, the same for any ranks."""
    chance = random.Random(seed)
    sizes = chance.choice([[5], [*range(1, 13)], [1, 2, 60]])
    lengths = chance.choices(sizes, k=chance.randint(1, 40))
    batch_size, streams, block_shards = chance.randint(1, 40), chance.choice([1, 2, 4, 8]), chance.choice([1, 4, 16])
    shards = np.repeat(np.arange(len(lengths)), lengths)
    expected = slow_streams(seed, lengths, batch_size, streams, block_shards)
    rows, of_stream = stream_order(seed, 2, shards, batch_size, streams, block_shards)
    flat = list(itertools.chain(*expected))
    assert [*zip(of_stream.tolist(), rows.tolist(), strict=True)] == flat
    assert sorted(rows.tolist()) == list(range(len(shards)))
    if streams == 1:
        np.testing.assert_array_equal(rows, block_order(seed, 2, shards, block_shards))
    for world_size, together in itertools.product({1, 2, 3, streams, 2 * streams + 1}, {1, 2 - batch_size % 2}):
        ranks = [
            StepPlan(*(shards, batch_size, "streams", block_shards, seed, rank, world_size), False, together, streams)
            for rank in range(world_size)
        ]
        read = [set[int]() for _ in ranks]
        for step, whole in enumerate(expected):
            parts = [rank.part(2, step) for rank in ranks]
            assert np.concatenate([part for part, _ in parts]).tolist() == [row for _, row in whole]
            first = step * batch_size
            assert np.concatenate([place for _, place in parts]).tolist() == list(range(first, first + len(whole)))
            assert all(len(part) <= rank.largest_part for (part, _), rank in zip(parts, ranks, strict=True))
            assert all(places[0] % together == 0 for _, places in parts if len(places))
            if streams % world_size == 0 and together == 1:
                each = streams // world_size
                owners = [stream // each for stream, _ in whole]
                assert owners == [n for n, (part, _) in enumerate(parts) for _ in part]
            for own, (part, _) in zip(read, parts, strict=True):
                own |= set(shards[part].tolist())
        if streams % world_size == 0:
            alone = len(set(lengths)) == 1 and len(lengths) >= 2 * streams and together == 1
            assert len(lengths) <= sum(map(len, read)) <= len(lengths) + (0 if alone else 2 * (world_size - 1)), seed


def test_even_streams_give_even_parts() -> None:
    """Where all shards are of one size and streams have as many."""
    shards = np.arange(48 * 32) // 32
    for world_size in (1, 2, 4, 8):
        ranks = [StepPlan(shards, 64, "streams", 16, 3, rank, world_size) for rank in range(world_size)]
        for step in range(len(ranks[0])):
            assert {len(rank.part(1, step)[0]) for rank in ranks} == {64 // world_size}


@pytest.mark.parametrize("order", ["shuffle", "blocks", "streams", "sequential"])
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
                assert order == "streams" or max(sizes) - min(sizes) <= 1
                assert max(sizes) <= ranks[0].largest_part
                rows += whole.tolist()
            assert sorted(rows) == list(range(samples))
        assert {len(rank) for rank in ranks} == {len(alone)} == {-(-samples // batch_size)}
