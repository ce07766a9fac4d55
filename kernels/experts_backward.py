"""Backward through an expert MLP's second product and activation, in one kernel.

    G_r = D_e^T dy_r;   dw_r = <act_r, G_r>;   dact_r = w_r G_r;   dh_r = act'(h_r) dact_r

dy (t,l), its rows gathered by `order`; D (e,l,m); h is what forward kept (h or relu(h), in expert order), or is
computed again from x and U beside G, and never stored. Writes dh (rows, m | 2m) and w act (rows,m), which the matrices'
gradients need, in expert order, and each column block's share of dw; `sum_shares` adds the shares in order.
"""

import triton
import triton.language as tl

from tigon.kernels.experts_up import hidden_rows, rounded, split_gates
from tigon.kernels.grouped_gemm_rows import multiply_tile
from tigon.kernels.grouped_gemm_tiles import find_rows, local_places, tile_rows
from tigon.kernels.ssd_common import narrow


@triton.jit
def load_kept(kept_ptr, row, mask, column):
    return tl.load(kept_ptr + row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def activation_gradient(
    dy_ptr, x_ptr, up_ptr, down_ptr, weights_ptr, kept_ptr, dh_ptr, act_ptr, shares_ptr,
    tiles_ptr, order_ptr, offsets_ptr, experts, choices, top_k, m, l, dy_pitch, x_pitch,
    SWIGLU: tl.constexpr, WHOLE: tl.constexpr, ROWS_LEFT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """kept_ptr: None if h is computed again. shares (column blocks, choices) fp32."""
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    blocks = tl.cdiv(m, COLUMNS)
    program = tl.program_id(0)
    item, block = (program // blocks).to(tl.int64), program % blocks
    expert, start, end = find_rows(item, tiles_ptr, None, order_ptr, offsets_ptr, 0, experts, ROWS)
    width = 2 * m if SWIGLU else m
    column, source = hidden_rows(block, m, SWIGLU, COLUMNS)
    base = tl.load(offsets_ptr).to(tl.int64)
    for row in range(start, end, ROWS):
        place, here, live = tile_rows(row, end, ROWS)
        choice = tl.load(order_ptr + here)
        token = (choice // top_k).to(tl.int64)
        mask = live[:, None] & (column < m)[None, :]
        g = multiply_tile(
            down_ptr, None, expert, column, m, dy_ptr, token, 0, l, l, m, 0, dy_pitch,
            "plain", False, True, False, WHOLE, ROWS_LEFT, PRECISION, BLOCK_K, UPCAST,
        )  # fmt: skip
        if kept_ptr is None:
            h = multiply_tile(
                up_ptr, None, expert, source, width, x_ptr, token, 0, l, l, l, 0, x_pitch,
                "plain", False, False, False, WHOLE, ROWS_LEFT, PRECISION, BLOCK_K, UPCAST,
            )  # fmt: skip
            h = rounded(h, DTYPE, UPCAST)
            if SWIGLU:
                gate, value = split_gates(h, ROWS, COLUMNS)
        else:
            kept = (here - base) * width
            h = load_kept(kept_ptr, kept, mask, column)
            if SWIGLU:
                gate, value = h, load_kept(kept_ptr, kept, mask, column + m)
        w = tl.load(weights_ptr + choice)[:, None]
        dact = w * g
        at = (place * width)[:, None] + column[None, :]
        if SWIGLU:
            sig = tl.sigmoid(gate)
            act = rounded(rounded(gate * sig, DTYPE, UPCAST) * value, DTYPE, UPCAST)
            dgate = dact * value * (sig * (1 + gate * (1 - sig)))
            tl.store(dh_ptr + at, narrow(dgate, DTYPE, UPCAST), mask=mask)
            tl.store(dh_ptr + (at + m), narrow(dact * (gate * sig), DTYPE, UPCAST), mask=mask)
        else:
            r = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
            act = rounded(r * r, DTYPE, UPCAST)
            tl.store(dh_ptr + at, narrow(2 * r * dact, DTYPE, UPCAST), mask=mask)
        at = (place * m)[:, None] + column[None, :]
        tl.store(act_ptr + at, narrow(w * act, DTYPE, UPCAST), mask=mask)
        share = tl.sum(tl.where((column < m)[None, :], act * g, 0.0), 1)
        tl.store(shares_ptr + tl.cast(block, tl.int64) * choices + choice, share, mask=live)


@triton.jit
def sum_shares(
    shares_ptr, inverse_ptr, offsets_ptr, out_ptr, experts, choices, blocks, BLOCK: tl.constexpr
):
    """out (choices) fp32: the shares (blocks, choices) of each choice, added in order; 0 for a choice not made here."""
    choice = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = choice < choices
    place = tl.load(inverse_ptr + choice, mask=real, other=-1)
    begin, end = local_places(offsets_ptr, experts)
    here = (place >= begin) & (place < end)
    total = tl.zeros((BLOCK,), tl.float32)
    at = shares_ptr + choice
    for _ in range(blocks):
        total += tl.load(at, mask=here, other=0.0)
        at += choices
    tl.store(out_ptr + choice, total, mask=real)
