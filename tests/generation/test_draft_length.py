"""The choice of K: from made-up times and acceptance, the K with the most tokens a second."""

import pytest

from tigon.generation.draft_length import PERIOD, TRIES, DraftLength


def simulate(share, seconds, steps=400, most=4, rows=2):
    """The last K of a run where a draft at depth i is kept with probability share[i], all before it kept."""
    chooser, chosen, debt = DraftLength(most), [], [0.0] * most
    for _ in range(steps):
        k = chooser.choose(rows)
        accepted = []
        for _ in range(rows):
            n = 0
            while n < k:  # a sequence with the right shares, without chance
                debt[n] += share[n]
                if debt[n] < 1:
                    break
                debt[n] -= 1
                n += 1
            accepted.append(n)
        chooser.observe(k, accepted, seconds[k])
        chosen.append(k)
    return chooser, chosen


@pytest.mark.parametrize(
    "share, seconds, best",
    [
        ([0.9, 0.9, 0.9, 0.9], [1.0, 1.1, 1.2, 1.3, 1.4], 4),  # cheap and right
        ([0.9, 0.1, 0.1, 0.1], [1.0, 1.2, 1.5, 1.8, 2.1], 1),  # right once
        ([0.3, 0.3, 0.3, 0.3], [1.0, 1.6, 2.2, 2.8, 3.4], 0),  # never pays
        ([0.8, 0.7, 0.1, 0.1], [1.0, 1.2, 1.4, 1.8, 2.2], 2),
    ],
)
def test_the_best_length_is_found(share, seconds, best):
    chooser, chosen = simulate(share, seconds)
    assert chooser.best(2) == best
    assert chosen[-PERIOD:].count(best) >= PERIOD - 2


def test_every_length_is_tried_first_and_neighbours_later():
    _, chosen = simulate([0.9] * 4, [1.0] * 5)
    first = chosen[: 5 * TRIES]
    assert sorted(first) == sorted(list(range(5)) * TRIES)
    assert set(chosen[5 * TRIES :]) >= {3, 4}


def test_times_of_other_batch_sizes_are_apart():
    chooser, _ = simulate([0.9] * 4, [1.0, 1.1, 1.2, 1.3, 1.4], rows=1)
    assert chooser.best(1) == 4
    for k in range(5):
        for _ in range(5):
            chooser.observe(k, [0] * 40, [1.0, 9.0, 9.0, 9.0, 9.0][k])
    assert chooser.best(40) == 0
