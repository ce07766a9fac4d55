"""How much a few queries look at listed keys, reduced over heads and queries; nothing of size t x t is made.

    attention   score_v = reduce_t reduce_h exp(scale q_th . k_vh - lse_th)
    Mamba-2     score_v = reduce_t reduce_h |C_t . B_v| dt_vh,  times exp(A_h (elapsed_th - elapsed_vh)) with decay

q (tq,hq,dim), k (tk,hkv,dim), C, B (t,g,n) in fp32, bf16 or fp16; their rows are gathered by query_index (nq) and
key_index (nk). Scores are fp32. A key that a query does not see (behind it, or in another sequence) has weight 0.

`attention_scores`, `ssd_scores`   A program owns a tile of listed keys of one sequence and walks all queries of that
    sequence: for each tile of queries it sums (or takes the largest of) the heads' weights in registers, then adds up
    the columns. So every score is one program's, in one order. Heads of a group share the keys' tile; without decay the
    heads of a group of C and B come down to a sum (or maximum) of dt.
`row_sums`, `join_rows`   lse where it is not given: a program takes rows (queries x heads of a group) and SPLIT keys,
    and leaves (maximum, sum of exponentials); the splits are joined in their order.
`elapsed`   The sum of dt since the start of the sequence, in fp64, left as two fp32 numbers: differences of large sums
    keep their digits.

Tiles never hold two sequences: tile i of sequence s has number bounds[s] // SIZE + s + i, so a program finds its own by
bisection, and total // SIZE + sequences programs are enough.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tigon.kernels.launch import plan, target
from tigon.kernels.launch_tokens import SPLIT
from tigon.kernels.ssd_common import INTERPRETED, LOG2E, dot


@triton.jit
def bound(cu_ptr, i, total):
    """Bound i of the sequences, int64; without cu_ptr there is one. Never past `total`, never below 0."""
    at = tl.cast(i, tl.int64)
    all_of = tl.cast(total, tl.int64)
    if cu_ptr is None:
        return tl.where(at > 0, all_of, 0)
    else:
        value = tl.load(cu_ptr + at).to(tl.int64)
        return tl.maximum(tl.minimum(value, all_of), 0)


@triton.jit
def find_tile(cu_ptr, tile, sequences, total, SIZE: tl.constexpr):
    """(sequence, first place, end) of tile number `tile`, int64; empty where there is none."""
    tile = tl.cast(tile, tl.int64)
    low = tile * 0
    high = low + sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        below = bound(cu_ptr, middle, total) // SIZE + middle <= tile
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    begin = bound(cu_ptr, low, total)
    first = begin + (tile - begin // SIZE - low) * SIZE
    return low, first, tl.minimum(bound(cu_ptr, low + 1, total), first + SIZE)


@triton.jit
def listed(index_ptr, place, real, rows):
    """Rows that the list names, clamped into 0 to rows - 1; 0 where the place is not real."""
    row = tl.load(index_ptr + place, mask=real, other=0).to(tl.int64)
    return tl.maximum(tl.minimum(row, tl.cast(rows, tl.int64) - 1), 0)


@triton.jit
def larger(a, b):
    """The larger one; a NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_tile(ptr, row, row_real, row_t, column, width):
    """(rows,columns) of a matrix with row stride row_t, 0 outside."""
    mask = row_real[:, None] & (column < width)[None, :]
    return tl.load(ptr + (row * row_t)[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def sight(row, real, sequence, cu_q_ptr, cu_k_ptr, tq, tk, CAUSAL: tl.constexpr):
    """(first, limit): queries at rows `row` see keys from `first` on and below `limit`, int64."""
    first = bound(cu_k_ptr, sequence, tk)
    last = bound(cu_k_ptr, sequence + 1, tk)
    limit = last + row * 0
    if CAUSAL:
        after = bound(cu_q_ptr, sequence + 1, tq) - 1 - row
        limit = tl.minimum(last - after, last)
    return first, tl.where(real, limit, 0)


@triton.jit
def row_sums(
    q_ptr, k_ptr, query_index_ptr, most_ptr, sum_ptr, cu_queries_ptr, cu_q_ptr, cu_k_ptr,
    nq, tq, tk, sequences, q_t, k_t, scale,
    HQ: tl.constexpr, REP: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, PLACES: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """most, sum (splits,nq,hq): of one split of the keys, in units of log2. A row is (query, one of HEADS heads)."""
    CHUNKS: tl.constexpr = (REP + HEADS - 1) // HEADS
    sequence, begin, end = find_tile(cu_queries_ptr, tl.program_id(0), sequences, nq, PLACES)
    group = tl.program_id(1) // CHUNKS
    split = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, ROWS)
    place = begin + lane // HEADS
    local = tl.program_id(1) % CHUNKS * HEADS + lane % HEADS
    real = (place < end) & (local < REP)
    row = listed(query_index_ptr, place, real, tq)
    first, limit = sight(row, real, sequence, cu_q_ptr, cu_k_ptr, tq, tk, CAUSAL)
    d = tl.arange(0, BLOCK_D)
    head = group * REP + local
    at = (row * q_t + head * DIM)[:, None] + d[None, :]
    q = tl.load(q_ptr + at, mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    start = first + split * SPLIT
    stop = tl.minimum(start + SPLIT, tl.max(limit, 0))
    for key in range(start, stop, KEYS):
        at_key = key + tl.arange(0, KEYS).to(tl.int64)
        k = load_tile(k_ptr + tl.cast(group * DIM, tl.int64), at_key, at_key < stop, k_t, d, DIM)
        s = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E)
        s = tl.where(
            (at_key < stop)[None, :] & (at_key[None, :] < limit[:, None]), s, float("-inf")
        )
        higher = tl.maximum(most, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(most - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        most = higher
    out = (split * nq + place) * HQ + head
    tl.store(most_ptr + out, most, mask=real)
    tl.store(sum_ptr + out, total, mask=real)


@triton.jit
def join_rows(most_ptr, sum_ptr, lse_ptr, rows, splits, BLOCK: tl.constexpr):
    """lse (nq,hq), natural, from the splits' (maximum, sum)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * rows + row
        part = tl.load(most_ptr + at, mask=mask, other=float("-inf"))
        higher = tl.maximum(most, part)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(part - base)
        total = total * tl.exp2(most - base) + tl.load(sum_ptr + at, mask=mask, other=0.0) * weight
        most = higher
    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees no key, whose lse is -inf
    tl.store(lse_ptr + row, (most + tl.log2(total)) / LOG2E, mask=mask)


@triton.jit
def attention_scores(
    q_ptr, k_ptr, lse_ptr, query_index_ptr, key_index_ptr, out_ptr, cu_queries_ptr, cu_keys_ptr, cu_q_ptr, cu_k_ptr,
    nq, nk, tq, tk, sequences, q_t, k_t, lse_h, scale,
    HKV: tl.constexpr, REP: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr, GIVEN: tl.constexpr,
    HEAD_MEAN: tl.constexpr, QUERY_MEAN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """GIVEN: lse is (hq,tq) and read at the queries' rows; otherwise it is (nq,hq)."""
    sequence, begin, end = find_tile(cu_keys_ptr, tl.program_id(0), sequences, nk, KEYS)
    place = begin + tl.arange(0, KEYS).to(tl.int64)
    key_real = place < end
    key = listed(key_index_ptr, place, key_real, tk)
    d = tl.arange(0, BLOCK_D)
    first_query = bound(cu_queries_ptr, sequence, nq)
    last_query = tl.where(begin < end, bound(cu_queries_ptr, sequence + 1, nq), first_query)
    scores = tl.zeros((KEYS,), tl.float32)
    for start in range(first_query, last_query, QUERIES):
        asking = start + tl.arange(0, QUERIES).to(tl.int64)
        real = asking < last_query
        row = listed(query_index_ptr, asking, real, tq)
        first, limit = sight(row, real, sequence, cu_q_ptr, cu_k_ptr, tq, tk, CAUSAL)
        seen = (key >= first)[None, :] & (key[None, :] < limit[:, None]) & key_real[None, :]
        heads = tl.zeros((QUERIES, KEYS), tl.float32)
        for group in range(HKV):
            k = load_tile(k_ptr + tl.cast(group * DIM, tl.int64), key, key_real, k_t, d, DIM)
            for local in range(REP):
                head = tl.cast(group * REP + local, tl.int64)
                q = load_tile(q_ptr + head * DIM, row, real, q_t, d, DIM)
                if GIVEN:
                    lse = tl.load(lse_ptr + head * lse_h + row, mask=real, other=0.0)
                else:
                    lse = tl.load(lse_ptr + asking * (HKV * REP) + head, mask=real, other=0.0)
                s = dot(q, tl.trans(k), None, PRECISION, UPCAST) * (scale * LOG2E)
                exponent = s - (lse * LOG2E)[:, None]
                weight = tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))
                if HEAD_MEAN:
                    heads += weight
                else:
                    heads = larger(heads, weight)
        heads = tl.where(seen, heads, 0.0)
        if QUERY_MEAN:
            scores += tl.sum(heads, 0)
        else:
            scores = larger(scores, tl.reduce(heads, 0, larger))
    if HEAD_MEAN:
        scores = scores / (HKV * REP)
    if QUERY_MEAN:
        scores = scores / tl.maximum(last_query - first_query, 1).to(tl.float32)
    tl.store(out_ptr + place, scores, mask=key_real)


@triton.jit
def elapsed(
    dt_ptr, high_ptr, low_ptr, cu_ptr, t, dt_t, dt_h, H: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """high + low (t,h): the sum of dt up to and with each token of its sequence."""
    BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    sequence = tl.program_id(0) // BLOCKS
    head = tl.program_id(0) % BLOCKS * HEADS + tl.arange(0, HEADS).to(tl.int64)
    carry = tl.zeros((HEADS,), tl.float64)
    last = bound(cu_ptr, sequence + 1, t)
    for start in range(bound(cu_ptr, sequence, t), last, TOKENS):
        token = start + tl.arange(0, TOKENS).to(tl.int64)
        mask = (token < last)[:, None] & (head < H)[None, :]
        at = (token * dt_t)[:, None] + (head * dt_h)[None, :]
        dt = tl.load(dt_ptr + at, mask=mask, other=0.0).to(tl.float64)
        sums = tl.cumsum(dt, 0) + carry[None, :]
        carry += tl.sum(dt, 0)
        high = sums.to(tl.float32)
        out = (token * H)[:, None] + head[None, :]
        tl.store(high_ptr + out, high, mask=mask)
        tl.store(low_ptr + out, (sums - high.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def ssd_scores(
    C_ptr, B_ptr, dt_ptr, A_ptr, high_ptr, low_ptr, query_index_ptr, key_index_ptr, out_ptr,
    cu_queries_ptr, cu_keys_ptr, cu_ptr, nq, nk, t, sequences, C_t, B_t, dt_t, dt_h,
    G: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, DECAY: tl.constexpr,
    HEAD_MEAN: tl.constexpr, QUERY_MEAN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """HEADS: of a group. high, low (t,h): as `elapsed` leaves them."""
    sequence, begin, end = find_tile(cu_keys_ptr, tl.program_id(0), sequences, nk, KEYS)
    place = begin + tl.arange(0, KEYS).to(tl.int64)
    key_real = place < end
    key = listed(key_index_ptr, place, key_real, t)
    n = tl.arange(0, BLOCK_N)
    first_query = bound(cu_queries_ptr, sequence, nq)
    last_query = tl.where(begin < end, bound(cu_queries_ptr, sequence + 1, nq), first_query)
    scores = tl.zeros((KEYS,), tl.float32)
    for start in range(first_query, last_query, QUERIES):
        asking = start + tl.arange(0, QUERIES).to(tl.int64)
        real = asking < last_query
        row = listed(query_index_ptr, asking, real, t)
        first, limit = sight(row, real, sequence, cu_ptr, cu_ptr, t, t, True)
        seen = (key >= first)[None, :] & (key[None, :] < limit[:, None]) & key_real[None, :]
        heads = tl.zeros((QUERIES, KEYS), tl.float32)
        for group in range(G):
            at_group = tl.cast(group * N, tl.int64)
            C = load_tile(C_ptr + at_group, row, real, C_t, n, N)
            B = load_tile(B_ptr + at_group, key, key_real, B_t, n, N)
            products = tl.abs(dot(C, tl.trans(B), None, PRECISION, UPCAST))
            if DECAY:
                for local in range(HEADS):
                    head = tl.cast(group * HEADS + local, tl.int64)
                    step = tl.load(dt_ptr + (key * dt_t + head * dt_h), mask=key_real, other=0.0)
                    A = tl.load(A_ptr + head).to(tl.float32) * LOG2E
                    at = head + key * (G * HEADS)
                    key_high = tl.load(high_ptr + at, mask=key_real, other=0.0)
                    key_low = tl.load(low_ptr + at, mask=key_real, other=0.0)
                    at = head + row * (G * HEADS)
                    high = tl.load(high_ptr + at, mask=real, other=0.0)
                    low = tl.load(low_ptr + at, mask=real, other=0.0)
                    gone = high[:, None] - key_high[None, :]
                    gone += low[:, None] - key_low[None, :]
                    left = tl.minimum(A * gone, 0.0, propagate_nan=tl.PropagateNan.ALL)
                    weight = products * step.to(tl.float32)[None, :] * tl.exp2(left)
                    if HEAD_MEAN:
                        heads += weight
                    else:
                        heads = larger(heads, weight)
            else:
                steps = tl.full((KEYS,), 0.0 if HEAD_MEAN else float("-inf"), tl.float32)
                for block in range(0, HEADS, BLOCK_H):
                    local = block + tl.arange(0, BLOCK_H).to(tl.int64)
                    at = (key * dt_t)[None, :] + ((group * HEADS + local) * dt_h)[:, None]
                    mask = key_real[None, :] & (local < HEADS)[:, None]
                    empty = 0.0 if HEAD_MEAN else float("-inf")
                    step = tl.load(dt_ptr + at, mask=mask, other=empty).to(tl.float32)
                    if HEAD_MEAN:
                        steps += tl.sum(step, 0)
                    else:
                        steps = larger(steps, tl.reduce(step, 0, larger))
                weight = products * tl.where(key_real, steps, 0.0)[None, :]
                if HEAD_MEAN:
                    heads += weight
                else:
                    heads = larger(heads, weight)
        heads = tl.where(seen, heads, 0.0)
        if QUERY_MEAN:
            scores += tl.sum(heads, 0)
        else:
            scores = larger(scores, tl.reduce(heads, 0, larger))
    if HEAD_MEAN:
        scores = scores / (G * HEADS)
    if QUERY_MEAN:
        scores = scores / tl.maximum(last_query - first_query, 1).to(tl.float32)
    tl.store(out_ptr + place, scores, mask=key_real)


def _out(nk: int, cu_keys: Tensor | None, device: torch.device) -> Tensor:
    """Past the last bound lies padding that no program owns."""
    make = torch.empty if cu_keys is None else torch.zeros
    return make(nk, dtype=torch.float32, device=device)


def _sequences(cu: Tensor | None) -> int:
    return 1 if cu is None else cu.shape[0] - 1


def attention_token_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    query_index: Tensor,
    key_index: Tensor,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    causal: bool,
    head_reduce: str,
    query_reduce: str,
    batch_invariant: bool,
) -> Tensor:
    """(nk) fp32, as the reference says it."""
    (tq, hq, dim), (tk, hkv, _) = q.shape, k.shape
    nq, nk, sequences = query_index.shape[0], key_index.shape[0], _sequences(cu_queries)
    if not (nq and nk and tq and tk):
        return torch.zeros(nk, dtype=torch.float32, device=q.device)
    out = _out(nk, cu_keys, q.device)
    given, rep = lse is not None, hq // hkv
    sizes = dict(nq=nq, hq=hq, hkv=hkv, dim=dim, itemsize=q.element_size(), lse=given)
    configs = plan(
        "attention_token_scores", target(q.device)[0], batch_invariant=batch_invariant, **sizes
    )
    block_d = max(16, triton.next_power_of_2(dim))
    shared = dict(DIM=dim, REP=rep, CAUSAL=causal, BLOCK_D=block_d, UPCAST=INTERPRETED)
    if not given:
        config = configs["row_sums"]
        heads = min(rep, config.queries)
        places, splits = config.queries // heads, triton.cdiv(tk, SPLIT)
        most, total = torch.empty(2, splits, nq, hq, dtype=torch.float32, device=q.device)
        grid = (nq // places + sequences, hkv * triton.cdiv(rep, heads), splits)
        row_sums[grid](
            q, k, query_index, most, total, cu_queries, cu_seqlens_q, cu_seqlens_k,
            nq, tq, tk, sequences, q.stride(0), k.stride(0), scale,
            HQ=hq, PLACES=places, HEADS=heads, ROWS=config.queries, KEYS=config.keys, SPLIT=SPLIT,
            PRECISION=config.precision, num_warps=config.warps, num_stages=config.stages, **shared,
        )  # fmt: skip
        lse = torch.empty(nq, hq, dtype=torch.float32, device=q.device)
        join_rows[(triton.cdiv(nq * hq, 128),)](
            most, total, lse, nq * hq, splits, BLOCK=128, num_warps=4
        )
    config = configs["attention_scores"]
    attention_scores[(nk // config.keys + sequences,)](
        q, k, lse, query_index, key_index, out, cu_queries, cu_keys, cu_seqlens_q, cu_seqlens_k,
        nq, nk, tq, tk, sequences, q.stride(0), k.stride(0), lse.stride(0), scale,
        HKV=hkv, GIVEN=given, HEAD_MEAN=head_reduce == "mean", QUERY_MEAN=query_reduce == "mean",
        QUERIES=config.queries, KEYS=config.keys, PRECISION=config.precision,
        num_warps=config.warps, num_stages=config.stages, **shared,
    )  # fmt: skip
    return out


def ssd_token_scores(
    C: Tensor,
    B: Tensor,
    dt: Tensor,
    A: Tensor | None,
    query_index: Tensor,
    key_index: Tensor,
    cu_queries: Tensor | None,
    cu_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    decay: bool,
    head_reduce: str,
    query_reduce: str,
    batch_invariant: bool,
) -> Tensor:
    """(nk) fp32, as the reference says it."""
    (t, g, n), h = C.shape, dt.shape[1]
    nq, nk, sequences = query_index.shape[0], key_index.shape[0], _sequences(cu_queries)
    if not (nq and nk and t):
        return torch.zeros(nk, dtype=torch.float32, device=C.device)
    out = _out(nk, cu_keys, C.device)
    sizes = dict(nq=nq, h=h, n=n, itemsize=C.element_size(), decay=decay)
    configs = plan(
        "ssd_token_scores", target(C.device)[0], batch_invariant=batch_invariant, **sizes
    )
    high = low = None
    if decay:
        walk = configs["elapsed"]
        # Rows of no sequence are never asked for.
        high, low = torch.empty(2, t, h, dtype=torch.float32, device=C.device)
        elapsed[(sequences * triton.cdiv(h, walk.heads),)](
            dt, high, low, cu_seqlens, t, dt.stride(0), dt.stride(1),
            H=h, TOKENS=walk.tokens, HEADS=walk.heads, num_warps=walk.warps,
        )  # fmt: skip
        A = A.contiguous()
    config = configs["ssd_scores"]
    ssd_scores[(nk // config.keys + sequences,)](
        C, B, dt, A, high, low, query_index, key_index, out, cu_queries, cu_keys, cu_seqlens,
        nq, nk, t, sequences, C.stride(0), B.stride(0), dt.stride(0), dt.stride(1),
        G=g, HEADS=h // g, N=n, DECAY=decay,
        HEAD_MEAN=head_reduce == "mean", QUERY_MEAN=query_reduce == "mean",
        QUERIES=config.queries, KEYS=config.keys, BLOCK_N=max(16, triton.next_power_of_2(n)),
        BLOCK_H=min(16, triton.next_power_of_2(h // g)), PRECISION=config.precision, UPCAST=INTERPRETED,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
