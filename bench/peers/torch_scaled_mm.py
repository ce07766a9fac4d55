"""torch's own scaled products: cuBLASLt on a GPU, oneDNN on a CPU.

What needs which chip is torch's affair (128 blocks Hopper, MXFP8 and NVFP4 Blackwell); where it refuses, that is told.
"""

from collections.abc import Callable

import torch

from tigon.bench.peers.find import once
from tigon.bench.workloads import Workload

OPS = ("scaled_mm",)
PACKAGE = "torch"


def build(work: Workload) -> Callable:
    """inputs -> outputs of the op; scales are brought into torch's layouts before the clock runs."""
    kinds = {"fp8-tensor": _outer, "fp8-row": _outer, "fp8-block": _blocks}
    kinds |= {"mxfp8": _packed, "w4a4": _packed}
    if work.variant not in kinds:
        raise NotImplementedError(f"torch._scaled_mm has no {work.variant}")
    prepare = once(lambda inputs: kinds[work.variant](inputs["a"], inputs["b"]))
    return lambda inputs: (prepare(inputs)(work.options["out_dtype"]),)


def _outer(a, b) -> Callable:
    scale_a, scale_b = a.scale, b.scale
    if scale_a.dim():
        scale_a, scale_b = scale_a[:, None], scale_b[None, :]
    right = b.codes.t()

    def product(dtype):
        return torch._scaled_mm(a.codes, right, scale_a, scale_b, out_dtype=dtype)

    return product


def _blocks(a, b) -> Callable:
    from torch.nn.functional import ScalingType, scaled_mm

    # 1x128 scales lie row after row of k, 128x128 ones too with k padded to 4.
    scale_a = a.scale.t().contiguous().t()
    n, k = b.scale.shape
    padded = b.scale.new_ones(n, -(-k // 4) * 4)
    padded[:, :k] = b.scale
    kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    right, scale_b = b.codes.t(), padded[:, :k].t()

    def product(dtype):
        return scaled_mm(a.codes, right, scale_a, kinds[0], scale_b, kinds[1], output_dtype=dtype)

    return product


def _packed(a, b) -> Callable:
    from tigon.reference.quantize import swizzle

    def scale(q):
        return q.block_scale if q.scale_layout == "128x4" else swizzle(q.block_scale)

    scales, right, alpha = [scale(a), scale(b)], b.codes, None
    left = a.codes
    if a.codes.dtype == torch.uint8:
        left, right = (t.view(torch.float4_e2m1fn_x2) for t in (left, right))
        alpha = a.tensor_scale * b.tensor_scale
    else:
        scales = [s.view(torch.float8_e8m0fnu) for s in scales]

    def product(dtype):
        out = torch._scaled_mm(left, right.t(), *scales, out_dtype=dtype)
        return out if alpha is None else out.mul_(alpha)

    return product
