"""Quantizers and their products, checked and timed: `pytest bench/suites/test_lowprec.py --benchmark-only`."""

import pytest

from tigon.bench.suite import cases, measure


@pytest.mark.parametrize("op, variant, mode", cases("low precision"))
def test_lowprec(benchmark, op, variant, mode):
    measure(benchmark, op, variant, mode)
