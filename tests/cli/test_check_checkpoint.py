"""tigon check-checkpoint: every fault alone, by its tensor; headers that lie; checkpoints without fault."""

import json
import math
import struct

import pytest
import torch

from tigon.integrations import modelopt_format as form
from tigon.models import HybridConfig, HybridLM
from tigon.models.shapes import tensor_shapes
from tigon.modules.fp8_linear import FP8Linear
from tigon.modules.nvfp4_linear import NVFP4Linear

safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
}
IN, UP, DOWN, Q, K = (
    "backbone.layers.0.mixer.in_proj",
    "backbone.layers.1.mixer.up_proj",
    "backbone.layers.1.mixer.down_proj",
    "backbone.layers.2.mixer.q_proj",
    "backbone.layers.2.mixer.k_proj",
)


def quantized(plain=("lm_head",), fp8=("in_proj", "out_proj")):
    """A small model, Mamba layers in FP8 and the rest in NVFP4, with static activation scales."""
    model = HybridLM(HybridConfig(pattern="M-*", **SIZES))
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith(plain):
            cls = FP8Linear if name.endswith(fp8) else NVFP4Linear
            layer = cls.from_linear(module, frozen=True)
            layer.input_scale = torch.tensor(0.01)
            model.set_submodule(name, layer)
    for name in (Q, K, Q.replace("q_", "v_")):
        model.get_submodule(name).weight_scale_2 = torch.tensor(1e-4)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    quantized().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy to spoil."""
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def check(tigon_command):
    """check(folder, *options) -> (exit code, findings)."""

    def run(folder, *options):
        code, out = tigon_command("check-checkpoint", str(folder), "--json", *options)
        report = json.loads(out)
        assert report["ok"] == (code == 0) == (not errors(report["findings"]))
        return code, report["findings"]

    return run


def errors(findings):
    return [f for f in findings if f["severity"] == "error"]


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    change(tensors)
    safetensors_torch.save_file(tensors, path)


def edit_json(folder, file, change):
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def test_a_checkpoint_without_fault_says_what_it_holds(good, tigon_command, check):
    code, out = tigon_command("check-checkpoint", str(good), "--values", "all")
    assert code == 0 and "0 errors, 0 warnings" in out
    assert "2 FP8, 6 NVFP4" in out
    assert check(good) == (0, [])


def test_no_folder_is_a_mistake_in_the_command(tigon_command, tmp_path):
    assert tigon_command("check-checkpoint", str(tmp_path / "none"))[0] == 1


def poison(name, byte):
    def change(t):
        t[name].view(torch.uint8).view(-1)[3] = byte

    return change


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


def raw_header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(change):
    """The header with one entry changed."""

    def edit(header):
        change(header[f"{UP}.weight"])
        return header

    return edit


def overlap(header):
    a, b = (header[f"{UP}.{part}"]["data_offsets"] for part in ("weight", "weight_scale"))
    size = b[1] - b[0]
    header[f"{UP}.weight_scale"]["data_offsets"] = [a[0] + 8, a[0] + 8 + size]
    return header


HEADERS = {  # change of the header -> words of the fault
    "beyond the end": (
        entry(lambda e: e.update(data_offsets=[10**12, 10**12 + 3072])),
        "ends at byte",
    ),
    "backwards": (entry(lambda e: e.update(data_offsets=[3072, 0])), "after its end"),
    "negative": (entry(lambda e: e.update(data_offsets=[-3072, 0])), "are not two positions"),
    "true is no number": (entry(lambda e: e.update(shape=[True, 3072])), "is not a list of sizes"),
    "negative size": (entry(lambda e: e.update(shape=[-1, 3072])), "is not a list of sizes"),
    "fraction": (entry(lambda e: e.update(shape=[96.0, 32])), "is not a list of sizes"),
    "huge product": (entry(lambda e: e.update(shape=[2**40, 2**40])), "data_offsets hold 3072"),
    "too few bytes": (entry(lambda e: e.update(shape=[96, 33])), "needs 3168 bytes"),
    "dtype": (entry(lambda e: e.update(dtype="F7")), "dtype 'F7' is not known"),
    "dtype of a list": (entry(lambda e: e.update(dtype=[])), "dtype [] is not known"),
    "wider dtype": (entry(lambda e: e.update(dtype="F32")), "needs 12288 bytes"),
    "no shape": (entry(lambda e: e.pop("shape")), "lacks dtype, shape or data_offsets"),
    "three offsets": (entry(lambda e: e.update(data_offsets=[0, 1, 2])), "are not two positions"),
    "overlap": (overlap, "overlaps"),
    "entry of a list": (lambda h: h | {f"{UP}.weight": []}, "lacks dtype"),
    "metadata": (lambda h: h | {"__metadata__": {"a": 1}}, "object of texts"),
    "a list": (lambda h: [], "not a JSON object"),
    "not JSON": (lambda h: b"{", "header is not JSON"),
    "not text": (lambda h: b"\xff\xfe{}", "header is not JSON"),
    "deep": (lambda h: b"[" * 200_000, "header is not JSON"),
    "twice": (
        lambda h: (
            json.dumps(h)[:-1] + f', "{UP}.weight": {json.dumps(h[f"{UP}.weight"])}}}'
        ).encode(),
        "named twice",
    ),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_the_file_cannot_hold_is_reported(fault, folder, check):
    change, words = HEADERS[fault]
    path = folder / "model.safetensors"
    header, data = raw_header(path)
    write_raw(path, change(header), data)
    code, findings = check(folder, "--values", "all")
    assert code == 2
    found = [f for f in errors(findings) if words in f["fault"]]
    assert found, findings
    assert found[0]["file"] == "model.safetensors"


def test_whatever_bytes_of_a_header_change_it_is_read_or_reported_as_safetensors_does(
    folder, check
):
    """Where safetensors refuses the file an error is reported; nothing raises."""
    import random

    from safetensors import SafetensorError, safe_open

    draw = random.Random(5)
    path = folder / "model.safetensors"
    original = path.read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    refused = 0
    for _ in range(150):
        data = bytearray(original)
        for _ in range(draw.randint(1, 3)):
            at = draw.choice([draw.randrange(8), 8 + draw.randrange(length)])
            data[at] = draw.choice([draw.randrange(256), *b'0123456789-,:"[]{}eE'])
        path.write_bytes(data)
        code, findings = check(folder, "--values", "none")
        try:
            with safe_open(path, "pt") as f:
                list(f.keys())
        except (SafetensorError, OverflowError):
            refused += 1
            assert code == 2 and any(f["file"] == path.name for f in errors(findings))
    assert refused > 50


def test_names_in_a_header_cannot_steer_the_terminal(folder, tigon_command):
    header, data = raw_header(folder / "model.safetensors")
    header["\x1b[2J\ud800"] = header.pop(f"{UP}.weight")
    write_raw(folder / "model.safetensors", header, data)
    code, out = tigon_command("check-checkpoint", str(folder))
    assert code == 2 and "\\x1b[2J\\ud800" in out and "\x1b" not in out


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": -3},
        {"hidden_size": "wide"},
        {"n_groups": 0},
        {"hybrid_override_pattern": "X"},
        {"hybrid_override_pattern": "E", "n_routed_experts": 10**12},
        {"time_step_limit": 3},
    ],
)
def test_sizes_that_make_no_model_leave_the_rest_checked(sizes, folder, check):
    edit_json(folder, "config.json", lambda v: v.update(sizes))
    edit_tensors(folder, poison(f"{UP}.weight_scale", 0x7F))
    code, findings = check(folder)
    assert code == 2 and any("shapes are not checked" in f["fault"] for f in findings)
    assert [f["tensor"] for f in errors(findings)] == [f"{UP}.weight_scale"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not even"),
        (b"\x05\0\0", "not even"),
        (struct.pack("<Q", 2**63) + b"{}", "header of"),
        (struct.pack("<Q", 3) + b"{}", "header of 3 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"{}" + b"\0" * 5, "belong to none"),
    ],
)
def test_a_file_that_is_no_safetensors_is_reported(content, words, folder, check):
    (folder / "model.safetensors").write_bytes(content)
    code, findings = check(folder)
    assert code == 2 and any(words in f["fault"] for f in findings), findings


def test_a_truncated_file_names_what_it_lost(folder, check):
    path = folder / "model.safetensors"
    header, _ = raw_header(path)
    last = max(
        (e["data_offsets"][1], name) for name, e in header.items() if name != "__metadata__"
    )[1]
    path.write_bytes(path.read_bytes()[:-1])
    code, findings = check(folder)
    assert code == 2 and last in [f["tensor"] for f in findings if "ends at byte" in f["fault"]]


@pytest.fixture
def sharded(tmp_path):
    quantized().save_pretrained(tmp_path, max_shard_size="8KB")
    return tmp_path


INDEX = "model.safetensors.index.json"
INDICES = {
    "shard that is not there": (
        lambda m: m.update({f"{UP}.weight": "model-9.safetensors"}),
        "which is not there",
    ),
    "tensor in another shard": (
        lambda m: m.update(
            {f"{UP}.weight": m["lm_head.weight"], "lm_head.weight": m[f"{UP}.weight"]}
        ),
        "the index has it in",
    ),
    "tensor that no shard has": (lambda m: m.update(ghost=m["lm_head.weight"]), "is not in model-"),
    "file outside": (
        lambda m: m.update({f"{UP}.weight": "../model.safetensors"}),
        "outside the folder",
    ),
    "absolute path": (lambda m: m.update({f"{UP}.weight": "/etc/passwd"}), "outside the folder"),
    "pickle": (lambda m: m.update({f"{UP}.weight": "model.bin"}), "never opened"),
    "number": (lambda m: m.update({f"{UP}.weight": 3}), "does not map"),
}


@pytest.mark.parametrize("fault", INDICES)
def test_an_index_that_does_not_fit_its_shards_is_reported(fault, sharded, check):
    change, words = INDICES[fault]
    assert check(sharded) == (0, [])
    edit_json(sharded, INDEX, lambda v: change(v["weight_map"]))
    code, findings = check(sharded)
    assert code == 2 and any(words in f["fault"] for f in errors(findings)), findings


def test_shards_beside_the_index_are_warned_of(sharded, check):
    extra = sharded / "extra.safetensors"
    safetensors_torch.save_file({"x": torch.ones(2)}, extra)
    code, findings = check(sharded)
    assert code == 0 and findings[0]["file"] == "extra.safetensors"


def test_only_pickled_weights_are_named_and_not_opened(folder, check):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    code, findings = check(folder)
    assert code == 2 and "never opened: pytorch_model.bin" in findings[0]["fault"]


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


def test_many_findings_are_cut_short_on_a_terminal_only(folder, tigon_command, check):
    edit_tensors(folder, lambda t: [put(f"extra.{i}", torch.ones(1))(t) for i in range(60)])
    code, out = tigon_command("check-checkpoint", str(folder))
    assert code == 2 and "… and 20 more" in out and "60 errors" in out
    assert len(check(folder)[1]) == 60
