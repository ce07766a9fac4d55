"""tigon.integrations.compressed_tensors: NVFP4 checkpoints that the package itself packs, and what it does not pack.

The package runs in a process of its own (tests/support/compressed_export.py), from where `make env` puts it:

    pip install --no-deps --target .venv/peers -c constraints.txt compressed-tensors loguru psutil
"""

import json
import math
import shutil

import pytest
import torch
from peer_process import run_peer

from tigon.integrations import compressed_tensors, modelopt
from tigon.models import HybridLM
from tigon.modules.quantized_linear import QuantizedLinear

pytest.importorskip("transformers", minversion="5.23")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.xdist_group("modelopt")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed")
    return run_peer("compressed_export.py", out, "compressed-tensors")


def weights(model):
    return {
        name: m.quantized_weight.dequantize()
        for name, m in model.named_modules()
        if isinstance(m, QuantizedLinear)
    }


@pytest.mark.parametrize("case", ["w4a16", "w4a4"])
def test_weights_are_what_the_package_decompresses_its_own_to(case, exports):
    truth = safetensors_torch.load_file(exports / case / "truth.safetensors")
    model = HybridLM.from_pretrained(exports / case / "checkpoint")
    got = weights(model)
    assert {f"weight.{name}" for name in got} == truth.keys()  # o_proj is excluded by a pattern
    for name, weight in got.items():  # theirs is in bf16
        torch.testing.assert_close(weight, truth[f"weight.{name}"], rtol=2**-7, atol=0)
    layer = model.backbone.layers[0].mixer.in_proj
    assert layer.activation == ("bf16" if case == "w4a16" else "nvfp4")
    if case == "w4a4":
        torch.testing.assert_close(layer.input_scale, torch.tensor(3.0 / 2688))


def test_it_is_saved_in_modelopts_layout(exports, tmp_path):
    model = HybridLM.from_pretrained(exports / "w4a4" / "checkpoint")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "hf_quant_config.json").is_file()
    assert [f for f in modelopt.validate(tmp_path, "all") if f.severity == "error"] == []
    again = HybridLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


def change(folder, target, edit):
    """A copy whose tensors and quantization_config went through edit(tensors, config)."""
    shutil.copytree(folder, target)
    tensors = safetensors_torch.load_file(target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text())
    edit(tensors, settings["quantization_config"])
    safetensors_torch.save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize("scale", [0.0, math.inf])
def test_a_dead_layer_adds_nothing_and_no_nan(scale, exports, tmp_path):
    dead = "backbone.layers.1.mixer.down_proj"

    def kill(tensors, config):
        tensors[f"{dead}.weight_global_scale"] = torch.tensor([scale])
        tensors[f"{dead}.input_global_scale"] = torch.tensor([scale])

    folder = change(exports / "w4a4" / "checkpoint", tmp_path / "dead", kill)
    found = [f for f in modelopt.validate(folder) if "zeros in calibration" in f.fault]
    assert [(f.severity, f.tensor) for f in found] == [
        ("warning", f"{dead}.input_global_scale"),
        ("warning", f"{dead}.weight_global_scale"),
    ]
    model = HybridLM.from_pretrained(folder)
    x = torch.randn(3, 160)
    assert torch.equal(model.get_submodule(dead)(x), torch.zeros(3, 64))


def test_a_decode_scale_under_an_encode_scales_name_is_found(exports, tmp_path):
    name = "backbone.layers.1.mixer.down_proj.weight_global_scale"

    def invert(tensors, config):
        tensors[name] = 1 / tensors[name]

    folder = change(exports / "w4a4" / "checkpoint", tmp_path / "inverted", invert)
    errors = [f for f in modelopt.validate(folder) if f.severity == "error"]
    assert [f.tensor for f in errors] == [name]
    assert "stored as the reciprocal" in errors[0].fault


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: g.update(format="float-quantized"), "format 'float-quantized'"),
        (lambda g: g["weights"].update(group_size=32), r"weights \(4, 'float', 32\)"),
        (lambda g: g["input_activations"].update(num_bits=8), "activations of 8 bits"),
    ],
)
def test_other_formats_are_refused_by_name(edit, message, exports, tmp_path):
    folder = change(
        exports / "w4a4" / "checkpoint",
        tmp_path / "other",
        lambda t, config: edit(config["config_groups"]["group_0"]),
    )
    with pytest.raises(ValueError, match=message):
        HybridLM.from_pretrained(folder)
    assert any("is not read" in f.fault for f in modelopt.validate(folder))


def test_targets_are_names_patterns_or_every_linear_layer():
    def config(*targets):
        return compressed_tensors.parse(
            {
                "format": compressed_tensors.FORMAT,
                "config_groups": {
                    "group_0": {
                        "targets": list(targets),
                        "weights": {"num_bits": 4, "type": "float", "group_size": 16},
                    }
                },
                "ignore": ["re:.*lm_head", "a.gate"],
            }
        )

    names = ("a.up_proj", "a.down_proj", "a.gate", "lm_head")
    assert [n for n in names if config("Linear").of(n)] == ["a.up_proj", "a.down_proj"]
    assert [n for n in names if config(r"re:.*up_proj$").of(n)] == ["a.up_proj"]
    assert [n for n in names if config("a").of(n)] == ["a.up_proj", "a.down_proj"]
