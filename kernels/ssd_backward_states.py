"""States at the boundaries of chunks, forwards and backwards: what the SSD backward sweep starts from.

The stream is cut into chunks of at most Q tokens (rows of a segment table; none crosses a sequence). One kernel
walks the chunks in either direction with a state (n, p) fp32 in registers:

    forwards    S  <- exp(cs_last) S  + sum_s dt'_s exp(cs_last - cs_s) B_s x_s^T      entry state of each chunk
    backwards   dS <- exp(cs_last) dS + sum_l exp(cs_l) C_l dy_l^T                     exit gradient of each chunk

dy is already multiplied by silu(z). A walk starts anew at the edge of a sequence: forwards from its initial
state, backwards from dfinal; backwards it also takes up dstates where a chunk ends at a requested position, and
leaves dinitial at the start of a sequence.

Shapes: the chunks' states (chunks,h,n,p) in the io dtype, rounded once, because they feed tensor cores only; what
callers hand in or get is (.,h,p,n). n comes first in ours: 128 rows keep 8 warps of tensor cores busy.

Where batch x heads alone would not fill the device, the chunks are dealt out to several walks: a first pass
leaves each walk's own end state (fp32) and decay, ``join`` turns them into entry states, a second pass stores.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels import launch
from tigon.kernels.ssd_backward_steps import load_steps, load_tile
from tigon.kernels.ssd_common import decay, decay_limit, dot, load_head, narrow, segment_bounds
from tigon.kernels.ssd_forward import pitch
from tigon.segments import segment_count, segment_table


@triton.jit
def walk(
    u_ptr, v_ptr, A_ptr, steps_ptr,
    edge_ptr, inject_ptr, inject_order, inject_offset, carry_ptr, decays_ptr, out_ptr, left_ptr,
    starts, ends, sequences, offsets, length, per_sequence, used_ptr, chunks, chunks_a_walk, walks,
    u_b, u_t, v_b, v_t, edge_s, inject_s,
    REVERSE: tl.constexpr, STORE: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one (run of chunks, head, tile of p). u, v are x, B forwards and dy, C backwards.

    STORE: write out (chunks,h,n,p) and, backwards, left (s,h,p,n), starting from carry (walks,h,n,p) fp32 if
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
    q = tl.arange(0, Q)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    theirs = p[None, :] * N + n[:, None]  # (p,n)
    ours = n[:, None] * P + p[None, :]  # (n,p)
    mask = (n < N)[:, None] & (p < P)[None, :]
    first_element = head * (P * N)

    limit = decay_limit(load_head(A_ptr, head))
    S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if STORE and carry_ptr is not None:
        S = tl.load(carry_ptr + number * STATE + first_element + ours, mask=mask, other=0.0)
    passed = 0.0  # log2 of the run's decay
    began = 0

    low = number * chunks_a_walk
    used = tl.cast(chunks, tl.int64)
    if used_ptr is not None:
        used = tl.load(used_ptr)  # rows of the table that own tokens
    count = tl.minimum(chunks_a_walk, used - low)
    for i in range(0, count):
        chunk = low + (count - 1 - i if REVERSE else i)
        batch, start, end, sequence, first, last = segment_bounds(
            chunk, starts, ends, sequences, offsets, length, Q, per_sequence
        )
        if last if REVERSE else first:
            began = 1
            S = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
            if edge_ptr is not None:
                edge = edge_ptr + sequence * edge_s + first_element
                S += tl.load(edge + theirs, mask=mask, other=0.0).to(tl.float32)
        if inject_ptr is not None:
            for j in range(tl.load(inject_offset + chunk), tl.load(inject_offset + (chunk + 1))):
                source = inject_ptr + tl.load(inject_order + j) * inject_s + first_element
                S += tl.load(source + theirs, mask=mask, other=0.0)
        if STORE:
            state = narrow(S, out_ptr.dtype.element_ty, UPCAST)
            tl.store(out_ptr + chunk * STATE + first_element + ours, state, mask=mask)
        inside = q < end - start
        u = load_tile(u_ptr + batch * u_b + start * u_t + head * P, u_t, q, inside, p, P)
        v = load_tile(v_ptr + batch * v_b + start * v_t + group * N, v_t, q, inside, n, N)
        dt, cs, total = load_steps(steps_ptr, chunk * HEADS + head, Q)
        weight = tl.exp2(cs) if REVERSE else dt * decay(total - cs, limit)
        weighted = narrow(u.to(tl.float32) * weight[:, None], u.dtype, UPCAST)
        added = dot(tl.trans(v), weighted, None, PRECISION, UPCAST)
        # Not as the product's accumulator: Triton 3.9 crashes on sm_100 when that comes out of the branch above.
        S = tl.fma(S, tl.zeros_like(S) + tl.exp2(total), added)
        passed += total
        if STORE and REVERSE and left_ptr is not None and first:
            tl.store(left_ptr + sequence * STATE + first_element + theirs, S, mask=mask)

    if not STORE:
        tl.store(carry_ptr + next_walk * STATE + first_element + ours, S, mask=mask)
        if tile == 0:
            decayed = tl.where(began != 0, -1.0, tl.exp2(passed))
            tl.store(decays_ptr + next_walk * HEADS + head, decayed)


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


@dataclass(frozen=True)
class Chunks:
    """The stream cut into chunks: how many, and the columns of their table where they are not plain arithmetic.

    table: as `segment_bounds` takes it, up to per_sequence; used: 1 number on the device, the rows that own tokens.
    order, offset: dstates[order[j]] enters at the end of chunk c for j in [offset[c], offset[c + 1]).
    """

    count: int
    per_sequence: int
    table: tuple[object, ...]
    used: Tensor | None = None
    at_position: Tensor | None = None
    order: Tensor | None = None
    offset: Tensor | None = None


def cut(x: Tensor, cu_seqlens: Tensor | None, positions: Tensor | None, size: int) -> Chunks:
    """Chunks of x (b,l,h,p) that end at sequence ends, at requested positions and after `size` tokens."""
    b, l = x.shape[:2]
    each = -(-l // size)
    if cu_seqlens is None and positions is None:
        return Chunks(b * each, each, (None, None, None, None, l, each))
    cu = torch.arange(2, device=x.device) * l if cu_seqlens is None else cu_seqlens
    wanted = 0 if positions is None else positions.numel()
    count = segment_count(l, size, cu.numel() - 1, wanted)
    rows = segment_table(cu, l, size, positions)
    table = (rows.start, rows.end, rows.sequence, rows.offset, l, each)
    used = rows.offset[-1:]
    if positions is None:
        return Chunks(count, each, table, used)
    at, order = rows.at_position.sort()
    offset = torch.searchsorted(at, torch.arange(count + 1, device=x.device))
    return Chunks(count, each, table, used, rows.at_position, order, offset)


def chunk_states(
    config: launch.SweepConfig, chunks: Chunks, tiles: dict[str, object], reverse: bool,
    u: Tensor, v: Tensor, A: Tensor, steps: Tensor,
    edge: Tensor | None, inject: Tensor | None = None, left: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Entry states of all chunks, or with `reverse` their exit gradients: (chunks,h,n,p) in u's dtype.

    tiles: what walk and sweep are specialized to. edge, inject, left: initial states, or dfinal, dstates, dinitial.
    """
    b, _, h, p = u.shape
    n = v.shape[3]
    blocks = h * -(-p // tiles["BLOCK_P"])
    dense = chunks.used is None
    walks = min(chunks.count, -(-config.programs // blocks))
    if dense:  # whole sequences if they suffice, else the same cuts in each
        walks = b * min(-(-walks // b), chunks.per_sequence)
    chunks_a_walk = -(-chunks.count // walks)
    walks = -(-chunks.count // chunks_a_walk)
    alone = walks == 1 or (dense and chunks_a_walk == chunks.per_sequence)
    out = torch.empty((chunks.count, h, n, p), dtype=u.dtype, device=u.device)
    carry = decays = None
    if not alone:
        carry = torch.empty((walks, h, n, p), dtype=torch.float32, device=u.device)
        decays = torch.empty((walks, h), dtype=torch.float32, device=u.device)

    def run(store: bool) -> None:
        walk[(walks * blocks,)](
            u, v, A, steps, edge, inject, chunks.order, chunks.offset, carry, decays, out, left,
            *chunks.table, chunks.used, chunks.count, chunks_a_walk, walks,
            *pitch(u), *pitch(v), pitch(edge)[0], pitch(inject)[0],
            REVERSE=reverse, STORE=store, num_warps=config.walk_warps, num_stages=config.walk_stages, **tiles,
        )  # fmt: skip

    if not alone:
        run(store=False)
        size = p * n
        join[(h * -(-size // 1024),)](
            carry, decays, walks, REVERSE=reverse, HEADS=h, STATE=size, BLOCK=1024
        )
    run(store=True)
    return out
