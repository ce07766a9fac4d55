"""Fine-tuning on Tigon's ops follows transformers' own curve, and what it saves is read again."""

import pytest
from scripts import line, numbers, run

pytest.importorskip("transformers", minversion="5.23")

EXAMPLE = "examples/finetune_nemotron_h.py"


def test_patched_and_unpatched_curves_agree_and_fall_and_the_saved_model_goes_on(tmp_path):
    options = ["--steps", 8, "--length", 64]
    lines = run(EXAMPLE, *options, "--save", tmp_path)
    assert "NemotronHMamba2Mixer" in line(lines, "patched:")
    first, last, *_ = numbers(line(lines, "tigon").replace("->", ""))
    assert last < first - 1
    assert numbers(line(lines, "largest difference of the curves:"))[0] < 1e-3
    loss, again = numbers(line(lines, "saved to").split("loss")[1])
    assert loss == again < first

    lines = run(EXAMPLE, "--model", tmp_path, "--alone", *options)
    assert numbers(line(lines, "tigon"))[0] < first - 1
    assert not any(text.startswith("transformers") for text in lines)


def test_layers_quantized_by_the_recipe_train():
    lines = run(EXAMPLE, "--steps", 8, "--length", 64, "--recipe", "nvfp4", "--alone")
    assert "2 in_proj          nvfp4" in "\n".join(lines)
    first, last, *_ = numbers(line(lines, "tigon").replace("->", ""))
    assert last < first - 1
