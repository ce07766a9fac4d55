"""Both models drop what the schedule says, hold smaller caches, and keep their text where nothing is dropped."""

import pytest
from scripts import line, numbers, run

pytest.importorskip("transformers", minversion="5.23")


def test_layers_keep_their_share_caches_shrink_and_a_whole_budget_changes_no_text():
    lines = run("examples/token_reduction.py", "--visual", 512, "--average", 0.4)
    layers = [numbers(text) for text in lines if text.startswith("layer ")]
    tokens = [int(row[1]) for row in layers]
    assert tokens[0] == 512 + 64 and tokens == sorted(tokens, reverse=True) and tokens[-1] < 128
    average = sum(row[2] for row in layers) / len(layers)
    assert abs(average - 40) < 0.2
    for model in ("HybridLM", "NemotronH"):
        _, peak, cache = numbers(line(lines, f"{model} unreduced prompt"))
        _, reduced_peak, reduced_cache = numbers(line(lines, f"{model} reduced   prompt"))
        assert reduced_peak < peak and reduced_cache < 0.6 * cache
        assert line(lines, f"{model} the same text with average 1:") == " True"
