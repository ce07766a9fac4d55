"""Sum of a token's rows: y_t = T(sum_j w_tj T(rows_tj)), in fp32, in the order of its choices.

rows (segments, t k, l) in the order of the choices: in x's dtype T, or partial sums in fp32 that are added first. Only
choices made here count: those with a place in [offsets[0], offsets[experts]). Without weights, w is 1.
"""

import triton
import triton.language as tl

from tigon.kernels.experts_up import rounded
from tigon.kernels.grouped_gemm_tiles import local_places
from tigon.kernels.ssd_common import narrow


@triton.jit
def combine(
    rows_ptr, weights_ptr, inverse_ptr, offsets_ptr, out_ptr, experts, choices, l,
    TOP_K: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (t,l). A program sums BLOCK columns of one token. Unrolled by 8, so that as many loads are under way."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    blocks = tl.cdiv(l, BLOCK)
    program = tl.program_id(0)
    token = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    begin, end = local_places(offsets_ptr, experts)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.range(0, TOP_K, loop_unroll_factor=8):
        choice = token * TOP_K + j
        place = tl.load(inverse_ptr + choice)
        mask = column < tl.where((place >= begin) & (place < end), l, 0)
        row = tl.load(rows_ptr + choice * l + column, mask=mask, other=0.0).to(tl.float32)
        for segment in tl.static_range(1, SEGMENTS):
            at = rows_ptr + (choice + segment * tl.cast(choices, tl.int64)) * l
            row += tl.load(at + column, mask=mask, other=0.0)
        if SEGMENTS > 1:
            row = rounded(row, DTYPE, UPCAST)
        if weights_ptr is not None:
            row = tl.where(mask, row * tl.load(weights_ptr + choice), 0.0)
        total += row
    at = out_ptr + token * l + column
    tl.store(at, narrow(total, DTYPE, UPCAST), mask=column < l)
