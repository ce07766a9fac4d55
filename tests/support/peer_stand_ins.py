"""Stand-ins for packages that need a GPU: the signatures of their functions (versions below), what they demand of their
arguments, and what their documentation says that they compute.

mamba-ssm 2.3.2, causal-conv1d 1.7.0, flash-attn 2.8.3, flash-linear-attention 0.6.0, flashinfer 0.7.2.
"""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F

import tigon
from tigon.reference.sampling import acceptance

INF = float("inf")
STAND_INS: dict[str, list] = {}


def stands_in(module):
    def register(function):
        STAND_INS.setdefault(module, []).append(function)
        return function

    return register


def install(monkeypatch, package):
    """The stand-ins of a package become what an import finds."""
    for path, functions in STAND_INS.items():
        if path.split(".")[0] == package:
            parts = path.split(".")
            for i in range(1, len(parts) + 1):
                name = ".".join(parts[:i])
                monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
            for function in functions:
                setattr(sys.modules[path], function.__name__, function)
    for name in list(sys.modules):
        parent, _, child = name.rpartition(".")
        if name.split(".")[0] == package and parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def rms_norm(x, weight, eps):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def a_number_a_head(*tensors):
    """Spread over the head's elements without a copy."""
    assert all(stride == 0 for t in tensors for stride in t.stride()[1:])


@stands_in("mamba_ssm.ops.triton.ssd_combined")
def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
    cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, INF), return_final_states=False,
    return_varlen_states=False,
):  # fmt: skip
    options = {"dt_softplus": dt_softplus, "return_final_states": return_final_states}
    return tigon.ssd_scan(x, dt, A, B, C, D=D, dt_bias=dt_bias, **options)


@stands_in("mamba_ssm.ops.triton.selective_state_update")
def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
    state_batch_indices=None,
):  # fmt: skip
    b, h, p, n = state.shape
    assert x.shape == dt.shape == (b, h, p) and A.shape == (h, p, n)
    assert D.shape == dt_bias.shape == (h, p) and dt.stride(-1) == 0
    a_number_a_head(A, D, dt_bias)
    given = (state, x, dt[..., 0].contiguous(), A[:, 0, 0], B, C)
    return tigon.ssd_update(*given, D=D[:, 0], dt_bias=dt_bias[:, 0], dt_softplus=dt_softplus)


@stands_in("mamba_ssm.ops.triton.layernorm_gated")
def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    options = {"eps": eps, "group_size": group_size, "norm_before_gate": norm_before_gate}
    return tigon.gated_rms_norm(x, z, weight, **options)


@stands_in("mamba_ssm.ops.triton.layer_norm")
def rms_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0,
    rowscale=None, prenorm=False, residual_in_fp32=False, return_dropout_mask=False,
):  # fmt: skip
    return rms_norm(x, weight, eps)


@stands_in("causal_conv1d")
def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
    final_states_out=None, activation=None,
):  # fmt: skip
    assert x.stride(1) == 1, "final states are of channels-last inputs"
    options = {"activation": activation, "return_final_state": True}
    y, final = tigon.causal_conv1d(x.transpose(1, 2), weight, bias, **options)
    return y.transpose(1, 2), final


@stands_in("causal_conv1d")
def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    y = tigon.causal_conv1d_update(x.transpose(1, 2), conv_state, weight, bias)
    return y.transpose(1, 2)


def _flash_norm(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0,
    rowscale=None, prenorm=False, residual_in_fp32=False, zero_centered_weight=False,
    return_dropout_mask=False, out_dtype=None, out=None, residual_out=None,
):  # fmt: skip
    return rms_norm(x, weight, eps)


_flash_norm.__name__ = "rms_norm_fn"
stands_in("flash_attn.ops.triton.layer_norm")(_flash_norm)


def _linear_attention(q, k, v, g, scale, state):
    """o_t = scale S_t q_t, S_t = exp(g_t) S_{t-1} + k_t v_t; heads share nothing."""
    assert q.shape == k.shape and v.shape[:3] == k.shape[:3] == g.shape and scale is not None
    b, length, h, n = k.shape
    S = torch.zeros(b, h, n, v.shape[3]) if state is None else state.float()
    out = []
    for t in range(length):
        S = S * g[:, t].exp()[..., None, None] + k[:, t, :, :, None] * v[:, t, :, None].float()
        out.append(scale * (q[:, t, :, :, None] * S).sum(-2))
    return torch.stack(out, 1).to(v.dtype), S


@stands_in("fla.ops.simple_gla")
def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
    state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    return _linear_attention(q, k, v, g, scale, initial_state)


@stands_in("fla.ops.simple_gla")
def fused_recurrent_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
    reverse=False, state_v_first=False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    return _linear_attention(q, k, v, g, scale, initial_state)


@stands_in("fla.modules.convolution")
def causal_conv1d(
    x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False,
    activation=None, backend="triton", cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None,
    cp_context=None, **kwargs,
):  # fmt: skip
    y = tigon.causal_conv1d(x, weight, bias, activation=activation)
    return y, x[:, -weight.shape[1] :].transpose(1, 2)


def _fla_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    assert x.shape[1] == 1 and cache.shape[2] == weight.shape[1], "a token, a window of the width"
    y = tigon.causal_conv1d_update(x, cache, weight, bias, activation=activation)
    return y, cache


_fla_update.__name__ = "causal_conv1d_update"
stands_in("fla.modules.convolution")(_fla_update)


def _fla_gated(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)


_fla_gated.__name__ = "rmsnorm_fn"
stands_in("fla.modules.layernorm_gated")(_fla_gated)


def _fla_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    return rms_norm(x, weight, eps)


_fla_norm.__name__ = "rms_norm"
stands_in("fla.modules.layernorm")(_fla_norm)


@stands_in("flashinfer.sampling")
def softmax(logits, temperature=None, enable_pdl=None):
    assert logits.dim() == 2
    return logits.softmax(-1)


@stands_in("flashinfer.sampling")
def sampling_from_logits(
    logits, indices=None, deterministic=True, generator=None, check_nan=False, seed=None,
    offset=None,
):  # fmt: skip
    assert logits.dim() == 2 and logits.dtype == torch.float32
    return logits.argmax(-1).int()


@stands_in("flashinfer.sampling")
def top_k_top_p_sampling_from_logits(
    logits, top_k, top_p, indices=None, filter_apply_order="top_k_first", deterministic=True,
    generator=None, check_nan=False, seed=None, offset=None,
):  # fmt: skip
    assert isinstance(top_k, int) and 0 < top_p < 1
    return sampling_from_logits(logits)


@stands_in("flashinfer.sampling")
def chain_speculative_sampling(
    draft_probs, draft_token_ids, target_probs, maybe_output_accepted_token_num=None,
    maybe_output_emitted_draft_token_num=None, deterministic=True, generator=None, seed=None,
    offset=None,
):  # fmt: skip
    d = draft_token_ids.long()[..., None]
    accept = acceptance(target_probs[:, :-1].gather(-1, d), draft_probs.gather(-1, d))[..., 0] > 0.5
    n = accept.long().cumprod(-1).sum(-1)
    out = F.pad(draft_token_ids, (0, 1))
    step = torch.arange(out.shape[1])
    last = target_probs.argmax(-1).to(torch.int32)
    out = torch.where(step == n[:, None], last, out).where(step <= n[:, None], -1)
    return out, n, n


@stands_in("flashinfer.mamba")
def ssd_combined_fwd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INF),
    initial_states=None, seq_idx=None, chunk_indices=None, chunk_offsets=None,
    seq_chunk_cumsum=None, update_seq_chunk_cumsum=False, checkpoint_token_indices=None,
    checkpoint_state_slots=None, checkpoint_states=None, out=None, return_final_states=True,
    num_seqs=None,
):  # fmt: skip
    assert x.dtype == B.dtype == C.dtype == D.dtype == torch.bfloat16 and A.dtype == torch.float32
    options = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
    y, final = tigon.ssd_scan(x, dt, A, B, C, return_final_states=True, **options)
    return y, final.to(x.dtype)


def _flashinfer_step(
    state, x, dt, A, B, C, D, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None,
    pad_slot_id=-1, state_scale=None, out=None, disable_state_update=False,
    intermediate_states_buffer=None, intermediate_state_indices=None,
    intermediate_state_scales=None, rand_seed=None, philox_rounds=10, cache_steps=0,
    algorithm="auto", dst_state_batch_indices=None, cu_seqlens=None, num_accepted_tokens=None,
    backend="auto",
):  # fmt: skip
    assert x.dim() == (4 if cache_steps else 3) and dt.shape == x.shape
    assert dt.dtype == D.dtype == dt_bias.dtype and A.dtype == torch.float32
    assert B.dtype == C.dtype == x.dtype and dt.stride()[-2:] == (1, 0)
    assert x.stride(-2) == x.shape[-1] and B.stride(-2) == B.shape[-1] and state.is_contiguous()
    a_number_a_head(A, D, dt_bias)
    if rand_seed is not None:
        assert rand_seed.shape == (1,) and rand_seed.dtype == torch.int64
    given = (state, x, dt[..., 0].contiguous(), A[:, 0, 0], B, C)
    return tigon.ssd_update(*given, D=D[:, 0], dt_bias=dt_bias[:, 0], dt_softplus=dt_softplus)


_flashinfer_step.__name__ = "selective_state_update"
stands_in("flashinfer.mamba")(_flashinfer_step)


@stands_in("flashinfer.norm")
def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    assert input.dtype == weight.dtype
    return rms_norm(input, weight, eps)


@stands_in("flashinfer")
def fp4_quantize(
    input, global_scale=None, sf_vec_size=16, sf_use_ue8m0=False, is_sf_swizzled_layout=True,
    is_sf_8x4_layout=False, is_global_scale_inversed=False, enable_pdl=None, backend="cuda",
    nvfp4_4over6=None,
):  # fmt: skip
    assert input.dtype != torch.float32 and global_scale.shape == (1,)
    assert global_scale.dtype == torch.float32 and not is_sf_swizzled_layout
    q = tigon.quantize_nvfp4(input, amax=2688 / global_scale[0])
    return q.codes, q.block_scale.view(torch.uint8).flatten()


@stands_in("flashinfer")
def mxfp8_quantize(
    input, is_sf_swizzled_layout=True, alignment=32, enable_pdl=None, backend="cuda",
    sf_swizzle_layout=None,
):  # fmt: skip
    assert input.dtype != torch.float32 and not is_sf_swizzled_layout
    q = tigon.quantize_mxfp8(input)
    return q.codes, q.block_scale.flatten()


@stands_in("flashinfer.gemm")
class SegmentGEMMWrapper:
    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.int8

    def run(
        self, x, weights, batch_size, weight_column_major, out=None, seg_lens=None,
        seg_indptr=None, weight_indices=None,
    ):  # fmt: skip
        assert seg_indptr.dtype == torch.int64 and weights.shape[0] == batch_size
        w = weights.mT if weight_column_major else weights
        return torch.cat([rows @ m for rows, m in zip(x.split(seg_indptr.diff().tolist()), w)])
