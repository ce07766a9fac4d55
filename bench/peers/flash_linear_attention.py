"""flash-linear-attention: its norms and convolutions, and simple gated linear attention for the scan and its step.

With q = C, k = B, v = dt x and g = dt A that attention is Mamba-2's recurrence but for D x. Its heads share nothing, so
B and C are spread over them; what Tigon does inside one op, softplus and D x among it, is part of the call.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tigon.bench.peers.find import once
from tigon.bench.workloads import Workload

OPS = (
    "ssd_scan",
    "ssd_update",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "rms_norm",
)
DEVICES = ("cuda",)
PACKAGE = "flash-linear-attention"
EPS = 1e-5


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    if work.variant not in ("", "plain"):
        raise NotImplementedError(f"flash-linear-attention has no {work.op} {work.variant}")
    kinds = (scan, update, convolution, convolution_update, gated_norm, norm)
    return dict(zip(OPS, kinds))[work.op](work)


def _attention(inputs) -> tuple[torch.Tensor, ...]:
    """(q, k, v, g) of (b,l,h,…)."""
    x, B, C = (inputs[name] for name in ("x", "B", "C"))
    heads = x.shape[2] // B.shape[2]
    dt = F.softplus(inputs["dt"].float() + inputs["dt_bias"])
    v = (x * dt[..., None]).to(x.dtype)
    return *(t.repeat_interleave(heads, 2) for t in (C, B)), v, dt * inputs["A"]


def _skip(inputs) -> torch.Tensor:
    return inputs["x"] * inputs["D"][:, None].to(inputs["x"].dtype)


def scan(work: Workload) -> Callable:
    from fla.ops.simple_gla import chunk_simple_gla

    def call(inputs):
        y, final = chunk_simple_gla(*_attention(inputs), scale=1.0, output_final_state=True)
        return y + _skip(inputs), final.transpose(-1, -2)

    return call


def update(work: Workload) -> Callable:
    """Its state has n before p, and a new one comes out of every call."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    held = once(lambda inputs: [inputs["state"].transpose(-1, -2).contiguous()])

    def call(inputs):
        state = held(inputs)
        options = {"scale": 1.0, "initial_state": state[0], "output_final_state": True}
        y, state[0] = fused_recurrent_simple_gla(*_attention(inputs), **options)
        return y + _skip(inputs), state[0].transpose(-1, -2)

    return call


def convolution(work: Workload) -> Callable:
    from fla.modules.convolution import causal_conv1d

    def call(inputs):
        x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
        y, last = causal_conv1d(x, weight, bias, activation="silu", output_final_state=True)
        return y, last[..., 1:]  # it keeps as many inputs as the kernel is wide

    return call


def convolution_update(work: Workload) -> Callable:
    """Its window is one input wider."""
    from fla.modules.convolution import causal_conv1d_update

    held = once(lambda inputs: F.pad(inputs["conv_state"], (1, 0)))

    def call(inputs):
        x, window = inputs["x"], held(inputs)
        parameters = {"weight": inputs["weight"], "bias": inputs["bias"], "activation": "silu"}
        y = [
            causal_conv1d_update(x[:, j : j + 1], window, **parameters)[0]
            for j in range(x.shape[1])
        ]
        return torch.cat(y, 1) if len(y) > 1 else y[0], window[..., 1:]

    return call


def gated_norm(work: Workload) -> Callable:
    from fla.modules.layernorm_gated import rmsnorm_fn

    options = {"eps": EPS, "group_size": work.options["group_size"], "norm_before_gate": False}
    return lambda inputs: (
        rmsnorm_fn(inputs["x"], inputs["weight"], None, z=inputs["z"], **options),
    )


def norm(work: Workload) -> Callable:
    from fla.modules.layernorm import rms_norm

    return lambda inputs: (rms_norm(inputs["x"], inputs["weight"], None, eps=EPS),)
