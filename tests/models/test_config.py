"""Sizes: presets against published totals, and config.json both ways."""

import json
import math

import pytest

from tigon.models import PRESETS, HybridConfig, HybridLM, preset
from tigon.models.shapes import tensor_shapes

# Billions of parameters. Dense: the model names' cards and reports; MoE: NVIDIA's reports (31.6, 120.6, 550).
PUBLISHED = {
    "nemotron-h-8b": 8.1,
    "nemotron-h-47b": 46.8,
    "nemotron-h-56b": 56.3,
    "nemotron-nano-2-12b": 12.31,
    "nemotron-nano-2-9b": 8.89,
    "nemotron-3-nano-4b": 3.97,
    "nemotron-3-nano": 31.6,
    "nemotron-3-super": 120.6,
    "nemotron-3-ultra": 550,
}
LAYERS = {  # (M, *, - or E), facts of the reports
    "nemotron-h-4b": (24, 4, 24),
    "nemotron-h-8b": (24, 4, 24),
    "nemotron-h-47b": (45, 5, 48),
    "nemotron-h-56b": (54, 10, 54),
    "nemotron-nano-2-12b": (28, 6, 28),
    "nemotron-nano-2-9b": (27, 4, 25),
    "nemotron-3-nano-4b": (21, 4, 17),
    "nemotron-3-nano": (23, 6, 23),
    "nemotron-3-super": (40, 8, 40),
    "nemotron-3-ultra": (48, 12, 48),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    assert PRESETS[name].num_parameters() / 1e9 == pytest.approx(PUBLISHED[name], rel=2e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_preset_has_the_published_layers(name):
    pattern = PRESETS[name].pattern
    counts = (pattern.count("M"), pattern.count("*"), pattern.count("-") + pattern.count("E"))
    assert counts == LAYERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_on_the_meta_device_has_the_parameters_that_its_config_counts(name):
    tensors = HybridLM(name, device="meta").state_dict()  # with the routers' biases
    assert all(t.is_meta for t in tensors.values())
    assert sum(t.numel() for t in tensors.values()) == preset(name).num_parameters()


def test_super_has_the_tensors_and_elements_of_its_checkpoint_but_those_of_token_prediction():
    config = preset("nemotron-3-super")
    shapes = tensor_shapes(config.to_dict())
    # Its multi-token prediction is an attention and an E layer behind a projection of embedding and hidden state.
    d = config.hidden_size
    mtp = tensor_shapes(config.replace(pattern="*E", vocab_size=1).to_dict())
    del (
        mtp["backbone.embeddings.weight"],
        mtp["lm_head.weight"],
    )  # norm_f stands for final_layernorm
    mtp |= {"enorm": (d,), "hnorm": (d,), "eh_proj": (d, 2 * d)}
    assert len(shapes) + len(mtp) == 42_683
    count = sum(math.prod(s) for table in (shapes, mtp) for s in table.values())
    assert count == 123_611_033_088
    assert shapes["backbone.layers.1.mixer.experts.511.up_proj.weight"] == (2688, 1024)


def test_kinds_and_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="pattern='MX'"):
        HybridConfig(pattern="MX")
    with pytest.raises(ValueError, match=r"unknown preset 'nano'.*nemotron-nano-2-9b"):
        preset("nano")


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_gives_back_the_config(name):
    assert HybridConfig.from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


def test_old_and_new_names_of_layers_and_of_infinity_are_read():
    for kinds in (
        {"hybrid_override_pattern": "M*-E"},
        {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"]},
        {"layers_block_type": ["mamba", "attention", "mlp", "moe"]},
    ):
        assert HybridConfig.from_dict(kinds).pattern == "M*-E"
    for infinity in (math.inf, {"__float__": "Infinity"}):
        config = HybridConfig.from_dict({"time_step_limit": [0.0, infinity]})
        assert config.dt_limit == (0.001, math.inf)
    assert HybridConfig.from_dict({"mamba_n_groups": 4}).n_groups == 4
    with pytest.raises(ValueError, match=r"layers_block_type holds \['conv'"):
        HybridConfig.from_dict({"layers_block_type": ["conv"]})


@pytest.mark.parametrize(
    "option", [{"sliding_window": 128}, {"attention_bias": True}, {"mlp_hidden_act": "silu"}]
)
def test_options_that_would_change_results_are_refused_by_name(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        HybridConfig.from_dict(option)
    with pytest.raises(ValueError, match="model_type='mamba2'"):
        HybridConfig.from_dict({"model_type": "mamba2"})
