"""Products of quantized matrices: out = act(alpha (A B^T) + bias), in plain PyTorch.

A (m,k) and B (n,k) are what their codes and block scales stand for, exactly; alpha is the product of the scales a
tensor or row has. Accumulated in fp32 (in fp64 for fp64 outputs: the oracle).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.reference.quantize import block_values

ROWS = 16  # of a tile in batch-invariant mode, where a BLAS must not see how many rows there are


def _outer(scale: Tensor | None, tensor_scale: Tensor | None, format: str) -> Tensor | None:
    """The scale of the tensor or of each row, that is of the epilogue."""
    if format == "nvfp4":
        return tensor_scale
    return scale if format in ("fp8-tensor", "fp8-row") else None


def scaled_mm(
    a: Tensor,
    a_scale: Tensor | None,
    a_tensor_scale: Tensor | None,
    a_format: str,
    a_swizzled: bool,
    b: Tensor,
    b_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    b_format: str,
    b_swizzled: bool,
    k: int,
    bias: Tensor | None,
    relu2: bool,
    out_dtype: torch.dtype,
    out: Tensor | None,
    accumulate: bool,
    batch_invariant: bool = False,
) -> Tensor:
    """(m,n) of out_dtype; written to, or with `accumulate` added to, `out` if given.

    Formats: "plain" (a tensor as it is), "nvfp4", "mxfp8", "fp8-tensor", "fp8-row", "fp8-1x128", "fp8-128x128".
    """
    acc = torch.float64 if out_dtype == torch.float64 else torch.float32
    left = a if a_format == "plain" else block_values(a, a_scale, a_format, k, a_swizzled)
    right = b if b_format == "plain" else block_values(b, b_scale, b_format, k, b_swizzled)
    left, right = left.to(acc), right.to(acc)
    if batch_invariant and left.shape[0]:
        count = left.shape[0]
        tiles = F.pad(left, (0, 0, 0, -count % ROWS)).split(ROWS)
        result = torch.cat([tile @ right.T for tile in tiles])[:count]
    else:
        result = left @ right.T
    over_m = _outer(a_scale, a_tensor_scale, a_format)
    over_n = _outer(b_scale, b_tensor_scale, b_format)
    if over_m is not None and over_m.dim():
        over_m = over_m[:, None]
    if over_m is not None and over_n is not None:
        result = result * (over_m * over_n)
    elif over_m is not None or over_n is not None:
        result = result * (over_n if over_m is None else over_m)
    if bias is not None:
        result = result + bias.to(acc)
    if relu2:
        result = F.relu(result).square()
    if out is None:
        return result.to(out_dtype)
    return out.add_(result) if accumulate else out.copy_(result)
