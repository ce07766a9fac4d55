"""Draws and the verification of drafts, checked and timed: `pytest bench/suites/test_sampling.py --benchmark-only`."""

import pytest

from tigon.bench.suite import cases, measure


@pytest.mark.parametrize("op, variant, mode", cases("speculative decoding"))
def test_sampling(benchmark, op, variant, mode):
    measure(benchmark, op, variant, mode)
