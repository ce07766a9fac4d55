"""Rows in expert order times each expert's matrix: y_r = W_e x_r, or W_e^T x_r.

x (rows,k), W (e,n,k) plain, FP8 or NVFP4, or transposed (e,k,n); y (rows,n) in expert order, or in the order of the
choices, so that a token's rows lie together for `combine`. Sums in fp32, rounded once to y's dtype.

The weights are the left side of the MMA, whose tile is 64 or 128 high whatever there is; an expert's rows are its right
side, from 16 on, so that few rows waste little and codes are decoded where registers feed the MMA.
"""

import triton
import triton.language as tl

from tigon.kernels.gemm_multiply import load_outer
from tigon.kernels.gemm_operands import load_operand
from tigon.kernels.grouped_gemm_tiles import find_rows, local_places, tile_rows
from tigon.kernels.ssd_common import dot, narrow


@triton.jit
def load_weight(
    w_ptr, scale_ptr, expert, column, n, k, k0, w_pitch, scale_pitch,
    FORMAT: tl.constexpr, E5M2: tl.constexpr, DTYPE: tl.constexpr, TRANSPOSED: tl.constexpr, QUADS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(columns, BLOCK_K) of DTYPE: rows `column` of the expert's (n,k), or columns of its (k,n) if TRANSPOSED."""
    if TRANSPOSED:
        inner = k0 + tl.arange(0, BLOCK_K)
        at = w_ptr + expert * k * w_pitch + (inner.to(tl.int64) * w_pitch)[:, None]
        mask = (column < n)[None, :]
        mask = mask if WHOLE else mask & (inner < k)[:, None]
        return tl.load(at + column[None, :], mask=mask, other=0.0).T
    else:
        row = expert * n + tl.minimum(column, n - 1)
        tile = load_operand(
            w_ptr, scale_ptr, row, 0, w_pitch, scale_pitch, k0, k,
            FORMAT, E5M2, False, DTYPE, BLOCK_K, WHOLE, QUADS, False, UPCAST,
        )  # fmt: skip
        return tile if UPCAST else tile.to(DTYPE)


@triton.jit
def multiply_tile(
    w_ptr, scale_ptr, expert, column, n, x_ptr, x_row, first, last, k, w_pitch, scale_pitch, x_pitch,
    FORMAT: tl.constexpr, E5M2: tl.constexpr, TRANSPOSED: tl.constexpr, QUADS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS_LEFT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(rows, columns) fp32: sum over k in [first, last) of x[x_row, k] w[column, k]. x_row int64, any rows."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if ROWS_LEFT:
        acc = tl.zeros((x_row.shape[0], column.shape[0]), tl.float32)
    else:
        acc = tl.zeros((column.shape[0], x_row.shape[0]), tl.float32)
    for step in range(first // BLOCK_K, tl.cdiv(last, BLOCK_K)):
        k0 = step * BLOCK_K
        w = load_weight(
            w_ptr, scale_ptr, expert, column, n, k, k0, w_pitch, scale_pitch,
            FORMAT, E5M2, DTYPE, TRANSPOSED, QUADS, WHOLE, BLOCK_K, UPCAST,
        )  # fmt: skip
        x = load_operand(
            x_ptr, None, x_row, 0, x_pitch, 0, k0, k,
            "plain", False, False, DTYPE, BLOCK_K, WHOLE, QUADS, False, UPCAST,
        )  # fmt: skip
        if ROWS_LEFT:
            acc = dot(x, w.T, acc, PRECISION, UPCAST)
        else:
            acc = dot(w, x.T, acc, PRECISION, UPCAST)
    return acc if ROWS_LEFT else acc.T


@triton.jit
def scale_columns(acc, outer_ptr, expert, column, n, step, FOLDED: tl.constexpr):
    """(rows, columns) times the scale of the expert's tensor (step 0) or of its row `column` (step 1)."""
    if FOLDED != 1.0:
        acc *= FOLDED
    if outer_ptr is not None:
        acc *= load_outer(outer_ptr, expert * n + tl.minimum(column, n - 1), step)[None, :]
    return acc


@triton.jit
def multiply_rows(
    x_ptr, w_ptr, scale_ptr, outer_ptr, out_ptr,
    tiles_ptr, indices_ptr, order_ptr, offsets_ptr, first, experts,
    rows, n, k, split_k, x_pitch, w_pitch, scale_pitch, outer_step,
    FORMAT: tl.constexpr, E5M2: tl.constexpr, FOLDED: tl.constexpr, TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr,
    QUADS: tl.constexpr, WHOLE: tl.constexpr, ROWS_LEFT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (rows,n); with a second grid axis (segments of k), (segments, rows, n) partial sums.

    SCATTER: row r goes where its choice order[r] is.
    """
    blocks = tl.cdiv(n, COLUMNS)
    program = tl.program_id(0)
    item, block = (program // blocks).to(tl.int64), program % blocks
    expert, start, end = find_rows(
        item, tiles_ptr, indices_ptr, order_ptr, offsets_ptr, first, experts, ROWS
    )
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    segment = tl.program_id(1)
    begin = segment * split_k
    for row in range(start, end, ROWS):
        place, here, live = tile_rows(row, end, ROWS)
        acc = multiply_tile(
            w_ptr, scale_ptr, expert, column, n, x_ptr, here, begin, tl.minimum(begin + split_k, k), k,
            w_pitch, scale_pitch, x_pitch,
            FORMAT, E5M2, TRANSPOSED, QUADS, WHOLE, ROWS_LEFT, PRECISION, BLOCK_K, UPCAST,
        )  # fmt: skip
        acc = scale_columns(acc, outer_ptr, expert, column, n, outer_step, FOLDED)
        if SCATTER:
            place = tl.load(order_ptr + here).to(tl.int64)
        at = out_ptr + segment.to(tl.int64) * rows * n + (place * n)[:, None] + column[None, :]
        mask = live[:, None] & (column < n)[None, :]
        tl.store(at, narrow(acc, out_ptr.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def zero_tail(out_ptr, offsets_ptr, experts, rows, n, BLOCK: tl.constexpr):
    """Rows of no expert, offsets[experts] on, are zeros. Each program takes every num_programs-th."""
    _, end = local_places(offsets_ptr, experts)
    for row in range(end + tl.program_id(0), rows, tl.num_programs(0)):
        at = out_ptr + tl.cast(row, tl.int64) * n
        for done in range(0, n, BLOCK):
            column = done + tl.arange(0, BLOCK)
            tl.store(at + column, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=column < n)
