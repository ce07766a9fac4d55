"""The ops of the Mamba-2 layer, checked and timed: `pytest bench/suites/test_mamba2.py --benchmark-only`."""

import pytest

from tigon.bench.suite import cases, measure


@pytest.mark.parametrize("op, variant, mode", cases("mamba2"))
def test_mamba2(benchmark, op, variant, mode):
    measure(benchmark, op, variant, mode)
