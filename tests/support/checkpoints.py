"""A small quantized checkpoint to spoil, and the ways to do it."""

import json

import torch

from tigon.models import HybridConfig, HybridLM
from tigon.modules.fp8_linear import FP8Linear
from tigon.modules.nvfp4_linear import NVFP4Linear

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
IN, UP, Q, K = (
    "backbone.layers.0.mixer.in_proj",
    "backbone.layers.1.mixer.up_proj",
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


def errors(findings):
    return [f for f in findings if f["severity"] == "error"]


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(folder, file, change):
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def poison(name, byte):
    """The fourth byte of a tensor becomes this one."""

    def change(t):
        t[name].view(torch.uint8).view(-1)[3] = byte

    return change
