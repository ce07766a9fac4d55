"""Mamba-2 (SSD) scan, backward: every gradient from the inputs alone.

PLACEHOLDER
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels.ssd_backward_states import advance, gated, join, load_tile, retreat, walk
from tigon.kernels.ssd_common import (
    LOG2E,
    decay,
    decay_limit,
    dot,
    load_head,
    narrow,
    segment_bounds,
    step_size,
)
from tigon.segments import segment_count, segment_table


@triton.jit
def through_step_size(grad, v, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """Gradient of v = dt + bias from that of dt' = clamp(softplus(v)); the clamp's bounds pass it."""
    free = step_size(v, -float("inf"), float("inf"), SOFTPLUS)
    grad = tl.where((free >= dt_min) & (free <= dt_max), grad, 0.0)
    if SOFTPLUS:
        grad *= tl.where(v > 20.0, 1.0, tl.sigmoid(v))
    return grad


@triton.jit
def sweep(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, entry_ptr, exit_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr,
    starts, ends, sequences, offsets, length, per_sequence,
    x_b, x_t, dt_b, dt_t, dt_h, B_b, B_t, C_b, C_t, z_b, z_t, dt_min, dt_max, part_size,
    SOFTPLUS: tl.constexpr, D_ROWS: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEADS_A_PART: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    Q: tl.constexpr, SUBS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one (chunk, group, part of its heads); it loops over those heads and over tiles of p.

    Blocks over token pairs are held as [s, l] (source, then the later token): no product needs a transpose in
    the loop. dB, dC go to plane `part` of (parts,b,l,g,n); dA, dbias (chunks,h) and dD (chunks,h[,p])
    are this chunk's share.
    """
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    PARTS: tl.constexpr = (PER_GROUP + HEADS_A_PART - 1) // HEADS_A_PART
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    sub = program % SUBS
    part = (program // SUBS) % PARTS
    group = ((program // (SUBS * PARTS)) % GROUPS).to(tl.int64)
    row = (program // (SUBS * PARTS * GROUPS)).to(tl.int64)
    batch, start, end, _sequence, _first, _last = segment_bounds(
        row, starts, ends, sequences, offsets, length, SUBS * Q, per_sequence
    )
    tokens = (end - start).to(tl.int32)
    if sub * Q >= tokens:
        return
    chunk = row * SUBS + sub
    q = tl.arange(0, Q)
    rows = sub * Q + q
    inside = rows < tokens
    later = q[:, None] <= q[None, :]
    earlier = q[:, None] < q[None, :]
    n = tl.arange(0, BLOCK_N)
    inner = n[None, :]
    io = x_ptr.dtype.element_ty

    B_row = B_ptr + batch * B_b + start * B_t + group * N
    C_row = C_ptr + batch * C_b + start * C_t + group * N
    B = load_tile(B_row, B_t, rows, inside, n, N)
    C = load_tile(C_row, C_t, rows, inside, n, N)
    CB = dot(B, tl.trans(C), None, PRECISION, UPCAST)
    dCB = tl.zeros((Q, Q), tl.float32)
    dB = tl.zeros((Q, BLOCK_N), tl.float32)
    dC = tl.zeros((Q, BLOCK_N), tl.float32)

    first_head = group * PER_GROUP + part * HEADS_A_PART
    last_head = tl.minimum(first_head + HEADS_A_PART, (group + 1) * PER_GROUP)
    for head in range(first_head, last_head):
        A = load_head(A_ptr, head)
        limit = decay_limit(A)
        A2 = A * LOG2E
        bias = load_head(bias_ptr, head)
        dt_row = dt_ptr + batch * dt_b + start * dt_t + head * dt_h
        raw = tl.load(dt_row + rows * dt_t, mask=inside, other=0.0).to(tl.float32) + bias
        dt = tl.where(inside, step_size(raw, dt_min, dt_max, SOFTPLUS), 0.0)
        cs = A2 * tl.cumsum(dt, 0)
        total = A2 * tl.sum(dt, 0)
        to_end = decay(total - cs, limit)
        from_start = tl.exp2(cs)
        pair = tl.where(later, decay(cs[None, :] - cs[:, None], limit), 0.0)
        mixing = narrow(CB * pair * dt[:, None], io, UPCAST)

        gram = tl.zeros((Q, Q), tl.float32)
        v = tl.zeros((Q,), tl.float32)
        off = tl.zeros((Q,), tl.float32)
        through = 0.0
        dD_sum = 0.0
        for tile in range(0, TILES):
            p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            state = (row * HEADS + head) * (P * N) + p[:, None] * N + inner
            state_mask = (p < P)[:, None] & (inner < N)
            R = tl.load(entry_ptr + state, mask=state_mask, other=0.0)
            dR = tl.load(exit_ptr + state, mask=state_mask, other=0.0)
            x_row = x_ptr + batch * x_b + start * x_t + head * P
            out_row = (batch * length + start) * (HEADS * P) + head * P
            dy_row = dy_ptr + out_row
            z_row = z_ptr
            if z_ptr is not None:
                z_row = z_ptr + batch * z_b + start * z_t + head * P
            if SUBS > 1:
                S = R.to(tl.float32)
                for k in range(0, sub):
                    S, _ = advance(
                        S, x_row, x_t, B_row, B_t, dt_row, dt_t, A2, limit, bias, dt_min, dt_max,
                        k * Q, tokens, p, n, SOFTPLUS, P, N, Q, PRECISION, UPCAST,
                    )  # fmt: skip
                R = narrow(S, io, UPCAST)
                S = dR.to(tl.float32)
                subs = tl.cdiv(tokens, Q)
                for k in range(sub + 1, subs):
                    S, _ = retreat(
                        S, dy_row, HEADS * P, z_row, z_t, C_row, C_t, dt_row, dt_t, A2, bias, dt_min, dt_max,
                        (subs - k + sub) * Q, tokens, p, n, SOFTPLUS, P, N, Q, PRECISION, UPCAST,
                    )  # fmt: skip
                dR = narrow(S, io, UPCAST)
            through += tl.sum(tl.sum(R.to(tl.float32) * dR.to(tl.float32), 1), 0)

            x = load_tile(x_row, x_t, rows, inside, p, P)
            dout = load_tile(dy_row, HEADS * P, rows, inside, p, P)
            dy = gated(dout, z_row, z_t, rows, inside, p, P, UPCAST)
            if D_ptr is not None:
                if D_ROWS:
                    D = tl.load(D_ptr + head * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
                else:
                    D = load_head(D_ptr, head)
            x32 = x.to(tl.float32)
            dy32 = dy.to(tl.float32)
            tile_mask = inside[:, None] & (p < P)[None, :]
            out = out_row + rows[:, None] * (HEADS * P) + p[None, :]

            ahead = dot(C, tl.trans(R), None, PRECISION, UPCAST) * from_start[:, None]
            off += tl.sum(dy32 * ahead, 1)
            if z_ptr is not None:
                y = dot(tl.trans(mixing), x, ahead, PRECISION, UPCAST)
                if D_ptr is not None:
                    y += D * x32
                z = load_tile(z_row, z_t, rows, inside, p, P).to(tl.float32)
                gate = tl.sigmoid(z)
                dz = dout.to(tl.float32) * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(dz_ptr + out, narrow(dz, io, UPCAST), mask=tile_mask)

            back = dot(B, tl.trans(dR), None, PRECISION, UPCAST) * to_end[:, None]
            v += tl.sum(x32 * back, 1)
            dx = back * dt[:, None]
            if D_ptr is not None:
                dx += D * dy32
                dD = tl.sum(x32 * dy32, 0)
                if D_ROWS:
                    tl.store(dD_ptr + (chunk * HEADS + head) * P + p, dD, mask=p < P)
                else:
                    dD_sum += tl.sum(dD, 0)
            dx = dot(mixing, dy, dx, PRECISION, UPCAST)
            tl.store(dx_ptr + out, narrow(dx, io, UPCAST), mask=tile_mask)

            gram = dot(x, tl.trans(dy), gram, PRECISION, UPCAST)
            ending = narrow(x32 * (dt * to_end)[:, None], io, UPCAST)
            dB = dot(ending, dR, dB, PRECISION, UPCAST)
            started = narrow(dy32 * from_start[:, None], io, UPCAST)
            dC = dot(started, R, dC, PRECISION, UPCAST)

        gram *= pair
        dCB += gram * dt[:, None]
        gram *= CB
        direct = tl.sum(gram, 1) + v
        # The gradient of a_t = A dt'_t, in the form without cancellation: pairs s < t <= l, then the entry state's
        # way to l >= t, the sources s < t on their way out, and the entry state's way through.
        pairs = tl.cumsum(gram * dt[:, None], 1, reverse=True)
        da = tl.sum(tl.where(earlier, pairs, 0.0), 0)
        da += tl.cumsum(off, 0, reverse=True)
        da += tl.cumsum(v * dt, 0) - v * dt
        da += tl.exp2(total) * through
        ddt = through_step_size(direct + A * da, raw, dt_min, dt_max, SOFTPLUS)
        ddt = tl.where(inside, ddt, 0.0)
        ddt_row = ddt_ptr + (batch * length + start) * HEADS + head
        tl.store(
            ddt_row + rows * HEADS,
            narrow(
                ddt, ddt_ptr.dtype.element_ty, UPCAST and ddt_ptr.dtype.element_ty == tl.bfloat16
            ),
            mask=inside,
        )
        tl.store(dA_ptr + chunk * HEADS + head, tl.sum(da * dt, 0))
        if dbias_ptr is not None:
            tl.store(dbias_ptr + chunk * HEADS + head, tl.sum(ddt, 0))
        if D_ptr is not None and not D_ROWS:
            tl.store(dD_ptr + chunk * HEADS + head, dD_sum)

    low = narrow(dCB, io, UPCAST)
    dB = dot(low, C, dB, PRECISION, UPCAST)
    dC = dot(tl.trans(low), B, dC, PRECISION, UPCAST)
    place = part.to(tl.int64) * part_size + (batch * length + start) * (GROUPS * N) + group * N
    place = place + rows[:, None] * (GROUPS * N) + inner
    mask = inside[:, None] & (inner < N)
    tl.store(dB_ptr + place, narrow(dB, dB_ptr.dtype.element_ty, UPCAST and PARTS == 1), mask=mask)
    tl.store(dC_ptr + place, narrow(dC, dC_ptr.dtype.element_ty, UPCAST and PARTS == 1), mask=mask)


@dataclass(frozen=True)
class Config:
    q: int
    subs: int
    heads: int
    block_p: int
    warps: int
    stages: int
    walk_warps: int
    walk_stages: int
    programs: int


CONFIG = Config(64, 2, 16, 64, 8, 2, 4, 3, 512)


@dataclass(frozen=True)
class _Windows:
    """How many windows there are, and the table's columns where they are not plain arithmetic.

    order, offset: dstates[order[j]] enters at the end of window w for j in [offset[w], offset[w + 1]).
    """

    count: int
    size: int
    per_sequence: int
    rows: tuple[Tensor | None, ...] = (None, None, None, None)
    at_position: Tensor | None = None
    order: Tensor | None = None
    offset: Tensor | None = None


def _windows(x, cu_seqlens, state_positions, dstates, size) -> _Windows:
    b, l = x.shape[:2]
    if dstates is None:
        state_positions = None
    per_sequence = triton.cdiv(l, size)
    if cu_seqlens is None and state_positions is None:
        return _Windows(b * per_sequence, size, per_sequence)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=x.device) * l
    positions = 0 if state_positions is None else state_positions.numel()
    count = segment_count(l, size, cu_seqlens.numel() - 1, positions)
    table = segment_table(cu_seqlens, l, size, state_positions)
    rows = (table.start, table.end, table.sequence, table.offset)
    if state_positions is None:
        return _Windows(count, size, per_sequence, rows)
    at, order = table.at_position.sort()
    offset = torch.searchsorted(at, torch.arange(count + 1, device=x.device))
    return _Windows(count, size, per_sequence, rows, table.at_position, order, offset)


def _precision(x: Tensor) -> dict:
    interpreting = not x.is_cuda
    return dict(
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        UPCAST=interpreting and x.dtype == torch.bfloat16,
    )


def _walks(config, table, reverse, u, z, v, step, edge, inject, left, common) -> Tensor:
    """Entry states of all windows, or with `reverse` their exit gradients: (windows,h,p,n) in u's dtype."""
    b, l, h, p = u.shape
    n = v.shape[-1]
    dt, A, dt_bias, dt_min, dt_max = step
    block_p = min(config.block_p, max(16, triton.next_power_of_2(p)))
    tiles = triton.cdiv(p, block_p)
    walks = min(table.count, triton.cdiv(config.programs, h * tiles))
    if table.rows[0] is None:  # dense: whole sequences if they suffice, else the same cuts in each
        walks = b * min(triton.cdiv(walks, b), table.per_sequence)
    windows_a_walk = triton.cdiv(table.count, walks)
    walks = triton.cdiv(table.count, windows_a_walk)
    out = torch.empty(table.count, h, p, n, dtype=u.dtype, device=u.device)
    alone = walks == 1 or (table.rows[0] is None and windows_a_walk == table.per_sequence)
    carry = decays = None
    if not alone:
        carry = torch.empty(walks, h, p, n, dtype=torch.float32, device=u.device)
        decays = torch.empty(walks, h, dtype=torch.float32, device=u.device)

    def launch(store):
        walk[(walks * h * tiles,)](
            u, z, v, dt, A, dt_bias,
            edge, inject, table.order, table.offset, carry, decays, out, left,
            *table.rows, l, table.per_sequence, table.count, windows_a_walk, walks,
            *u.stride()[:2], *((0, 0) if z is None else z.stride()[:2]), *v.stride()[:2], *dt.stride(),
            0 if edge is None else edge.stride(0), 0 if inject is None else inject.stride(0), dt_min, dt_max,
            REVERSE=reverse, STORE=store, BLOCK_P=block_p,
            num_warps=config.walk_warps, num_stages=config.walk_stages, **common,
        )  # fmt: skip

    if not alone:
        launch(store=False)
        blocks = triton.cdiv(p * n, 1024)
        join[(h * blocks,)](carry, decays, walks, REVERSE=reverse, HEADS=h, STATE=p * n, BLOCK=1024)
    launch(store=True)
    return out


def ssd_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    dstates: Tensor | None,
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
) -> tuple[Tensor | None, ...]:
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial), each in its input's dtype; None for what was None.

    dfinal (b or s,h,p,n) and dstates (i,h,p,n) fp32 enter where the states they belong to left the scan.
    chunk_size is not used: the launch table chooses.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    config = CONFIG
    dy = dy.contiguous()
    dfinal, dstates = (None if t is None else t.contiguous() for t in (dfinal, dstates))
    table = _windows(x, cu_seqlens, state_positions, dstates, config.q * config.subs)

    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dinitial = None
    if initial_states is not None:
        dinitial = torch.zeros(initial_states.shape, dtype=torch.float32, device=x.device)
        if dfinal is not None:
            dinitial.copy_(dfinal)  # what an empty sequence keeps

    chunks = table.count * config.subs
    shares = partial(torch.zeros, dtype=torch.float32, device=x.device)
    dA = shares(chunks, h)
    dbias = None if dt_bias is None else shares(chunks, h)
    dD = None if D is None else shares(chunks, *D.shape)
    if l:
        common = dict(
            SOFTPLUS=dt_softplus, HEADS=h, GROUPS=g, P=p, N=n, Q=config.q, SUBS=config.subs,
            BLOCK_N=max(16, triton.next_power_of_2(n)), **_precision(x),
        )  # fmt: skip
        step = (dt, A, dt_bias, dt_min, dt_max)
        entry = _walks(config, table, False, x, None, B, step, initial_states, None, None, common)
        exit = _walks(config, table, True, dy, z, C, step, dfinal, dstates, dinitial, common)
        per_group = h // g
        parts = triton.cdiv(per_group, config.heads)
        if parts > 1:
            dB_parts, dC_parts = (
                torch.empty(parts, *B.shape, dtype=torch.float32, device=x.device) for _ in "BC"
            )
        else:
            dB_parts, dC_parts = dB, dC
        sweep[(table.count * config.subs * g * parts,)](
            dy, x, dt, A, B, C, D, z, dt_bias, entry, exit,
            dx, ddt, dA, dB_parts, dC_parts, dD, dz, dbias,
            *table.rows, l, table.per_sequence,
            *x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2],
            *((0, 0) if z is None else z.stride()[:2]), dt_min, dt_max, B.numel(),
            D_ROWS=D is not None and D.dim() == 2, HEADS_A_PART=config.heads,
            BLOCK_P=min(config.block_p, max(16, triton.next_power_of_2(p))),
            num_warps=config.warps, num_stages=config.stages, **common,
        )  # fmt: skip
        if parts > 1:
            dB, dC = dB_parts.sum(0).to(B.dtype), dC_parts.sum(0).to(C.dtype)
    if dinitial is not None and dstates is not None:
        at_start = (table.at_position < 0)[:, None, None, None]
        dinitial[0] += torch.where(at_start, dstates, 0).sum(0)
    return (
        dx,
        ddt,
        dA.sum(0).to(A.dtype),
        dB,
        dC,
        None if D is None else dD.sum(0).to(D.dtype),
        dz,
        None if dt_bias is None else dbias.sum(0).to(dt_bias.dtype),
        None if dinitial is None else dinitial.to(initial_states.dtype),
    )
