"""Token scores: how much the text queries of a sequence look at each of its visual tokens, layer by layer.

Attention layers have softmax weights; the weight that a Mamba-2 layer gives source token s at token t is

    w[h,t,s] = |C_t . B_s| dt[s,h] exp(A_h (dt[s+1,h] + … + dt[t,h])),   s <= t

(its hidden attention), by default without the last factor. In both a score is a reduction over heads, then over the
queries. Nothing of size t x t is made: a product of the few queries with the keys that are scored, and for attention
one more pass for the rows' log-sum-exp, where that is not given.

Sources: "Stateful Token Reduction" (arXiv 2603.00198) for the one score in both kinds of layers and the proxy without
decay; "The Hidden Attention of Mamba Models" (arXiv 2403.01590). The published text names no normalization: this one
is ours.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from tigon.ops.checks import INDEX, Check, beside_dtypes, readable
from tigon.ops.dispatch import call, inner, is_batch_invariant, run
from tigon.ops.library import register
from tigon.ops.quantize import one_of

MAX_WIDTH = 256  # of a head or a state
REDUCTIONS = ("mean", "max")
Reduction = Literal["mean", "max"]

register(
    "attention_token_scores(Tensor q, Tensor k, Tensor? lse, Tensor query_index, Tensor key_index, Tensor? cu_queries, "
    "Tensor? cu_keys, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, bool causal, str head_reduce, "
    "str query_reduce) -> Tensor",
    lambda q, *rest: run("attention_token_scores", q, q, *rest, is_batch_invariant()),
    lambda q, k, lse, query_index, key_index, *rest: _scores_like(q, key_index),
)
register(
    "ssd_token_scores(Tensor C, Tensor B, Tensor dt, Tensor? A, Tensor query_index, Tensor key_index, "
    "Tensor? cu_queries, Tensor? cu_keys, Tensor? cu_seqlens, bool decay, str head_reduce, str query_reduce) -> Tensor",
    lambda C, *rest: run("ssd_token_scores", C, C, *rest, is_batch_invariant()),
    lambda C, B, dt, A, query_index, key_index, *rest: _scores_like(C, key_index),
)


def _scores_like(main: Tensor, key_index: Tensor) -> Tensor:
    dtype = torch.float64 if main.dtype == torch.float64 else torch.float32
    return main.new_empty(key_index.shape[0], dtype=dtype)


def check_bounds(check: Check, name: str, cu: Tensor | None, total: int, of: str) -> None:
    """cu starts at 0, never falls and ends at `total` at most (looked at where that is free): the rest is padding."""
    check.tensor(name, cu, "bounds", dtypes=INDEX, optional=True)
    if cu is None:
        return
    check.require(cu.shape[0] > 1, f"{name} must hold two bounds or more, got {cu.shape[0]}")
    if readable(cu):
        bounds = cu.tolist()
        rises = all(a <= b for a, b in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] > total or not rises:
            check.fail(
                f"{name} must start at 0, never fall and end at {of}={total} or before, got {bounds[:8]}"
            )


def _check_lists(check: Check, query_index, key_index, cu_queries, cu_keys, packed, tq, tk) -> None:
    """The two index lists and their bounds; packed: whether the tokens hold several sequences."""
    check.tensor("query_index", query_index, "nq", dtypes=INDEX)
    check.tensor("key_index", key_index, "nk", dtypes=INDEX)
    check.within("query_index", query_index, 0, tq - 1)
    check.within("key_index", key_index, 0, tk - 1)
    check_bounds(check, "cu_queries", cu_queries, query_index.shape[0], "nq")
    check_bounds(check, "cu_keys", cu_keys, key_index.shape[0], "nk")
    given = (cu_queries is not None, cu_keys is not None, packed)
    check.require(
        len(set(given)) == 1,
        "bounds of the tokens' sequences, cu_queries and cu_keys come together",
    )


def attention_token_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    query_index: Tensor,
    key_index: Tensor,
    cu_queries: Tensor | None = None,
    cu_keys: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    head_reduce: Reduction = "mean",
    query_reduce: Reduction = "mean",
) -> Tensor:
    """score_v = reduce over queries t of reduce over heads of exp(scale q_t . k_v - lse_t), the softmax weight.

    Args:
        q: (tq,hq,dim) fp32, bf16 or fp16 (fp64 on the reference), after rotary embedding if there is any; tokens
            strided at will, dim up to 256. k: (tk,hkv,dim) of q's dtype, hkv dividing hq.
        lse: (hq,tq) fp32, the natural log of each row's softmax denominator over all keys that it sees, as attention
            kernels return it; looked at where query_index points. None: computed here, in one pass over the keys.
        query_index: (nq) int32 or int64, the rows of q that ask. key_index: (nk), the rows of k that are scored. From
            0 on, in packed coordinates; anything else is refused where it is free to look, and clamped elsewhere.
        cu_queries, cu_keys: (s+1) int32 or int64, bounds of each sequence's share of the two lists; past the last
            bound lies padding, whose score is 0. cu_seqlens_q, cu_seqlens_k: (s+1) bounds of the sequences in q and k
            (None for k: those of q). None: one sequence.
        scale: of the products; None: 1/sqrt(dim).
        causal: a query sees the keys up to its own place, the last query of a sequence standing at its last key; a key
            that it does not see has weight 0.
        head_reduce, query_reduce: "mean" or "max".

    Returns:
        (nk) fp32 (fp64 for fp64), zeros in a sequence without queries. It has no gradient. A NaN in a query makes all
        scores of its sequence NaN, one in a key those of that key and, through the row sums, of its sequence.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("attention_token_scores")
    check.tensor("q", q, "tq hq dim")
    check.tensor("k", k, "tk hkv dim", dtypes=(q.dtype,))
    check.divides("hkv", "hq")
    check.size("dim", MAX_WIDTH)
    wide = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    check.tensor("lse", lse, "hq tq", dtypes=wide, optional=True)
    (tq, hq, dim), (tk, hkv, _) = q.shape, k.shape
    check.require(
        cu_seqlens_q is not None or cu_seqlens_k is None, "cu_seqlens_k comes with cu_seqlens_q"
    )
    if cu_seqlens_q is not None and cu_seqlens_k is None:
        check.require(tq == tk, f"cu_seqlens_k may be left out where tk={tk} equals tq={tq}")
        cu_seqlens_k = cu_seqlens_q
    check_bounds(check, "cu_seqlens_q", cu_seqlens_q, tq, "tq")
    check_bounds(check, "cu_seqlens_k", cu_seqlens_k, tk, "tk")
    packed = cu_seqlens_q is not None
    _check_lists(check, query_index, key_index, cu_queries, cu_keys, packed, tq, tk)
    one_of(check, "head_reduce", head_reduce, REDUCTIONS)
    one_of(check, "query_reduce", query_reduce, REDUCTIONS)
    args = (
        inner("q", q, 2).detach(),
        inner("k", k, 2).detach(),
        None if lse is None else inner("lse", lse, 1).detach(),
        inner("query_index", query_index, 1),
        inner("key_index", key_index, 1),
        *(_packed(t) for t in (cu_queries, cu_keys, cu_seqlens_q, cu_seqlens_k)),
        1 / math.sqrt(dim) if scale is None else float(scale),
        causal,
        head_reduce,
        query_reduce,
    )
    sizes = {"nq": query_index.shape[0], "nk": key_index.shape[0], "tk": tk, "hq": hq, "hkv": hkv}
    sizes |= {"dim": dim, "s": 1 if cu_queries is None else cu_queries.shape[0] - 1}
    sizes |= {"lse": lse is not None, "itemsize": q.element_size()}
    return call("attention_token_scores", q, args, sizes)


def _packed(cu: Tensor | None) -> Tensor | None:
    return None if cu is None else cu.contiguous()


def ssd_token_scores(
    C: Tensor,
    B: Tensor,
    dt: Tensor,
    A: Tensor | None = None,
    *,
    query_index: Tensor,
    key_index: Tensor,
    cu_queries: Tensor | None = None,
    cu_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    decay: bool = False,
    head_reduce: Reduction = "mean",
    query_reduce: Reduction = "mean",
) -> Tensor:
    """score_v = reduce over queries t of reduce over heads h of abs(C_t . B_v) dt[v,h], with `decay` times that to t.

    Args:
        C, B: (t,g,n) fp32, bf16 or fp16 (fp64 on the reference), after the convolution; tokens strided at will, n up to
            256. dt: (t,h) fp32 or of C's dtype, processed (after bias, softplus and limit), any strides; g divides h.
        A: (h), negative; needed with decay.
        query_index, key_index, cu_queries, cu_keys: as in `attention_token_scores`, rows of C and of B and dt.
            cu_seqlens: (s+1) bounds of the sequences. None: one sequence.
        decay: whether weights decay as the state does; otherwise a token counts the same at any distance.
        head_reduce, query_reduce: "mean" or "max".

    Returns:
        (nk) fp32 (fp64 for fp64), zeros in a sequence without queries and for keys after every query. No gradient.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("ssd_token_scores")
    check.tensor("C", C, "t g n")
    check.tensor("B", B, "t g n", dtypes=(C.dtype,))
    check.tensor("dt", dt, "t h", dtypes=beside_dtypes(C, cast=False))
    check.tensor("A", A, "h", dtypes=beside_dtypes(C, cast=False), optional=True)
    check.divides("g", "h")
    check.size("n", MAX_WIDTH)
    check.require(A is not None or not decay, "decay=True needs A")
    t = C.shape[0]
    check_bounds(check, "cu_seqlens", cu_seqlens, t, "t")
    packed = cu_seqlens is not None
    _check_lists(check, query_index, key_index, cu_queries, cu_keys, packed, t, t)
    one_of(check, "head_reduce", head_reduce, REDUCTIONS)
    one_of(check, "query_reduce", query_reduce, REDUCTIONS)
    args = (
        inner("C", C, 2).detach(),
        inner("B", B, 2).detach(),
        dt.detach(),
        A.detach() if decay else None,
        inner("query_index", query_index, 1),
        inner("key_index", key_index, 1),
        *(_packed(v) for v in (cu_queries, cu_keys, cu_seqlens)),
        decay,
        head_reduce,
        query_reduce,
    )
    sizes = {"nq": query_index.shape[0], "nk": key_index.shape[0], "t": t, "h": dt.shape[1]}
    sizes |= {"g": C.shape[1], "n": C.shape[2], "decay": decay}
    sizes |= {"s": 1 if cu_queries is None else cu_queries.shape[0] - 1}
    return call("ssd_token_scores", C, args, sizes | {"itemsize": C.element_size()})
