"""Sizes of published models: those of the registry are Super's, those of a CPU are slices."""

import pytest
import torch

from tigon.bench import presets, workloads
from tigon.bench.work import work
from tigon.models.presets import PRESETS
from tigon.registry import OPS, PUBLIC

ATTENTION = ("attention_token_scores",)  # the registry's has Nano 2's eight heads of keys


@pytest.mark.parametrize("op", PUBLIC)
def test_the_registrys_sizes_are_those_of_super(op):
    expected = OPS[op].sizes
    if op in ATTENTION:
        expected = expected | {"hkv": 2}
    assert presets.sizes(op, "nemotron-3-super") == expected


@pytest.mark.parametrize("op", PUBLIC)
def test_every_preset_gives_a_workload_or_says_why_not(op):
    for name, model in PRESETS.items():
        try:
            sizes = presets.sizes(op, name)
        except presets.NoSuchLayer as error:
            assert "E" not in model.pattern and name in str(error)
            continue
        assert workloads.make(op, sizes, torch.bfloat16, "meta").run()


@pytest.mark.parametrize("op", PUBLIC)
def test_a_cpu_gets_less_of_the_same(op):
    whole, part = presets.sizes(op), presets.sizes(op, device="cpu")
    assert whole.keys() == part.keys() and all(part[k] <= whole[k] for k in whole)
    assert work(op, part, 4).flops < 6e9 and work(op, part, 4).bytes < 2e8


@pytest.mark.parametrize("op", PUBLIC)
def test_a_sweep_goes_through_smaller_sizes_that_run(op):
    sizes = presets.sizes(op, device="cpu")
    letter, values = presets.sweep(op, sizes)
    assert values == sorted(values) and all(0 < value < sizes[letter] for value in values)
    for value in values:
        assert workloads.make(op, sizes | {letter: value}, torch.float32, "meta").run()


def test_widths_of_nano_are_its_own():
    assert presets.sizes("moe_experts", "nemotron-3-nano") == {
        "t": 8192, "k": 6, "e": 128, "m": 1856, "l": 2688,
    }  # fmt: skip
    assert presets.sizes("causal_conv1d", "nemotron-3-nano")["d"] == 64 * 64 + 2 * 8 * 128
