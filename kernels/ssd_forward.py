"""Mamba-2 (SSD) scan, forward: the state stays in registers while a program walks its tokens.

For every sequence and head, with group g = head // (h / g_count), R the state on entry of a chunk of Q tokens and
cs_l = sum_{i<=l} A dt'_i inside it:

    y_l = ( sum_{s<=l} C_l.B_s exp(cs_l - cs_s) dt'_s x_s  +  exp(cs_l) R C_l  +  D x_l ) * silu(z_l)
    R   <- exp(cs_last) R + sum_s exp(cs_last - cs_s) dt'_s x_s B_s^T

    x, z, y (b,l,h,p), B, C (b,l,g,n): fp32, bf16 or fp16      dt (b,l,h), A, dt_bias (h), D (h)|(h,p): any of these
    states (b or s,h,p,n): fp32 out, any in                    everything between is fp32

`walk` does all of it: one program owns (segment, head, tile of p) and takes its chunks in order. Chunk states,
C.B^T and dt' never reach memory; the heads of a group run side by side and find B and C in L2. Where one
segment a sequence leaves the chip idle, two short passes come first: `segment_states` lets every segment that
has a successor find its end state from a zero entry, and `join_segments` turns those, in place, into true ones.
Rounding to the io dtype happens where tensor cores are fed: the decayed C.B^T dt', exp() dt' x, and R.

On sm_90 and later tiles come through tensor descriptors (TMA) whose row bound is the segment's end: rows beyond
read as 0 and are not written, without a mask or a pointer in a register. Elsewhere, and for tensors that are
not aligned to 16 bytes, masked loads do the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels import launch
from tigon.kernels.ssd_common import (
    INTERPRETED,
    LOG2E,
    chunk_cumsum,
    decay,
    decay_limit,
    dot,
    ensure_scratch,
    is_aligned,
    load_head,
    load_step_size,
    load_tile,
    narrow,
    pitch,
    rows_of,
    segment_bounds,
    state_tile,
    tile_offsets,
    tile_source,
)
from tigon.segments import segment_table


@triton.jit
def advance(
    S, x, B, cs, dt, limit, Q: tl.constexpr,
    NP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """State after a chunk, and the chunk's total exponent."""
    total = tl.sum(tl.where(tl.arange(0, Q) == Q - 1, cs, 0.0), 0)
    weighted = x * (decay(total - cs, limit) * dt)[:, None]
    weighted = narrow(weighted, x.dtype, UPCAST)
    S *= tl.exp2(total)
    if NP:
        S = dot(tl.trans(B), weighted, S, PRECISION, UPCAST)
    else:
        S = dot(tl.trans(weighted), B, S, PRECISION, UPCAST)
    return S, total


@triton.jit
def mixing(C, B, cs, dt, limit, Q: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """M[l,s] = C_l.B_s exp(cs_l - cs_s) dt'_s for s <= l, else 0."""
    q = tl.arange(0, Q)
    M = dot(C, tl.trans(B), None, PRECISION, UPCAST)
    M *= decay(cs[:, None] - cs[None, :], limit)
    M *= dt[None, :]
    return narrow(tl.where(q[:, None] >= q[None, :], M, 0.0), C.dtype, UPCAST)


@triton.jit
def carried(
    C, S, x, cs, D,
    HAS_D: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """exp(cs_l) R C_l + D x_l."""
    R = narrow(S, C.dtype, UPCAST)
    if NP:
        y = dot(C, R, None, PRECISION, UPCAST)
    else:
        y = dot(C, tl.trans(R), None, PRECISION, UPCAST)
    y *= tl.exp2(cs)[:, None]
    if HAS_D:
        y += D * x
    return y


@triton.jit
def segment_states(
    x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, exits_ptr, decays_ptr,
    starts, ends, sequences, offsets, length, size, per_sequence, heads, per_group,
    x_b, x_t, dt_b, dt_t, dt_h, B_b, B_t, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, FIRST_N: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """exits (rows,h,p,n): end state of each segment from a zero entry; decays (rows,h): log2 of what it keeps."""
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES) % heads
    row = program // (TILES * heads)
    batch, start, end, _, _, last = segment_bounds(
        row, starts, ends, sequences, offsets, length, size, per_sequence
    )
    if (start >= end) | last:
        return
    group = (head // per_group).to(tl.int64)
    head = head.to(tl.int64)
    A = load_head(A_ptr, head)
    limit = decay_limit(A)
    A *= LOG2E
    bias = load_head(bias_ptr, head)
    tokens = (end - start).to(tl.int32)
    q = tl.arange(0, Q)
    dt_ptr += batch * dt_b + start * dt_t + head * dt_h
    xs = tile_source(x_ptr + batch * x_b + start * x_t + head * P, tokens, x_t, P, Q, BLOCK_P, TMA)
    Bs = tile_source(B_ptr + batch * B_b + start * B_t + group * N, tokens, B_t, N, Q, BLOCK_N, TMA)
    if NP:
        S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    else:
        S = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    kept = 0.0
    for t in tl.range(0, tokens, Q, disable_licm=True):
        dt = load_step_size(
            dt_ptr, dt_t, (t + q).to(tl.int64), t + q < tokens, bias, dt_min, dt_max, SOFTPLUS
        )
        cs, dt = chunk_cumsum(A, dt)
        B = load_tile(Bs, t, tokens, FIRST_N, B_t, N, Q, BLOCK_N, TMA)
        x = load_tile(xs, t, tokens, tile * BLOCK_P, x_t, P, Q, BLOCK_P, TMA)
        S, total = advance(S, x, B, cs, dt, limit, Q, NP, PRECISION, UPCAST)
        kept += total
    at = row.to(tl.int64) * heads + head
    offset, mask = state_tile(tile, FIRST_N, P, N, BLOCK_P, BLOCK_N, NP)
    tl.store(exits_ptr + at * (P * N) + offset, S, mask=mask)
    if tile == 0:
        tl.store(decays_ptr + at, kept)


@triton.jit
def join_segments(
    exits_ptr, decays_ptr, initial_ptr, final_ptr, offsets, per_sequence, heads, initial_s,
    STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """exits[row] <- 2^decays[row] (true exit before it) + exits[row], along each sequence but its last segment.

    One program owns BLOCK elements of a (sequence, head) state. A sequence without a segment keeps its initial state.
    """
    BLOCKS: tl.constexpr = (STATE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block = program % BLOCKS
    head = ((program // BLOCKS) % heads).to(tl.int64)
    sequence = (program // (BLOCKS * heads)).to(tl.int64)
    if offsets is None:
        first = sequence * per_sequence
        stop = first + per_sequence
    else:
        first = tl.load(offsets + sequence)
        stop = tl.load(offsets + (sequence + 1))
    element = block * BLOCK + tl.arange(0, BLOCK)
    mask = element < STATE
    S = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        at = sequence * initial_s + head * STATE
        S = tl.load(initial_ptr + at + element, mask=mask, other=0.0).to(tl.float32)
    if first == stop:
        tl.store(final_ptr + (sequence * heads + head) * STATE + element, S, mask=mask)
    if exits_ptr is not None:
        for row in range(first, stop - 1):
            at = row * heads + head
            exits = exits_ptr + at * STATE + element
            S = S * tl.exp2(tl.load(decays_ptr + at)) + tl.load(exits, mask=mask, other=0.0)
            tl.store(exits, S, mask=mask)


@triton.jit
def walk(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, exits_ptr, y_ptr, final_ptr,
    starts, ends, sequences, offsets, length, size, per_sequence, heads, per_group,
    x_b, x_t, dt_b, dt_t, dt_h, B_b, B_t, C_b, C_t, z_b, z_t, initial_s, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, D_ROWS: tl.constexpr, KEEP_LAST: tl.constexpr, FIRST_N: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    Q: tl.constexpr, NP: tl.constexpr, MIX_FIRST: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y of one segment and, from the last one of a sequence, its final state.

    A segment enters with its sequence's initial state or with exits[row - 1]. D_ROWS: D is (h,p), not (h).
    KEEP_LAST: states were asked for at positions, so exits[row] of last segments is written as well. FIRST_N: this
    launch's tile of n begins there; all terms are sums over n, so it adds to the y of the launch before.
    """
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES) % heads
    row = program // (TILES * heads)
    batch, start, end, sequence, first, last = segment_bounds(
        row, starts, ends, sequences, offsets, length, size, per_sequence
    )
    if start >= end:
        return
    group = (head // per_group).to(tl.int64)
    head = head.to(tl.int64)
    row = row.to(tl.int64)
    offset, mask = state_tile(tile, FIRST_N, P, N, BLOCK_P, BLOCK_N, NP)
    if NP:
        S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    else:
        S = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if first:
        if initial_ptr is not None:
            initial = initial_ptr + sequence * initial_s + head * (P * N)
            S = tl.load(initial + offset, mask=mask, other=0.0).to(tl.float32)
    elif exits_ptr is not None:
        # A name of its own: Triton refuses one variable that is a pointer to bf16 here and to fp32 there.
        before = exits_ptr + ((row - 1) * heads + head) * (P * N)
        S = tl.load(before + offset, mask=mask, other=0.0)

    A = load_head(A_ptr, head)
    limit = decay_limit(A)
    A *= LOG2E
    bias = load_head(bias_ptr, head)
    tokens = (end - start).to(tl.int32)
    q = tl.arange(0, Q)
    column = tile * BLOCK_P
    y_t = heads * P
    y_ptr += (batch * length + start) * y_t + head * P
    dt_ptr += batch * dt_b + start * dt_t + head * dt_h
    xs = tile_source(x_ptr + batch * x_b + start * x_t + head * P, tokens, x_t, P, Q, BLOCK_P, TMA)
    Bs = tile_source(B_ptr + batch * B_b + start * B_t + group * N, tokens, B_t, N, Q, BLOCK_N, TMA)
    Cs = tile_source(C_ptr + batch * C_b + start * C_t + group * N, tokens, C_t, N, Q, BLOCK_N, TMA)
    ys = tile_source(y_ptr, tokens, y_t, P, Q, BLOCK_P, TMA)
    if z_ptr is not None:
        z_ptr += batch * z_b + start * z_t + head * P
        zs = tile_source(z_ptr, tokens, z_t, P, Q, BLOCK_P, TMA)
    HAS_D: tl.constexpr = D_ptr is not None
    if D_ROWS:
        p = column + tl.arange(0, BLOCK_P)
        D = tl.load(D_ptr + head * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
    else:
        D = load_head(D_ptr, head)

    for t in tl.range(0, tokens, Q, disable_licm=True):
        dt = load_step_size(
            dt_ptr, dt_t, (t + q).to(tl.int64), t + q < tokens, bias, dt_min, dt_max, SOFTPLUS
        )
        cs, dt = chunk_cumsum(A, dt)
        C = load_tile(Cs, t, tokens, FIRST_N, C_t, N, Q, BLOCK_N, TMA)
        B = load_tile(Bs, t, tokens, FIRST_N, B_t, N, Q, BLOCK_N, TMA)
        x = load_tile(xs, t, tokens, column, x_t, P, Q, BLOCK_P, TMA)

        if MIX_FIRST:
            M = mixing(C, B, cs, dt, limit, Q, PRECISION, UPCAST)
            y = carried(C, S, x, cs, D, HAS_D, NP, PRECISION, UPCAST)
        else:
            y = carried(C, S, x, cs, D, HAS_D, NP, PRECISION, UPCAST)
            M = mixing(C, B, cs, dt, limit, Q, PRECISION, UPCAST)
        y = dot(M, x, y, PRECISION, UPCAST)
        S, _ = advance(S, x, B, cs, dt, limit, Q, NP, PRECISION, UPCAST)

        if FIRST_N > 0:
            y += load_tile(ys, t, tokens, column, y_t, P, Q, BLOCK_P, TMA)
        if z_ptr is not None:
            z = load_tile(zs, t, tokens, column, z_t, P, Q, BLOCK_P, TMA).to(tl.float32)
            y *= z * tl.sigmoid(z)
        y = narrow(y, x.dtype, UPCAST)
        if TMA:
            ys.store([t, column], y)
        else:
            at, inside = tile_offsets(t, tokens, column, y_t, P, Q, BLOCK_P)
            tl.store(ys + at, y, mask=inside)

    if last:
        tl.store(final_ptr + (sequence * heads + head) * (P * N) + offset, S, mask=mask)
        if KEEP_LAST:
            tl.store(exits_ptr + (row * heads + head) * (P * N) + offset, S, mask=mask)


def ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    state_positions: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int = 0,
    batch_invariant: bool = False,
    configs: dict[str, launch.ScanConfig] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in x's dtype, final states and states at positions in fp32: as `tigon.reference.ssd.ssd_forward`.

    chunk_size is not used: the launch table, or `configs` in its place, chooses the tiles.
    """
    x, B, C, z = (None if t is None else rows_of(t) for t in (x, B, C, z))
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    device = x.device
    packed = cu_seqlens is not None or state_positions is not None
    sequences = b if cu_seqlens is None else cu_seqlens.numel() - 1
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    final = torch.empty((sequences, h, p, n), dtype=torch.float32, device=device)
    if configs is None:
        arch, sms = launch.target(device)
        sizes = {"b": b, "l": l, "h": h, "p": p, "n": n, "itemsize": x.element_size(), "sms": sms}
        configs = launch.plan(
            "ssd_scan",
            arch,
            **sizes,
            aligned=is_aligned(x, B, C, z),
            batch_invariant=batch_invariant,
        )
    config = configs["walk"]
    size = config.segment

    per_sequence = -(-l // size)
    rows = b * per_sequence
    segments, table = None, (None, None, None, None)
    if packed:
        cu = torch.arange(2, device=device) * l if cu_seqlens is None else cu_seqlens
        segments = segment_table(cu, l, size, state_positions)
        table = (segments.start, segments.end, segments.sequence, segments.offset)
        rows = segments.start.numel()
    several = per_sequence > 1 or state_positions is not None
    exits = decays = None
    if several:
        # The last row is for position 0, which asks for the first sequence's initial state.
        exits = torch.empty((rows + 1, h, p, n), dtype=torch.float32, device=device)
        decays = torch.empty((rows, h), dtype=torch.float32, device=device)

    shared = {"P": p, "N": n, "SOFTPLUS": dt_softplus, "UPCAST": INTERPRETED}
    sizes = (l, size, per_sequence, h, h // max(g, 1))
    strides = (*pitch(x), *dt.stride(), *pitch(B))
    initial_s = 0 if initial_states is None else initial_states.stride(0)
    if config.tma:
        ensure_scratch()
    columns = range(0, n, config.block_n)
    if several and l and b * h:
        states = configs["segment_states"]
        for first_n in columns:
            segment_states[(rows * h * -(-p // states.block_p),)](
                x, dt, A, B, dt_bias, exits, decays, *table, *sizes, *strides, dt_min, dt_max,
                FIRST_N=first_n, **shared, **tiles(states),
            )  # fmt: skip
    if (packed or several or not l) and sequences * h:
        block = min(launch.power_of_two(p * n), 1024)
        join_segments[(sequences * h * -(-p * n // block),)](
            exits, decays, initial_states, final, table[3], per_sequence, h, initial_s,
            STATE=p * n, BLOCK=block, num_warps=4,
        )  # fmt: skip
    for first_n in columns if l and b * h else ():
        skip = D if first_n == 0 else None
        gate = z if first_n == columns[-1] else None
        walk[(rows * h * -(-p // config.block_p),)](
            x, dt, A, B, C, skip, gate, dt_bias, initial_states, exits, y, final, *table, *sizes,
            *strides, *pitch(C), *pitch(z), initial_s, dt_min, dt_max,
            D_ROWS=skip is not None and D.dim() == 2, KEEP_LAST=state_positions is not None,
            FIRST_N=first_n, MIX_FIRST=config.mix_first, **shared, **tiles(config),
        )  # fmt: skip
    if state_positions is None:
        return y, final, final.new_empty((0, h, p, n))
    exits[rows] = 0.0 if initial_states is None else initial_states[0]
    at = segments.at_position
    return y, final, exits[torch.where(at < 0, rows, at).clamp(max=rows)]


def tiles(config: launch.ScanConfig) -> dict[str, object]:
    """A config as the kernels' keyword arguments."""
    return {
        "BLOCK_P": config.block_p,
        "BLOCK_N": config.block_n,
        "Q": config.q,
        "NP": config.np,
        "TMA": config.tma,
        "PRECISION": config.precision,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
