"""The list of ops as data. Standard library only: `tigon doctor` and `tigon list` read it without torch.

Every op has one reference and one GPU implementation, named "module:function" and imported at first use.
Both functions have the same signature.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Op:
    """name: of the registered op `tigon::<name>`. kind: "triton" or "cuda", the language of its kernel.
    public: whether users call it (backward ops are not). sizes: a real shape, by symbol of the API.

    The rest is what the table of support says, and tests/ops/test_support.py proves: archs: of GPUs, as in sm_90.
    takes: dtypes and formats beside `dtypes`. ragged: how rows or sequences of different lengths come. compiles:
    under torch.compile in one graph; captures: in a CUDA graph, as nothing is read from the device. invariant: a
    row's bits are independent of the rest of the batch "always", "in its mode" (batch-invariant), or "" (they cannot).
    """

    name: str
    family: str
    kind: str
    summary: str
    reference: str
    kernel: str
    backward: str | None = None
    public: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    sizes: dict[str, int] = field(default_factory=dict)
    archs: tuple[int, ...] = (80, 90, 100, 120)
    takes: str = ""
    ragged: str = ""
    compiles: bool = True
    captures: bool = True
    invariant: str = "in its mode"


_SUPER = {"b": 1, "l": 8192, "h": 128, "p": 64, "g": 8, "n": 128}
_SUPER_STEP = {"b": 64, "m": 1, "h": 128, "p": 64, "g": 8, "n": 128}
_SUPER_CONV = {"b": 1, "l": 8192, "d": 10240, "width": 4}

_ALL = (
    Op(
        "ssd_scan",
        "mamba2",
        "triton",
        "Mamba-2 (SSD) scan over whole sequences, dense or packed",
        "tigon.reference.ssd:ssd_forward",
        "tigon.kernels.ssd_forward:ssd_forward",
        backward="ssd_scan_backward",
        sizes=_SUPER,
        ragged="cu_seqlens; states and their gradients by sequence",
    ),
    Op(
        "ssd_scan_backward",
        "mamba2",
        "triton",
        "Gradients of ssd_scan",
        "tigon.reference.ssd:ssd_backward",
        "tigon.kernels.ssd_backward:ssd_backward",
        public=False,
        sizes=_SUPER,
    ),
    Op(
        "ssd_update",
        "mamba2",
        "cuda",
        "Mamba-2 decode step: 1 to 16 tokens a call on slot-indexed states",
        "tigon.reference.ssd:ssd_update",
        "tigon.native:ssd_update",
        sizes=_SUPER_STEP,
        takes="state also int8, E4M3",
        ragged="slots, padding, 1 to 16 tokens a row; with replay 1 to 32, chains and trees",
        invariant="always",
    ),
    Op(
        "ssd_replay",
        "mamba2",
        "cuda",
        "ssd_update with rollback by replay: 1 to 32 tokens a call, chains and trees",
        "tigon.reference.ssd_replay:ssd_replay",
        "tigon.native:ssd_replay",
        public=False,
        sizes=_SUPER_STEP,
    ),
    Op(
        "causal_conv1d",
        "mamba2",
        "triton",
        "Depthwise causal convolution with SiLU, dense or packed",
        "tigon.reference.conv1d:conv1d_forward",
        "tigon.kernels.causal_conv1d:conv1d_forward",
        backward="causal_conv1d_backward",
        sizes=_SUPER_CONV,
        ragged="cu_seqlens; states by sequence",
    ),
    Op(
        "causal_conv1d_backward",
        "mamba2",
        "triton",
        "Gradients of causal_conv1d",
        "tigon.reference.conv1d:conv1d_backward",
        "tigon.kernels.causal_conv1d:conv1d_backward",
        public=False,
        sizes=_SUPER_CONV,
    ),
    Op(
        "causal_conv1d_update",
        "mamba2",
        "cuda",
        "Decode step of the causal convolution: 1 to 16 tokens a call on slot-indexed windows",
        "tigon.reference.conv1d:conv1d_update",
        "tigon.native:conv1d_update",
        sizes={"b": 64, "m": 1, "d": 10240, "width": 4},
        ragged="as ssd_update",
        invariant="always",
    ),
    Op(
        "conv1d_replay",
        "mamba2",
        "cuda",
        "causal_conv1d_update with rollback by replay: 1 to 32 tokens a call, chains and trees",
        "tigon.reference.conv1d_replay:conv1d_replay",
        "tigon.native:conv1d_replay",
        public=False,
        sizes={"b": 64, "m": 1, "d": 10240, "width": 4},
    ),
    Op(
        "gated_rms_norm",
        "mamba2",
        "triton",
        "RMSNorm with a SiLU gate, whole rows or groups of channels",
        "tigon.reference.norm:norm_forward",
        "tigon.kernels.gated_norm:norm_forward",
        backward="gated_rms_norm_backward",
        sizes={"t": 8192, "d": 8192, "group_size": 1024},
    ),
    Op(
        "gated_rms_norm_backward",
        "mamba2",
        "triton",
        "Gradients of gated_rms_norm and rms_norm",
        "tigon.reference.norm:norm_backward",
        "tigon.kernels.gated_norm:norm_backward",
        public=False,
        sizes={"t": 8192, "d": 8192, "group_size": 1024},
    ),
    Op(
        "rms_norm",
        "mamba2",
        "triton",
        "RMSNorm",
        "tigon.reference.norm:norm_forward",
        "tigon.kernels.gated_norm:norm_forward",
        backward="gated_rms_norm_backward",
        sizes={"t": 8192, "d": 4096},
    ),
    Op(
        "rms_statistics",
        "mamba2",
        "triton",
        "Inverse root mean squares of rows or groups, for quantizers that apply the norm themselves",
        "tigon.reference.norm:rms_statistics",
        "tigon.kernels.gated_norm:rms_statistics",
        public=False,
        sizes={"t": 8192, "d": 8192, "group_size": 1024},
    ),
    Op(
        "quantize_nvfp4",
        "low precision",
        "cuda",
        "To NVFP4: E2M1 in blocks of 16 or 16x16, nearest, stochastic or four-over-six, with a Hadamard transform",
        "tigon.reference.quantize:quantize_nvfp4",
        "tigon.native:quantize_nvfp4",
        sizes={"m": 8192, "k": 4096},
        invariant="always",
    ),
    Op(
        "quantize_mxfp8",
        "low precision",
        "cuda",
        "To MXFP8: FP8 in blocks of 32 with power-of-two scales",
        "tigon.reference.quantize:quantize_mxfp8",
        "tigon.native:quantize_mxfp8",
        sizes={"m": 8192, "k": 4096},
        invariant="always",
    ),
    Op(
        "quantize_fp8",
        "low precision",
        "cuda",
        "To FP8 with a scale a tensor, a row, 1x128 or 128x128",
        "tigon.reference.quantize:quantize_fp8",
        "tigon.native:quantize_fp8",
        sizes={"m": 8192, "k": 4096},
        invariant="always",
    ),
    Op(
        "dequantize",
        "low precision",
        "cuda",
        "NVFP4, MXFP8 and FP8 back to fp32, bf16 or fp16",
        "tigon.reference.quantize:dequantize",
        "tigon.native:dequantize",
        sizes={"m": 18560, "k": 4096},
        takes="from NVFP4, MXFP8, FP8",
        invariant="always",
    ),
    Op(
        "scaled_mm",
        "low precision",
        "triton",
        "Products of FP8, MXFP8 and NVFP4 matrices, and of bf16 or fp16 with NVFP4",
        "tigon.reference.gemm:scaled_mm",
        "tigon.kernels.gemm:scaled_mm",
        sizes={"m": 8192, "n": 18560, "k": 4096},
        takes="of NVFP4, MXFP8, FP8, or plain x NVFP4",
    ),
    Op(
        "moe_route",
        "moe",
        "cuda",
        "Scores, top-k choice, weights, counts, loss sums and the order by expert",
        "tigon.reference.moe:moe_route",
        "tigon.native:moe_route",
        backward="moe_route_backward",
        dtypes=("float32",),
        sizes={"t": 8192, "e": 512, "k": 22},
        ragged="masks; sums by sequence",
        invariant="always",
    ),
    Op(
        "moe_route_backward",
        "moe",
        "cuda",
        "Gradient of moe_route",
        "tigon.reference.moe:moe_route_backward",
        "tigon.native:moe_route_backward",
        public=False,
        dtypes=("float32",),
        sizes={"t": 8192, "e": 512, "k": 22},
    ),
    Op(
        "moe_sort",
        "moe",
        "cuda",
        "Counts, offsets and the order by expert of choices that were made elsewhere",
        "tigon.reference.moe:moe_sort",
        "tigon.native:moe_sort",
        dtypes=("int32", "int64"),
        sizes={"t": 8192, "e": 512, "k": 22},
        ragged="skipped choices",
        invariant="",
    ),
    Op(
        "grouped_mm",
        "moe",
        "triton",
        "Rows in expert order times each expert's matrix",
        "tigon.reference.experts:grouped_mm",
        "tigon.kernels.grouped_gemm:grouped_mm",
        backward="grouped_mm_backward",
        sizes={"rows": 180224, "e": 512, "n": 2688, "k": 1024},
        ragged="rows by expert",
    ),
    Op(
        "grouped_mm_backward",
        "moe",
        "triton",
        "Gradients of grouped_mm",
        "tigon.reference.experts:grouped_mm_backward",
        "tigon.kernels.grouped_gemm:grouped_mm_backward",
        public=False,
        sizes={"rows": 180224, "e": 512, "n": 2688, "k": 1024},
    ),
    Op(
        "moe_experts",
        "moe",
        "triton",
        "Expert MLPs, ReLU^2 or SwiGLU, on routed rows, and their weighted sum",
        "tigon.reference.experts:moe_experts",
        "tigon.kernels.grouped_gemm:moe_experts",
        backward="moe_experts_backward",
        sizes={"t": 8192, "k": 22, "e": 512, "m": 2688, "l": 1024},
        takes="weights also NVFP4, FP8, without their gradients",
        ragged="rows by expert",
    ),
    Op(
        "moe_experts_backward",
        "moe",
        "triton",
        "Gradients of moe_experts",
        "tigon.reference.experts:moe_experts_backward",
        "tigon.kernels.grouped_gemm:moe_experts_backward",
        public=False,
        sizes={"t": 8192, "k": 22, "e": 512, "m": 2688, "l": 1024},
    ),
    Op(
        "sample",
        "speculative decoding",
        "cuda",
        "A draw a row at temperature, top-k and top-p, with random bits by seed and position",
        "tigon.reference.sampling:sample",
        "tigon.native:sample",
        sizes={"b": 32, "V": 131072},
        ragged="settings by row",
        invariant="always",
    ),
    Op(
        "verify_draft",
        "speculative decoding",
        "cuda",
        "Drafts against the target's logits: lossless by token, block, own draw or argmax",
        "tigon.reference.sampling:verify_draft",
        "tigon.native:verify_draft",
        sizes={"b": 32, "K": 5, "V": 131072},
        ragged="rules, settings and numbers of drafts by row",
        invariant="always",
    ),
    Op(
        "verify_tree",
        "speculative decoding",
        "cuda",
        "A tree of drafts against the target's own draws",
        "tigon.reference.sampling:verify_tree",
        "tigon.native:verify_tree",
        sizes={"b": 32, "N": 16, "V": 131072},
        ragged="trees and settings by row",
        invariant="always",
    ),
    Op(
        "tree_ancestors",
        "speculative decoding",
        "cuda",
        "Ancestor bits and depths of draft trees",
        "tigon.reference.sampling:tree_ancestors",
        "tigon.native:tree_ancestors",
        dtypes=("int32",),
        sizes={"b": 32, "N": 16},
        ragged="trees by row",
        invariant="always",
    ),
    Op(
        "attention_token_scores",
        "token reduction",
        "triton",
        "Softmax weights of a few queries on listed keys, reduced over heads and queries",
        "tigon.reference.token_scores:attention_token_scores",
        "tigon.kernels.token_scores:attention_token_scores",
        sizes={"nq": 64, "nk": 32768, "hq": 32, "hkv": 8, "dim": 128},
        ragged="queries and keys by sequence",
    ),
    Op(
        "ssd_token_scores",
        "token reduction",
        "triton",
        "The hidden attention of Mamba-2 of a few queries on listed tokens, reduced over heads and queries",
        "tigon.reference.token_scores:ssd_token_scores",
        "tigon.kernels.token_scores:ssd_token_scores",
        sizes={"nq": 64, "nk": 32768, "h": 128, "g": 8, "n": 128},
        ragged="queries and keys by sequence",
    ),
    Op(
        "select_tokens",
        "token reduction",
        "cuda",
        "The best tokens of each sequence in their order, counts on the device",
        "tigon.reference.select_tokens:select_tokens",
        "tigon.native:select_tokens",
        dtypes=("float32",),
        sizes={"t": 32768, "s": 4, "keep": 2048},
        ragged="counts by sequence, on the device",
        invariant="always",
    ),
    Op(
        "compact_tokens",
        "token reduction",
        "cuda",
        "Kept rows of several tensors, moved in one launch",
        "tigon.reference.select_tokens:gather_rows",
        "tigon.native:gather_rows",
        backward="compact_tokens_backward",
        sizes={"t": 32768, "d": 4096, "kept": 8192},
        takes="any other of up to 8 bytes",
        ragged="sequences of any length",
        invariant="always",
    ),
    Op(
        "compact_tokens_backward",
        "token reduction",
        "cuda",
        "Gradients of compact_tokens",
        "tigon.reference.select_tokens:gather_rows",
        "tigon.native:gather_rows",
        public=False,
        sizes={"t": 32768, "d": 4096, "kept": 8192},
    ),
)

OPS: dict[str, Op] = {op.name: op for op in _ALL}
PUBLIC: dict[str, Op] = {name: op for name, op in OPS.items() if op.public}
