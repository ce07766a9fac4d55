"""transformers' experts by its "grouped_mm" implementation: sorted rows and torch's grouped product."""

from collections.abc import Callable

from tigon.bench.peers.transformers import experts
from tigon.bench.workloads import Workload

OPS = ("moe_experts",)
PACKAGE = "transformers"


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    return experts(work, "grouped_mm")
