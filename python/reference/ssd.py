"""Mamba-2 state-space duality (SSD) scan in plain PyTorch: the definition, then the chunked form.

For every batch row and head, with group g = head // (h / g_count):

    dt'_t = clamp(softplus(dt_t + dt_bias), dt_min, dt_max)          (softplus optional; identity above 20)
    S_t   = exp(A dt'_t) S_{t-1} + dt'_t x_t B_t^T                    (p, n)
    y_t   = (S_t C_t + D x_t) * silu(z_t)                             (p)

Shapes: x, z, y (b,l,h,p); dt (b,l,h); A, dt_bias (h); D (h) or (h,p); B, C (b,l,g,n); states (b,h,p,n).
Packed batches have b = 1 and cu_seqlens (s+1); their states are (s,h,p,n).

`ssd_recurrence` is the oracle: run it in fp64. `ssd_forward` and `ssd_backward` compute the same in chunks
(Dao and Gu 2024, "Transformers are SSMs", section 6) with matrix products; they serve as the CPU backend.
A chunk is small enough to stay in cache. They accumulate in fp32 (fp64 for fp64 inputs) and hold:
input dtype in, output dtype out. With `round_operands=True` they round to the io dtype exactly where a
kernel feeds tensor cores; the error of that run against the oracle is the baseline for kernels.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.reference.chunks import Dense, cut_chunks, one_sequence
from tigon.reference.elementwise import silu, softplus
from tigon.reference.slots import write_slots
from tigon.reference.state_format import decode_state, encode_state, raw

CHUNK = 64  # tokens: a chunk's blocks over token pairs stay in the CPU's cache


def process_dt(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float
) -> Tensor:
    """dt' = clamp(softplus(dt + dt_bias), dt_min, dt_max); softplus is the identity above 20."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    return dt.clamp(dt_min, dt_max)


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_positions: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token, straight from the formula; differentiable by autograd. Returns (y, final, states)."""
    batch, length, heads, p = x.shape
    n = B.shape[-1]
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    wanted = [] if state_positions is None else state_positions.tolist()
    dt = process_dt(dt, dt_bias, dt_softplus, dt_min, dt_max)
    B = B.repeat_interleave(heads // B.shape[2], dim=2)
    C = C.repeat_interleave(heads // C.shape[2], dim=2)
    zeros = x.new_zeros(batch, heads, p, n)
    rows, finals, seen = [], [], {}
    for k, (start, end) in enumerate(pairwise(bounds)):
        S = zeros
        if initial_states is not None:
            S = initial_states if cu_seqlens is None else initial_states[k : k + 1]
        seen.setdefault(start, S)
        for t in range(start, end):
            decay = torch.exp(A * dt[:, t])[..., None, None]
            S = decay * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
            seen[t + 1] = S
            rows.append((S * C[:, t, :, None, :]).sum(-1))
        finals.append(S)
    y = torch.stack(rows, 1) if rows else torch.zeros_like(x)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        y = y * F.silu(z)
    states = torch.cat([seen[t] for t in wanted]) if wanted else zeros[:0]
    return y, torch.cat(finals), states


def _rows(t, count):
    """The batch rows of a tensor, or of None."""
    return [None] * count if t is None else t.split(1)


def _joined(i, parts):
    """Gradient number i of `ssd_backward` from those of each row: A, D and dt_bias serve all rows."""
    if parts[0] is None:
        return None
    return sum(parts) if i in (2, 5, 7) else torch.cat(parts)


def _entry(initial_states, rows, heads, p, n, like, acc):
    """Initial states in the accumulation dtype, with one dummy row at the end."""
    out = torch.zeros(rows + 1, heads, p, n, dtype=acc, device=like.device)
    if initial_states is not None:
        out[:-1] = initial_states
    return out


class _Chunk:
    """One chunk's tensors, batched over (batch, group, heads of the group = e): what both directions need."""

    def __init__(self, cut, c, x, dt, A, B, C, dt_bias, dt_softplus, dt_min, dt_max, acc):
        groups = B.shape[2]
        self.raw_dt = cut.take(dt, c).to(acc)
        self.dt = cut.mask_dt(process_dt(self.raw_dt, dt_bias, dt_softplus, dt_min, dt_max), c)
        self.x = cut.take(x, c).to(acc)  # (b,q,h,p)
        b, q, h, p = self.x.shape
        self.shape = (b, groups, h // groups, q, p)
        self.B = cut.take(B, c).to(acc).transpose(1, 2)  # (b,g,q,n)
        self.C = cut.take(C, c).to(acc).transpose(1, 2)
        self.cs = (self.dt * A).cumsum(1)  # (b,q,h), <= 0 and descending for A <= 0
        self.total = self.cs[:, -1]  # (b,h)
        # Where A <= 0 rounding must not lift a difference above 0; a positive A is the caller's wish.
        limit = torch.where(A <= 0, 0.0, float("inf"))
        self.to_end = torch.exp(torch.minimum(self.total[:, None] - self.cs, limit))  # (b,q,h)
        self.from_start = torch.exp(self.cs)
        cs = self.cs.transpose(1, 2).contiguous()  # else all that follows is strided: 5x slower
        decay = cs[..., :, None] - cs[..., None, :]
        torch.minimum(decay, limit[:, None, None], out=decay)
        self.decay = decay.exp_().tril_()  # (b,h,q,q)
        self.CB = self.C @ self.B.transpose(-1, -2)  # (b,g,q,q)

    def mixing(self) -> Tensor:
        """M[l,s] = C_l.B_s exp(cs_l - cs_s) dt'_s for s <= l: (b,g,e,q,q)."""
        b, g, e, q, _ = self.shape
        return (self.decay.view(b, g, e, q, q) * self.CB[:, :, None]).mul_(self.by_source(self.dt))

    def by_source(self, t: Tensor) -> Tensor:
        """(b,q,h) -> (b,g,e,1,q), to scale the columns of a (q,q) block."""
        b, g, e, q, _ = self.shape
        return t.transpose(1, 2).reshape(b, g, e, 1, q)

    def heads(self, t: Tensor) -> Tensor:
        """(b,q,h,p) -> (b,g,e,q,p) without a copy."""
        b, g, e, q, _ = self.shape
        return t.view(b, q, g, e, -1).permute(0, 2, 3, 1, 4)

    def rows(self, t: Tensor) -> Tensor:
        """(b,q,h,p) -> (b,g,q,e*p): the heads of a group side by side, one matrix product for all."""
        b, g, e, q, p = self.shape
        return t.view(b, q, g, e * p).transpose(1, 2)

    def unrows(self, t: Tensor) -> Tensor:
        """(b,g,q,e*p) -> (b,q,h,p)."""
        b, g, e, q, p = self.shape
        return t.transpose(1, 2).reshape(b, q, g * e, p)

    def state_rows(self, S: Tensor) -> Tensor:
        """(b,h,p,n) -> (b,g,e*p,n)."""
        b, g, e, _, p = self.shape
        return S.reshape(b, g, e * p, -1)


def _scan_chunk(k: _Chunk, R: Tensor, low) -> Tensor:
    """y of a chunk before D and z, from its entry state R (b,h,p,n): (b,q,h,p)."""
    within = low(k.mixing()) @ k.heads(k.x)  # (b,g,e,q,p)
    b, g, e, q, p = k.shape
    y = within.permute(0, 3, 1, 2, 4).reshape(b, q, g * e, p)
    before = k.unrows(k.C @ k.state_rows(low(R)).transpose(-1, -2))
    return y.addcmul_(k.from_start[..., None], before)


def _advance(k: _Chunk, R: Tensor, low) -> Tensor:
    """Exit state of a chunk from its entry state."""
    weighted = k.rows(low(k.x * (k.to_end * k.dt)[..., None]))  # (b,g,q,e*p)
    added = (weighted.transpose(-1, -2) @ k.B).view(R.shape)
    return added.addcmul_(torch.exp(k.total)[..., None, None], R)


def _prepare(x, A, D, dt_bias, round_operands):
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    low = (lambda t: t.to(x.dtype).to(acc)) if round_operands else (lambda t: t)
    skip = None if D is None else (D if D.dim() == 2 else D[:, None]).to(acc)
    return acc, low, A.to(acc), skip, None if dt_bias is None else dt_bias.to(acc)


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
    chunk_size: int = CHUNK,
    round_operands: bool = False,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunked scan. Returns y in x's dtype and, in fp32 (fp64), final states and states at positions.

    A requested position's state is the one right after that many packed tokens: the state of the sequence that
    holds the token before it. Position 0 gives the first sequence's initial state.
    """
    if batch_invariant and cu_seqlens is None and x.shape[0]:
        # A matrix product's bits depend on its shape: one row a call, in the packed form, which pads the last chunk.
        rows = zip(*(_rows(t, x.shape[0]) for t in (x, dt, B, C, z, initial_states)), strict=True)
        options = (dt_softplus, dt_min, dt_max, chunk_size, round_operands)
        outs = [
            ssd_forward(r, s, A, b, c, D, g, dt_bias, i, one_sequence(x), state_positions, *options)
            for r, s, b, c, g, i in rows
        ]
        return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))
    acc, low, A, skip, bias = _prepare(x, A, D, dt_bias, round_operands)
    heads, p, n = x.shape[2], x.shape[3], B.shape[3]
    cut = cut_chunks(x, cu_seqlens, state_positions, CHUNK)
    initial = _entry(initial_states, cut.sequences, heads, p, n, x, acc)
    final = initial.clone()
    wanted = 0 if state_positions is None else state_positions.numel()
    states = torch.zeros(wanted + 1, heads, p, n, dtype=acc, device=x.device)
    out = cut.buffer(x)
    dense = isinstance(cut, Dense)
    S = initial[:-1] if dense else initial[:1]
    for c in range(cut.rows):
        k = _Chunk(cut, c, x, dt, A, B, C, bias, dt_softplus, dt_min, dt_max, acc)
        R = cut.enter(S, initial[:-1] if dense else initial, c)
        y = _scan_chunk(k, R, low)
        if skip is not None:
            y.addcmul_(skip, k.x)
        if z is not None:
            y.mul_(silu(cut.take(z, c).to(acc)))
        cut.put(out, c, y)
        S = _advance(k, R, low)
        cut.leave(S, c, final[:-1] if dense else final, states)
    if wanted:
        states = torch.where(
            cut.at_zero[:, None, None, None], initial[:1], states[cut.slot_of.clamp(max=wanted)]
        )
    else:
        states = states[:0]
    return cut.trim(out), final[:-1], states


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
    chunk_size: int = CHUNK,
    round_operands: bool = False,
    batch_invariant: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of `ssd_forward`: (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial), each in its input's dtype.

    A first sweep finds every chunk's entry state again; a second one walks right to left. With dR' the
    gradient of a chunk's exit state, W = M * (dy x^T), and v_s = dt'_s exp(cs_last - cs_s) x_s.(dR' B_s), the
    gradient of a_t = A dt'_t is taken in the form without cancellation:

        da_t = sum_{l >= t > s} W[l,s]  +  sum_{l >= t} exp(cs_l) dy_l.(R C_l)
             + sum_{s < t} v_s  +  exp(cs_last) <R, dR'>
    """
    if batch_invariant and cu_seqlens is None and x.shape[0]:
        options = (dt_softplus, dt_min, dt_max, chunk_size, round_operands)
        batched = (dy, dfinal, x, dt, B, C, z, initial_states)
        rows = zip(*(_rows(t, x.shape[0]) for t in batched), strict=True)
        sequence = (one_sequence(x), state_positions)
        outs = [
            ssd_backward(y, f, dstates, r, s, A, b, c, D, g, dt_bias, i, *sequence, *options)
            for y, f, r, s, b, c, g, i in rows
        ]
        return tuple(_joined(i, parts) for i, parts in enumerate(zip(*outs, strict=True)))
    acc, low, A_acc, skip, bias = _prepare(x, A, D, dt_bias, round_operands)
    heads, p, n = x.shape[2], x.shape[3], B.shape[3]
    cut = cut_chunks(x, cu_seqlens, state_positions, CHUNK)
    dense = isinstance(cut, Dense)
    initial = _entry(initial_states, cut.sequences, heads, p, n, x, acc)
    chunk_args = (x, dt, A_acc, B, C, bias, dt_softplus, dt_min, dt_max, acc)

    entries = []
    S = initial[:-1] if dense else initial[:1]
    for c in range(cut.rows):
        entries.append(cut.enter(S, initial[:-1] if dense else initial, c))
        if c < cut.rows - 1:
            S = _advance(_Chunk(cut, c, *chunk_args), entries[-1], low)

    dx, ddt, dB, dC = (cut.buffer(t) for t in (x, dt, B, C))
    dz = None if z is None else cut.buffer(z)
    dA = torch.zeros(heads, dtype=acc, device=x.device)
    ddt_bias = torch.zeros(heads, dtype=acc, device=x.device)
    dD = torch.zeros(heads, p, dtype=acc, device=x.device)
    exit_grad = _entry(dfinal, cut.sequences, heads, p, n, x, acc)
    dinitial = exit_grad.clone()  # what an empty sequence keeps
    wanted = 0 if state_positions is None else state_positions.numel()
    state_grad = torch.zeros(wanted + 1, heads, p, n, dtype=acc, device=x.device)
    if wanted and dstates is not None:
        at_zero = cut.at_zero[:, None, None, None]
        state_grad.index_add_(
            0, cut.slot_of.clamp(max=wanted), dstates.to(acc).masked_fill(at_zero, 0)
        )
        state_grad[-1] = 0

    dS = exit_grad[:-1] if dense else exit_grad[:1]
    if dense:
        exit_grad = exit_grad[:-1]
    for c in reversed(range(cut.rows)):
        k = _Chunk(cut, c, *chunk_args)
        b, g, e, q, _ = k.shape
        R = entries.pop()
        dS = cut.leave_backward(dS, c, exit_grad, state_grad)
        grad = cut.take(dy, c).to(acc)
        if not dense:
            grad = torch.where(cut.valid[c][:, None, None], grad, 0)
        if z is not None:
            y = _scan_chunk(k, R, low)
            if skip is not None:
                y.addcmul_(skip, k.x)
            gate = cut.take(z, c).to(acc)
            sig = torch.sigmoid(gate)
            cut.put(dz, c, grad * y * sig * (1 + gate * (1 - sig)))
            grad = low(grad * gate * sig)
        if D is not None:
            dD += (grad * k.x).sum((0, 1))

        heads_x, heads_g = k.heads(k.x), k.heads(grad)
        decayed = k.decay.view(b, g, e, q, q)
        dot = heads_g @ heads_x.transpose(-1, -2)  # dy_l . x_s
        decayed_dot = decayed * dot
        by_dt = k.by_source(k.dt)
        dCB = low(decayed_dot * by_dt).sum(2)
        direct = decayed_dot.mul_(k.CB[:, :, None])  # d y.x / d dt'_s, per pair
        W = direct * by_dt
        mixing = low(k.mixing())

        low_dS, low_R = low(dS), low(R)
        back = k.unrows(k.B @ k.state_rows(low_dS).transpose(-1, -2))  # dR' B_s: (b,q,h,p)
        ahead = k.unrows(k.C @ k.state_rows(low_R).transpose(-1, -2))  # R C_l
        out = (mixing.transpose(-1, -2) @ heads_g).permute(0, 3, 1, 2, 4).reshape(b, q, heads, p)
        out.addcmul_((k.dt * k.to_end)[..., None], back)
        if skip is not None:
            out.addcmul_(skip, grad)
        cut.put(dx, c, out)

        started = low(grad * k.from_start[..., None])
        ending = low(k.x * (k.dt * k.to_end)[..., None])
        chunk_dC = dCB @ k.B + k.rows(started) @ k.state_rows(low_R)
        chunk_dB = dCB.transpose(-1, -2) @ k.C + k.rows(ending) @ k.state_rows(low_dS)
        cut.put(dC, c, chunk_dC.transpose(1, 2))
        cut.put(dB, c, chunk_dB.transpose(1, 2))

        # The gradient of a = A dt', then of dt' and of the raw dt.
        v = (k.x * back).sum(-1) * k.to_end  # (b,q,h), without its dt'
        pairs = _rectangles(W).reshape(b, heads, q).transpose(1, 2)
        off = (grad * ahead).sum(-1) * k.from_start
        through = torch.exp(k.total) * (R * dS).sum((-1, -2))
        vdt = v * k.dt
        da = pairs + off.flip(1).cumsum(1).flip(1) + (vdt.cumsum(1) - vdt) + through[:, None]
        dA += (da * k.dt).sum((0, 1))
        chunk_ddt = direct.sum(-2).reshape(b, heads, q).transpose(1, 2) + v + da * A_acc
        chunk_ddt = _through_dt(chunk_ddt, k.raw_dt, bias, dt_softplus, dt_min, dt_max)
        if not dense:
            chunk_ddt = torch.where(cut.valid[c][:, None], chunk_ddt, 0)
        ddt_bias += chunk_ddt.sum((0, 1))
        cut.put(ddt, c, chunk_ddt)

        dR = (k.rows(started).transpose(-1, -2) @ k.C).view(R.shape)
        dS = dR.add_(torch.exp(k.total)[..., None, None] * dS)
        cut.enter_backward(dS, c, dinitial[:-1] if dense else dinitial)

    dinitial = dinitial[:-1]
    if wanted and dstates is not None:
        dinitial[0] += dstates.to(acc).masked_fill(~at_zero, 0).sum(0)
    return (
        cut.trim(dx),
        cut.trim(ddt),
        dA.to(A.dtype),
        cut.trim(dB),
        cut.trim(dC),
        None if D is None else (dD if D.dim() == 2 else dD.sum(-1)).to(D.dtype),
        None if z is None else cut.trim(dz),
        None if dt_bias is None else ddt_bias.to(dt_bias.dtype),
        None if initial_states is None else dinitial.to(initial_states.dtype),
    )


def _rectangles(W: Tensor) -> Tensor:
    """sum over l >= t > s of W[..., l, s], for every t: (..., q)."""
    q = W.shape[-1]
    before = torch.ones(q, q, dtype=W.dtype, device=W.device).triu_(1)  # [s, t] = 1 where s < t
    return (W @ before).tril_().sum(-2)


def _through_dt(grad, raw, bias, dt_softplus, dt_min, dt_max):
    """Gradient of the raw dt from the gradient of dt' = clamp(softplus(raw + bias))."""
    value = raw if bias is None else raw + bias
    slope = None
    if dt_softplus:
        slope = torch.where(value > 20, 1.0, torch.sigmoid(value))
        value = softplus(value)
    grad = torch.where((value >= dt_min) & (value <= dt_max), grad, 0)
    return grad if slope is None else grad * slope


def ssd_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    state_scale: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """m steps of the recurrence on slot-indexed states, updated in place: x (b,m,h,p) -> y (b,m,h,p).

    state (slots,h,p,n). Rows whose slot is out of [0, slots) are padding: zeros come out, nothing is touched.
    Tokens from num_tokens[row] on are padding too. The state is rounded once, at the end: to nearest, or with seeds (b)
    and positions (b), where the first token stands, stochastically; with state_scale (slots,h,p) to 8-bit codes.
    """
    acc, _, A, skip, bias = _prepare(x, A, D, dt_bias, False)
    batch, m = x.shape[:2]
    slots = state.shape[0]
    dt = process_dt(dt.to(acc), bias, dt_softplus, dt_min, dt_max)
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    step = _Step(x, dt, A, B, C, skip, z, acc)
    if state_indices is None and num_tokens is None:
        scale = None if state_scale is None else state_scale[:batch]
        # The state itself where the dtypes agree.
        S = decode_state(state[:batch], scale, acc)
        for j in range(m):
            y[:, j] = step.output(step.advance(S, j), j)
        if S.dtype != state.dtype:
            after = None if seeds is None else positions + m
            codes, scale = encode_state(S, state.dtype, seeds=seeds, positions=after, layer=layer)
            raw(state)[:batch] = raw(codes)
            if scale is not None:
                state_scale[:batch] = scale
        return y
    index = (
        torch.arange(batch, device=x.device)
        if state_indices is None
        else state_indices.to(torch.int64)
    )
    live = (index >= 0) & (index < slots)
    count = torch.full_like(index, m) if num_tokens is None else num_tokens.to(torch.int64)
    count = torch.where(live, count, 0)
    live = live & (count > 0)
    place = index.clamp(0, slots - 1)
    before = raw(state)[place]
    old_scale = None if state_scale is None else state_scale[place]
    S = decode_state(before.view(state.dtype), old_scale, acc)
    for j in range(m):
        active = (j < count)[:, None, None]
        new = step.advance(S.clone(), j)
        y[:, j] = torch.where(active, step.output(new, j), 0)
        S = torch.where(active[..., None], new, S)
    after = None if seeds is None else positions + count
    codes, scale = encode_state(S, state.dtype, seeds=seeds, positions=after, layer=layer)
    # A row that is not live writes back what it read.
    codes = torch.where(live[:, None, None, None], raw(codes), before)
    write_slots(raw(state), codes, index, live)
    if scale is not None:
        scale = torch.where(live[:, None, None], scale, old_scale)
        write_slots(state_scale, scale, index, live)
    return y


class _Step:
    """One token of the recurrence, batched over rows."""

    def __init__(self, x, dt, A, B, C, skip, z, acc):
        self.x, self.dt, self.B, self.C, self.z = x, dt, B, C, z
        self.A, self.skip, self.acc = A, skip, acc
        self.per_group = x.shape[2] // B.shape[2]

    def advance(self, S: Tensor, j: int) -> Tensor:
        """S <- exp(A dt') S + dt' x B^T, in place."""
        x, dt = self.x[:, j].to(self.acc), self.dt[:, j]
        B = self.B[:, j].to(self.acc).repeat_interleave(self.per_group, 1)
        S.mul_(torch.exp(dt * self.A)[..., None, None])
        return S.addcmul_((dt[..., None] * x)[..., None], B[:, :, None])

    def output(self, S: Tensor, j: int) -> Tensor:
        """(S C + D x) silu(z)."""
        b, h, p, n = S.shape
        rows = S.view(b, h // self.per_group, self.per_group * p, n)
        # C^T S^T, a group at a time: on the CPU six times as fast as S @ C.
        y = (self.C[:, j, :, None].to(self.acc) @ rows.transpose(-1, -2)).view(b, h, p)
        if self.skip is not None:
            y.addcmul_(self.skip, self.x[:, j].to(self.acc))
        if self.z is not None:
            y.mul_(silu(self.z[:, j].to(self.acc)))
        return y
