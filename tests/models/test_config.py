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
    backbone = PRESETS[name].replace(mtp_pattern="")  # reports count without token prediction
    assert backbone.num_parameters() / 1e9 == pytest.approx(PUBLISHED[name], rel=2e-3)


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


def test_super_has_the_tensors_and_elements_of_its_checkpoint():
    config = preset("nemotron-3-super")
    shapes = tensor_shapes(config.to_dict())
    assert len(shapes) == 42_683
    assert sum(math.prod(s) for s in shapes.values()) == 123_611_033_088
    assert shapes["backbone.layers.1.mixer.experts.511.up_proj.weight"] == (2688, 1024)


def test_super_has_the_tensors_of_its_prediction_block_under_their_names():
    config = preset("nemotron-3-super")
    shapes = {k: v for k, v in tensor_shapes(config.to_dict()).items() if k.startswith("mtp.")}
    assert sum(math.prod(s) for s in shapes.values()) == 2_942_325_248
    assert (
        config.num_parameters() - config.replace(mtp_pattern="").num_parameters() == 2_942_325_248
    )
    single = {k.removeprefix("mtp.layers."): v for k, v in shapes.items() if ".experts." not in k}
    assert single == {
        "0.enorm.weight": (4096,),
        "0.hnorm.weight": (4096,),
        "0.eh_proj.weight": (4096, 8192),
        "0.norm.weight": (4096,),
        "0.mixer.q_proj.weight": (4096, 4096),
        "0.mixer.k_proj.weight": (256, 4096),
        "0.mixer.v_proj.weight": (256, 4096),
        "0.mixer.o_proj.weight": (4096, 4096),
        "1.norm.weight": (4096,),
        "1.mixer.gate.weight": (512, 4096),
        "1.mixer.gate.e_score_correction_bias": (512,),
        "1.mixer.fc1_latent_proj.weight": (1024, 4096),
        "1.mixer.fc2_latent_proj.weight": (4096, 1024),
        "1.mixer.shared_experts.up_proj.weight": (5376, 4096),
        "1.mixer.shared_experts.down_proj.weight": (4096, 5376),
        "1.final_layernorm.weight": (4096,),
    }
    experts = {k: v for k, v in shapes.items() if ".experts." in k}
    assert len(experts) == 1024
    assert experts["mtp.layers.1.mixer.experts.511.down_proj.weight"] == (1024, 2688)


def test_prediction_blocks_are_read_under_every_name_and_odd_ones_refused():
    one = {"num_nextn_predict_layers": 1}
    for values, pattern in (
        (one | {"mtp_hybrid_override_pattern": "*-"}, "*-"),
        (one | {"mtp_layers_block_type": ["full_attention", "moe"]}, "*E"),
        (one | {"mtp_layers_block_type": ["attention", "mlp"]}, "*-"),
        (one, "*E"),
        ({"num_nextn_predict_layers": 0, "mtp_layers_block_type": ["full_attention"]}, ""),
        ({"mtp_hybrid_override_pattern": "*E"}, ""),
        ({}, ""),
    ):
        assert HybridConfig.from_dict(values).mtp_pattern == pattern, values
    config = HybridConfig(mtp_pattern="*", mtp_repeats=3, mtp_loss_coef=0.3, mtp_detach_head=True)
    written = config.to_dict()
    assert HybridConfig.from_dict(json.loads(json.dumps(written))) == config
    assert (written["num_nextn_predict_layers"], written["mtp_hybrid_override_pattern"]) == (1, "*")
    with pytest.raises(ValueError, match="num_nextn_predict_layers=2 is not supported"):
        HybridConfig.from_dict({"num_nextn_predict_layers": 2})
    with pytest.raises(ValueError, match=r"mtp_layers_block_type holds \['conv'"):
        HybridConfig.from_dict(one | {"mtp_layers_block_type": ["conv"]})
    with pytest.raises(ValueError, match=r"mtp_pattern='\*M' .*no Mamba-2 state"):
        HybridConfig(mtp_pattern="*M")
    with pytest.raises(ValueError, match="mtp_repeats=0"):
        HybridConfig(mtp_pattern="*", mtp_repeats=0)


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
