"""The segment table against a plain loop over sequences."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tigon.segments import segment_count, segment_table


def expected(bounds, size, positions):
    """(start, end, sequence, first) of every segment, by the definition."""
    rows = []
    for sequence, (start, end) in enumerate(pairwise(bounds)):
        cuts = {start, end, *(p for p in positions if start < p < end), *range(start, end, size)}
        cuts = sorted(cuts)
        for a, b in pairwise(cuts):
            rows.append((a, b, sequence, int(a == start)))
    return rows


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(lengths, st.integers(1, 17), st.lists(st.floats(0, 1), max_size=4))
def test_segments_follow_the_definition(lengths, size, fractions):
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    total = bounds[-1]
    positions = [round(f * total) for f in fractions]
    table = segment_table(
        torch.tensor(bounds, dtype=torch.int32),
        total,
        size,
        torch.tensor(positions) if positions else None,
    )
    rows = expected(bounds, size, positions)
    assert table.start.numel() == segment_count(total, size, len(lengths), len(positions))
    assert len(rows) <= table.start.numel()
    got = list(
        zip(
            *(t.tolist() for t in (table.start, table.end, table.sequence, table.first)),
            strict=True,
        )
    )
    assert got[: len(rows)] == rows
    assert all(row == (total, total, len(lengths), 0) for row in got[len(rows) :])
    for position, row in zip(positions, table.at_position.tolist(), strict=True):
        assert row == -1 if position == 0 else rows[row][1] == position


@pytest.mark.usefixtures("no_host_sync")
def test_the_table_waits_for_nothing():
    segment_table(torch.tensor([0, 5, 9], dtype=torch.int32), 9, 4, torch.tensor([3]))
