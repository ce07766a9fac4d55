"""Gradients of expert matrices: dW_e (n,k) = sum over the rows r of expert e of left_r right_r^T.

left (.., n) and right (.., k), one row each in expert order, or gathered: row r is that of its token, order[r] / top_k.
A program owns a tile of one expert's matrix and walks its rows; fp32 sums, rounded once to the output's dtype, or added
to what an fp32 output holds. An expert without rows gets zeros, or is left alone when adding.
"""

import triton
import triton.language as tl

from tigon.kernels.ssd_common import dot, narrow


@triton.jit
def load_rows(ptr, row, live, column, width, pitch):
    """(rows, columns), 0 outside."""
    at = ptr + (row * pitch)[:, None] + column[None, :]
    return tl.load(at, mask=live[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def weight_gradient(
    left_ptr, right_ptr, out_ptr, order_ptr, offsets_ptr, n, k, top_k, left_pitch, right_pitch,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (e,n,k). A program's tile is (COLUMNS of n, ROWS of k); BLOCK_K rows at a time."""
    blocks_n, blocks_k = tl.cdiv(n, COLUMNS), tl.cdiv(k, ROWS)
    program = tl.program_id(0)
    expert = (program // (blocks_n * blocks_k)).to(tl.int64)
    tile = program % (blocks_n * blocks_k)
    i = tile // blocks_k * COLUMNS + tl.arange(0, COLUMNS)
    j = tile % blocks_k * ROWS + tl.arange(0, ROWS)
    start = tl.load(offsets_ptr + expert).to(tl.int64)
    end = tl.load(offsets_ptr + (expert + 1)).to(tl.int64)
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    for row in range(start, end, BLOCK_K):
        place = row + tl.arange(0, BLOCK_K)
        live = place < end
        token = place
        if GATHER_LEFT or GATHER_RIGHT:
            token = (tl.load(order_ptr + place, mask=live, other=0) // top_k).to(tl.int64)
        left = load_rows(left_ptr, token if GATHER_LEFT else place, live, i, n, left_pitch)
        right = load_rows(right_ptr, token if GATHER_RIGHT else place, live, j, k, right_pitch)
        acc = dot(left.T, right, acc, PRECISION, UPCAST)
    at = out_ptr + expert * n * k + (i.to(tl.int64) * k)[:, None] + j[None, :]
    touched = tl.where(start < end, n, 0) if ACCUMULATE else n
    mask = (i < touched)[:, None] & (j < k)[None, :]
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, narrow(acc, out_ptr.dtype.element_ty, UPCAST), mask=mask)
