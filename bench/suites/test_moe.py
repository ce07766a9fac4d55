"""Routing and experts, checked and timed: `pytest bench/suites/test_moe.py --benchmark-only`."""

import pytest

from tigon.bench.suite import cases, measure


@pytest.mark.parametrize("op, variant, mode", cases("moe"))
def test_moe(benchmark, op, variant, mode):
    measure(benchmark, op, variant, mode)
