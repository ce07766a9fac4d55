"""The CUDA C++ kernels of csrc/: found, planned, packed and launched.

``loader`` finds a way to them; ``mamba2``, ``replay``, ``quantize``, ``moe``, ``sampling`` and ``tokens`` hold a
launcher for each kernel.

Importing this package needs the standard library only, so that ``tigon doctor`` works without torch.
"""

from tigon.native import mamba2, moe, quantize, replay, sampling, tokens
from tigon.native.loader import (
    Extension,
    HostLibrary,
    Launch,
    Loader,
    RunTimeCompiler,
    available,
    cuda_headers,
    host_missing,
    load,
    sources,
    status,
    use_host_library,
)
from tigon.native.mamba2 import conv1d_update, ssd_update
from tigon.native.moe import moe_route, moe_route_backward, moe_sort
from tigon.native.quantize import dequantize, quantize_fp8, quantize_mxfp8, quantize_nvfp4
from tigon.native.replay import conv1d_replay, ssd_replay
from tigon.native.sampling import sample, tree_ancestors, verify_draft, verify_tree
from tigon.native.tokens import gather_rows, select_tokens

PLANS = mamba2.PLANS | replay.PLANS | quantize.PLANS | moe.PLANS | sampling.PLANS | tokens.PLANS

__all__ = [
    "Extension",
    "HostLibrary",
    "Launch",
    "Loader",
    "RunTimeCompiler",
    "available",
    "conv1d_replay",
    "conv1d_update",
    "cuda_headers",
    "dequantize",
    "gather_rows",
    "host_missing",
    "load",
    "moe_route",
    "moe_route_backward",
    "moe_sort",
    "plan",
    "quantize_fp8",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "sample",
    "select_tokens",
    "sources",
    "ssd_replay",
    "ssd_update",
    "status",
    "tree_ancestors",
    "use_host_library",
    "verify_draft",
    "verify_tree",
]


def plan(op: str, arch: int, **sizes: int) -> dict[str, Launch]:
    """What `op` launches for these sizes, as kernels/launch.py says it for Triton's kernels; for `explain`.

    The launches are the same for every arch.
    """
    return PLANS[op](**sizes)
