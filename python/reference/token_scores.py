"""How much the text queries look at each visual token: the reference of `tigon.attention_token_scores` and
`tigon.ssd_token_scores`.

First the definitions, a sequence at a time, which hold every weight. Then the form that serves as CPU backend: tiles
of a few queries by many keys, of fixed shape and aligned to their sequence: in batch-invariant mode, where their size
is fixed too, a sequence's scores do not depend on its batch mates.
"""

import torch
from torch import Tensor

from tigon.segments import segment_table

QUERIES, KEYS = 32, 512  # of a tile; outside batch-invariant mode as few queries as there are


def attention_weights(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """(hq,lq,lk) softmax weights of one sequence; its last query stands at its last key."""
    rep = q.shape[1] // k.shape[1]
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(rep, 1)) * scale
    seen = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(k.shape[0] - q.shape[0])
    weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)
    return torch.where(seen, weights, 0.0)  # a query that sees no key has no weights


def ssd_weights(C: Tensor, B: Tensor, dt: Tensor, A: Tensor | None, decay: bool) -> Tensor:
    """(h,l,l) weights of one sequence: |C_t . B_s| dt_s, with decay times exp(A sum of dt over s+1 to t)."""
    rep = dt.shape[1] // B.shape[1]
    weights = torch.einsum("tgn,sgn->gts", C, B).abs().repeat_interleave(rep, 0)
    weights = weights * dt.T[:, None, :]
    if decay:
        passed = dt.cumsum(0).T  # (h,l)
        gone = (passed[:, :, None] - passed[:, None, :]).tril()
        weights = weights * torch.exp(A[:, None, None] * gone)
    return weights.tril()


def reduced(weights: Tensor, head_reduce: str, query_reduce: str) -> Tensor:
    """(keys) from (h,queries,keys): heads first, then queries; without queries zeros."""
    if weights.shape[1] == 0:
        return weights.new_zeros(weights.shape[2])
    for kind in (head_reduce, query_reduce):
        weights = weights.mean(0) if kind == "mean" else weights.amax(0)
    return weights


def _queries(n: int, batch_invariant: bool) -> int:
    """Queries of a tile, for n of them in all."""
    return QUERIES if batch_invariant else min(QUERIES, 1 << (n - 1).bit_length())


class _Tiles:
    """A ragged list (n) in tiles of `size` places that never hold two sequences.

    place (tiles,size), real (tiles,size): whether the place is one; sequence (tiles).
    """

    def __init__(self, cu: Tensor | None, n: int, size: int, device: torch.device):
        cu = torch.tensor([0, n], device=device) if cu is None else cu
        table = segment_table(cu, n, size)
        self.place = table.start[:, None] + torch.arange(size, device=device)
        self.real = self.place < table.end[:, None]
        self.place = self.place.clamp(max=max(n - 1, 0))
        self.sequence = table.sequence.clamp(max=cu.numel() - 2)
        self.count = table.start.numel()


def _bounds(cu: Tensor | None, n: int, device: torch.device) -> Tensor:
    cu = torch.tensor([0, n], device=device) if cu is None else cu
    return cu.to(torch.int64).clamp(0, n)


class _Sums:
    """Scores under way: the reduction over queries of each key of the list."""

    def __init__(self, keys: _Tiles, n: int, dtype: torch.dtype, mean: bool):
        self.keys, self.mean = keys, mean
        self.total = torch.zeros(keys.count, KEYS, dtype=dtype, device=keys.place.device)
        self.n = n

    def add(self, j: int, weights: Tensor) -> None:
        """weights (queries,KEYS) of key tile j, zeros where nothing is seen."""
        if self.mean:
            self.total[j] += weights.sum(0)
        else:
            self.total[j] = torch.maximum(self.total[j], weights.amax(0))

    def scores(self, cu_queries: Tensor | None, queries: int) -> Tensor:
        total = self.total
        if self.mean:
            bounds = _bounds(cu_queries, queries, total.device)
            total = total / bounds.diff().clamp(min=1)[self.keys.sequence][:, None]
        out = total.new_zeros(self.n + 1)
        return out.scatter(
            0, torch.where(self.keys.real, self.keys.place, self.n).flatten(), total.flatten()
        )[:-1]


def _heads(weights: Tensor, mean: bool) -> Tensor:
    """(queries,KEYS) from (h,queries,KEYS)."""
    return weights.mean(0) if mean else weights.amax(0)


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
    batch_invariant: bool = True,
) -> Tensor:
    """(nk) fp32, fp64 for fp64; arguments as `tigon.attention_token_scores` names them."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (tq, hq, _), (tk, hkv, _), device = q.shape, k.shape, q.device
    nq, nk = query_index.shape[0], key_index.shape[0]
    if not (nq and nk and tq and tk):
        return torch.zeros(nk, dtype=dtype, device=device)
    size = _queries(nq, batch_invariant)
    queries = _Tiles(cu_queries, nq, size, device)
    keys = _Tiles(cu_keys, nk, KEYS, device)
    every = _Tiles(cu_seqlens_k, tk, KEYS, device)
    q_bounds, k_bounds = _bounds(cu_seqlens_q, tq, device), _bounds(cu_seqlens_k, tk, device)
    sums = _Sums(keys, nk, dtype, query_reduce == "mean")
    q_rows = query_index[queries.place].long().clamp(0, tq - 1)  # (tiles,queries)
    key_rows = key_index[keys.place].long().clamp(0, tk - 1)
    firsts, last = k_bounds[queries.sequence], k_bounds[queries.sequence + 1][:, None]
    after = q_bounds[queries.sequence + 1][:, None] - 1 - q_rows  # queries that come after
    limits = torch.minimum(last - after, last) if causal else last.expand_as(q_rows)
    limits = torch.where(queries.real, limits, 0)

    def keys_of(rows: Tensor) -> Tensor:
        return k[rows].to(dtype).permute(1, 2, 0)  # (hkv,d,KEYS)

    for i in range(queries.count):
        rows = q_rows[i]
        q_tile = (q[rows].to(dtype) * scale).unflatten(1, (hkv, hq // hkv))
        q_tile = q_tile.permute(1, 2, 0, 3).flatten(1, 2)  # (hkv, rep queries, d)

        def seen(at: Tensor, real: Tensor, i: int = i) -> Tensor:
            return (at >= firsts[i]) & (at < limits[i, :, None]) & real

        if lse is not None:
            norm = lse[:, rows].to(dtype)
        else:
            norm = torch.full((hq, size), -torch.inf, dtype=dtype, device=device)
            for j in range(every.count):
                z = (q_tile @ keys_of(every.place[j])).view(hq, size, KEYS)
                hidden = ~seen(every.place[j], every.real[j])
                norm = torch.logaddexp(norm, z.masked_fill_(hidden, -torch.inf).logsumexp(-1))
        # A row that sees nothing is masked below; its -inf must not meet another.
        norm = norm.masked_fill(norm == -torch.inf, 0.0).view(hkv, -1, 1)
        for j in range(keys.count):
            z = torch.baddbmm(norm.neg(), q_tile, keys_of(key_rows[j])).view(hq, size, KEYS)
            weights = _heads(z.clamp_(max=0.0).exp_(), head_reduce == "mean")
            same = keys.sequence[j] == queries.sequence[i]
            sums.add(j, torch.where(seen(key_rows[j], keys.real[j] & same), weights, 0.0))
    return sums.scores(cu_queries, nq)


def elapsed(dt: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(t,h) fp64: the sum of dt from the start of a token's sequence to the token itself, by tiles of it."""
    t = dt.shape[0]
    tiles = _Tiles(cu_seqlens, t, KEYS, dt.device)
    steps = torch.where(tiles.real[:, :, None], dt[tiles.place].double(), 0.0).cumsum(1)
    carry, carries = torch.zeros_like(steps[0, 0]), []
    for i in range(tiles.count):
        if i:
            same = tiles.sequence[i] == tiles.sequence[i - 1]
            carry = torch.where(same, carry + steps[i - 1, -1], 0.0)
        carries.append(carry)
    steps = steps + torch.stack(carries)[:, None]
    out = steps.new_zeros(t + 1, dt.shape[1])
    at = torch.where(tiles.real, tiles.place, t).flatten()
    return out.index_copy(0, at, steps.flatten(0, 1))[:-1]


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
    batch_invariant: bool = True,
) -> Tensor:
    """(nk) fp32, fp64 for fp64; arguments as `tigon.ssd_token_scores` names them."""
    dtype = torch.float64 if C.dtype == torch.float64 else torch.float32
    (t, g, _), h, device = C.shape, dt.shape[1], C.device
    nq, nk = query_index.shape[0], key_index.shape[0]
    if not (nq and nk and t):
        return torch.zeros(nk, dtype=dtype, device=device)
    queries = _Tiles(cu_queries, nq, _queries(nq, batch_invariant), device)
    keys = _Tiles(cu_keys, nk, KEYS, device)
    bounds = _bounds(cu_seqlens, t, device)
    sums = _Sums(keys, nk, dtype, query_reduce == "mean")
    mean = head_reduce == "mean"
    passed = elapsed(dt, cu_seqlens) if decay else None
    all_queries = query_index[queries.place].long().clamp(0, t - 1)  # (tiles,queries)
    all_keys = key_index[keys.place].long().clamp(0, t - 1)
    firsts, last = bounds[queries.sequence], bounds[queries.sequence + 1][:, None]
    limits = torch.where(queries.real, torch.minimum(all_queries + 1, last), 0)
    for i in range(queries.count):
        q_rows = all_queries[i]
        C_tile = C[q_rows].to(dtype).transpose(0, 1)  # (g,queries,n)
        for j in range(keys.count):
            rows = all_keys[j]
            products = (C_tile @ B[rows].to(dtype).permute(1, 2, 0)).abs()  # (g,queries,KEYS)
            steps = dt[rows].to(dtype).T.unflatten(0, (g, h // g))  # (g,heads,KEYS)
            if decay:
                gone = passed[q_rows].T[:, :, None] - passed[rows].T[:, None, :]  # (h,Q,K)
                left = gone.to(dtype).mul_(A.to(dtype)[:, None, None]).clamp_(max=0.0).exp_()
                left = left.unflatten(0, (g, h // g)).mul_(steps[:, :, None])
                weights = _heads(left.mul_(products[:, None]).flatten(0, 1), mean)
            elif mean:
                weights = (products * steps.sum(1)[:, None]).sum(0) / h
            else:
                weights = (products * steps.amax(1)[:, None]).amax(0)
            seen = (rows >= firsts[i]) & (rows < limits[i, :, None]) & keys.real[j]
            wanted = seen & (keys.sequence[j] == queries.sequence[i])
            sums.add(j, torch.where(wanted, weights, 0.0))
    return sums.scores(cu_queries, nq)
