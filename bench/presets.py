"""Sizes of an op in a published model, and the slice of them that a CPU computes in a fraction of a second.

Tokens, batch and sequence counts are the registry's; the model gives the widths.
"""

from tigon.models.config import HybridConfig
from tigon.models.presets import preset as config_of
from tigon.registry import OPS

# What two cores do in a fraction of a second: fewer tokens and rows, fewer experts, a share of a wide matrix.
CPU = {
    "ssd_scan": {"l": 512, "h": 64},
    "ssd_update": {"b": 8},
    "causal_conv1d": {"l": 512},
    "causal_conv1d_update": {"b": 64},
    "gated_rms_norm": {"t": 512},
    "rms_norm": {"t": 1024},
    "quantize_nvfp4": {"m": 512},
    "quantize_mxfp8": {"m": 512},
    "quantize_fp8": {"m": 512},
    "dequantize": {"m": 512},
    "scaled_mm": {"m": 64, "n": 1024},
    "moe_route": {"t": 512},
    "moe_sort": {"t": 1024},
    "grouped_mm": {"rows": 512, "e": 8, "n": 672},
    "moe_experts": {"t": 256, "k": 4, "e": 16, "m": 672, "l": 512},
    "sample": {"b": 4},
    "verify_draft": {"b": 2},
    "verify_tree": {"b": 1},
    "attention_token_scores": {"nk": 4096},
    "ssd_token_scores": {"nk": 4096},
    "select_tokens": {"t": 32768},
    "compact_tokens": {"t": 2048, "kept": 512},
}
# The size that grows with what a user feeds in, which sweeps vary.
MOVING = {
    "ssd_scan": "l",
    "ssd_update": "b",
    "causal_conv1d": "l",
    "causal_conv1d_update": "b",
    "gated_rms_norm": "t",
    "rms_norm": "t",
    "quantize_nvfp4": "m",
    "quantize_mxfp8": "m",
    "quantize_fp8": "m",
    "dequantize": "m",
    "scaled_mm": "m",
    "moe_route": "t",
    "moe_sort": "t",
    "grouped_mm": "rows",
    "moe_experts": "t",
    "sample": "b",
    "verify_draft": "b",
    "verify_tree": "b",
    "tree_ancestors": "b",
    "attention_token_scores": "nk",
    "ssd_token_scores": "nk",
    "select_tokens": "t",
    "compact_tokens": "t",
}


class NoSuchLayer(ValueError):
    """The model has no layer that calls the op."""


def widths(op: str, model: HybridConfig) -> dict[str, int]:
    """What the model fixes of the sizes of `op`. NoSuchLayer where none of its layers calls it."""
    d_inner = model.mamba_num_heads * model.mamba_head_dim
    states = 2 * model.n_groups * model.ssm_state_size
    heads = {"h": model.mamba_num_heads, "g": model.n_groups, "n": model.ssm_state_size}
    in_proj = 2 * d_inner + states + model.mamba_num_heads
    if OPS[op].family == "moe":
        if "E" not in model.pattern:
            raise NoSuchLayer(f"{op}: a model without experts")
        latent = model.moe_latent_size or model.hidden_size
        experts, top = model.n_routed_experts, model.num_experts_per_tok
        hidden = model.moe_intermediate_size
        return {
            "moe_route": {"e": experts, "k": top},
            "moe_sort": {"e": experts, "k": top},
            "grouped_mm": {"rows": 8192 * top, "e": experts, "n": hidden, "k": latent},
            "moe_experts": {"e": experts, "k": top, "m": hidden, "l": latent},
        }[op]
    known = {
        "ssd_scan": heads | {"p": model.mamba_head_dim},
        "ssd_update": heads | {"p": model.mamba_head_dim},
        "causal_conv1d": {"d": d_inner + states, "width": model.conv_kernel},
        "causal_conv1d_update": {"d": d_inner + states, "width": model.conv_kernel},
        "gated_rms_norm": {"d": d_inner, "group_size": d_inner // model.n_groups},
        "dequantize": {"m": in_proj, "k": model.hidden_size},
        "scaled_mm": {"n": in_proj, "k": model.hidden_size},
        "sample": {"V": model.vocab_size},
        "verify_draft": {"V": model.vocab_size},
        "verify_tree": {"V": model.vocab_size},
        "attention_token_scores": {
            "hq": model.num_attention_heads,
            "hkv": model.num_key_value_heads,
            "dim": model.head_dim,
        },
        "ssd_token_scores": heads,
        "rms_norm": {"d": model.hidden_size},
        "compact_tokens": {"d": model.hidden_size},
    }
    hidden = {"k": model.hidden_size} if op.startswith("quantize") else {}
    return known.get(op, hidden)


def sizes(op: str, preset: str | None = None, device: str = "cuda") -> dict[str, int]:
    """The sizes to run: the registry's, a model's in their place, a slice of them on the CPU."""
    found = dict(OPS[op].sizes)
    if preset is not None:
        try:
            found |= widths(op, config_of(preset))
        except NoSuchLayer as error:
            raise NoSuchLayer(
                f"{error} ({preset}); tigon list presets shows which have E layers"
            ) from None
    if device == "cpu":
        found |= {name: min(size, found[name]) for name, size in CPU.get(op, {}).items()}
    return found


def sweep(op: str, sizes: dict[str, int]) -> tuple[str, list[int]]:
    """The letter that grows with the input, and two smaller values of it: a sixteenth and a quarter."""
    letter = MOVING[op]
    least = {
        "select_tokens": sizes.get("s", 1) * sizes.get("keep", 1),
        "compact_tokens": sizes.get("kept", 1),
    }
    values = {max(least.get(op, 1), sizes[letter] // share) for share in (16, 4)}
    return letter, sorted(value for value in values if value < sizes[letter])
