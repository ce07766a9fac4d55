"""torch's own grouped product: CUTLASS on a GPU, a loop on a CPU."""

from collections.abc import Callable

import torch.nn.functional as F

from tigon.bench.workloads import Workload

OPS = ("grouped_mm",)
PACKAGE = "torch"


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    if not hasattr(F, "grouped_mm"):
        raise NotImplementedError("this torch has no grouped_mm")
    ends = work.options["offsets"][1:]
    return lambda inputs: (F.grouped_mm(inputs["x"], inputs["w"].mT, offs=ends),)
