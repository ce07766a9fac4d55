"""Plain torch, eager: what a model writes without Tigon. The code is in the folder `eager`, by family.

Draft trees have none: models keep them as lists on the host.
"""

from collections.abc import Callable

from tigon.bench.peers.eager import lowprec, mamba2, moe, sampling, tokens
from tigon.bench.workloads import Workload

PARTS = mamba2.PARTS | lowprec.PARTS | moe.PARTS | sampling.PARTS | tokens.PARTS
OPS = tuple(PARTS)
PACKAGE = "torch"


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    take, compute = PARTS[work.op](work)
    return lambda inputs: compute(*take(inputs))
