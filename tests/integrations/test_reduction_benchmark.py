"""The benchmark of a reduced prefill runs, names both shares, and leaves the model as it was."""

import pytest

from tigon.bench import token_reduction as bench
from tigon.models.reduction_schedule import ReductionSchedule
from tigon.modules.reduced_stack import Tokens

TINY = {
    "hidden_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "head_dim": 8,
    "vocab_size": 31,
}


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_it_measures_both_prefills_and_the_share_of_the_choice(clock):
    leave = Tokens.leave
    schedule = ReductionSchedule("stages", stages=4, average=0.6)
    found = bench.benchmark(schedule, 120, 8, rounds=1, clock=clock, pattern="M-M*-M", **TINY)
    assert found["ratio"] > 0 and found["average"] == pytest.approx(0.6)
    assert 0 < found["overhead_parts"]["score"] < found["overhead"] < 1
    assert found["final"] < 0.6 and found["flops_ratio"] > 1
    assert Tokens.leave is leave
