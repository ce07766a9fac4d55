"""First product of an expert MLP, with its activation: a_r = act(U_e x_r), times w_r if the weight comes first.

x (t,l), its rows gathered by `order` where they are loaded; U (e,m,l), for SwiGLU (e,2m,l) with the gate rows first.
Writes a (rows,m) in expert order, and h or relu(h) for backward. Rounded to x's dtype T where the definition says so:

    h = T(U x);  relu2: T(relu(h)^2 [w]), one rounding;  swiglu: T(T(silu(gate)) up), then T(. w)

For SwiGLU a program multiplies gate and up rows of the same columns, in turn: neighbours in the tile are a pair.
"""

import triton
import triton.language as tl

from tigon.kernels.gated_norm import silu
from tigon.kernels.grouped_gemm_rows import multiply_tile, scale_columns
from tigon.kernels.grouped_gemm_tiles import find_rows, tile_rows
from tigon.kernels.ssd_common import narrow


@triton.jit
def rounded(v, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 -> DTYPE -> fp32."""
    return v if tl.float32 == DTYPE else narrow(v, DTYPE, UPCAST).to(tl.float32)


@triton.jit
def hidden_rows(block, m, SWIGLU: tl.constexpr, COLUMNS: tl.constexpr):
    """(columns of the activation, rows of U that make them). Past the end, rows are those of the last column."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    if SWIGLU:
        place = tl.arange(0, 2 * COLUMNS)
        return column, tl.minimum(block * COLUMNS + place // 2, m - 1) + place % 2 * m
    else:
        return column, column


@triton.jit
def split_gates(h, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(gate, up), each (rows, columns), of the product of `hidden_rows`."""
    return tl.split(h.reshape(ROWS, COLUMNS, 2))


@triton.jit
def up_activate(
    x_ptr, w_ptr, scale_ptr, outer_ptr, weights_ptr, out_ptr, kept_ptr,
    tiles_ptr, indices_ptr, order_ptr, offsets_ptr, first, experts,
    top_k, m, l, x_pitch, w_pitch, scale_pitch, outer_step,
    FORMAT: tl.constexpr, E5M2: tl.constexpr, FOLDED: tl.constexpr, SWIGLU: tl.constexpr, KEEP_RELU: tl.constexpr,
    QUADS: tl.constexpr, WHOLE: tl.constexpr, ROWS_LEFT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """weights_ptr: None if they come after the second product; kept_ptr: None if nothing is kept."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    blocks = tl.cdiv(m, COLUMNS)
    program = tl.program_id(0)
    item, block = (program // blocks).to(tl.int64), program % blocks
    expert, start, end = find_rows(
        item, tiles_ptr, indices_ptr, order_ptr, offsets_ptr, first, experts, ROWS
    )
    width = 2 * m if SWIGLU else m
    column, source = hidden_rows(block, m, SWIGLU, COLUMNS)
    base = tl.load(offsets_ptr).to(tl.int64)
    for row in range(start, end, ROWS):
        place, here, live = tile_rows(row, end, ROWS)
        choice = tl.load(order_ptr + here)
        token = (choice // top_k).to(tl.int64)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + choice)[:, None]
        acc = multiply_tile(
            w_ptr, scale_ptr, expert, source, width, x_ptr, token, 0, l, l, w_pitch, scale_pitch, x_pitch,
            FORMAT, E5M2, False, QUADS, WHOLE, ROWS_LEFT, PRECISION, BLOCK_K, UPCAST,
        )  # fmt: skip
        acc = scale_columns(acc, outer_ptr, expert, source, width, outer_step, FOLDED)
        h = rounded(acc, DTYPE, UPCAST)
        mask = live[:, None] & (column < m)[None, :]
        if kept_ptr is not None:
            keep = kept_ptr + ((place - base) * width)[:, None] + column[None, :]
        if SWIGLU:
            gate, value = split_gates(h, ROWS, COLUMNS)
            if kept_ptr is not None:
                tl.store(keep, narrow(gate, DTYPE, UPCAST), mask=mask)
                tl.store(keep + m, narrow(value, DTYPE, UPCAST), mask=mask)
            a = rounded(silu(gate, UPCAST), DTYPE, UPCAST) * value
            if weights_ptr is not None:
                a = rounded(a, DTYPE, UPCAST)
        else:
            r = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if kept_ptr is not None:
                tl.store(keep, narrow(r if KEEP_RELU else h, DTYPE, UPCAST), mask=mask)
            r = rounded(r, DTYPE, UPCAST)  # it is; but so one change of layout serves both stores
            a = r * r
        if weights_ptr is not None:
            a *= w
        at = out_ptr + (place * m)[:, None] + column[None, :]
        tl.store(at, narrow(a, DTYPE, UPCAST), mask=mask)
