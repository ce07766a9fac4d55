"""Schedules of token reduction: the plain arithmetic, budgets that are met or refused, and the plan of a model."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tigon.models import HybridConfig
from tigon.models.presets import preset
from tigon.models.reduction_schedule import KINDS, ReductionSchedule, layer_work

PATTERNS = st.one_of(st.integers(1, 60), st.text("M*-E", min_size=1, max_size=40))


@given(st.sampled_from(KINDS), PATTERNS, st.floats(0, 1))
def test_shares_begin_with_all_and_never_rise(kind, layers, final):
    pattern = "M" * layers if isinstance(layers, int) else layers
    try:
        shares = ReductionSchedule(kind, final=final).plan(layers).shares
    except ValueError:  # no layer may choose, or the last one cannot reach it
        return
    assert len(shares) == len(pattern) and shares[0] == 1.0
    for l, (before, after) in enumerate(pairwise(shares)):
        assert after <= before
        if pattern[l] not in "M*":
            assert after == before, "an MLP has no scores to choose by"


@given(st.sampled_from(KINDS), st.integers(2, 80), st.floats(0, 1))
def test_a_budget_is_met_or_refused_with_the_range(kind, layers, wanted):
    for name in ("average", "final"):
        schedule = ReductionSchedule(kind, **{name: wanted})
        try:
            plan = schedule.plan(layers)
        except ValueError as error:
            low, high = map(float, str(error).split("can be ")[1].split(";")[0].split(" to "))
            assert not low <= wanted <= high
        else:
            assert getattr(plan, name) == pytest.approx(wanted, abs=1e-6)


@given(st.sampled_from(["power", "linear", "cosine"]), st.integers(2, 100), st.floats(0, 1))
def test_a_ramp_that_removes_ever_faster_averages_a_half_at_least(kind, layers, final):
    plan = ReductionSchedule(kind, final=final, gamma=1.5 if kind == "power" else None).plan(layers)
    assert plan.average >= 0.5 - 1e-12


@pytest.mark.parametrize("kind", ["power", "linear", "cosine"])
def test_a_quarter_on_average_is_refused_to_such_a_ramp_and_the_way_out_is_named(kind):
    with pytest.raises(ValueError, match="needs early removal") as caught:
        ReductionSchedule(kind, average=0.25).plan(52)
    assert "average=0.25 cannot be reached" in str(caught.value)


def test_early_removal_reaches_a_quarter():
    for schedule in (
        ReductionSchedule("stages", average=0.25, stages=8),
        ReductionSchedule("fastv", average=0.25),
        ReductionSchedule("power", average=0.25, gamma=0.1),
        ReductionSchedule("power", average=0.25, final=0.2),
    ):
        assert schedule.plan(52).average == pytest.approx(0.25, abs=1e-6)


def test_an_average_does_not_leave_the_last_layer_empty():
    """Four stages whose first keeps all would meet a quarter only with nothing in the other three."""
    with pytest.raises(
        ValueError, match=r"average can be 0.278 to 1.000; more stages remove earlier"
    ):
        ReductionSchedule("stages", average=0.25).plan(52)
    assert ReductionSchedule("stages", final=0.0).plan(52).final == 0.0


def test_a_final_quarter_is_no_quarter_of_the_work():
    plan = ReductionSchedule("linear", final=0.25).plan(32)
    assert plan.average == pytest.approx(0.625)
    assert str(plan) == "layer-average 0.625, final 0.250"


def test_fastv_and_pyramid_are_their_papers():
    assert ReductionSchedule("fastv").plan(32).shares == (1.0,) * 2 + (0.5,) * 30
    assert ReductionSchedule("pyramid").plan(32).shares == (
        (1.0,) * 8 + (0.5,) * 8 + (0.25,) * 8 + (0.125,) * 8
    )


def test_gamma_is_solved_where_both_ends_are_given():
    plan = ReductionSchedule("power", average=0.6, final=0.1).plan(40)
    assert plan.average == pytest.approx(0.6, abs=1e-6) and plan.final == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"average=0.1 with final=0.4 cannot be reached"):
        ReductionSchedule("power", average=0.1, final=0.4).plan(40)


def test_the_last_mixer_decides_what_the_end_can_be():
    """In "MM--" nothing is chosen after layer 1: the end of the ramp moves so that layer 2 meets it."""
    assert ReductionSchedule("linear", final=0.5).plan("MM--").final == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"final=0.1 cannot be reached .* final can be 0.334 to 1"):
        ReductionSchedule("linear", final=0.1).plan("MM--")


def test_kept_tokens_are_rounded_up_and_never_more_than_before():
    config = preset("nemotron-nano-2-9b")
    plan = ReductionSchedule("stages", average=0.4, multiple=64).plan(config, visual=1000, text=7)
    assert plan.layers[0].visual == 1000 and plan.layers[0].tokens == 1007
    for before, after in pairwise(plan.layers):
        assert after.visual <= before.visual
        assert after.visual % 64 == 0 or after.visual == 1000
        assert after.share * 1000 <= after.visual + 1e-6
    assert [row.kind for row in plan.layers] == list(config.pattern)


def test_work_is_counted_by_layer_and_shrinks_with_the_tokens():
    config = HybridConfig(pattern="M*-E", hidden_size=64, intermediate_size=128)
    flops, moved = layer_work(config, "-", 10)
    assert flops == 10 * 2 * 2 * 64 * 128 and moved == 2 * (2 * 64 * 128 + 2 * 10 * 64)
    attention, _ = layer_work(config, "*", 10)
    products, width = config._attention(), 32 * 128
    assert attention == 10 * 2 * products + 4 * width * 10 * 11 // 2
    full = ReductionSchedule("fastv", final=1.0).plan(config, visual=500)
    cut = ReductionSchedule("fastv", final=0.25, layer=1).plan(config, visual=500)
    assert full.flops == full.full_flops == cut.full_flops
    for whole, part in zip(full.layers[1:], cut.layers[1:]):
        assert part.flops < 0.3 * whole.flops and part.bytes < whole.bytes
    assert f"{cut.full_flops / cut.flops:.2f}x fewer FLOPs" in str(cut)


WRONG = [
    (dict(kind="square"), "kind='square' is not one of 'power'"),
    (dict(kind="linear", average=1.5), "average=1.5 must lie in 0 to 1"),
    (dict(kind="cosine", average=0.6, final=0.1), "average and final together need kind='power'"),
    (dict(kind="linear", gamma=2.0), "gamma is an argument of kind='power'"),
    (dict(kind="power", gamma=-1.0), "gamma=-1.0 must be above 0"),
    (dict(kind="stages", stages=1), "stages=1 must be 2 or more"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=lambda v: str(v)[:30])
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError) as caught:
        ReductionSchedule(**options)
    assert message in str(caught.value)
