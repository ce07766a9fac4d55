"""tigon.integrations.modelopt: checkpoints that nvidia-modelopt itself quantizes and exports, on the CPU.

Oracles: modelopt's own dequantization of its tensors, the logits of its fake-quantized model, its config.json. It runs
in a process of its own (tests/support/modelopt_export.py), from where `make env` puts it:

    pip install --no-build-isolation --no-deps --target .venv/peers -c constraints.txt \
        nvidia-modelopt nvidia-ml-py omegaconf antlr4-python3-runtime pulp scipy
"""

import copy
import json
import shutil

import pytest
import torch
from peer_process import run_peer

import tigon
from tigon.generation import generate
from tigon.integrations import modelopt
from tigon.integrations import modelopt_format as form
from tigon.models import HybridLM
from tigon.modules.quantized_linear import QuantizedLinear

pytest.importorskip("transformers", minversion="5.23")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = [
    pytest.mark.xdist_group("modelopt"),
    pytest.mark.filterwarnings("ignore:.*KV cache.*:UserWarning"),
]

EXACT = ("fp8", "fp8-row", "mxfp8", "nvfp4", "nvfp4-bias", "w4a16", "w4a8", "mixed")
ALL = (*EXACT, "fp8-block", "fp8-cache", "nvfp4-bf16")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """exports(case) -> (checkpoint folder, what modelopt says of it)."""
    out = run_peer("modelopt_export.py", tmp_path_factory.mktemp("exports"), "nvidia-modelopt")
    assert json.loads((out / "failed.json").read_text()) == {}

    def find(case):
        return out / case / "checkpoint", safetensors_torch.load_file(
            out / case / "truth.safetensors"
        )

    return find


def distance(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("case", ALL)
def test_weights_are_what_modelopt_dequantizes_its_own_to(case, exports):
    folder, truth = exports(case)
    model = HybridLM.from_pretrained(folder)
    layers = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers == {name.removeprefix("weight.") for name in truth if name.startswith("weight.")}
    for name in layers:
        got = model.get_submodule(name).quantized_weight.dequantize()
        rtol = 0 if "fp8" in case else 3e-7  # FP4: theirs multiplies the two scales first
        torch.testing.assert_close(got, truth[f"weight.{name}"], rtol=rtol, atol=0, msg=name)


@pytest.mark.parametrize("case", EXACT)
def test_logits_are_those_of_modelopts_fake_quantized_model(case, exports):
    folder, truth = exports(case)
    with torch.no_grad():
        got = HybridLM.from_pretrained(folder)(truth["ids"])
    assert distance(truth["plain"], truth["logits"]) > 0.05  # quantization shows in them
    assert distance(got, truth["logits"]) < 1e-5


@pytest.mark.parametrize(("case", "share"), [("fp8-cache", 0.3), ("nvfp4-bf16", 0.6)])
def test_logits_are_closer_to_modelopts_than_without_quantization(case, share, exports):
    """Their FP8 cache is not quantized here; in bf16, products are rounded in another order."""
    folder, truth = exports(case)
    with torch.no_grad():
        got = HybridLM.from_pretrained(folder)(truth["ids"])
    assert distance(got, truth["logits"]) < share * distance(truth["plain"], truth["logits"])


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors_torch.load_file(file)
    return found


def raw(t):
    return t.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("case", [c for c in ALL if c not in ("w4a8", "fp8-cache", "fp8-block")])
def test_what_is_saved_is_what_was_loaded_byte_for_byte(case, exports, tmp_path):
    folder, _ = exports(case)
    HybridLM.from_pretrained(folder).save_pretrained(tmp_path / "a")
    before, after = tensors_of(folder), tensors_of(tmp_path / "a")
    assert before.keys() == after.keys()
    for name, t in before.items():
        assert (t.dtype, t.shape) == (after[name].dtype, after[name].shape), name
        assert torch.equal(raw(t), raw(after[name])), name
    again = HybridLM.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    again = tensors_of(tmp_path / "b")
    assert all(torch.equal(raw(t), raw(again[name])) for name, t in after.items())
    for file in ("config.json", form.QUANT_FILE):
        assert (tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text()
    assert modelopt.validate(tmp_path / "b", "all") == []


@pytest.mark.parametrize("case", ["w4a8", "fp8-cache", "fp8-block"])
def test_what_is_written_differently_is_read_to_the_same_model(case, exports, tmp_path):
    """Groups of 32 become two of 16 with one scale, cache scales are dropped, block scales have two dimensions."""
    folder, truth = exports(case)
    model = HybridLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert modelopt.validate(tmp_path, "all") == []
    with torch.no_grad():
        assert torch.equal(HybridLM.from_pretrained(tmp_path)(truth["ids"]), model(truth["ids"]))


@pytest.mark.parametrize("case", [*ALL, "experts", "experts-w4a16", "llama"])
def test_modelopts_own_checkpoints_are_faultless_but_for_its_marker(case, exports):
    folder, _ = exports(case)
    findings = modelopt.validate(folder, "all")
    assert all("marker" in f.fault and f.severity == "warning" for f in findings), findings
    assert len(findings) == (case != "llama")


@pytest.mark.parametrize("case", [c for c in ALL if c not in ("w4a8", "fp8-block", "fp8-cache")])
def test_the_mirror_in_config_json_is_modelopts(case, exports):
    folder, _ = exports(case)
    values = json.loads((folder / form.QUANT_FILE).read_text())
    theirs = json.loads((folder / "config.json").read_text())["quantization_config"]
    ours = form.mirror(values)
    if case in ("fp8-row", "mxfp8"):  # modelopt writes no config group for them
        del ours["config_groups"]
    assert ours == theirs
    (folder_only := copy.deepcopy(theirs)).pop("producer")
    assert form.parse(folder_only).every == form.parse(values).every


def test_layers_of_a_mixed_table_get_their_own_formats(exports):
    model = HybridLM.from_pretrained(exports("mixed")[0])
    layers = model.backbone.layers
    assert layers[0].mixer.in_proj.scaling == "tensor"
    assert layers[1].mixer.up_proj.activation == "bf16"
    assert layers[1].mixer.down_proj.activation == "nvfp4"
    assert not isinstance(layers[2].mixer.q_proj, QuantizedLinear)
    table = modelopt.config_of(model)["quantization"]
    assert table["quant_algo"] == form.MIXED and len(table["quantized_layers"]) == 6


def test_dtype_converts_what_is_not_quantized_and_nothing_else(exports):
    folder, truth = exports("nvfp4-bias")
    stored = HybridLM.from_pretrained(folder).state_dict()
    half = HybridLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, t in half.state_dict().items():
        kept = (
            name.endswith(form.LAYER_PARTS) and name.rpartition(".")[0] + ".weight_scale" in stored
        )
        assert t.dtype == (stored[name].dtype if kept else torch.bfloat16), name
    assert half.allocate_cache(1, 8).layers[0].conv.dtype == torch.bfloat16
    with torch.no_grad():
        assert distance(half(truth["ids"]), truth["logits"]) < 0.5


def test_prefill_and_decode_of_a_quantized_model_agree(exports):
    folder, truth = exports("w4a16")
    model, ids = HybridLM.from_pretrained(folder), truth["ids"]
    cache = model.allocate_cache(2, 24)
    with torch.no_grad():
        whole = model(ids)
        pieces = [model(piece, cache=cache) for piece in ids.split([17, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4)
    new = generate(model, ids, 3, stop_ids=())
    assert torch.equal(torch.stack(new)[:, 0], whole[:, -1].argmax(-1))


def test_nothing_of_a_frozen_layer_is_trained(exports):
    model = HybridLM.from_pretrained(exports("mixed")[0])
    frozen = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert frozen and not any(p.requires_grad for m in frozen for p in m.parameters())
    assert model.lm_head.weight.requires_grad and model.backbone.layers[0].mixer.A_log.requires_grad


@pytest.mark.parametrize("case", ["experts", "experts-w4a16"])
def test_experts_are_dequantized_to_modelopts_values_with_a_warning(case, exports):
    folder, truth = exports(case)
    with pytest.warns(UserWarning, match="8 quantized weights of experts or embeddings"):
        model = HybridLM.from_pretrained(folder)
    mixer, stem = model.backbone.layers[1].mixer, "weight.backbone.layers.1.mixer"
    assert isinstance(mixer.shared_experts.up_proj, QuantizedLinear)
    dtype = mixer.experts.up_proj.dtype
    for side in ("up_proj", "down_proj"):
        theirs = [truth[f"{stem}.experts.{i}.{side}"] for i in range(4)]
        got, want = getattr(mixer.experts, side), torch.stack(theirs).to(dtype)
        torch.testing.assert_close(got, want, rtol=3e-7 if case == "experts-w4a16" else 0, atol=0)
    if case == "experts-w4a16":
        with torch.no_grad():
            assert distance(model(truth["ids"]), truth["logits"]) < 1e-5


def test_embeddings_that_a_table_names_are_dequantized_wherever_their_parts_lie(exports, tmp_path):
    """In shards of one tensor each, so that codes and scales come from different files."""
    folder, _ = exports("mixed")
    name, layer = "backbone.embeddings", {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    values = json.loads((folder / form.QUANT_FILE).read_text())
    values["quantization"]["quantized_layers"][name] = layer
    tensors = tensors_of(folder)
    q = tigon.quantize_nvfp4(tensors.pop(f"{name}.weight"))
    parts = {"weight": q.codes, "weight_scale": q.block_scale, "weight_scale_2": q.tensor_scale}
    tensors |= {f"{name}.{part}": t for part, t in parts.items()}
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / form.QUANT_FILE).write_text(json.dumps(values))
    weight_map = {key: f"model-{i}.safetensors" for i, key in enumerate(tensors)}
    for key, file in weight_map.items():
        safetensors_torch.save_file({key: tensors[key]}, tmp_path / file)
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="1 quantized weights of experts or embeddings"):
        model = HybridLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(model.backbone.embeddings.weight, q.dequantize(torch.bfloat16))


def test_another_packages_model_takes_the_layers_too(exports):
    from transformers import AutoConfig, LlamaForCausalLM

    folder, truth = exports("llama")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = None
    model = modelopt.load(LlamaForCausalLM(config).eval(), folder)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    with torch.no_grad():
        assert distance(model(truth["ids"]).logits, truth["logits"]) < 1e-5


def test_scales_of_a_quantized_cache_are_reported_and_left_out(exports):
    with pytest.warns(UserWarning, match="KV cache in FP8; its 2 scales are not loaded"):
        HybridLM.from_pretrained(exports("fp8-cache")[0])


def test_algorithms_that_are_not_supported_are_refused_by_name(exports, tmp_path):
    with pytest.raises(ValueError, match=r"'NVFP4_AWQ' is not supported.*pre_quant_scale"):
        HybridLM.from_pretrained(exports("awq")[0])
    folder = shutil.copytree(exports("fp8")[0], tmp_path / "unknown")
    values = json.loads((folder / form.QUANT_FILE).read_text())
    values["quantization"]["quant_algo"] = "FP3"
    (folder / form.QUANT_FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: quant_algo='FP3' is not known"):
        HybridLM.from_pretrained(folder)
    (folder / form.QUANT_FILE).unlink()
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="quant_method='gptq' is not read"):
        HybridLM.from_pretrained(folder)


def test_config_json_alone_is_enough(exports, tmp_path):
    folder = shutil.copytree(exports("mixed")[0], tmp_path / "mirror")
    (folder / form.QUANT_FILE).unlink()
    state = HybridLM.from_pretrained(folder).state_dict()
    expected = HybridLM.from_pretrained(exports("mixed")[0]).state_dict()
    assert all(torch.equal(raw(t), raw(expected[name])) for name, t in state.items())


def test_without_input_scales_activations_are_scaled_as_they_come(exports, tmp_path):
    folder, truth = exports("fp8")
    copied = shutil.copytree(folder, tmp_path / "dynamic")
    tensors = {k: t for k, t in tensors_of(folder).items() if not k.endswith("input_scale")}
    safetensors_torch.save_file(tensors, copied / "model.safetensors")
    with pytest.warns(UserWarning, match="no input_scale for 10 layers"):
        model = HybridLM.from_pretrained(copied)
    with torch.no_grad():
        assert distance(model(truth["ids"]), truth["logits"]) < 0.1


def test_tensors_that_do_not_fit_the_config_are_all_named(exports, tmp_path):
    folder, _ = exports("nvfp4")
    copied = shutil.copytree(folder, tmp_path / "bad")
    tensors = tensors_of(folder)
    layer = "backbone.layers.1.mixer.up_proj"
    tensors[f"{layer}.weight_scale"] = tensors[f"{layer}.weight_scale"][:, :2].contiguous()
    del tensors["backbone.layers.0.mixer.in_proj.weight_scale_2"]
    safetensors_torch.save_file(tensors, copied / "model.safetensors")
    with pytest.raises(ValueError) as error:
        HybridLM.from_pretrained(copied)
    assert "missing: backbone.layers.0.mixer.in_proj.weight_scale_2" in str(error.value)
    assert f"{layer}.weight_scale has dtype F8_E4M3 and shape (160, 2), expected" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("damaged", "mended"),
    [
        ("lm_head.\0backbone.pt_name_sentinel", "lm_head"),
        ("backbone.layers.0.\0backbone.pt_name_sentinel*", "backbone.layers.0*"),
        ("backbone.layers.0.\0backbone.pt_name_sentinel.*", "backbone.layers.0.*"),
        ("model.layers.3.mixer.*", "model.layers.3.mixer.*"),
    ],
)
def test_names_with_modelopts_marker_are_mended(damaged, mended):
    assert form.mend_name(damaged) == mended


def test_patterns_mean_a_module_and_what_it_holds():
    config = form.parse(
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "a.1.mixer", "b*z"]}}
    )
    plain = [
        m
        for m in ("lm_head", "lm_header", "a.1.mixer.x", "a.11.mixer", "bz.x", "b.z")
        if not config.of(m)
    ]
    assert plain == ["lm_head", "a.1.mixer.x", "b.z"]
