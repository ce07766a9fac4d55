"""mamba_ssm's Triton kernels.

The package asks for its CUDA part at import, which these kernels do not need: where that was left out, an empty
stand-in is there for as long as the import takes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType

from tigon.bench.peers.steps import by_token
from tigon.bench.workloads import Workload

OPS = ("ssd_scan", "ssd_update", "gated_rms_norm", "rms_norm")
CHUNK = 256  # the Mamba2 module's default
EPS = 1e-5
DEVICES = ("cuda",)
APART = True
PACKAGE = "mamba-ssm"
CUDA_PART = "selective_scan_cuda"


@contextlib.contextmanager
def without_cuda_part() -> Iterator[None]:
    missing = CUDA_PART not in sys.modules and find_spec(CUDA_PART) is None
    if missing:
        sys.modules[CUDA_PART] = ModuleType(CUDA_PART)
    try:
        yield
    finally:
        if missing:
            del sys.modules[CUDA_PART]


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op."""
    if work.op == "ssd_update" and work.variant != "plain":
        raise NotImplementedError(f"mamba_ssm has no {work.variant} states")
    with without_cuda_part():
        return {
            "ssd_scan": scan,
            "ssd_update": update,
            "gated_rms_norm": gated_norm,
            "rms_norm": norm,
        }[work.op](work)


def scan(work: Workload) -> Callable:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def call(inputs):
        given = {k: inputs[k] for k in ("dt", "A", "B", "C", "D", "dt_bias")}
        return mamba_chunk_scan_combined(inputs["x"], chunk_size=CHUNK, **given, **work.options)

    return call


def update(work: Workload) -> Callable:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    return by_token(selective_state_update)


def gated_norm(work: Workload) -> Callable:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    group = work.options["group_size"]

    def call(inputs):
        x, z, weight = inputs["x"], inputs["z"], inputs["weight"]
        options = {"eps": EPS, "group_size": group, "norm_before_gate": False}
        return (rmsnorm_fn(x, weight, None, z=z, **options),)

    return call


def norm(work: Workload) -> Callable:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    return lambda inputs: (rms_norm_fn(inputs["x"], inputs["weight"], None, eps=EPS),)
