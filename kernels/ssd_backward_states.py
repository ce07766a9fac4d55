"""States at the boundaries of windows, forwards and backwards: what the SSD backward sweep starts from.

The stream is cut into *windows* of WINDOW = SUBS * Q tokens (rows of a segment table; none crosses a sequence).
One kernel walks the windows in either direction with a state (p, n) fp32 in registers:

    forward    S  <- exp(cs_last) S  + sum_s dt'_s exp(cs_last - cs_s) x_s B_s^T      entry state of each window
    reverse    dS <- exp(cs_last) dS + sum_l exp(cs_l) dy_l C_l^T                     exit gradient of each window

dy is already multiplied by silu(z) and rounded. A walk starts anew at the edge of a sequence: forwards from its
initial state, backwards from dfinal; backwards it also takes up dstates where a window ends at a requested
position, and leaves dinitial at the start of a sequence.

Shapes: entry, exit (windows,h,p,n) in the io dtype, rounded once, because they feed tensor cores only. Where
batch x heads alone would not fill the device the windows are dealt out to several walks: a first pass leaves
each walk's own end state (fp32) and decay, ``join`` turns them into entry states, a second pass stores.
"""

import triton
import triton.language as tl

from tigon.kernels.ssd_common import (
    LOG2E,
    decay,
    decay_limit,
    dot,
    load_head,
    load_step_size,
    narrow,
    segment_bounds,
)


@triton.jit
def load_tile(ptr, stride, rows, row_mask, columns, WIDTH: tl.constexpr):
    """(rows, columns) tile, 0 outside; ptr: row 0 of the head or group; columns are contiguous."""
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def gated(dy, z_ptr, z_t, rows, row_mask, columns, P: tl.constexpr, UPCAST: tl.constexpr):
    """dy silu(z) in dy's dtype: the gradient of the scan before its gate."""
    if z_ptr is None:
        return dy
    else:
        z = load_tile(z_ptr, z_t, rows, row_mask, columns, P).to(tl.float32)
        return narrow(dy.to(tl.float32) * z * tl.sigmoid(z), dy.dtype, UPCAST)


@triton.jit
def advance(
    S, x_ptr, x_t, B_ptr, B_t, dt_ptr, dt_t, A, limit, bias, dt_min, dt_max, first_token, tokens, p, n,
    SOFTPLUS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(exit state, log2 decay) of the chunk [first_token, first_token + Q) whose entry state is S; A in log2."""
    q = first_token + tl.arange(0, Q)
    inside = q < tokens
    dt = load_step_size(dt_ptr, dt_t, q, inside, bias, dt_min, dt_max, SOFTPLUS)
    total = A * tl.sum(dt, 0)
    weight = dt * decay(total - A * tl.cumsum(dt, 0), limit)
    x = load_tile(x_ptr, x_t, q, inside, p, P)
    B = load_tile(B_ptr, B_t, q, inside, n, N)
    ending = narrow(x.to(tl.float32) * weight[:, None], x.dtype, UPCAST)
    return dot(tl.trans(ending), B, S * tl.exp2(total), PRECISION, UPCAST), total


@triton.jit
def retreat(
    dS, dy_ptr, dy_t, z_ptr, z_t, C_ptr, C_t, dt_ptr, dt_t, A, bias, dt_min, dt_max, first_token, tokens, p, n,
    SOFTPLUS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(entry gradient, log2 decay) of the chunk whose exit gradient is dS; A in log2."""
    q = first_token + tl.arange(0, Q)
    inside = q < tokens
    dt = load_step_size(dt_ptr, dt_t, q, inside, bias, dt_min, dt_max, SOFTPLUS)
    total = A * tl.sum(dt, 0)
    weight = tl.exp2(A * tl.cumsum(dt, 0))
    dy = load_tile(dy_ptr, dy_t, q, inside, p, P)
    dy = gated(dy, z_ptr, z_t, q, inside, p, P, UPCAST)
    C = load_tile(C_ptr, C_t, q, inside, n, N)
    started = narrow(dy.to(tl.float32) * weight[:, None], dy.dtype, UPCAST)
    return dot(tl.trans(started), C, dS * tl.exp2(total), PRECISION, UPCAST), total


@triton.jit
def walk(
    u_ptr, z_ptr, v_ptr, dt_ptr, A_ptr, bias_ptr,
    edge_ptr, inject_ptr, inject_order, inject_offset, carry_ptr, decays_ptr, out_ptr, left_ptr,
    starts, ends, sequences, offsets, length, per_sequence, windows, windows_a_walk, walks,
    u_b, u_t, z_b, z_t, v_b, v_t, dt_b, dt_t, dt_h, edge_s, inject_s, dt_min, dt_max,
    REVERSE: tl.constexpr, STORE: tl.constexpr, SOFTPLUS: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, Q: tl.constexpr, SUBS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one (run of windows, head, tile of p). u, v are x, B forwards and dy, C backwards.

    STORE: write out (windows,h,p,n) and, backwards, left (s,h,p,n), starting from carry (walks,h,p,n) fp32 if
    given. Otherwise write the run's own end state to the carry of the next run, and its decay; -1 there says
    that a sequence began in the run, so nothing passes through.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    tile = program % TILES
    head = ((program // TILES) % HEADS).to(tl.int64)
    number = (program // (TILES * HEADS)).to(tl.int64)
    next_walk = number - 1 if REVERSE else number + 1
    if not STORE and ((next_walk < 0) | (next_walk >= walks)):
        return
    group = head // (HEADS // GROUPS)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    inner = head * (P * N) + p[:, None] * N + n[None, :]
    inner_mask = (p < P)[:, None] & (n < N)[None, :]
    STATE: tl.constexpr = HEADS * P * N

    A = load_head(A_ptr, head)
    limit = decay_limit(A)
    A *= LOG2E
    bias = load_head(bias_ptr, head)
    S = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if STORE and carry_ptr is not None:
        S = tl.load(carry_ptr + number * STATE + inner, mask=inner_mask, other=0.0)
    through = 0.0  # log2 of the run's decay
    began = 0

    low = number * windows_a_walk
    count = tl.minimum(windows_a_walk, windows - low)
    for i in range(0, count):
        if REVERSE:
            row = low + count - 1 - i
        else:
            row = low + i
        batch, start, end, sequence, first, last = segment_bounds(
            row, starts, ends, sequences, offsets, length, SUBS * Q, per_sequence
        )
        if end > start:
            tokens = (end - start).to(tl.int32)
            at_edge = last if REVERSE else first
            if at_edge:
                began = 1
                S = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
                if edge_ptr is not None:
                    S += tl.load(edge_ptr + sequence * edge_s + inner, mask=inner_mask, other=0.0)
            if inject_ptr is not None:
                inject_low = tl.load(inject_offset + row)
                inject_high = tl.load(inject_offset + row + 1)
                for j in range(inject_low, inject_high):
                    source = inject_ptr + tl.load(inject_order + j) * inject_s
                    S += tl.load(source + inner, mask=inner_mask, other=0.0)
            if STORE:
                out = out_ptr + row * STATE + inner
                tl.store(out, narrow(S, out_ptr.dtype.element_ty, UPCAST), mask=inner_mask)
            u = u_ptr + batch * u_b + start * u_t + head * P
            v = v_ptr + batch * v_b + start * v_t + group * N
            step = dt_ptr + batch * dt_b + start * dt_t + head * dt_h
            subs = tl.cdiv(tokens, Q)
            for k in range(0, subs):
                if REVERSE:
                    z = z_ptr
                    if z_ptr is not None:
                        z = z_ptr + batch * z_b + start * z_t + head * P
                    S, total = retreat(
                        S, u, u_t, z, z_t, v, v_t, step, dt_t, A, bias, dt_min, dt_max,
                        (subs - 1 - k) * Q, tokens, p, n, SOFTPLUS, P, N, Q, PRECISION, UPCAST,
                    )  # fmt: skip
                else:
                    S, total = advance(
                        S, u, u_t, v, v_t, step, dt_t, A, limit, bias, dt_min, dt_max,
                        k * Q, tokens, p, n, SOFTPLUS, P, N, Q, PRECISION, UPCAST,
                    )  # fmt: skip
                through += total
            if STORE and REVERSE and left_ptr is not None:
                if first:
                    tl.store(left_ptr + sequence * STATE + inner, S, mask=inner_mask)

    if not STORE:
        tl.store(carry_ptr + next_walk * STATE + inner, S, mask=inner_mask)
        if tile == 0:
            passed = tl.where(began != 0, -1.0, tl.exp2(through))
            tl.store(decays_ptr + next_walk * HEADS + head, passed)


@triton.jit
def join(
    carry_ptr, decays_ptr, walks,
    REVERSE: tl.constexpr, HEADS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """carry[k] += decay[k] carry[k - 1], walk after walk in walking order; STATE = p n elements a head."""
    BLOCKS: tl.constexpr = (STATE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    head = (program // BLOCKS).to(tl.int64)
    element = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = element < STATE
    S = tl.zeros((BLOCK,), tl.float32)
    for i in range(1, walks):
        number = tl.cast(walks - 1 - i if REVERSE else i, tl.int64)
        passed = tl.load(decays_ptr + number * HEADS + head)
        place = carry_ptr + (number * HEADS + head) * STATE + element
        own = tl.load(place, mask=inside, other=0.0)
        S = own + tl.where(passed < 0, 0.0, passed * S)
        tl.store(place, S, mask=inside)
