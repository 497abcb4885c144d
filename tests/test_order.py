"""Orders, draws and permutations: pure, uniform, the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from alexprep.pipeline.draws import centred, draw, philox
from alexprep.pipeline.order import epoch_order, rank_part, steps_per_epoch
from alexprep.shards.permute import permutation


def test_philox_known_answers() -> None:
    """Random123's kat_vectors for philox4x32-10."""
    for counter, key, answer in (
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        np.testing.assert_array_equal(philox(np.array(counter, np.uint64)[:, None], key)[:, 0], answer)


def test_orders_stay_as_they_are() -> None:
    """A change of these numbers changes every data set and every run that was begun before it."""
    assert permutation((0, 0), 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    digest = hashlib.sha256(epoch_order(7, 3, 1000).astype("<i8").tobytes()).hexdigest()
    assert digest == "d9cb4a068f23b4226391233a641d7302e027e85df4b9b99e6c85f8bdb16d3fca"
    assert draw(7, 3, np.array([0, 41]), 32).offsets_N2.tolist() == OFFSETS


OFFSETS = [[19, 4], [4, 20]]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 4097])
def test_permutations(count: int) -> None:
    assert sorted(permutation((1, 2), count).tolist()) == list(range(count))


def test_permutations_are_uniform() -> None:
    """Each of the 24 orders of four things is equally likely: chi-squared with 23 degrees, 99.99 % bound."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(permutation((seed,), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 55.0


def test_epochs_and_seeds_differ() -> None:
    orders = {epoch_order(seed, epoch, 100).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert epoch_order(0, 5, 10, shuffle=False).tolist() == list(range(10))


@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_share_each_step(world_size: int) -> None:
    """The parts in the ranks' order are the step, and their sizes differ by one at most."""
    for samples in (1, 5, 64, 101):
        for batch_size in (1, 3, 8, 64, 300):
            seen: list[int] = []
            for step in range(steps_per_epoch(samples, batch_size)):
                first, last = step * batch_size, min((step + 1) * batch_size, samples)
                parts = [rank_part(first, last, rank, world_size) for rank in range(world_size)]
                sizes = [high - low for low, high in parts]
                assert max(sizes) - min(sizes) <= 1
                seen += [row for low, high in parts for row in range(low, high)]
            assert seen == list(range(samples))


def test_draws_do_not_depend_on_company() -> None:
    rows = np.arange(200)
    whole = draw(9, 4, rows, 32)
    for part in (rows[17:18], rows[::-1], rows[[5, 5, 180]]):
        alone = draw(9, 4, part, 32)
        np.testing.assert_array_equal(alone.offsets_N2, whole.offsets_N2[part])
        np.testing.assert_array_equal(alone.mirror_N, whole.mirror_N[part])
        np.testing.assert_array_equal(alone.alpha_N3, whole.alpha_N3[part])


def test_draws_differ_between_seeds_and_epochs() -> None:
    rows = np.arange(50)
    drawn = {draw(seed, epoch, rows, 32).offsets_N2.tobytes() for seed in (0, 1, 2**40) for epoch in (0, 1, 90)}
    assert len(drawn) == 9


def test_corners_and_mirrors_are_uniform() -> None:
    """33 x 33 corners (2012 code) and two mirrors: chi-squared bounds at 99.99 %."""
    count = 33 * 33 * 100
    draws = draw(1, 0, np.arange(count), 32)
    corners = np.bincount(draws.offsets_N2[:, 0] * 33 + draws.offsets_N2[:, 1], minlength=33 * 33)
    assert ((corners - 100) ** 2 / 100).sum() < 1088 + 3.72 * np.sqrt(2 * 1088)
    assert abs(draws.mirror_N.sum() - count / 2) < 3.9 * np.sqrt(count) / 2
    together = np.corrcoef(np.column_stack([draws.offsets_N2, draws.mirror_N, draws.alpha_N3]).T)
    assert np.abs(together - np.eye(6)).max() < 3.9 / np.sqrt(count) * 1.3


def test_alpha_is_standard_normal() -> None:
    count = 100_000
    alpha = draw(2, 0, np.arange(count), 0).alpha_N3
    assert np.abs(alpha.mean(axis=0)).max() < 4 / np.sqrt(count)
    assert np.abs(np.cov(alpha.T) - np.eye(3)).max() < 4 * np.sqrt(2 / count)
    assert np.abs((alpha**3).mean(axis=0)).max() < 4 * np.sqrt(15 / count)
    assert np.abs((alpha**4).mean(axis=0) - 3).max() < 4 * np.sqrt(96 / count)


def test_no_slack_and_no_chance() -> None:
    assert (draw(0, 0, np.arange(9), 0).offsets_N2 == 0).all()
    still = centred(3, 32)
    assert (still.offsets_N2 == 16).all() and not still.mirror_N.any() and (still.alpha_N3 == 0).all()
