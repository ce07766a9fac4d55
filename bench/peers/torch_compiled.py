"""torch.compile of what torch_eager runs; on a CPU, where compiling takes seconds, only what fusion is for."""

from collections.abc import Callable

import torch

from tigon.bench.peers import torch_eager
from tigon.bench.workloads import Workload

OPS = torch_eager.OPS
PACKAGE = "torch"
LOOPS = ("grouped_mm", "moe_experts")
ON_CPU = (
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "rms_norm",
    "quantize_nvfp4",
    "quantize_mxfp8",
    "quantize_fp8",
    "dequantize",
    "moe_route",
)


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op. The first call compiles.

    What was compiled before is forgotten: graphs of one op's variants and sizes would add up to dynamo's limit, past
    which it runs eagerly.
    """
    if work.op in LOOPS:
        raise NotImplementedError("the loop reads counts on the host")
    on_gpu = any(t.device.type == "cuda" for t in work.inputs.values())
    if work.op not in ON_CPU and not on_gpu:
        raise NotImplementedError("not compiled on a CPU: little to fuse")
    take, compute = torch_eager.PARTS[work.op](work)
    torch.compiler.reset()
    compiled = torch.compile(compute, fullgraph=True, dynamic=False)
    return lambda inputs: compiled(*take(inputs))
