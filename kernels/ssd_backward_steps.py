"""Step sizes before and after the SSD backward sweep: everything per token and head, out of the tiles' way.

``prepare``, before: for every chunk of Q tokens

    steps (chunks,h,2,Q)  dt'_t, 0 where the chunk ends early, and cs_t = sum_{i<=t} A dt'_i in units of log2
    CB (chunks,g,Q,Q)     [s, l] = B_s . C_l

``finish``, after: with the pieces (chunks,h,4,Q) and through (chunks,h) that the sweep leaves, the gradient of
a_t = A dt'_t in the form without cancellation, then ddt and each chunk's share of dA and ddt_bias:

    da_t  = pairs_t + sum_{l>=t} off_l + sum_{s<t} dt'_s v_s + exp(cs_last) through
    ddt_t = (direct_t + v_t + A da_t) dt'/d(dt + bias)            dA = sum_t da_t dt'_t    ddt_bias = sum_t ddt_t

All buffers are fp32. About 70 bytes a token and head go through memory for this: 9 KB of the 160 KB a token
at h 128, p 64, n 128, and the tile kernels keep neither softplus nor scans over tokens.
"""

import triton
import triton.language as tl

from tigon.kernels.ssd_common import LOG2E, dot, narrow, segment_bounds, step_size

DIRECT: tl.constexpr = tl.constexpr(0)
PAIRS: tl.constexpr = tl.constexpr(1)
OFF: tl.constexpr = tl.constexpr(2)
V: tl.constexpr = tl.constexpr(3)


@triton.jit
def within(row_mask, columns, WIDTH: tl.constexpr):
    """Mask of a (rows, columns) tile; columns that cannot pass WIDTH cost nothing."""
    mask = row_mask[:, None]
    if (columns.shape[0] - 1) & WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return mask


@triton.jit
def load_tile(ptr, stride, rows, row_mask, columns, WIDTH: tl.constexpr):
    """(rows, columns) tile, 0 outside; ptr: row 0 of the head or group; columns are contiguous."""
    place = ptr + rows[:, None] * stride + columns[None, :]
    return tl.load(place, mask=within(row_mask, columns, WIDTH), other=0.0)


@triton.jit
def gate(
    dy_ptr, z_ptr, grad_ptr, y_ptr, length, z_b, z_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad = dy silu(z), the gradient before the gate, and dz = dy y silu'(z) in place of y, the scan before it.

    WIDTH = h p. One program: one (token, block).
    """
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    place = token * WIDTH + column
    z_row = z_ptr + (token // length * z_b + token % length * z_t)
    z = tl.load(z_row + column, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32)
    passed = tl.sigmoid(z)
    tl.store(
        grad_ptr + place, narrow(dy * z * passed, grad_ptr.dtype.element_ty, UPCAST), mask=mask
    )
    dz = dy * y * passed * (1.0 + z * (1.0 - passed))
    tl.store(y_ptr + place, narrow(dz, y_ptr.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def skip(
    dy_ptr, x_ptr, dD_ptr, starts, ends, sequences, offsets, length, per_sequence, x_b, x_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """A chunk's share of dD (h,p): sum over its tokens of dy x. WIDTH = h p. One program: one (chunk, block)."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    chunk = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    batch, start, end, _sequence, _first, _last = segment_bounds(
        chunk, starts, ends, sequences, offsets, length, Q, per_sequence
    )
    q = tl.arange(0, Q)
    inside = q < end - start
    dy = load_tile(dy_ptr + (batch * length + start) * WIDTH, WIDTH, q, inside, column, WIDTH)
    x = load_tile(x_ptr + (batch * x_b + start * x_t), x_t, q, inside, column, WIDTH)
    share = tl.sum(dy.to(tl.float32) * x.to(tl.float32), 0)
    tl.store(dD_ptr + chunk * WIDTH + column, share, mask=column < WIDTH)


@triton.jit
def load_steps(steps_ptr, slot, Q: tl.constexpr):
    """(dt', cs, cs_last) of a chunk and head; slot = chunk * h + head (int64)."""
    first = slot * (2 * Q)
    place = steps_ptr + first + tl.arange(0, Q)
    return tl.load(place), tl.load(place + Q), tl.load(steps_ptr + (first + 2 * Q - 1))


@triton.jit
def load_raw(dt_ptr, bias_ptr, dt_t, dt_h, rows, heads, mask, HEADS: tl.constexpr):
    """dt + bias (Q, heads) in fp32. dt may have any strides, so its offsets are 64 bits wide."""
    place = rows.to(tl.int64)[:, None] * dt_t + heads.to(tl.int64)[None, :] * dt_h
    raw = tl.load(dt_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + heads, mask=heads < HEADS, other=0.0).to(tl.float32)[None, :]
    return raw


@triton.jit
def prepare(
    dt_ptr, A_ptr, bias_ptr, B_ptr, C_ptr, steps_ptr, CB_ptr, starts, ends, sequences, offsets, length, per_sequence,
    dt_b, dt_t, dt_h, B_b, B_t, C_b, C_t, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_H: tl.constexpr,
    N: tl.constexpr, BLOCK_N: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one (chunk, group)."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    group = (tl.program_id(0) % GROUPS).to(tl.int64)
    chunk = (tl.program_id(0) // GROUPS).to(tl.int64)
    batch, start, end, _sequence, _first, _last = segment_bounds(
        chunk, starts, ends, sequences, offsets, length, Q, per_sequence
    )
    tokens = (end - start).to(tl.int32)
    if tokens <= 0:
        return
    q = tl.arange(0, Q)
    inside = q < tokens
    n = tl.arange(0, BLOCK_N)
    B = load_tile(B_ptr + batch * B_b + start * B_t + group * N, B_t, q, inside, n, N)
    C = load_tile(C_ptr + batch * C_b + start * C_t + group * N, C_t, q, inside, n, N)
    CB = dot(B, tl.trans(C), None, PRECISION, UPCAST)
    tl.store(CB_ptr + (chunk * GROUPS + group) * (Q * Q) + q[:, None] * Q + q[None, :], CB)

    dt_ptr += batch * dt_b + start * dt_t
    for block in range(0, PER_GROUP, BLOCK_H):
        heads = block + tl.arange(0, BLOCK_H)
        known = heads < PER_GROUP
        heads = tl.where(known, group * PER_GROUP + heads, HEADS)
        mask = inside[:, None] & known[None, :]
        raw = load_raw(dt_ptr, bias_ptr, dt_t, dt_h, q, heads, mask, HEADS)
        dt = tl.where(mask, step_size(raw, dt_min, dt_max, SOFTPLUS), 0.0)
        A = tl.load(A_ptr + heads, mask=known, other=0.0).to(tl.float32) * LOG2E
        place = steps_ptr + (chunk * HEADS + heads)[None, :] * (2 * Q) + q[:, None]
        known = known[None, :] & (q >= 0)[:, None]
        tl.store(place, dt, mask=known)
        tl.store(place + Q, A[None, :] * tl.cumsum(dt, 0), mask=known)


@triton.jit
def finish(
    dt_ptr, A_ptr, bias_ptr, steps_ptr, pieces_ptr, through_ptr, ddt_ptr, dA_ptr, dbias_ptr,
    starts, ends, sequences, offsets, length, per_sequence, dt_b, dt_t, dt_h, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, Q: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one (chunk, block of heads). Chunks without tokens leave zeros in dA, dbias (chunks,h)."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    heads = (tl.program_id(0) % BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    known = heads < HEADS
    chunk = (tl.program_id(0) // BLOCKS).to(tl.int64)
    batch, start, end, _sequence, _first, _last = segment_bounds(
        chunk, starts, ends, sequences, offsets, length, Q, per_sequence
    )
    q = tl.arange(0, Q)
    mask = (q < end - start)[:, None] & known[None, :]
    raw = load_raw(
        dt_ptr + batch * dt_b + start * dt_t, bias_ptr, dt_t, dt_h, q, heads, mask, HEADS
    )
    slot = chunk * HEADS + heads
    steps = steps_ptr + slot[None, :] * (2 * Q) + q[:, None]
    pieces = pieces_ptr + slot[None, :] * (4 * Q) + q[:, None]
    dt = tl.load(steps, mask=mask, other=0.0)
    direct = tl.load(pieces + DIRECT * Q, mask=mask, other=0.0)
    pairs = tl.load(pieces + PAIRS * Q, mask=mask, other=0.0)
    off = tl.load(pieces + OFF * Q, mask=mask, other=0.0)
    v = tl.load(pieces + V * Q, mask=mask, other=0.0)
    held = heads < tl.where(end > start, HEADS, 0)  # chunks past the end have no steps
    total = tl.load(steps_ptr + slot * (2 * Q) + (2 * Q - 1), mask=held, other=0.0)
    through = tl.load(through_ptr + slot, mask=held, other=0.0) * tl.exp2(total)
    A = tl.load(A_ptr + heads, mask=known, other=0.0).to(tl.float32)

    sources = v * dt
    da = (
        pairs
        + tl.cumsum(off, 0, reverse=True)
        + (tl.cumsum(sources, 0) - sources)
        + through[None, :]
    )
    grad = direct + v + A[None, :] * da
    free = step_size(raw, -float("inf"), float("inf"), SOFTPLUS)
    grad = tl.where(
        mask & (free >= dt_min) & (free <= dt_max), grad, 0.0
    )  # the clamp's bounds pass it
    if SOFTPLUS:
        grad *= tl.where(raw > 20.0, 1.0, tl.sigmoid(raw))
    place = ((batch * length + start) + q)[:, None] * HEADS + heads[None, :]
    tl.store(ddt_ptr + place, narrow(grad, ddt_ptr.dtype.element_ty, UPCAST), mask=mask)
    tl.store(dA_ptr + slot, tl.sum(da * dt, 0), mask=known)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + slot, tl.sum(grad, 0), mask=known)
