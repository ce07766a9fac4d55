"""The functional API: arguments are checked, then a registered op runs on the backend that `select` names."""

from tigon.ops.conv1d import causal_conv1d, causal_conv1d_update
from tigon.ops.dispatch import backend, batch_invariant, explain
from tigon.ops.gemm import scaled_mm
from tigon.ops.moe import grouped_mm, moe_experts, moe_route, moe_sort
from tigon.ops.norm import gated_rms_norm, rms_norm
from tigon.ops.quantize import (
    GatedRMSNorm,
    RMSNorm,
    dequantize,
    quantize_fp8,
    quantize_mxfp8,
    quantize_nvfp4,
)
from tigon.ops.quantized import FP8Tensor, MXFP8Tensor, NVFP4Tensor
from tigon.ops.replay import (
    ReplayCache,
    ReplayCursor,
    replay_advance,
    replay_commit,
    replay_state,
    replay_store_window,
    replay_window,
)
from tigon.ops.routing import Routing
from tigon.ops.sampling import VerifyRule, sample, tree_ancestors, verify_draft, verify_tree
from tigon.ops.select_tokens import Selection, compact_tokens, select_tokens
from tigon.ops.ssd import ssd_scan, ssd_update
from tigon.ops.token_scores import attention_token_scores, ssd_token_scores
from tigon.ops.video_tokens import frame_difference_mask, video_redundancy_mask

__all__ = [
    "FP8Tensor",
    "GatedRMSNorm",
    "MXFP8Tensor",
    "NVFP4Tensor",
    "RMSNorm",
    "ReplayCache",
    "ReplayCursor",
    "Routing",
    "Selection",
    "VerifyRule",
    "attention_token_scores",
    "backend",
    "batch_invariant",
    "causal_conv1d",
    "causal_conv1d_update",
    "compact_tokens",
    "dequantize",
    "explain",
    "frame_difference_mask",
    "gated_rms_norm",
    "grouped_mm",
    "moe_experts",
    "moe_route",
    "moe_sort",
    "quantize_fp8",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "replay_advance",
    "replay_commit",
    "replay_state",
    "replay_store_window",
    "replay_window",
    "rms_norm",
    "sample",
    "scaled_mm",
    "select_tokens",
    "ssd_scan",
    "ssd_token_scores",
    "ssd_update",
    "tree_ancestors",
    "verify_draft",
    "verify_tree",
    "video_redundancy_mask",
]
