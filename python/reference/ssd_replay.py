"""`ssd_update` with state rollback by replay, in plain PyTorch: the definition, then the form that serves as CPU
backend.

A slot's SSM state is the one after `checkpoint` tokens; its tokens checkpoint..length-1 are committed and lie in the
ring only: x (slots,L,h,p), B (slots,L,g,n) and dt' (slots,L,h), token t at place t % L. A call adds the tokens from
`length` on to the ring; which of them stay is decided afterwards, by how far `length` is moved. The law is

    S   = round(S)                                      before token t, where t is a multiple of `flush`
    S   = exp(A dt'_t) S + dt'_t x_t B_t^T
    y_t = (S C_t + D x_t) silu(z_t)

with rounding to the state's dtype (stochastic: the bits of write position t). So outputs and stored states are a pure
function of the tokens since the start of the request: not of how they were grouped into calls, nor of rejected drafts.

`ssd_replay` computes it without a step a token. With F(t) the multiple of flush at or below t, the state is folded, and
written, up to F(length) only; the output of a token at position t uses base(t) = max(checkpoint, F(t)):

    y_t = exp(c(base..t)) C_t.S_base + sum_{base <= k <= t} exp(sum_{k < j <= t} A dt'_j) dt'_k (C_t.B_k) x_k  (+ D, z)

Tokens at or past the next boundary, F(length) + flush, use a copy that is folded and rounded as the later write will
be. Exponents are sums from the newer end: no differences, so with A <= 0 none exceeds 0. Windows begin at multiples
of flush, so that sums have the same shape however tokens are grouped.

Trees: bit j of ancestors[b,i] says that node j of the call is i or an ancestor of i; parents come first. Node i lies at
place (length + i) % L and sees the committed tokens and its ancestors; all nodes use base(length).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.reference.elementwise import silu
from tigon.reference.slots import Rows, write_rings, write_slots
from tigon.reference.ssd import _prepare, process_dt
from tigon.reference.state_format import decode_state, encode_state, raw


def replay_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    S: Tensor,
    start: int,
    flush: int,
    rounded: Callable[[Tensor, int], Tensor] = lambda S, position: S,
) -> tuple[Tensor, Tensor, Tensor]:
    """The law, token by token, for one sequence that starts at position `start` with state S (h,p,n).

    x, z (l,h,p), dt' (l,h), B, C (l,g,n), D (h)|(h,p). Returns y (l,h,p), the state after the last token and the state
    as it would be stored at the last multiple of flush (S itself before the first one).
    """
    per_group = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(per_group, 1), C.repeat_interleave(per_group, 1)
    stored, rows = S, []
    for i in range(x.shape[0]):
        t = start + i
        if t % flush == 0 and i:
            S = stored = rounded(S, t)
        S = torch.exp(A * dt[i])[:, None, None] * S
        S = S + (dt[i, :, None] * x[i])[..., None] * B[i, :, None]
        y = (S * C[i, :, None]).sum(-1)
        if D is not None:
            y = y + (D if D.dim() == 2 else D[:, None]) * x[i]
        rows.append(y if z is None else y * F.silu(z[i]))
    return torch.stack(rows) if rows else x, S, stored


class _Ring:
    """The tokens of every row at positions last - 0, last - 1, ... (newest first), zeros where unknown."""

    def __init__(self, rings, index, last, count: int, known: Callable[[Tensor], Tensor], acc):
        self.position = last[:, None] - torch.arange(count, device=last.device)
        self.known = known(self.position)
        slot, place = index[:, None], self.position % rings[0].shape[1]
        unknown = ~self.known
        # Never 0 * what lies there: a ring keeps what other requests left, NaN perhaps.
        self.x, self.B, self.dt = (
            ring[slot, place].to(acc).masked_fill_(unknown.view(*unknown.shape, *[1] * (d - 2)), 0)
            for ring, d in zip(rings, (4, 4, 3), strict=True)
        )

    def cut(self, first: int, end: int) -> "_Ring":
        part = object.__new__(_Ring)
        for name, t in vars(self).items():
            setattr(part, name, t[:, first:end])
        return part

    def only(self, seen: Tensor) -> "_Ring":
        """The same with zeros where not seen (b,T)."""
        part = object.__new__(_Ring)
        part.position, part.known = self.position, seen
        part.x, part.B = (torch.where(seen[..., None, None], t, 0) for t in (self.x, self.B))
        part.dt = self.dt
        return part

    def fold(self, S: Tensor, A: Tensor) -> Tensor:
        """The state after the tokens of this window, from the state before: (b,h,p,n)."""
        b, T, h, p = self.x.shape
        g = self.B.shape[2]
        decay = F.pad(self.dt * A, (0, 0, 1, 0)).cumsum(1).exp_()  # (b,T+1,h): after k; of all
        weighted = self.x * (decay[:, :T] * self.dt)[..., None]
        weighted = weighted.view(b, T, g, h // g * p).permute(0, 2, 3, 1)
        added = (weighted @ self.B.transpose(1, 2)).view(S.shape)
        return added.addcmul_(decay[:, T, :, None, None], S)

    def outputs(self, S: Tensor, C: Tensor, A: Tensor, seen: Tensor) -> Tensor:
        """y (b,q,h,p) before D and z, of q tokens that see `seen` (b,q,T) of this window, from its base state."""
        b, T, h, p = self.x.shape
        q, g, n = C.shape[1:]
        steps = torch.where(seen[..., None], (self.dt * A)[:, None], 0)
        decay = F.pad(steps, (0, 0, 1, 0)).cumsum(2).exp_()  # (b,q,T+1,h)
        weight = decay[:, :, :T] * self.dt[:, None]
        C = C.transpose(1, 2)  # (b,g,q,n)
        CB = C @ self.B.permute(0, 2, 3, 1)  # (b,g,q,T)
        mixing = weight.permute(0, 3, 1, 2).unflatten(1, (g, -1)) * CB[:, :, None]
        mixing = torch.where(seen[:, None, None], mixing, 0).view(b, h, q, T)
        y = (mixing @ self.x.transpose(1, 2)).transpose(1, 2)  # (b,q,h,p)
        # C^T S^T, a group at a time: on the CPU much faster than S @ C.
        before = (C @ S.reshape(b, g, h // g * p, n).transpose(-1, -2)).transpose(1, 2)
        return y.addcmul(decay[:, :, T, :, None], before.reshape(b, q, h, p))


def ssd_replay(
    state: Tensor,
    state_scale: Tensor | None,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    checkpoint: Tensor,
    length: Tensor,
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
    ancestors: Tensor | None,
    seeds: Tensor | None,
    flush: int,
    layer: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    batch_invariant: bool = False,
) -> Tensor:
    """m tokens a row, x (b,m,h,p) -> y (b,m,h,p); the rings and, at a boundary, the state are updated in place.

    seeds (b): round the state stochastically; None: to nearest. Rows whose slot is out of [0, slots) are padding: zeros
    come out, nothing is touched. Tokens from num_tokens[row] on are padding too. checkpoint and length are only read.
    batch_invariant: bits of a token's output do not depend on how many others come with it (those of states never do).
    """
    acc, _, A, skip, bias = _prepare(x, A, D, dt_bias, False)
    batch, m = x.shape[:2]
    rows = Rows(batch, m, state.shape[0], state_indices, num_tokens, x.device)
    rings = (ring_x, ring_B, ring_dt)
    start, first = checkpoint[rows.index], length[rows.index]
    boundary = first // flush * flush
    token = torch.arange(m, device=x.device)
    position = first[:, None] + token
    dt = process_dt(dt.to(acc), bias, dt_softplus, dt_min, dt_max)
    write_rings(rings, (x, B, dt), rows.index, position % ring_x.shape[1], rows.real())

    end = (first + (m if rows.count is None else rows.count))[:, None]
    begin = start[:, None]
    ahead = 1 if m == 1 and ancestors is None else 2  # windows from the boundary on
    last = boundary + (ahead * flush - 1)
    ring = _Ring(
        *(rings, rows.index, last, (ahead + 1) * flush),
        *(lambda at: (at >= begin) & (at < end), acc),
    )
    S = _folded_once(state, state_scale, ring, A, rows, start, boundary, seeds, layer, acc, flush)

    C = C.to(acc)
    if ancestors is not None:
        window = ring.cut(0, 2 * flush)
        y = _outputs(window, S, C, A, _tree(window, first, ancestors), batch_invariant)
    else:
        window = ring.cut((ahead - 1) * flush, ahead * flush)
        y = _outputs(window, S, C, A, _chain(window, position), batch_invariant)
    if ancestors is None and ahead == 2:
        # Tokens at or past the next boundary see the state as it will be stored there.
        after = boundary + flush
        S = window.fold(S, A)
        stored = encode_state(S, state.dtype, seeds=seeds, positions=after, layer=layer)
        S, window = decode_state(*stored, acc), ring.cut(0, flush)
        late = _outputs(window, S, C, A, _chain(window, position), batch_invariant)
        y = torch.where((position >= after[:, None])[..., None, None], late, y)
    if skip is not None:
        y = y.addcmul(skip, x.to(acc))
    if z is not None:
        y = y * silu(z.to(acc))
    real = rows.real()
    y = y if real is None else torch.where(real[..., None, None], y, 0)
    return y.to(x.dtype).contiguous()


def _outputs(window: _Ring, S, C, A, seen: Tensor, one_by_one: bool) -> Tensor:
    """Of all tokens at once, or of each by products of one shape and from what it sees only."""
    if not one_by_one or C.shape[1] == 1:
        return window.outputs(S, C, A, seen)
    each = zip(C.split(1, 1), seen.split(1, 1), strict=True)
    return torch.cat([window.only(s[:, 0]).outputs(S, c, A, s) for c, s in each], 1)


def _chain(window: _Ring, position: Tensor) -> Tensor:
    """(b,m,T): the tokens of the window at or before each position."""
    return window.known[:, None] & (window.position[:, None] <= position[..., None])


def _tree(window: _Ring, first: Tensor, ancestors: Tensor) -> Tensor:
    """(b,m,T): the committed tokens, and the nodes that are ancestors of each node or itself."""
    place = (window.position - first[:, None])[
        :, None
    ]  # of a node in its call; negative: committed
    node = torch.arange(ancestors.shape[1], device=place.device)[:, None]
    bit = ancestors.to(torch.int64)[..., None] >> place.clamp(0, 31) & 1
    return window.known[:, None] & ((place < 0) | (place == node) | ((place < node) & (bit == 1)))


def _folded_once(
    state, state_scale, ring, A, rows, start, boundary, seeds, layer, acc, flush
) -> Tensor:
    """The state of each row at max(checkpoint, F(length)); written where that is past the checkpoint."""
    memory = raw(state)
    before = memory[: rows.batch] if rows.in_order else memory[rows.index]
    scale = None if state_scale is None else state_scale[rows.index]
    codes = before.view(state.dtype)
    S = decode_state(codes, scale, acc)
    T = ring.position.shape[1]
    S = ring.cut(T - flush, T).fold(S, A)
    due = boundary > start
    if rows.live is not None:
        due = due & rows.live
    codes, new_scale = encode_state(S, state.dtype, seeds=seeds, positions=boundary, layer=layer)
    codes = torch.where(due[:, None, None, None], raw(codes), before)
    if scale is not None:
        scale = torch.where(due[:, None, None], new_scale, scale)
    for pool, new in ((memory, codes), (state_scale, scale)):
        if pool is None:
            continue
        if rows.in_order:
            pool[: rows.batch] = new  # what was not due is what was read
        else:
            write_slots(pool, new, rows.index, due)
    return decode_state(codes.view(state.dtype), scale, acc)


def replay_state(
    state: Tensor,
    state_scale: Tensor | None,
    rings: tuple[Tensor, Tensor, Tensor],
    start: Tensor,
    first: Tensor,
    index: Tensor,
    A: Tensor,
    flush: int,
    seeds: Tensor | None,
    layer: int,
) -> Tensor:
    """The state (b,h,p,n) of the slots `index` (b) after first (b) tokens, in fp32 (fp64): pending tokens are folded,
    those before F(first) and then, after rounding, the rest. Nothing is written."""
    acc = torch.float64 if rings[2].dtype == torch.float64 else torch.float32
    A = A.to(acc)
    boundary = first // flush * flush
    begin, end = start[:, None], first[:, None]
    ring = _Ring(
        *(rings, index, boundary + flush - 1, 2 * flush),
        *(lambda at: (at >= begin) & (at < end), acc),
    )
    scale = None if state_scale is None else state_scale[index]
    S = decode_state(raw(state)[index].view(state.dtype), scale, acc)
    folded = ring.cut(flush, 2 * flush).fold(S, A)
    codes = encode_state(folded, state.dtype, seeds=seeds, positions=boundary, layer=layer)
    S = torch.where((boundary > start)[:, None, None, None], decode_state(*codes, acc), S)
    return ring.cut(0, flush).fold(S, A)
