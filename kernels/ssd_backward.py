"""Mamba-2 (SSD) scan, backward: every gradient from the inputs alone.

Per chunk of q tokens and head, with R the entry state, dR' the gradient of the exit state, cs the running sum of
A dt' inside the chunk, dy already multiplied by silu(z), and L[l,s] = exp(cs_l - cs_s) for s <= l:

    CB = C B^T    G[l,s] = dy_l . x_s    M = CB L dt'_s    dCB = sum over the group's heads of L G dt'_s
    dx_s = sum_l M[l,s] dy_l + dt'_s exp(cs_last - cs_s) dR' B_s + D dy_s
    dC_l = sum_s dCB[l,s] B_s + sum over heads of exp(cs_l) R^T dy_l
    dB_s = sum_l dCB[l,s] C_l + sum over heads of dt'_s exp(cs_last - cs_s) dR'^T x_s

and per token what `ssd_backward_steps` turns into ddt, dA and ddt_bias. Shapes: dy, x, z (b,l,h,p); dt (b,l,h);
A, dt_bias (h); B, C (b,l,g,n); D (h) or (h,p); states (b or s,h,p,n). Sums, states in registers and exponents are
fp32; products take operands of x's dtype.

Kernels, in order: [`gate`, `skip`] `prepare` (dt', cs, CB), `walk` twice (R and dR' of every chunk), `sweep` (the
above), `finish`. The sweep is parallel over chunks and loops over a group's heads, so that dB and dC stay in
registers until they are whole, and the products with CB and dCB are done once a group. More than 16 heads go in
parts, whose fp32 planes are summed in a fixed order. With z, y before the gate comes from the forward kernels.

KB a token at h 128, p 64, n 128, g 8, q 64, bf16 without z: prepare 7, walks 2 x 52 (x or dy, and states 33), sweep
128 (x, dy 33, states 66, dx 16), finish 3: 243, of which states 131. Where b h does not fill the device the walks
read their inputs twice: 41 more. The minimum is 76, mamba_ssm moves about 375. 14.7 MFLOP a token (mamba_ssm
18.4). A walk with dS in registers would save one trip of dR' (66) but has to add dB and dC of every head to memory
(262 KB of L2), has its products in series, and computes CB, dCB B and dCB^T C once a head (22 MFLOP). q 32 doubles
the states: 374. States at every second chunk would save 66, but recomputing the other one in the sweep spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels import launch
from tigon.kernels.ssd_backward_states import chunk_states, cut
from tigon.kernels.ssd_backward_steps import (
    DIRECT,
    OFF,
    PAIRS,
    V,
    finish,
    gate,
    load_steps,
    load_tile,
    prepare,
    skip,
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
from tigon.kernels.ssd_forward import pitch, rows_of, ssd_forward


@triton.jit
def sweep(
    dy_ptr, x_ptr, A_ptr, B_ptr, C_ptr, D_ptr, steps_ptr, CB_ptr, entry_ptr, exit_ptr,
    dx_ptr, dB_ptr, dC_ptr, dD_ptr, pieces_ptr, through_ptr,
    starts, ends, sequences, offsets, length, per_sequence,
    x_b, x_t, B_b, B_t, C_b, C_t, part_size,
    D_ROWS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, HEADS_A_PART: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    NQ: tl.constexpr, HOIST: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one (chunk, group, part of its heads); it loops over those heads and over tiles of p.

    Blocks over token pairs are held as [s, l] (source, then the later token): no product needs a transpose in
    the loop. dB, dC go to plane `part` of (parts,b,l,g,n); dD (chunks,h) is this
    chunk's share, for D (h); dD_ptr is None for D (h,p). HOIST: let the compiler move what all heads share out of
    their loop, into registers.
    """
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    PARTS: tl.constexpr = (PER_GROUP + HEADS_A_PART - 1) // HEADS_A_PART
    TILES: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    part = program % PARTS
    group = ((program // PARTS) % GROUPS).to(tl.int64)
    chunk = (program // (PARTS * GROUPS)).to(tl.int64)
    batch, start, end, _sequence, _first, _last = segment_bounds(
        chunk, starts, ends, sequences, offsets, length, Q, per_sequence
    )
    tokens = (end - start).to(tl.int32)
    if tokens <= 0:
        return
    q = tl.arange(0, Q)
    inside = q < tokens
    n = tl.arange(0, BLOCK_N)
    io = x_ptr.dtype.element_ty

    B_row = B_ptr + batch * B_b + start * B_t + group * N
    C_row = C_ptr + batch * C_b + start * C_t + group * N
    B = load_tile(B_row, B_t, q, inside, n, N)
    C = load_tile(C_row, C_t, q, inside, n, N)
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
    for head in tl.range(first_head, last_head, disable_licm=not HOIST):
        limit = decay_limit(load_head(A_ptr, head))
        slot = chunk * HEADS + head
        dt, cs, total = load_steps(steps_ptr, slot, Q)
        to_end = decay(total - cs, limit)
        from_start = tl.exp2(cs)
        x_row = x_ptr + batch * x_b + start * x_t + head * P
        out_row = (batch * length + start) * (HEADS * P) + head * P
        dy_row = dy_ptr + out_row
        direct = tl.zeros((Q,), tl.float32)
        between = tl.zeros((Q,), tl.float32)
        v = tl.zeros((Q,), tl.float32)
        off = tl.zeros((Q,), tl.float32)
        through = 0.0
        dD = 0.0
        for tile in range(0, TILES):
            p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            state = slot * (P * N)
            R = load_tile(entry_ptr + state, P, n, n < N, p, P)
            dR = load_tile(exit_ptr + state, P, n, n < N, p, P)
            through += tl.sum(tl.sum(R.to(tl.float32) * dR.to(tl.float32), 1), 0)

            x = load_tile(x_row, x_t, q, inside, p, P)
            dy = load_tile(dy_row, HEADS * P, q, inside, p, P)
            x32 = x.to(tl.float32)
            dy32 = dy.to(tl.float32)
            tile_mask = within(inside, p, P)
            out = q[:, None] * (HEADS * P) + p[None, :]

            CB = tl.load(CB_block + (q[:, None] * Q + q[None, :]))
            pair = decay(cs[None, :] - cs[:, None], limit)
            pair = tl.where(q[:, None] <= q[None, :], pair, 0.0)
            mixing = narrow(CB * pair * dt[:, None], io, UPCAST)
            gram = dot(x, tl.trans(dy), None, PRECISION, UPCAST) * pair
            if dD_ptr is not None:
                diagonal = tl.where(q[:, None] == q[None, :], gram, 0.0)  # x_s . dy_s
                dD += tl.sum(tl.sum(diagonal, 1), 0)
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
            tl.store(dx_ptr + out_row + out, narrow(dx, io, UPCAST), mask=tile_mask)
            ending = narrow(x32 * (dt * to_end)[:, None], io, UPCAST)
            if NQ:
                dB = dot(dR, tl.trans(ending), dB, PRECISION, UPCAST)
            else:
                dB = dot(ending, tl.trans(dR), dB, PRECISION, UPCAST)

            ahead = dot(C, R, None, PRECISION, UPCAST) * from_start[:, None]
            off += tl.sum(dy32 * ahead, 1)
            started = narrow(dy32 * from_start[:, None], io, UPCAST)
            if NQ:
                dC = dot(R, tl.trans(started), dC, PRECISION, UPCAST)
            else:
                dC = dot(started, tl.trans(R), dC, PRECISION, UPCAST)

        pieces = pieces_ptr + slot * (4 * Q) + q
        tl.store(pieces + DIRECT * Q, direct)
        tl.store(pieces + PAIRS * Q, between)
        tl.store(pieces + OFF * Q, off)
        tl.store(pieces + V * Q, v)
        tl.store(through_ptr + slot, through)
        if dD_ptr is not None:
            tl.store(dD_ptr + slot, dD)

    low = narrow(dCB, io, UPCAST)
    if NQ:
        dB = dot(tl.trans(C), tl.trans(low), dB, PRECISION, UPCAST)
        dC = dot(tl.trans(B), low, dC, PRECISION, UPCAST)
        tile = q[None, :] * (GROUPS * N) + n[:, None]
        mask = inside[None, :] & (n < N)[:, None]
    else:
        dB = dot(low, C, dB, PRECISION, UPCAST)
        dC = dot(tl.trans(low), B, dC, PRECISION, UPCAST)
        tile = q[:, None] * (GROUPS * N) + n[None, :]
        mask = within(inside, n, N)
    place = part.to(tl.int64) * part_size + (batch * length + start) * (GROUPS * N) + group * N
    tl.store(dB_ptr + place + tile, narrow(dB, dB_ptr.dtype.element_ty, UPCAST), mask=mask)
    tl.store(dC_ptr + place + tile, narrow(dC, dC_ptr.dtype.element_ty, UPCAST), mask=mask)


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
    batch_invariant: bool = False,
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
        sizes = {"b": b, "l": l, "h": h, "g": g, "p": p, "n": n, "sms": sms}
        sizes["batch_invariant"] = batch_invariant
        plan = launch.plan("ssd_scan_backward", arch, itemsize=x.element_size(), **sizes)
        config = plan["sweep"]
    dy = dy.contiguous()
    dfinal, dstates = (None if t is None else t.contiguous() for t in (dfinal, dstates))
    chunks = cut(x, cu_seqlens, None if dstates is None else state_positions, config.q)
    parts = -(-(h // g) // config.heads)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx, ddt = (new(*t.shape, dtype=t.dtype) for t in (x, dt))
    dz = None if z is None else new(*z.shape, dtype=z.dtype)
    dB, dC = (new(parts, *t.shape, dtype=t.dtype if parts == 1 else torch.float32) for t in (B, C))
    dA, dbias = new(chunks.count, h), None if dt_bias is None else new(chunks.count, h)
    dD = None if D is None else new(chunks.count, *D.shape).zero_()
    dinitial = None
    if initial_states is not None:
        dinitial = new(*initial_states.shape)
        dinitial.copy_(
            torch.zeros_like(dinitial) if dfinal is None else dfinal
        )  # empty sequences keep it

    if chunks.count and h:
        q, block_h = config.q, 16
        steps, CB = new(chunks.count, h, 2, q), new(chunks.count, g, q, q)
        pieces, through = new(chunks.count, h, 4, q), new(chunks.count, h)
        step = (dt, A, dt_bias)
        steps_of = {
            "SOFTPLUS": dt_softplus,
            "HEADS": h,
            "BLOCK_H": block_h,
            "Q": q,
            "UPCAST": INTERPRETED,
        }
        tiles = {
            "HEADS": h, "GROUPS": g, "P": p, "N": n, "Q": q, "BLOCK_N": launch.power_of_two(n),
            "BLOCK_P": min(config.block_p, launch.power_of_two(p)),
            "PRECISION": config.precision, "UPCAST": INTERPRETED,
        }  # fmt: skip
        grad = dy
        if z is not None:
            grad, block = torch.empty_like(dy), 1024
            dz, _, _ = ssd_forward(
                x, dt, A, B, C, D, None, dt_bias, initial_states, cu_seqlens, None, dt_softplus, dt_min, dt_max,
                batch_invariant=batch_invariant,
            )  # fmt: skip
            gate[(b * l * -(-h * p // block),)](
                dy, z, grad, dz, l, *pitch(z), WIDTH=h * p, BLOCK=block, UPCAST=INTERPRETED
            )
        D_ROWS = D is not None and D.dim() == 2
        if D_ROWS:
            skip[(chunks.count * -(-h * p // 128),)](
                grad, x, dD, *chunks.table, *pitch(x), WIDTH=h * p, BLOCK=128, Q=q
            )
        prepare[(chunks.count * g,)](
            *step, B, C, steps, CB, *chunks.table, *dt.stride(), *pitch(B), *pitch(C), dt_min, dt_max,
            GROUPS=g, N=n, BLOCK_N=tiles["BLOCK_N"], PRECISION=config.precision, num_warps=config.warps, **steps_of,
        )  # fmt: skip
        states = (config, chunks, tiles)
        entry = chunk_states(*states, False, x, B, A, steps, initial_states)
        exit = chunk_states(*states, True, grad, C, A, steps, dfinal, dstates, dinitial)
        sweep[(chunks.count * g * parts,)](
            grad, x, A, B, C, D, steps, CB, entry, exit, dx, dB, dC, None if D_ROWS else dD, pieces, through,
            *chunks.table, *pitch(x), *pitch(B), *pitch(C), B.numel(),
            D_ROWS=D_ROWS, HEADS_A_PART=config.heads, NQ=config.nq, HOIST=config.hoist,
            num_warps=config.warps, num_stages=config.stages, **tiles,
        )  # fmt: skip
        finish[(chunks.count * -(-h // block_h),)](
            *step, steps, pieces, through, ddt, dA, dbias, *chunks.table, *dt.stride(), dt_min, dt_max, **steps_of
        )  # fmt: skip
    if dinitial is not None and dstates is not None:
        at_start = (chunks.at_position < 0)[:, None, None, None]
        dinitial[0] += torch.where(at_start, dstates, 0.0).sum(0)
    if parts == 1:
        dB, dC = dB[0], dC[0]
    return (
        dx,
        ddt,
        dA.sum(0).to(A.dtype),
        dB if parts == 1 else dB.sum(0).to(B.dtype),
        dC if parts == 1 else dC.sum(0).to(C.dtype),
        None if D is None else dD.sum(0).to(D.dtype),
        dz,
        None if dt_bias is None else dbias.sum(0).to(dt_bias.dtype),
        None if dinitial is None else dinitial.to(initial_states.dtype),
    )
