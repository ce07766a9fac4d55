"""Runs by itself, in a process of its own: nvidia-modelopt quantizes small models on the CPU and exports them.

    python modelopt_export.py PEERS OUT        PEERS: the folder where modelopt is installed

Writes OUT/<case>/checkpoint, what `export_hf_checkpoint` writes, and OUT/<case>/truth.safetensors: `ids`, `logits` of
modelopt's fake-quantized model, `weight.<layer>`, modelopt's own dequantization of what it exported. OUT/plain has the
logits before quantization. Exit code 3 and one line if modelopt cannot be imported.

modelopt's fake quantizers in blocks need a GPU; here they are made of its own tensor classes, which do not.
"""

import copy
import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

warnings.simplefilter("ignore")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 160,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "time_step_min": 1e-6,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 96,
    "moe_latent_size": 32,
}


def nemotron(pattern="M-*M", dtype=torch.float32, **options):
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(**SIZES, **options, hybrid_override_pattern=pattern)
    return prepared(NemotronHForCausalLM(config), dtype)


def llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return prepared(LlamaForCausalLM(config), dtype)


def prepared(model, dtype):
    """Weights away from their small initial values, where every model says the same."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.15 if p.dim() > 1 else 0.05) * torch.randn_like(p))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    return model.to(dtype).eval()


def cases(mtq):
    """Name -> (model, config)."""
    mixed = copy.deepcopy(mtq.W4A16_NVFP4_CFG)
    nvfp4 = next(e["cfg"] for e in mtq.NVFP4_DEFAULT_CFG["quant_cfg"] if "cfg" in e)
    fp8 = {"num_bits": (4, 3), "axis": None}
    for part in ("weight", "input"):
        mixed["quant_cfg"] += [
            {"quantizer_name": f"*mixer.{side}_proj.{part}_quantizer", "cfg": fp8, "enable": True}
            for side in ("in", "out")
        ]
        mixed["quant_cfg"] += [
            {"quantizer_name": f"*down_proj.{part}_quantizer", "cfg": nvfp4, "enable": True},
            {"quantizer_name": f"*[qkvo]_proj.{part}_quantizer", "enable": False},
        ]
    cached = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    cached["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    half = torch.bfloat16
    return {
        "fp8": (nemotron(), mtq.FP8_DEFAULT_CFG),
        "fp8-row": (nemotron(), mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG),
        "fp8-block": (nemotron(), mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG),
        "fp8-cache": (nemotron(), cached),
        "mxfp8": (nemotron(), mtq.MXFP8_DEFAULT_CFG),
        "nvfp4": (nemotron(), mtq.NVFP4_DEFAULT_CFG),
        "nvfp4-bf16": (nemotron(dtype=half), mtq.NVFP4_DEFAULT_CFG),
        "nvfp4-bias": (
            nemotron(use_bias=True, mlp_bias=True, attention_bias=False),
            mtq.NVFP4_DEFAULT_CFG,
        ),
        "w4a16": (nemotron(), mtq.W4A16_NVFP4_CFG),
        "w4a8": (nemotron(), mtq.W4A8_NVFP4_FP8_CFG),
        "mixed": (nemotron(), mixed),
        "awq": (nemotron("M*-"), mtq.NVFP4_AWQ_LITE_CFG),
        "experts": (nemotron("ME*", dtype=half, **EXPERTS), mtq.NVFP4_DEFAULT_CFG),
        "experts-w4a16": (nemotron("ME*", **EXPERTS), mtq.W4A16_NVFP4_CFG),
        "llama": (llama(), mtq.NVFP4_DEFAULT_CFG),
    }


def block_quantize(x, block, amax, num_bits, exponent_bits, scale_bits, scale_exponent_bits):
    """What modelopt's CUDA kernel computes, by its tensor classes."""
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    flat = x.reshape(-1, x.shape[-1]).float()
    if num_bits == 8:
        q, scale = MXFP8QTensor.quantize(flat)
        return q.dequantize(torch.float32, scale=scale).view(x.shape).to(x.dtype)
    # Weights of W4A8_NVFP4_FP8, the one preset with blocks of 32, by the scale that the export then writes.
    double = amax.float().amax() / (448 if block == 32 else 6 * 448)
    q, scale, double = NVFP4QTensor.quantize(flat, block, weights_scaling_factor_2=double)
    out = q.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: block})
    return out.view(x.shape).to(x.dtype)


def dequantized(folder):
    """modelopt's own dequantization of every quantized layer of a checkpoint."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    found = {}
    for name, scale in tensors.items():
        layer, _, part = name.rpartition(".")
        if part != "weight_scale":
            continue
        weight = tensors[f"{layer}.weight"]
        if weight.dtype == torch.uint8:
            shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
            double = tensors[f"{layer}.weight_scale_2"]
            sizes = {-1: shape[1] // scale.shape[1]}
            q = NVFP4QTensor(shape, torch.float32, weight)
            value = q.dequantize(scale=scale, double_scale=double, block_sizes=sizes)
        elif scale.dtype == torch.uint8:
            q = MXFP8QTensor(weight.shape, torch.float32, weight)
            value = q.dequantize(scale=scale)
        else:
            blocks = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
            sizes = None
            if scale.dim() == 1:
                scale = scale[:, None]
            elif scale.dim() > 1 or scale.numel() == blocks[0] * blocks[1] > 1:
                scale, sizes = scale.reshape(blocks), {-1: 128, -2: 128}
            q = FP8QTensor(weight.shape, torch.float32, weight)
            value = q.dequantize(scale=scale, block_sizes=sizes)
        found[f"weight.{layer}"] = value.float().contiguous()
    return found


def main(peers, out):
    sys.path.append(peers)
    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers
        from modelopt.torch.quantization import tensor_quant
    except ImportError as error:
        print(error)
        return 3
    tensor_quant.dynamic_block_quantize_op = block_quantize
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))
    failed = {}
    with torch.no_grad():
        for name, (model, config) in cases(mtq).items():
            folder = out / name
            folder.mkdir(parents=True)
            before = model(ids).logits
            try:
                model = mtq.quantize(model, config, lambda m: m(ids))
                requantize_resmooth_fused_llm_layers(
                    model
                )  # as the export does: q, k, v share scales
                truth = {"ids": ids, "plain": before, "logits": model(ids).logits}
                export_hf_checkpoint(model, export_dir=folder / "checkpoint")
                save_file(truth | dequantized(folder / "checkpoint"), folder / "truth.safetensors")
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
    (out / "failed.json").write_text(json.dumps(failed, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
