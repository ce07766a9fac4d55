"""Mamba-2 (SSD) scan, backward: every gradient from the inputs alone.

DOCSTRING
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels import launch
from tigon.kernels.ssd_backward_states import advance, gated, join, retreat, walk
from tigon.kernels.ssd_backward_steps import (
    DIRECT,
    OFF,
    PAIRS,
    V,
    finish,
    load_steps,
    load_tile,
    prepare,
    within,
)
from tigon.kernels.ssd_common import (
    INTERPRETED,
    decay,
    decay_limit,
    dot,
    load_head,
    narrow,
    segment_bounds,
)
from tigon.kernels.ssd_forward import pitch, rows_of
from tigon.segments import segment_count, segment_table


@triton.jit
def sweep(
    dy_ptr, x_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, steps_ptr, CB_ptr, entry_ptr, exit_ptr,
    dx_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, pieces_ptr, through_ptr,
    starts, ends, sequences, offsets, length, per_sequence,
    x_b, x_t, B_b, B_t, C_b, C_t, z_b, z_t, part_size,
    D_ROWS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, HEADS_A_PART: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    NQ: tl.constexpr, Q: tl.constexpr, SUBS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one (chunk, group, part of its heads); it loops over those heads and over tiles of p.

    Blocks over token pairs are held as [s, l] (source, then the later token): no product needs a transpose in
    the loop. dB, dC go to plane `part` of (parts,b,l,g,n); dD (chunks,h,p) is this chunk's share.
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
    n = tl.arange(0, BLOCK_N)
    io = x_ptr.dtype.element_ty

    B_row = B_ptr + batch * B_b + start * B_t + group * N
    C_row = C_ptr + batch * C_b + start * C_t + group * N
    B = load_tile(B_row, B_t, rows, inside, n, N)
    C = load_tile(C_row, C_t, rows, inside, n, N)
    CB_block = CB_ptr + (chunk * GROUPS + group) * (Q * Q)
    dCB = tl.zeros((Q, Q), tl.float32)
    if NQ:
        dB = tl.zeros((BLOCK_N, Q), tl.float32)
        dC = tl.zeros((BLOCK_N, Q), tl.float32)
    else:
        dB = tl.zeros((Q, BLOCK_N), tl.float32)
        dC = tl.zeros((Q, BLOCK_N), tl.float32)

    first_head = group * PER_GROUP + part * HEADS_A_PART
    last_head = tl.minimum(first_head + HEADS_A_PART, (group + 1) * PER_GROUP)
    for head in range(first_head, last_head):
        limit = decay_limit(load_head(A_ptr, head))
        dt, cs, total = load_steps(steps_ptr, chunk * HEADS + head, Q)
        to_end = decay(total - cs, limit)
        from_start = tl.exp2(cs)
        x_row = x_ptr + batch * x_b + start * x_t + head * P
        out_row = (batch * length + start) * (HEADS * P) + head * P
        dy_row = dy_ptr + out_row
        z_row = z_ptr
        if z_ptr is not None:
            z_row = z_ptr + batch * z_b + start * z_t + head * P
        direct = tl.zeros((Q,), tl.float32)
        between = tl.zeros((Q,), tl.float32)
        v = tl.zeros((Q,), tl.float32)
        off = tl.zeros((Q,), tl.float32)
        through = 0.0
        for tile in range(0, TILES):
            p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            state = (row * HEADS + head) * (P * N)
            R = load_tile(entry_ptr + state, P, n, n < N, p, P)
            dR = load_tile(exit_ptr + state, P, n, n < N, p, P)
            if SUBS > 1:
                S = R.to(tl.float32)
                for k in range(0, sub):
                    S, _ = advance(
                        S, x_row, x_t, B_row, B_t, steps_ptr, (row * SUBS + k) * HEADS + head, limit,
                        k * Q + q, tokens, p, n, P, N, Q, PRECISION, UPCAST,
                    )  # fmt: skip
                R = narrow(S, io, UPCAST)
                S = dR.to(tl.float32)
                subs = tl.cdiv(tokens, Q)
                for k in range(sub + 1, subs):
                    other = subs + sub - k
                    S, _ = retreat(
                        S, dy_row, HEADS * P, z_row, z_t, C_row, C_t, steps_ptr, (row * SUBS + other) * HEADS + head,
                        other * Q + q, tokens, p, n, P, N, Q, PRECISION, UPCAST,
                    )  # fmt: skip
                dR = narrow(S, io, UPCAST)
            through += tl.sum(tl.sum(R.to(tl.float32) * dR.to(tl.float32), 1), 0)

            x = load_tile(x_row, x_t, rows, inside, p, P)
            dout = load_tile(dy_row, HEADS * P, rows, inside, p, P)
            dy = gated(dout, z_row, z_t, rows, inside, p, P, UPCAST)
            x32 = x.to(tl.float32)
            dy32 = dy.to(tl.float32)
            tile_mask = within(inside, p, P)
            out = rows[:, None] * (HEADS * P) + p[None, :]

            CB = tl.load(CB_block + (q[:, None] * Q + q[None, :]))
            pair = decay(cs[None, :] - cs[:, None], limit)
            pair = tl.where(q[:, None] <= q[None, :], pair, 0.0)
            mixing = narrow(CB * pair * dt[:, None], io, UPCAST)
            gram = dot(x, tl.trans(dy), None, PRECISION, UPCAST) * pair
            dCB += gram * dt[:, None]
            gram *= CB
            direct += tl.sum(gram, 1)
            later = tl.cumsum(gram * dt[:, None], 1, reverse=True)  # [s, t]: sum over l >= t
            between += tl.sum(tl.where(q[:, None] < q[None, :], later, 0.0), 0)

            # fma and not +: a sum with a product would be folded into its accumulator, and two products in a
            # chain get a layout that holds everything twice.
            dx = dot(mixing, dy, None, PRECISION, UPCAST)
            back = dot(B, dR, None, PRECISION, UPCAST) * to_end[:, None]
            v += tl.sum(x32 * back, 1)
            dx = tl.fma(back, dt[:, None].broadcast_to(Q, BLOCK_P), dx)
            if D_ptr is not None:
                if D_ROWS:
                    D = tl.load(D_ptr + head * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
                else:
                    D = load_head(D_ptr, head)
                dx += D * dy32
                tl.store(dD_ptr + (chunk * HEADS + head) * P + p, tl.sum(x32 * dy32, 0), mask=p < P)
            tl.store(dx_ptr + out_row + out, narrow(dx, io, UPCAST), mask=tile_mask)
            ending = narrow(x32 * (dt * to_end)[:, None], io, UPCAST)
            if NQ:
                dB = dot(dR, tl.trans(ending), dB, PRECISION, UPCAST)
            else:
                dB = dot(ending, tl.trans(dR), dB, PRECISION, UPCAST)

            ahead = dot(C, R, None, PRECISION, UPCAST) * from_start[:, None]
            off += tl.sum(dy32 * ahead, 1)
            if z_ptr is not None:
                y = dot(tl.trans(mixing), x, None, PRECISION, UPCAST)
                y = tl.fma(ahead, 1.0, y)
                if D_ptr is not None:
                    y += D * x32
                z = load_tile(z_row, z_t, rows, inside, p, P).to(tl.float32)
                gate = tl.sigmoid(z)
                dz = dout.to(tl.float32) * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(dz_ptr + out_row + out, narrow(dz, io, UPCAST), mask=tile_mask)
            started = narrow(dy32 * from_start[:, None], io, UPCAST)
            if NQ:
                dC = dot(R, tl.trans(started), dC, PRECISION, UPCAST)
            else:
                dC = dot(started, tl.trans(R), dC, PRECISION, UPCAST)

        slot = chunk * HEADS + head
        pieces = pieces_ptr + slot * (4 * Q) + q
        tl.store(pieces + DIRECT * Q, direct)
        tl.store(pieces + PAIRS * Q, between)
        tl.store(pieces + OFF * Q, off)
        tl.store(pieces + V * Q, v)
        tl.store(through_ptr + slot, through)

    low = narrow(dCB, io, UPCAST)
    if NQ:
        dB = dot(tl.trans(C), tl.trans(low), dB, PRECISION, UPCAST)
        dC = dot(tl.trans(B), low, dC, PRECISION, UPCAST)
        tile = rows[None, :] * (GROUPS * N) + n[:, None]
        mask = inside[None, :] & (n < N)[:, None]
    else:
        dB = dot(low, C, dB, PRECISION, UPCAST)
        dC = dot(tl.trans(low), B, dC, PRECISION, UPCAST)
        tile = rows[:, None] * (GROUPS * N) + n[None, :]
        mask = within(inside, n, N)
    place = part.to(tl.int64) * part_size + (batch * length + start) * (GROUPS * N) + group * N
    tl.store(dB_ptr + place + tile, narrow(dB, dB_ptr.dtype.element_ty, UPCAST), mask=mask)
    tl.store(dC_ptr + place + tile, narrow(dC, dC_ptr.dtype.element_ty, UPCAST), mask=mask)


@dataclass(frozen=True)
class Windows:
    """How many windows there are, and the table's columns where they are not plain arithmetic.

    order, offset: dstates[order[j]] enters at the end of window w for j in [offset[w], offset[w + 1]).
    """

    count: int
    per_sequence: int
    rows: tuple[Tensor | None, ...] = (None, None, None, None)
    at_position: Tensor | None = None
    order: Tensor | None = None
    offset: Tensor | None = None


def cut(x: Tensor, cu_seqlens: Tensor | None, positions: Tensor | None, size: int) -> Windows:
    b, l = x.shape[:2]
    per_sequence = -(-l // size)
    if cu_seqlens is None and positions is None:
        return Windows(b * per_sequence, per_sequence)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=x.device) * l
    count = segment_count(
        l, size, cu_seqlens.numel() - 1, 0 if positions is None else positions.numel()
    )
    table = segment_table(cu_seqlens, l, size, positions)
    rows = (table.start, table.end, table.sequence, table.offset)
    if positions is None:
        return Windows(count, per_sequence, rows)
    at, order = table.at_position.sort()
    offset = torch.searchsorted(at, torch.arange(count + 1, device=x.device))
    return Windows(count, per_sequence, rows, table.at_position, order, offset)


def window_states(
    config, windows, reverse, u, z, v, A, steps, edge, inject, left, common
) -> Tensor:
    """Entry states of all windows, or with `reverse` their exit gradients: (windows,h,n,p) in u's dtype."""
    b, _l, h, p = u.shape
    n = v.shape[-1]
    tiles = -(-p // common["BLOCK_P"])
    walks = min(windows.count, -(-config.programs // (h * tiles)))
    if (
        windows.rows[0] is None
    ):  # dense: whole sequences if they suffice, else the same cuts in each
        walks = b * min(-(-walks // b), windows.per_sequence)
    windows_a_walk = -(-windows.count // walks)
    walks = -(-windows.count // windows_a_walk)
    alone = walks == 1 or (windows.rows[0] is None and windows_a_walk == windows.per_sequence)
    out = torch.empty((windows.count, h, n, p), dtype=u.dtype, device=u.device)
    carry = decays = None
    if not alone:
        carry = torch.empty((walks, h, n, p), dtype=torch.float32, device=u.device)
        decays = torch.empty((walks, h), dtype=torch.float32, device=u.device)

    def run(store: bool) -> None:
        walk[(walks * h * tiles,)](
            u, z, v, A, steps, edge, inject, windows.order, windows.offset, carry, decays, out, left,
            *windows.rows, u.shape[1], windows.per_sequence, windows.count, windows_a_walk, walks,
            *pitch(u), *pitch(z), *pitch(v), *pitch(edge)[:1], *pitch(inject)[:1],
            REVERSE=reverse, STORE=store, num_warps=config.walk_warps, num_stages=config.walk_stages, **common,
        )  # fmt: skip

    if not alone:
        run(store=False)
        block = 1024
        join[(h * -(-p * n // block),)](
            carry, decays, walks, REVERSE=reverse, HEADS=h, STATE=p * n, BLOCK=block
        )
    run(store=True)
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
    config: launch.SweepConfig | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial), each in its input's dtype; None for what was None.

    dfinal (b or s,h,p,n) and dstates (i,h,p,n) fp32 are the gradients of the states that left the scan.
    chunk_size is not used: the launch table, or `config` in its place, chooses.
    """
    x, B, C, z = (None if t is None else rows_of(t) for t in (x, B, C, z))
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    if config is None:
        arch, sms = launch.target(x.device)
        sizes = {
            "b": b,
            "l": l,
            "h": h,
            "g": g,
            "p": p,
            "n": n,
            "itemsize": x.element_size(),
            "sms": sms,
        }
        config = launch.plan("ssd_scan_backward", arch, **sizes)["sweep"]
    dy = dy.contiguous()
    dfinal, dstates = (None if t is None else t.contiguous() for t in (dfinal, dstates))
    windows = cut(
        x, cu_seqlens, None if dstates is None else state_positions, config.q * config.subs
    )
    chunks = windows.count * config.subs
    parts = -(-(h // g) // config.heads)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx, ddt, dz = (None if t is None else new(*t.shape, dtype=t.dtype) for t in (x, dt, z))
    dB, dC = (new(parts, *t.shape, dtype=t.dtype if parts == 1 else torch.float32) for t in (B, C))
    dA, dbias = new(chunks, h), None if dt_bias is None else new(chunks, h)
    dD = None if D is None else torch.zeros((chunks, h, p), dtype=torch.float32, device=x.device)
    dinitial = None
    if initial_states is not None:
        dinitial = torch.zeros(initial_states.shape, dtype=torch.float32, device=x.device)
        if dfinal is not None:
            dinitial.copy_(dfinal)  # what an empty sequence keeps

    if chunks:
        steps, CB = new(chunks, h, 2, config.q), new(chunks, g, config.q, config.q)
        pieces, through = new(chunks, h, 4, config.q), new(chunks, h)
        chunking = {"HEADS": h, "Q": config.q, "SUBS": config.subs, "UPCAST": INTERPRETED}
        tiles = chunking | {
            "GROUPS": g, "P": p, "N": n, "BLOCK_N": launch.power_of_two(n), "PRECISION": config.precision,
            "BLOCK_P": min(config.block_p, launch.power_of_two(p)),
        }  # fmt: skip
        table = (*windows.rows, l, windows.per_sequence)
        prepare[(chunks * g,)](
            dt, A, dt_bias, B, C, steps, CB, *table, *dt.stride(), *pitch(B), *pitch(C), dt_min, dt_max,
            SOFTPLUS=dt_softplus, GROUPS=g, BLOCK_H=min(16, launch.power_of_two(h // g)), N=n,
            BLOCK_N=tiles["BLOCK_N"], PRECISION=config.precision, **chunking,
        )  # fmt: skip
        entry = window_states(
            config, windows, False, x, None, B, A, steps, initial_states, None, None, tiles
        )
        exit = window_states(
            config, windows, True, dy, z, C, A, steps, dfinal, dstates, dinitial, tiles
        )
        sweep[(chunks * g * parts,)](
            dy, x, A, B, C, D, z, steps, CB, entry, exit, dx, dB, dC, dD, dz, pieces, through, *table,
            *pitch(x), *pitch(B), *pitch(C), *pitch(z), B.numel(),
            D_ROWS=D is not None and D.dim() == 2, HEADS_A_PART=config.heads, NQ=config.nq,
            num_warps=config.warps, num_stages=config.stages, **tiles,
        )  # fmt: skip
        finish[(chunks * -(-h // 16),)](
            dt, A, dt_bias, steps, pieces, through, ddt, dA, dbias, *table, *dt.stride(), dt_min, dt_max,
            SOFTPLUS=dt_softplus, BLOCK_H=16, **chunking,
        )  # fmt: skip
    if dinitial is not None and dstates is not None:
        at_start = (windows.at_position < 0)[:, None, None, None]
        dinitial[0] += torch.where(at_start, dstates, 0.0).sum(0)
    if parts == 1:
        dB, dC = dB[0], dC[0]
    return (
        dx,
        ddt,
        dA.sum(0).to(A.dtype),
        dB if parts == 1 else dB.sum(0).to(B.dtype),
        dC if parts == 1 else dC.sum(0).to(C.dtype),
        None if D is None else dD.sum(0 if D.dim() == 2 else (0, 2)).to(D.dtype),
        dz,
        None if dt_bias is None else dbias.sum(0).to(dt_bias.dtype),
        None if dinitial is None else dinitial.to(initial_states.dtype),
    )
