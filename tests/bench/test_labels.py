"""Names and numbers of a record as tables and plots show them."""

import pytest
from bench_records import DIFFERS, LAUNCH_BOUND, SUSPECT, case, sample_run, swept

from tigon.bench import labels
from tigon.registry import OPS


@pytest.mark.parametrize(
    "value, said",
    [(3.35e12, "3.35 TB/s"), (9.8e8, "980 MB/s"), (0, "0 B/s"), (1, "1 B/s"), (2e-7, "200 nB/s"), (1e18, "1e+03 PB/s")],
)  # fmt: skip
def test_quantities_have_three_digits_and_a_prefix(value, said):
    assert labels.quantity(value, "B/s") == said


def test_every_op_has_a_family_and_an_unknown_one_is_other():
    assert {labels.family(name) for name in OPS} | {labels.OTHER} == set(labels.FAMILIES)
    assert labels.family("op of tomorrow") == labels.OTHER


def test_titles_and_settings_say_what_is_not_the_default():
    item = case("ssd_update", "int8", shape={"b": 1, "m": 2, "h": 2, "p": 2, "g": 1, "n": 2})[
        "case"
    ]
    assert labels.title(item) == "ssd_update · int8"
    assert labels.title(item | {"mode": "step"}) == "ssd_update · int8 · step"
    assert labels.setting(item) == "b=1,m=2,h=2,p=2,g=1,n=2 bfloat16 cold"
    more = item | {"graph": True, "backend": "reference"}
    assert labels.setting(more, ("bfloat16", "cold")) == "b=1,m=2,h=2,p=2,g=1,n=2 graph reference"


def test_conditions_are_common_only_if_all_cases_share_them():
    items = [case("rms_norm"), case("rms_norm", dtype="float32")]
    assert labels.common(items) == ["cold"]
    assert labels.common([]) == []


def test_launch_bound_times_are_compared_and_doubtful_ones_are_not():
    assert not labels.doubtful({"flags": [LAUNCH_BOUND]}, {"flags": []})
    assert labels.doubtful({"flags": []}, {"flags": [LAUNCH_BOUND, SUSPECT]})
    assert labels.doubtful({"flags": [DIFFERS]})


def test_one_size_is_no_sweep_and_other_conditions_do_not_join():
    run = sample_run()
    lone = swept("ssd_scan", "l", (512,))
    assert [*labels.sweeps(run | {"cases": lone})] == []
    assert [*labels.sweeps(run | {"cases": [*lone, case("ssd_scan", mode="step")]})] == []
    [(letter, items)] = labels.sweeps(run | {"cases": [case("ssd_scan"), *lone]})
    assert letter == "l" and [item["case"]["shape"]["l"] for item in items] == [512, 8192]
