"""Variants of an op: options that change what it does so much that each is measured by itself.

The first is the default. A variant of a decode step names the form of the state (dtype, rounding) and, with replay,
the tokens between two writes of it. A variant of `quantize_*` names the options, of `dequantize` the format, of
`scaled_mm` the formats of both operands, of `moe_*` the options (for experts foremost `save`). Standard library only.
"""

FORMATS = ("nvfp4", "mxfp8", "fp8-tensor", "fp8-row", "fp8-1x128", "fp8-128x128")

FLUSH = 16  # tokens between two writes of a state, with replay

VARIANTS: dict[str, dict[str, object]] = {
    "ssd_update": {
        "plain": {},
        "fp16-stochastic": {"state": "float16", "rounding": "stochastic"},
        "int8": {"state": "int8"},
        "e4m3": {"state": "float8_e4m3fn"},
        "replay": {"flush": FLUSH},
        "replay-fp16-stochastic": {
            "flush": FLUSH,
            "state": "float16",
            "rounding": "stochastic",
        },
        "replay-int8": {"flush": FLUSH, "state": "int8"},
        "replay-tree": {"flush": FLUSH, "tree": True},
    },
    "causal_conv1d_update": {
        "plain": {},
        "replay": {"flush": FLUSH},
        "replay-tree": {"flush": FLUSH, "tree": True},
    },
    "quantize_nvfp4": {
        "row": {},
        "both": {"axis": "both"},
        "weight": {"axis": "both", "block": "16x16"},
        "gradient": {"axis": "both", "rounding": "stochastic", "hadamard": True},
        "four-over-six": {"four_over_six": "mse"},
    },
    "quantize_mxfp8": {"row": {}, "both": {"axis": "both"}},
    "quantize_fp8": {name: {"granularity": name} for name in ("tensor", "row", "1x128", "128x128")},
    "dequantize": {format: format for format in FORMATS},
    "scaled_mm": {
        "fp8-row": ("fp8-row", "fp8-row"),
        "fp8-tensor": ("fp8-tensor", "fp8-tensor"),
        "fp8-block": ("fp8-1x128", "fp8-128x128"),
        "mxfp8": ("mxfp8", "mxfp8"),
        "w4a16": ("plain", "nvfp4"),
        "w4a8": ("fp8-row", "nvfp4"),
        "w4a4": ("nvfp4", "nvfp4"),
    },
    "moe_route": {
        "sigmoid": {},
        "softmax": {"score": "softmax", "normalize": False},
        "groups": {"groups": 4, "top_groups": 2},
        "losses": {"aux": "batch", "z_loss": True},
    },
    "moe_experts": {
        **{save: {"save": save} for save in ("hidden", "relu", "nothing")},
        "swiglu": {"activation": "swiglu"},
        "before-down": {"weight_placement": "before_down"},
        "nvfp4": {"format": "nvfp4"},
        "fp8": {"format": "fp8-row"},
    },
    "sample": {"plain": {}, "top-k-p": {"top_k": 50, "top_p": 0.9}, "greedy": {"temperature": 0.0}},
    "verify_draft": {
        "token": {"rule": "token", "draft_logits": True},
        "token-greedy-drafts": {"rule": "token", "draft_logits": False},
        "block": {"rule": "block", "draft_logits": True},
        "strict": {"rule": "strict", "draft_logits": False},
        "greedy": {"rule": "greedy", "draft_logits": False},
        "token-top-k-p": {"rule": "token", "draft_logits": True, "top_k": 50, "top_p": 0.9},
    },
    "verify_tree": {"strict": {"rule": "strict"}, "greedy": {"rule": "greedy"}},
    "ssd_token_scores": {"plain": {}, "decay": {"decay": True}},
}


def variants(op: str) -> tuple[str, ...]:
    """Their names; ("",) for an op that has none."""
    return tuple(VARIANTS.get(op, ("",)))


def chosen(op: str, variant: str | None) -> str:
    """`variant`, or the default if None. ValueError for an unknown one."""
    known = variants(op)
    if variant is None:
        return known[0]
    if variant not in known:
        names = f"it has {', '.join(known)}" if known[0] else "it has none"
        raise ValueError(f"{op} has no variant {variant!r}; {names}")
    return variant
