"""State rollback by replay: what a decoder that verifies drafts keeps beside its states, and how it moves on.

    cursor.start(slots, lengths)                                after a prefill

    causal_conv1d_update(x, cache.conv, …, replay=(cache, cursor))    every layer: m new tokens a row
    ssd_update(state, x, …, replay=(cache, cursor))
    replay_commit(cache, cursor, slots, path, num_new)                every layer, trees only: the path to the front

    replay_advance(cursor, slots, num_new)                      once, after all layers

A rejected token is undone by not advancing over it. The state is written at absolute positions that are multiples of
`flush` only; the tokens since lie in rings. `tigon.reference.ssd_replay` states the law.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tigon.ops.checks import FLOATS, INDEX, Check, inner_is_strided
from tigon.ops.dispatch import is_batch_invariant, run
from tigon.ops.library import register
from tigon.reference import ssd_replay as reference
from tigon.reference.conv1d_replay import committed_window
from tigon.reference.slots import Rows, write_rings, write_slots
from tigon.reference.state_format import E4M3

MAX_FLUSH = 32  # tokens between two writes of a state, and tokens a call with replay
STATES = (*FLOATS, torch.int8, E4M3)


@dataclass
class ReplayCache:
    """The rings of one layer: the newest tokens of every slot, the token of position t at place t % L (t % Lc).

    x (slots,L,h,p), B (slots,L,g,n) in the activations' dtype; dt (slots,L,h) fp32 (fp64 for fp64), after bias,
    softplus and limit; conv (slots,d,Lc), the convolution's inputs. L >= flush + 2m - 1 and Lc >= width - 1 + m for m
    tokens a call.
    """

    x: Tensor
    B: Tensor
    dt: Tensor
    conv: Tensor

    @classmethod
    def allocate(
        cls,
        slots: int,
        *,
        tokens: int,
        flush: int,
        heads: int,
        head_dim: int,
        groups: int,
        state_dim: int,
        channels: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> ReplayCache:
        """Rings for up to `tokens` tokens a call (m), of the least length: L = flush + 2m - 1, Lc = width - 1 + m."""
        _check_sizes("ReplayCache.allocate", tokens, flush)
        length = flush + 2 * tokens - 1
        beside = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        return cls(
            x=zeros(length, heads, head_dim),
            B=zeros(length, groups, state_dim),
            dt=zeros(length, heads, dtype=beside),
            conv=zeros(channels, width - 1 + tokens),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x, self.B, self.dt, self.conv)


@dataclass
class ReplayCursor:
    """Where every slot is, for all layers: the states hold `checkpoint` (slots) int64 tokens, `length` (slots) int64
    are committed. States are written at multiples of flush, 1 to 32."""

    checkpoint: Tensor
    length: Tensor
    flush: int

    @classmethod
    def allocate(
        cls, slots: int, flush: int, device: torch.device | str | None = None
    ) -> ReplayCursor:
        _check_sizes("ReplayCursor.allocate", 1, flush)
        places = torch.zeros(2, slots, dtype=torch.int64, device=device)
        return cls(places[0], places[1], flush)

    def start(self, state_indices: Tensor | None, lengths: Tensor) -> None:
        """The states of these slots are those after `lengths` (b) tokens, and the rings hold nothing that counts."""
        check = Check("ReplayCursor.start")
        rows = _rows(check, self, state_indices, lengths=lengths)
        _write(self.checkpoint, lengths, rows)
        _write(self.length, lengths, rows)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.checkpoint, self.length)


def _check_sizes(op: str, tokens: int, flush: int) -> None:
    if not 1 <= flush <= MAX_FLUSH:
        raise ValueError(f"{op}: flush={flush} is not supported, 1 to {MAX_FLUSH} are")
    if not 1 <= tokens <= flush:
        raise ValueError(f"{op}: {tokens} tokens a call, allowed with flush={flush}: 1 to {flush}")


def _rows(check: Check, cursor: ReplayCursor, state_indices: Tensor | None, **beside) -> Rows:
    """The rows that state_indices (or, without it, the first of `beside`, tensors of one element a row) names."""
    check_cursor(check, cursor)
    check.tensor("state_indices", state_indices, "b", dtypes=INDEX, optional=True)
    for name, value in beside.items():
        check.tensor(name, value, "b", dtypes=INDEX)
    slots = cursor.length.shape[0]
    check_slots(check, "cursor has", slots, check.sizes["b"], state_indices)
    return Rows(check.sizes["b"], 1, slots, state_indices, None, cursor.length.device)


def check_slots(check: Check, pool: str, slots: int, b: int, state_indices: Tensor | None) -> None:
    """state_indices (None: row i uses slot i) against a pool; `pool` begins the message: "state has"."""
    if state_indices is None:
        check.require(b <= slots, f"{pool} {slots} slots for b={b} rows; pass state_indices")
    elif state_indices.numel():
        check.require(slots > 0, f"{pool} no slots")
        check.within("state_indices", state_indices, -(2**31), slots - 1)
        check.distinct("state_indices", state_indices)


def check_cursor(check: Check, cursor: ReplayCursor) -> None:
    if not isinstance(cursor, ReplayCursor):
        check.fail(f"cursor must be a ReplayCursor, got {type(cursor).__name__}", TypeError)
    _check_sizes(check.op, 1, cursor.flush)
    check.tensor("cursor.checkpoint", cursor.checkpoint, "slots", dtypes=(torch.int64,))
    check.tensor("cursor.length", cursor.length, "slots", dtypes=(torch.int64,))


def unpack(check: Check, replay: tuple, m: int) -> tuple[ReplayCache, ReplayCursor]:
    """`replay` as (cache, cursor), the cursor checked, for m tokens a row."""
    pair = isinstance(replay, tuple) and len(replay) == 2 and isinstance(replay[0], ReplayCache)
    if not pair:
        check.fail("replay must be a pair (ReplayCache, ReplayCursor)", TypeError)
    cache, cursor = replay
    check_cursor(check, cursor)
    check.require(
        1 <= m <= cursor.flush,
        f"x has m={m} tokens a row, allowed with flush={cursor.flush}: 1 to {cursor.flush}",
    )
    return cache, cursor


def check_ancestors(check: Check, ancestors: Tensor | None, single: bool) -> Tensor | None:
    """(b,m) int32, contiguous; (b) for one token a row."""
    if ancestors is None:
        return None
    check.tensor("ancestors", ancestors, "b" if single else "b m", dtypes=(torch.int32,))
    return (ancestors[:, None] if single else ancestors).contiguous()


def check_rings(check: Check, cache: ReplayCache, cursor: ReplayCursor, x: Tensor, m: int) -> None:
    """The three rings of the state-space layer against x."""
    beside = torch.float64 if x.dtype == torch.float64 else torch.float32
    check.tensor("cache.x", cache.x, "slots L h p", dtypes=(x.dtype,))
    check.tensor("cache.B", cache.B, "slots L g n", dtypes=(x.dtype,))
    check.tensor("cache.dt", cache.dt, "slots L h", dtypes=(beside,))
    least = cursor.flush + 2 * m - 1
    check.require(
        check.sizes["L"] >= least,
        f"cache holds L={check.sizes['L']} tokens a slot, flush + 2m - 1 = {least} are needed",
    )
    _check_packed(check, x=cache.x, B=cache.B, dt=cache.dt)


def _check_packed(check: Check, **rings: Tensor) -> None:
    for name, ring in rings.items():
        if inner_is_strided(ring):
            check.fail(f"cache.{name} must be contiguous inside a slot: it is updated in place")


def check_conv_ring(check: Check, ring: Tensor, x: Tensor, width: int, m: int) -> None:
    check.tensor("cache.conv", ring, "slots d Lc", dtypes=(x.dtype,))
    least = width - 1 + m
    check.require(
        ring.shape[2] >= least,
        f"cache.conv holds Lc={ring.shape[2]} inputs a slot, width - 1 + m = {least} are needed",
    )
    _check_packed(check, conv=ring)


def _ssd(state, scale, ring_x, ring_B, ring_dt, checkpoint, length, x, *rest):
    args = (state, scale, ring_x, ring_B, ring_dt, checkpoint, length, x, *rest)
    return run("ssd_replay", x, *args, batch_invariant=is_batch_invariant())


def _ssd_fake(state, scale, ring_x, ring_B, ring_dt, checkpoint, length, x, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "ssd_replay(Tensor(a!) state, Tensor(b!)? state_scale, Tensor(c!) ring_x, Tensor(d!) ring_B, Tensor(e!) ring_dt, "
    "Tensor checkpoint, Tensor length, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor? state_indices, Tensor? num_tokens, Tensor? ancestors, Tensor? seeds, int flush, "
    "int layer, bool dt_softplus, float dt_min, float dt_max) -> Tensor",
    _ssd,
    _ssd_fake,
)


def _conv(x, *rest):
    return run("conv1d_replay", x, x, *rest)


def _conv_fake(x, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "conv1d_replay(Tensor x, Tensor(a!) ring, Tensor length, Tensor weight, Tensor? bias, Tensor? state_indices, "
    "Tensor? num_tokens, Tensor? ancestors, bool silu) -> Tensor",
    _conv,
    _conv_fake,
)


def replay_advance(cursor: ReplayCursor, state_indices: Tensor | None, num_new: Tensor) -> None:
    """Commit the first num_new (b) tokens of each row's last call: once a step, after all layers.

    checkpoint = max(checkpoint, F(length)), which is what the layers have folded; length += max(num_new, 0). F(t) is
    the multiple of flush at or below t. Padding rows (negative slot) are untouched. state_indices (b) as in
    ssd_update.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, by name.
    """
    rows = _rows(Check("replay_advance"), cursor, state_indices, num_new=num_new)
    length = cursor.length[rows.index]
    folded = length // cursor.flush * cursor.flush
    _write(cursor.checkpoint, torch.maximum(cursor.checkpoint[rows.index], folded), rows)
    _write(cursor.length, length + num_new.to(torch.int64).clamp(min=0), rows)


def _write(pool: Tensor, new: Tensor, rows: Rows) -> None:
    """pool[slot] = new for live rows."""
    if rows.live is None:
        pool[: rows.batch] = new
        return
    kept = torch.where(rows.live, new.to(pool.dtype), pool[rows.index])
    write_slots(pool, kept, rows.index, rows.live)


def replay_commit(
    cache: ReplayCache,
    cursor: ReplayCursor,
    state_indices: Tensor | None,
    path: Tensor,
    num_new: Tensor,
) -> None:
    """Trees: bring the accepted path of each row's last call to the front of the rings, before replay_advance.

    Token 0 of the num_new (b) accepted ones is node 0 and in front already; token i+1 is node path[b,i] of path (b,j)
    int32, padded with -1. Its entries move to the place of position length + 1 + i.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, by name.
    """
    check = Check("replay_commit")
    rows = _rows(check, cursor, state_indices, num_new=num_new)
    check.tensor("path", path, "b j", dtypes=INDEX)
    path = path.to(torch.int64)
    first = cursor.length[rows.index][:, None]
    token = torch.arange(1, path.shape[1] + 1, device=path.device)
    real = (token < num_new[:, None]) & (path >= 0)
    if rows.live is not None:
        real = real & rows.live[:, None]
    rings = (cache.x, cache.B, cache.dt, cache.conv.transpose(1, 2))
    slot = rows.index[:, None]
    source = first + path.clamp(0, MAX_FLUSH - 1)
    for ring in rings:  # places overlap: all is read before any is written
        held = ring[slot, source % ring.shape[1]]
        write_rings((ring,), (held,), rows.index, (first + token) % ring.shape[1], real)


def replay_state(
    state: Tensor,
    cache: ReplayCache,
    cursor: ReplayCursor,
    state_indices: Tensor | None,
    A: Tensor,
    state_scale: Tensor | None = None,
    *,
    rounding: str = "nearest",
    seeds: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """The SSM state (b,h,p,n) after `length` tokens in fp32 (fp64): the pending ones are folded, nothing is written.

    For what goes on with a scan. Where a write of the state is due, it is rounded on the way as that write will round
    it: rounding, seeds (b) and layer as in ssd_update. A padding row gives zeros; without state_indices all slots are
    meant.
    """
    check = Check("replay_state")
    check.tensor("state", state, "slots h p n", dtypes=STATES)
    check.tensor("A", A, "h")
    check_cursor(check, cursor)
    check.tensor("state_indices", state_indices, "b", dtypes=INDEX, optional=True)
    check.tensor("state_scale", state_scale, "slots h p", dtypes=(torch.float32,), optional=True)
    slots = state.shape[0]
    b = slots if state_indices is None else state_indices.shape[0]
    if rounding == "stochastic":
        check.sizes["b"], check.source["b"] = b, "state_indices"
        check.tensor("seeds", seeds, "b", dtypes=(torch.int64,))
    rows = Rows(b, 1, slots, state_indices, None, state.device)
    S = reference.replay_state(
        *(state, state_scale, (cache.x, cache.B, cache.dt)),
        *(cursor.checkpoint[rows.index], cursor.length[rows.index], rows.index, A, cursor.flush),
        *(seeds if rounding == "stochastic" else None, layer),
    )
    return S if rows.live is None else torch.where(rows.live[:, None, None, None], S, 0)


def replay_window(
    cache: ReplayCache, cursor: ReplayCursor, state_indices: Tensor | None, width: int
) -> Tensor:
    """The convolution's last width-1 inputs before `length`, newest last: (b,d,width-1). A padding row gives zeros."""
    slots = cursor.length.shape[0]
    b = slots if state_indices is None else state_indices.shape[0]
    rows = Rows(b, 1, slots, state_indices, None, cursor.length.device)
    window = committed_window(cache.conv, rows.index, cursor.length[rows.index], width - 1)
    if rows.live is not None:
        window = torch.where(rows.live[:, None, None], window, 0)
    return window.transpose(1, 2).contiguous()


def replay_store_window(
    cache: ReplayCache, lengths: Tensor, state_indices: Tensor | None, window: Tensor
) -> None:
    """Put window (b,d,width-1), the last inputs before position lengths (b), newest last, into the convolution's
    ring."""
    b, _, count = window.shape
    rows = Rows(b, count, cache.conv.shape[0], state_indices, None, window.device)
    position = lengths.to(torch.int64)[:, None] - count + torch.arange(count, device=window.device)
    place = position % cache.conv.shape[2]
    ring = cache.conv.transpose(1, 2)
    write_rings((ring,), (window.transpose(1, 2),), rows.index, place, rows.real())
