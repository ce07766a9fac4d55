"""Plain torch, eager: what a model writes without Tigon; for products, the dense one of the dequantized operands."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tigon.bench.peers.find import once
from tigon.bench.workloads import Workload

OPS = ("causal_conv1d", "rms_norm", "scaled_mm")


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    if work.op == "scaled_mm":
        return _product(work.dtype)
    return {"causal_conv1d": _conv, "rms_norm": _norm}[work.op]


def _product(dtype) -> Callable:
    """cuBLAS on a GPU. The operands are dequantized before the clock runs."""

    def dense(inputs):
        return [t if isinstance(t, torch.Tensor) else t.dequantize(dtype) for t in inputs.values()]

    prepared = once(dense)

    def call(inputs):
        a, b = prepared(inputs)
        return (a @ b.T,)

    return call


def _conv(inputs):
    x, weight = inputs["x"].transpose(1, 2), inputs["weight"].to(inputs["x"].dtype)
    width = weight.shape[1]
    y = F.conv1d(
        x, weight[:, None], inputs["bias"].to(x.dtype), padding=width - 1, groups=x.shape[1]
    )
    tail = F.pad(x, (width - 1, 0))[..., x.shape[2] :]
    return F.silu(y[..., : x.shape[2]]).transpose(1, 2), tail


def _norm(inputs):
    x = inputs["x"]
    return (F.rms_norm(x, x.shape[-1:], inputs["weight"].to(x.dtype), 1e-5),)
