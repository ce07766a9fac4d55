"""Token scores, selection and compaction, checked and timed: `pytest bench/suites/test_tokens.py --benchmark-only`."""

import pytest

from tigon.bench.suite import cases, measure


@pytest.mark.parametrize("op, variant, mode", cases("token reduction"))
def test_tokens(benchmark, op, variant, mode):
    measure(benchmark, op, variant, mode)
