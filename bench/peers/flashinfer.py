"""flashinfer: sampling, decode steps, norms, quantizers and segmented products; compiled for the GPU at the first call.

Its random numbers are its own, of one seed for all rows. Where it wants another layout or dtype, bringing the inputs
there is part of the call.
"""

from collections.abc import Callable

import torch

from tigon.bench.peers.find import once
from tigon.bench.peers.steps import spread
from tigon.bench.workloads import Workload

OPS = (
    "sample",
    "verify_draft",
    "ssd_scan",
    "ssd_update",
    "rms_norm",
    "quantize_nvfp4",
    "quantize_mxfp8",
    "grouped_mm",
)
DEVICES = ("cuda",)
PACKAGE = "flashinfer-python"
KNOWN = {
    "sample": ("plain", "top-k-p"),
    "verify_draft": ("token", "token-greedy-drafts"),
    "ssd_update": ("plain", "fp16-stochastic"),
    "quantize_nvfp4": ("row",),
    "quantize_mxfp8": ("row",),
}
EPS = 1e-5
WORKSPACE = 128 << 20  # bytes, as its documentation advises


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    if work.variant not in KNOWN.get(work.op, ("",)):
        raise NotImplementedError(f"flashinfer has no {work.op} {work.variant}")
    kinds = (sample, chain, scan, update, norm, nvfp4, mxfp8, segments)
    return dict(zip(OPS, kinds))[work.op](work)


def sample(work: Workload) -> Callable:
    from flashinfer import sampling

    if work.variant == "plain":
        return lambda inputs: (sampling.sampling_from_logits(inputs["logits"].float()),)
    k, p = work.options["top_k"], work.options["top_p"]
    draw = sampling.top_k_top_p_sampling_from_logits
    return lambda inputs: (draw(inputs["logits"].float(), k, p),)


def chain(work: Workload) -> Callable:
    """chain_speculative_sampling takes probabilities; its softmaxes are part of the call."""
    from flashinfer.sampling import chain_speculative_sampling, softmax

    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        return softmax(logits.flatten(0, 1).float()).view(logits.shape)

    def call(inputs):
        target, tokens = inputs["target_logits"], inputs["draft_tokens"]
        p = probabilities(target)
        if "draft_logits" in inputs:
            q = probabilities(inputs["draft_logits"])
        else:
            q = torch.zeros_like(p[:, :-1]).scatter_(-1, tokens.long()[..., None], 1.0)
        out, _, _ = chain_speculative_sampling(q, tokens, p)
        return out, (out >= 0).sum(-1, dtype=torch.int32) - 1

    return call


def scan(work: Workload) -> Callable:
    """For Blackwell. States are of the activations' dtype."""
    from flashinfer.mamba import ssd_combined_fwd

    def call(inputs):
        x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
        options = {"D": inputs["D"].to(x.dtype), "dt_bias": inputs["dt_bias"]}
        return ssd_combined_fwd(x, dt, A, B, C, dt_softplus=True, **options)

    return call


def update(work: Workload) -> Callable:
    """All tokens in one call. dt is of the dtype of D and dt_bias, so it becomes fp32."""
    from flashinfer.mamba import selective_state_update

    parameters = once(spread)

    def call(inputs):
        state, x, B, C = (inputs[name] for name in ("state", "x", "B", "C"))
        A, D, bias = parameters(inputs)
        m, options = x.shape[1], {"dt_bias": bias, "dt_softplus": True}
        if work.variant == "fp16-stochastic":
            options["rand_seed"] = inputs["seeds"][:1]
        dt = inputs["dt"].float()[..., None].expand(x.shape)
        if m == 1:
            x, dt, B, C = (t[:, 0] for t in (x, dt, B, C))
        else:
            options["cache_steps"] = m
        y = selective_state_update(state, x, dt, A, B, C, D, **options)
        return y[:, None] if m == 1 else y, state

    return call


def norm(work: Workload) -> Callable:
    from flashinfer.norm import rmsnorm

    def call(inputs):
        x = inputs["x"]
        return (rmsnorm(x, inputs["weight"].to(x.dtype), eps=EPS),)

    return call


def nvfp4(work: Workload) -> Callable:
    """The amax is taken first, by torch."""
    from flashinfer import fp4_quantize

    def call(inputs):
        x = inputs["x"]
        scale = 2688.0 / x.abs().amax().float()
        codes, blocks = fp4_quantize(x, scale.view(1), 16, is_sf_swizzled_layout=False)
        blocks = blocks.view(torch.float8_e4m3fn).view(x.shape[0], -1)
        return codes.view(torch.uint8), blocks, 1 / scale

    return call


def mxfp8(work: Workload) -> Callable:
    from flashinfer import mxfp8_quantize

    def call(inputs):
        x = inputs["x"]
        codes, scale = mxfp8_quantize(x, is_sf_swizzled_layout=False)
        return codes, scale.view(torch.uint8).view(x.shape[0], -1)

    return call


def segments(work: Workload) -> Callable:
    from flashinfer.gemm import SegmentGEMMWrapper

    offsets = work.options["offsets"].long()
    wrapper = SegmentGEMMWrapper(offsets.new_empty(WORKSPACE, dtype=torch.int8))
    count = offsets.shape[0] - 1

    def call(inputs):
        return (wrapper.run(inputs["x"], inputs["w"], count, True, seg_indptr=offsets),)

    return call
