"""tigon check-checkpoint: every fault of layers, configs and scales alone, by its tensor; checkpoints without fault."""

import json
import math

import pytest
import torch
from checkpoints import IN, SIZES, UP, K, Q, edit_json, edit_tensors, errors, poison, quantized

from tigon.integrations import modelopt_format as form
from tigon.models import HybridConfig, HybridLM
from tigon.models.shapes import tensor_shapes

safetensors_torch = pytest.importorskip("safetensors.torch")


def test_a_checkpoint_without_fault_says_what_it_holds(good_checkpoint, tigon_command, check):
    code, out = tigon_command("check-checkpoint", str(good_checkpoint), "--values", "all")
    assert code == 0 and "0 errors, 0 warnings" in out
    assert "2 FP8, 6 NVFP4" in out
    assert check(good_checkpoint) == (0, [])


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_without_quantization_are_checked_too(tied, tmp_path, check):
    config = HybridConfig(pattern="M-*", tie_word_embeddings=tied, **SIZES)
    HybridLM(config).save_pretrained(tmp_path)
    assert check(tmp_path, "--values", "all") == (0, [])
    edit_tensors(tmp_path, drop("backbone.layers.0.mixer.A_log"))
    assert [f["tensor"] for f in check(tmp_path)[1]] == ["backbone.layers.0.mixer.A_log"]


def test_a_tensor_under_two_names_is_an_error(folder, check):
    edit_tensors(folder, put("model.norm_f.weight", torch.ones(64)))
    code, findings = check(folder)
    assert code == 2 and "the same tensor of the model" in findings[0]["fault"]


def test_no_folder_is_a_mistake_in_the_command(tigon_command, tmp_path):
    assert tigon_command("check-checkpoint", str(tmp_path / "none"))[0] == 1


def put(name, value):
    return lambda t: t.__setitem__(name, value)


def drop(name):
    return lambda t: t.__delitem__(name)


def cut(name):
    def change(t):
        t[name] = t[name][:, : t[name].shape[1] // 2].contiguous()

    return change


def cast(name, dtype):
    return lambda t: t.__setitem__(name, t[name].to(dtype))


FAULTS = {  # what was done to the tensors -> the one finding: tensor, words of its fault
    "NaN block scale": (
        poison(f"{UP}.weight_scale", 0x7F),
        f"{UP}.weight_scale",
        "1 of 384 scales are NaN",
    ),
    "negative NaN": (poison(f"{UP}.weight_scale", 0xFF), f"{UP}.weight_scale", "NaN (byte 0x7F)"),
    "negative scale": (poison(f"{UP}.weight_scale", 0x90), f"{UP}.weight_scale", "negative"),
    "half-size scales": (cut(f"{UP}.weight_scale"), f"{UP}.weight_scale", "half of (96, 4)"),
    "scales of another shape": (
        put(f"{UP}.weight_scale", torch.ones(4, 96).to(torch.float8_e4m3fn)),
        f"{UP}.weight_scale",
        "shape (4, 96), expected (96, 4)",
    ),
    "half the weight": (cut(f"{UP}.weight"), f"{UP}.weight", "shape (96, 16)"),
    "weight not quantized": (
        put(f"{UP}.weight", torch.ones(96, 64)),
        f"{UP}.weight",
        "is F32, NVFP4 stores U8",
    ),
    "scales of another dtype": (
        cast(f"{UP}.weight_scale", torch.float32),
        f"{UP}.weight_scale",
        "is F32, NVFP4 stores F8_E4M3",
    ),
    "no input scale": (drop(f"{UP}.input_scale"), f"{UP}.input_scale", "is missing"),
    "no tensor scale": (drop(f"{UP}.weight_scale_2"), f"{UP}.weight_scale_2", "is missing"),
    "no block scales": (drop(f"{UP}.weight_scale"), f"{UP}.weight_scale", "is missing"),
    "no codes": (drop(f"{UP}.weight"), f"{UP}.weight", "is missing"),
    "no FP8 scale": (drop(f"{IN}.weight_scale"), f"{IN}.weight_scale", "is missing"),
    "no plain tensor": (drop("backbone.norm_f.weight"), "backbone.norm_f.weight", "is missing"),
    "plain tensor of another shape": (
        put("backbone.norm_f.weight", torch.ones(63)),
        "backbone.norm_f.weight",
        "the model needs (64,)",
    ),
    "unknown tensor": (
        put("backbone.layers.7.x", torch.ones(2)),
        "backbone.layers.7.x",
        "no layer of the model",
    ),
    "encode scale": (
        put(f"{UP}.weight_scale_2", torch.tensor(2688 / 0.2)),
        f"{UP}.weight_scale_2",
        "stored as the reciprocal",
    ),
    "encode scale in FP8": (
        put(f"{IN}.weight_scale", torch.tensor(448 / 0.2)),
        f"{IN}.weight_scale",
        "stored as the reciprocal",
    ),
    "infinite scale": (
        put(f"{UP}.weight_scale_2", torch.tensor(math.inf)),
        f"{UP}.weight_scale_2",
        "infinite",
    ),
    "NaN scale": (
        put(f"{UP}.weight_scale_2", torch.tensor(math.nan)),
        f"{UP}.weight_scale_2",
        "is NaN",
    ),
    "negative tensor scale": (
        put(f"{UP}.weight_scale_2", torch.tensor(-1e-4)),
        f"{UP}.weight_scale_2",
        "negative",
    ),
    "zero input scale": (put(f"{UP}.input_scale", torch.tensor(0.0)), f"{UP}.input_scale", "is 0"),
    "infinite input scale": (
        put(f"{UP}.input_scale", torch.tensor(math.inf)),
        f"{UP}.input_scale",
        "infinite",
    ),
    "their name for codes": (
        put(f"{UP}.weight_packed", torch.zeros(96, 32, dtype=torch.uint8)),
        f"{UP}.weight_packed",
        "compressed-tensors' name",
    ),
    "their global scale": (
        put(f"{UP}.weight_global_scale", torch.ones(1)),
        f"{UP}.weight_global_scale",
        "compressed-tensors' encode scale",
    ),
    "AWQ": (put(f"{UP}.pre_quant_scale", torch.ones(64)), f"{UP}.pre_quant_scale", "AWQ"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_tensor_is_the_one_error_and_named(fault, folder, check):
    change, tensor, words = FAULTS[fault]
    edit_tensors(folder, change)
    code, findings = check(folder)
    assert code == 2
    assert [f["tensor"] for f in errors(findings)] == [tensor], findings
    assert words in errors(findings)[0]["fault"] and errors(findings)[0]["fix"]


def test_nan_in_a_plain_tensor_is_found_when_all_values_are_read(folder, check):
    name = "backbone.norm_f.weight"
    edit_tensors(folder, put(name, torch.full((64,), math.nan)))
    assert check(folder)[0] == 0
    code, findings = check(folder, "--values", "all")
    assert code == 2 and findings[0]["tensor"] == name and "64 NaN" in findings[0]["fault"]
    edit_tensors(folder, lambda t: (put(name, torch.ones(64))(t), poison(f"{IN}.weight", 0x7F)(t)))
    assert [f["tensor"] for f in check(folder, "--values", "all")[1]] == [f"{IN}.weight"]


def test_headers_alone_are_checked_without_values(folder, check):
    edit_tensors(folder, poison(f"{UP}.weight_scale", 0x7F))
    assert check(folder, "--values", "none") == (0, [])


def test_scales_that_fused_layers_do_not_share_are_a_warning(folder, check):
    edit_tensors(folder, put(f"{K}.weight_scale_2", torch.tensor(2e-4)))
    code, findings = check(folder)
    assert code == 0 and [f["severity"] for f in findings] == ["warning"]
    assert findings[0]["tensor"] == f"{K}.weight_scale_2" and Q in findings[0]["fault"]


def test_a_zero_weight_and_no_input_scale_at_all_are_warnings(folder, check):
    def change(t):
        for name in [n for n in t if n.endswith("input_scale")]:
            del t[name]
        t[f"{UP}.weight_scale_2"] = torch.tensor(0.0)

    edit_tensors(folder, change)
    code, findings = check(folder)
    assert code == 0
    assert sorted(f["tensor"] for f in findings) == ["", f"{UP}.weight_scale_2"]


def both(change):
    """On hf_quant_config.json and on its mirror."""

    def edit(folder):
        edit_json(folder, form.QUANT_FILE, lambda v: change(v["quantization"]))
        edit_json(folder, "config.json", lambda v: change(v["quantization_config"]))

    return edit


def only(file, change):
    return lambda folder: edit_json(folder, file, change)


def set_algo(table):
    table["quantized_layers"][UP]["quant_algo"] = "W3A3"


def swap(table):
    table["quantized_layers"][UP] = {"quant_algo": "FP8"}


CONFIGS = {  # what was done -> tensor or file of the first error, words
    "unknown algorithm": (both(set_algo), form.QUANT_FILE, "quant_algo='W3A3' is not known"),
    "quantized but excluded": (
        both(lambda v: v.update(exclude_modules=[UP], ignore=[UP])),
        f"{UP}.weight",
        "exclude_modules says that it is not",
    ),
    "quantized but not listed": (
        both(lambda v: v["quantized_layers"].pop(UP)),
        f"{UP}.weight",
        "does not name it",
    ),
    "listed but plain": (
        both(lambda v: v["quantized_layers"].update(lm_head={"quant_algo": "FP8"})),
        "lm_head.weight",
        "stored as plain F32",
    ),
    "listed but absent": (
        both(lambda v: v["quantized_layers"].update(nowhere={"quant_algo": "FP8"})),
        "nowhere",
        "no tensor of it",
    ),
    "another format": (both(swap), f"{UP}.weight", "is U8, FP8 stores F8_E4M3"),
    "files that disagree": (
        only("config.json", lambda v: v["quantization_config"].update(quant_algo="FP8")),
        "config.json",
        "is not what hf_quant_config.json says",
    ),
    "another quantizer": (
        lambda folder: (
            (folder / form.QUANT_FILE).unlink(),
            edit_json(
                folder,
                "config.json",
                lambda v: v.update(quantization_config={"quant_method": "gptq"}),
            ),
        ),
        "config.json",
        "quant_method='gptq' is not read",
    ),
    "no config at all": (
        lambda folder: (
            (folder / form.QUANT_FILE).unlink(),
            edit_json(folder, "config.json", lambda v: v.pop("quantization_config")),
        ),
        f"{IN}.weight",
        "no config says how",
    ),
    "algorithm of a list": (
        both(lambda v: v["quantized_layers"][UP].update(quant_algo=[1])),
        form.QUANT_FILE,
        "quant_algo=[1] is not known",
    ),
    "config that is not JSON": (
        lambda folder: (folder / form.QUANT_FILE).write_text("{"),
        form.QUANT_FILE,
        "is not JSON",
    ),
    "config of a list": (
        lambda folder: (folder / form.QUANT_FILE).write_text("[]"),
        form.QUANT_FILE,
        "list",
    ),
    "exclude_modules of a number": (
        lambda folder: edit_json(
            folder, form.QUANT_FILE, lambda v: v["quantization"].update(exclude_modules=3)
        ),
        form.QUANT_FILE,
        "exclude_modules must be",
    ),
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        "config.json",
        "is not there",
    ),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_fault_in_a_config_is_named(fault, folder, check):
    edit, where, words = CONFIGS[fault]
    edit(folder)
    code, findings = check(folder)
    assert code == 2
    found = [f for f in errors(findings) if words in f["fault"]]
    assert found and where in (found[0]["tensor"], found[0]["file"]), findings


def test_one_algorithm_for_all_layers_and_a_plain_one_not_excluded(tmp_path, check):
    quantized(fp8=()).save_pretrained(tmp_path)
    details = json.loads((tmp_path / form.QUANT_FILE).read_text())["quantization"]
    assert details["quant_algo"] == "NVFP4" and "lm_head" in details["exclude_modules"]
    assert check(tmp_path) == (0, [])
    both(lambda v: (v.get("exclude_modules") or v["ignore"]).remove("lm_head"))(tmp_path)
    code, findings = check(tmp_path)
    assert code == 2
    assert [(f["tensor"], "plain F32" in f["fault"]) for f in findings] == [
        ("lm_head.weight", True)
    ]


def experts(folder, change=None):
    """A small LatentMoE checkpoint in Super's formats: experts NVFP4, shared experts and Mamba FP8, the rest plain."""
    config = HybridConfig(
        pattern="ME*",
        **SIZES,
        n_routed_experts=3,
        moe_intermediate_size=48,
        moe_latent_size=32,
        moe_shared_expert_intermediate_size=80,
    )
    formats, tensors = {}, {}
    dtypes = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    for name, shape in tensor_shapes(config.to_dict()).items():
        layer = name.removesuffix(".weight")
        if ".experts." in name:
            formats[layer] = form.LayerFormat("NVFP4", 16)
        elif "shared_experts" in name or layer.endswith(("in_proj", "out_proj")):
            formats[layer] = form.LayerFormat("FP8")
        if layer not in formats:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        for part, (dtype, size) in formats[layer].tensors(*shape).items():
            tensors[f"{layer}.{part}"] = torch.full(size, 0.01).to(dtypes[dtype])
    tensors["mtp.layers.0.enorm.weight"] = torch.ones(64)
    values = form.describe(formats, [])
    if change is not None:
        change(tensors)
    safetensors_torch.save_file(tensors, folder / "model.safetensors")
    (folder / form.QUANT_FILE).write_text(json.dumps(values))
    settings = config.to_dict() | {"quantization_config": form.mirror(values)}
    (folder / "config.json").write_text(json.dumps(settings))


EXPERT = "backbone.layers.1.mixer.experts.2.down_proj"


@pytest.mark.parametrize(
    ("change", "tensor", "words"),
    [
        (None, None, ""),
        (drop(f"{EXPERT}.input_scale"), f"{EXPERT}.input_scale", "never chosen in calibration"),
        (cut(f"{EXPERT}.weight"), f"{EXPERT}.weight", "expected (32, 24)"),
        (
            drop("backbone.layers.1.mixer.gate.weight"),
            "backbone.layers.1.mixer.gate.weight",
            "is missing",
        ),
        (drop(f"{EXPERT}.weight"), f"{EXPERT}.weight", "is missing"),
        (
            put("backbone.layers.1.mixer.experts.3.up_proj.weight", torch.ones(48, 32)),
            "backbone.layers.1.mixer.experts.3.up_proj.weight",
            "no layer of the model",
        ),
    ],
)
def test_experts_are_known_by_their_index(change, tensor, words, tmp_path, check):
    experts(tmp_path, change)
    code, findings = check(tmp_path, "--values", "all")
    assert [f["tensor"] for f in findings] == ([tensor] if tensor else [])
    assert all(words in f["fault"] for f in findings) and code == (2 if tensor else 0)


PREDICTS = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*"}


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (None, {}),
        (drop("mtp.layers.0.hnorm.weight"), {"mtp.layers.0.hnorm.weight": "is missing"}),
        (cut("mtp.layers.0.eh_proj.weight"), {"mtp.layers.0.eh_proj.weight": "the model needs"}),
        (
            put("mtp.layers.1.norm.weight", torch.ones(64)),
            {"mtp.layers.1.norm.weight": "no layer of the model"},
        ),
        (lambda t: [t.pop(n) for n in list(t) if "mtp" in n], {"": "no mtp.* tensors are stored"}),
    ],
)
def test_a_prediction_block_that_the_config_names_is_checked(change, faults, tmp_path, check):
    def add(tensors):
        settings = HybridConfig(pattern="ME*", **SIZES).to_dict() | PREDICTS
        shapes = {n: s for n, s in tensor_shapes(settings).items() if n.startswith("mtp.")}
        tensors |= {n: torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items()}
        if change is not None:
            change(tensors)

    experts(tmp_path, add)
    settings = json.loads((tmp_path / "config.json").read_text()) | PREDICTS
    (tmp_path / "config.json").write_text(json.dumps(settings))
    code, findings = check(tmp_path)
    assert {f["tensor"] for f in findings} == set(faults)
    assert all(faults[f["tensor"]] in f["fault"] for f in findings)
    assert code == (2 if faults.keys() - {""} else 0)


def test_many_findings_are_cut_short_on_a_terminal_only(folder, tigon_command, check):
    edit_tensors(folder, lambda t: [put(f"extra.{i}", torch.ones(1))(t) for i in range(60)])
    code, out = tigon_command("check-checkpoint", str(folder))
    assert code == 2 and "… and 20 more" in out and "60 errors" in out
    assert len(check(folder)[1]) == 60
