"""Products of quantized matrices: out = act(alpha (A B^T) + bias), A (m,k), B (n,k), any m, n, k.

A and B are what their codes and block scales stand for, exactly; alpha is the product of the scales that a tensor or a
row has. Accumulated in fp32, then scaled, biased, activated (relu2: max(x, 0)^2), and rounded once to `out_dtype`.

    a, b                                 multiplied as (see `launch_gemm`)
    fp8 tensor|row x fp8 tensor|row      the codes; on sm_80, which has no FP8 MMA, their values in fp16
    fp8 1x128 x fp8 128x128|1x128        the same, scaled every 128 of k
    bf16|fp16|fp32 x nvfp4               the plain operand's dtype (fp32: three TF32 products)
    fp8 tensor|row|1x128 x nvfp4         fp16
    nvfp4 x nvfp4                        4-bit MMA on sm_100 and sm_120, elsewhere fp16
    mxfp8 x mxfp8                        8-bit MMA on sm_100 and sm_120, elsewhere bf16

Decoding is exact, with one exception: an MXFP8 value below 2^-126 is rounded to a multiple of 2^-133 where it is
decoded to bf16. A value too large for bf16 is too large for fp32 as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels.gemm_decode import FOLD
from tigon.kernels.gemm_multiply import add_splits, multiply
from tigon.kernels.launch import plan, target
from tigon.kernels.launch_gemm import GemmConfig
from tigon.kernels.ssd_common import INTERPRETED, ensure_scratch

GRANULES = {"fp8-1x128": 1, "fp8-128x128": 128}
ROW_TILE, COLUMN_TILE = 1, 1024  # of add_splits: 8 elements a thread


class _Operand:
    """One side's kernel arguments: rows, pointers, pitches (elements between rows) and what is compiled in."""

    def __init__(self, codes, scale, tensor_scale, format, swizzled):
        self.codes, self.rows, self.format = _dense(codes), codes.shape[0], format.split("-")[0]
        self.swizzled = swizzled
        self.granule = GRANULES.get(format, 0)
        self.e5m2 = codes.dtype == torch.float8_e5m2
        self.outer = tensor_scale if format == "nvfp4" else scale
        self.scale = None
        if self.granule or format in ("nvfp4", "mxfp8"):
            self.scale = scale.view(torch.uint8) if scale.element_size() == 1 else scale
            self.scale = self.scale if swizzled else _dense(self.scale)
        if self.granule or format in ("plain", "mxfp8"):
            self.outer = None
        self.step = 0 if self.outer is None or self.outer.dim() == 0 else 1

    def pointers(self):
        return self.codes, self.scale, self.outer

    def is_aligned(self) -> bool:
        """Rows of codes, and tiles of scales, start on 16 bytes; no row is empty or overlaps the next: TMA's wishes."""
        size, width = self.codes.element_size(), self.codes.shape[1]
        starts = [self.codes, self.scale] if self.swizzled else [self.codes]
        whole = 0 < width <= _pitch(self.codes) and _pitch(self.codes) * size % 16 == 0
        return whole and all(t.data_ptr() % 16 == 0 for t in starts)

    def pitches(self):
        """(of codes, of block scales, of outer scales)"""
        return _pitch(self.codes), 0 if self.scale is None else _pitch(self.scale), self.step


def _dense(t: Tensor) -> Tensor:
    """`t` with neighbouring columns side by side."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def _pitch(t: Tensor) -> int:
    """Elements from row to row; what torch leaves there for a single row may be anything, so not that."""
    return t.stride(0) if t.dim() > 1 and t.shape[0] > 1 else t.shape[-1]


def _element(config: GemmConfig, left: _Operand, right: _Operand) -> tl.dtype | None:
    """What codes are decoded to; None: they are not. The interpreter knows neither NaN nor E5M2's small numbers."""
    if config.scaled or (config.kind == "fp8" and not INTERPRETED):
        return None
    for side in (left, right):
        if side.format == "plain":
            return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(
                side.codes.dtype, tl.float32
            )
    return tl.bfloat16 if left.format == "mxfp8" else tl.float16


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
    """(m,n) of out_dtype; written to, or with `accumulate` added to, `out` if given, whose rows may lie apart.

    Formats: "plain" (a tensor as it is), "nvfp4", "mxfp8", "fp8-tensor", "fp8-row", "fp8-1x128", "fp8-128x128".
    Batch-invariant: a row's bits depend neither on m nor on the other rows.
    """
    m, n = a.shape[0], b.shape[0]
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    if not (m and n):
        return out
    one = _Operand(a, a_scale, a_tensor_scale, a_format, a_swizzled)
    other = _Operand(b, b_scale, b_tensor_scale, b_format, b_swizzled)
    arch, sms = target(a.device)
    configs = plan(
        "scaled_mm", arch, m=m, n=n, k=k, itemsize=a.element_size(), a_format=a_format, b_format=b_format,
        batch_invariant=batch_invariant, sms=sms, aligned=one.is_aligned() and other.is_aligned(),
    )  # fmt: skip
    config = configs["multiply"]
    left, right = (other, one) if config.swap else (one, other)
    element = _element(config, left, right)
    if element is not None and (arch < 90 or INTERPRETED):
        one.codes, other.codes = _bytes(one.codes), _bytes(other.codes)
    folded = 1.0
    if element is not None:
        folded = FOLD.value ** ((left.format == "nvfp4") + (right.format == "nvfp4"))
    partial = "add_splits" in configs
    if config.tma and a.is_cuda:
        ensure_scratch()
    given = (
        torch.empty(config.splits, m, n, dtype=torch.float32, device=a.device) if partial else out
    )
    row = n if partial else _pitch(out)
    grid = (triton.cdiv(left.rows, config.left) * triton.cdiv(right.rows, config.right),)
    multiply[(*grid, config.splits if partial else 1)](
        *left.pointers(), *right.pointers(), bias, given, left.rows, right.rows, k, config.split_k,
        *left.pitches(), *right.pitches(), *((1, row) if config.swap else (row, 1)),
        LEFT_FORMAT=left.format, LEFT_E5M2=left.e5m2, LEFT_GRANULE=left.granule, LEFT_SWIZZLED=left.swizzled,
        RIGHT_FORMAT=right.format, RIGHT_E5M2=right.e5m2, RIGHT_GRANULE=right.granule, RIGHT_SWIZZLED=right.swizzled,
        DTYPE=element, SCALED=config.scaled, PROMOTE=config.promote, PRECISION=config.precision,
        WHOLE=k % config.block_k == 0, QUADS=config.quads, TMA=config.tma, WALK=config.walk, PARTIAL=partial,
        FOLDED=folded, SWAPPED=config.swap, RELU2=relu2, ACCUMULATE=accumulate,
        LEFT=config.left, RIGHT=config.right, BLOCK_K=config.block_k, BAND=config.band, UPCAST=INTERPRETED,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if partial:
        add_splits[(triton.cdiv(m, ROW_TILE), triton.cdiv(n, COLUMN_TILE))](
            given, one.outer, other.outer, bias, out, m, n, config.splits, one.step, other.step, _pitch(out),
            FOLDED=folded, RELU2=relu2, ACCUMULATE=accumulate,
            ROWS=ROW_TILE, BLOCK=COLUMN_TILE, UPCAST=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return out


def _bytes(t: Tensor) -> Tensor:
    """FP8 codes as bytes, to be decoded by their bits: Triton refuses their types below sm_89."""
    return t.view(torch.uint8) if t.element_size() == 1 else t
