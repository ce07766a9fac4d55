"""States at the boundaries of windows, forwards and backwards: what the SSD backward sweep starts from.

The stream is cut into *windows* of SUBS chunks of Q tokens (rows of a segment table; none crosses a sequence).
One kernel walks the windows in either direction with a state (n, p) fp32 in registers:

    forwards    S  <- exp(cs_last) S  + sum_s dt'_s exp(cs_last - cs_s) B_s x_s^T      entry state of each window
    backwards   dS <- exp(cs_last) dS + sum_l exp(cs_l) C_l dy_l^T                     exit gradient of each window

dy is already multiplied by silu(z) and rounded. A walk starts anew at the edge of a sequence: forwards from its
initial state, backwards from dfinal; backwards it also takes up dstates where a window ends at a requested
position, and leaves dinitial at the start of a sequence.

Shapes: the windows' states (windows,h,n,p) in the io dtype, rounded once, because they feed tensor cores only;
what callers hand in or get is (.,h,p,n). n comes first in ours so that a product that feeds another one has 128
rows at n 128: Triton gives all warps to the rows of such a product, and fewer rows would be held twice.

Where batch x heads alone would not fill the device, the windows are dealt out to several walks: a first pass
leaves each walk's own end state (fp32) and decay, ``join`` turns them into entry states, a second pass stores.
"""

import triton
import triton.language as tl

from tigon.kernels.ssd_backward_steps import load_steps, load_tile
from tigon.kernels.ssd_common import decay, decay_limit, dot, load_head, narrow, segment_bounds


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
    S, x_ptr, x_t, B_ptr, B_t, steps_ptr, slot, limit, rows, tokens, p, n,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(exit state, log2 decay) of the chunk of tokens `rows` whose entry state is S (n, p)."""
    dt, cs, total = load_steps(steps_ptr, slot, Q)
    x = load_tile(x_ptr, x_t, rows, rows < tokens, p, P)
    B = load_tile(B_ptr, B_t, rows, rows < tokens, n, N)
    ending = narrow(x.to(tl.float32) * (dt * decay(total - cs, limit))[:, None], x.dtype, UPCAST)
    return dot(tl.trans(B), ending, S * tl.exp2(total), PRECISION, UPCAST), total


@triton.jit
def retreat(
    dS, dy_ptr, dy_t, z_ptr, z_t, C_ptr, C_t, steps_ptr, slot, rows, tokens, p, n,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(entry gradient, log2 decay) of the chunk of tokens `rows` whose exit gradient is dS (n, p)."""
    _dt, cs, total = load_steps(steps_ptr, slot, Q)
    dy = load_tile(dy_ptr, dy_t, rows, rows < tokens, p, P)
    dy = gated(dy, z_ptr, z_t, rows, rows < tokens, p, P, UPCAST)
    C = load_tile(C_ptr, C_t, rows, rows < tokens, n, N)
    started = narrow(dy.to(tl.float32) * tl.exp2(cs)[:, None], dy.dtype, UPCAST)
    return dot(tl.trans(C), started, dS * tl.exp2(total), PRECISION, UPCAST), total


@triton.jit
def walk(
    u_ptr, z_ptr, v_ptr, A_ptr, steps_ptr,
    edge_ptr, inject_ptr, inject_order, inject_offset, carry_ptr, decays_ptr, out_ptr, left_ptr,
    starts, ends, sequences, offsets, length, per_sequence, windows, windows_a_walk, walks,
    u_b, u_t, z_b, z_t, v_b, v_t, edge_s, inject_s,
    REVERSE: tl.constexpr, STORE: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, Q: tl.constexpr, SUBS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one (run of windows, head, tile of p). u, v are x, B forwards and dy, C backwards.

    STORE: write out (windows,h,n,p) and, backwards, left (s,h,p,n), starting from carry (walks,h,n,p) fp32 if
    given. Otherwise write the run's own end state to the carry of the next run, and its decay; -1 there says
    that a sequence began in the run, so nothing passes through.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    STATE: tl.constexpr = HEADS * P * N
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
    theirs = head * (P * N) + p[None, :] * N + n[:, None]  # (h,p,n)
    ours = head * (P * N) + n[:, None] * P + p[None, :]  # (h,n,p)
    mask = (n < N)[:, None] & (p < P)[None, :]

    limit = decay_limit(load_head(A_ptr, head))
    S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if STORE and carry_ptr is not None:
        S = tl.load(carry_ptr + number * STATE + ours, mask=mask, other=0.0)
    passed = 0.0  # log2 of the run's decay
    began = 0

    low = number * windows_a_walk
    count = tl.minimum(windows_a_walk, windows - low)
    for i in range(0, count):
        row = low + (count - 1 - i if REVERSE else i)
        batch, start, end, sequence, first, last = segment_bounds(
            row, starts, ends, sequences, offsets, length, SUBS * Q, per_sequence
        )
        if end > start:
            tokens = (end - start).to(tl.int32)
            if last if REVERSE else first:
                began = 1
                S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
                if edge_ptr is not None:
                    S += tl.load(edge_ptr + sequence * edge_s + theirs, mask=mask, other=0.0)
            if inject_ptr is not None:
                for j in range(tl.load(inject_offset + row), tl.load(inject_offset + row + 1)):
                    source = inject_ptr + tl.load(inject_order + j) * inject_s
                    S += tl.load(source + theirs, mask=mask, other=0.0)
            if STORE:
                state = narrow(S, out_ptr.dtype.element_ty, UPCAST)
                tl.store(out_ptr + row * STATE + ours, state, mask=mask)
            u = u_ptr + batch * u_b + start * u_t + head * P
            v = v_ptr + batch * v_b + start * v_t + group * N
            subs = tl.cdiv(tokens, Q)
            for k in range(0, subs):
                sub = subs - 1 - k if REVERSE else k
                rows = sub * Q + tl.arange(0, Q)
                slot = (row * SUBS + sub) * HEADS + head
                if REVERSE:
                    z = z_ptr
                    if z_ptr is not None:
                        z = z_ptr + batch * z_b + start * z_t + head * P
                    S, total = retreat(
                        S, u, u_t, z, z_t, v, v_t, steps_ptr, slot, rows, tokens, p, n, P, N, Q, PRECISION, UPCAST
                    )  # fmt: skip
                else:
                    S, total = advance(
                        S, u, u_t, v, v_t, steps_ptr, slot, limit, rows, tokens, p, n, P, N, Q, PRECISION, UPCAST
                    )  # fmt: skip
                passed += total
            if STORE and REVERSE and left_ptr is not None and first:
                tl.store(left_ptr + sequence * STATE + theirs, S, mask=mask)

    if not STORE:
        tl.store(carry_ptr + next_walk * STATE + ours, S, mask=mask)
        if tile == 0:
            tl.store(
                decays_ptr + next_walk * HEADS + head, tl.where(began != 0, -1.0, tl.exp2(passed))
            )


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
