"""torch.compile of what torch_eager runs."""

from collections.abc import Callable

import torch

from tigon.bench.peers import torch_eager
from tigon.bench.workloads import Workload

OPS = torch_eager.OPS
PACKAGE = "torch"
LOOPS = ("grouped_mm", "moe_experts")
ON_CPU = ()


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op. The first call compiles.

    What was compiled before is forgotten: graphs of one op's variants and sizes would add up to dynamo's limit, past
    which it runs eagerly.
    """
    if work.op in LOOPS:
        raise NotImplementedError("its loop reads counts on the host")
    take, compute = torch_eager.PARTS[work.op](work)
    torch.compiler.reset()
    compiled = torch.compile(compute, fullgraph=True, dynamic=False)
    return lambda inputs: compiled(*take(inputs))
