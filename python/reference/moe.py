"""Routing of tokens to experts: scores, choice, weights, counts and the order by expert, in plain PyTorch.

    s = sigmoid(z) or softmax(z)     choose top k of s + bias, ties to the lower index     w = scale s / (sum s + eps)

z (t,e) fp32 logits. The bias steers the choice only.
Sources: "DeepSeek-V3" (arXiv 2412.19437), section 2.1.2; "Nemotron 3" (arXiv 2512.20856), section 2.2.
"""

import torch
from torch import Tensor


def _scores(logits: Tensor, score: str) -> Tensor:
    if score == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    return torch.softmax(logits, -1)


def _ranked(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest in descending order, ties to the lower index."""
    return torch.sort(values, dim=-1, descending=True, stable=True)[1][..., :count]


def _choose(scores: Tensor, bias: Tensor | None, k: int, groups: int, top_groups: int) -> Tensor:
    """(t,k) indices; a NaN is never preferred."""
    rank = scores if bias is None else scores + bias
    rank = torch.where(rank.isnan(), -torch.inf, rank)
    if groups > 1:
        grouped = rank.unflatten(-1, (groups, -1))
        best = torch.sort(grouped, -1, descending=True)[0][..., :2].sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool)
        allowed.scatter_(-1, _ranked(best, top_groups), True)
        # Below every score, -inf among them, so that another group's expert is never taken.
        inside = torch.where(allowed[..., None], grouped, -torch.inf).flatten(-2)
        order = _ranked(inside, rank.shape[-1])
        kept = allowed.repeat_interleave(grouped.shape[-1], -1).gather(-1, order)
        return order.gather(-1, torch.sort(kept, dim=-1, descending=True, stable=True)[1])[..., :k]
    return _ranked(rank, k)


def moe_sort(indices: Tensor, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(counts (e), offsets (e+1), order (t k), inverse (t k)), all int32: a stable counting sort by expert.

    indices (t,k); one of e or more, or below 0, is a skipped choice: it comes last in `order`, as -1, inverse -1.
    """
    flat = indices.flatten().long()
    flat = torch.where((flat < 0) | (flat >= e), e, flat)
    counts = torch.zeros(e + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    offsets = torch.cat([counts.new_zeros(1), counts[:e].cumsum(0)])
    by_expert, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    order = torch.where(by_expert == e, -1, order)
    inverse = torch.where(flat == e, -1, inverse)
    return tuple(t.to(torch.int32) for t in (counts[:e], offsets, order, inverse))


def _sequence(cu_seqlens: Tensor | None, t: int, device: torch.device) -> tuple[Tensor, int]:
    """(the sequence of each token, how many there are); tokens past the last bound count to the last."""
    if cu_seqlens is None:
        return torch.zeros(t, dtype=torch.int64, device=device), 1
    count = cu_seqlens.shape[0] - 1
    token = torch.arange(t, device=device, dtype=cu_seqlens.dtype)
    where = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return where.clamp(max=count - 1), count


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scale: float,
    score: str,
    normalize: bool,
    eps: float,
    groups: int,
    top_groups: int,
    sums: bool,
    z_loss: bool,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """(indices (t,k), weights (t,k), scores (t,k), counts (e), offsets (e+1), order (tk), inverse (tk),
    score_sums (s,e), aux_counts (s,e), z_sum ()); the last three empty unless `sums` or `z_loss` asks for them.

    A row with a NaN gets NaN weights; a masked token chooses the expert e, which is none.
    """
    t, e = logits.shape
    s = _scores(logits, score)
    chosen = _choose(s, bias, top_k, groups, top_groups)
    scores = s.gather(-1, chosen)
    scores = torch.where(logits.isnan().any(-1, keepdim=True), torch.nan, scores)
    weights = scores / (scores.sum(-1, keepdim=True) + eps) if normalize else scores
    weights = weights * scale
    live = torch.ones(t, dtype=torch.bool, device=logits.device) if mask is None else mask
    chosen = torch.where(live[:, None], chosen, e)
    weights = torch.where(live[:, None], weights, 0)
    scores = torch.where(live[:, None], scores, 0)
    score_sums, aux_counts = s.new_empty(0), s.new_empty(0, dtype=torch.int32)
    if sums:
        where, count = _sequence(cu_seqlens, t, logits.device)
        share = s / s.sum(-1, keepdim=True) if score == "sigmoid" else s
        share = torch.where(live[:, None], share, 0)
        score_sums = s.new_zeros(count, e).index_add_(0, where, share)
        plain = _choose(s, None, top_k, groups, top_groups)
        taken = torch.zeros_like(s, dtype=torch.int32).scatter_(1, plain, 1) * live[:, None]
        aux_counts = s.new_zeros(count, e, dtype=torch.int32).index_add_(0, where, taken.int())
    z_sum = s.new_empty(0)
    if z_loss:
        z_sum = torch.where(live, torch.logsumexp(logits, -1).square(), 0).sum()
    return (
        chosen.to(torch.int32),
        weights,
        scores,
        *moe_sort(chosen, e),
        score_sums,
        aux_counts,
        z_sum,
    )


def moe_route_backward(
    dweights: Tensor,
    dscore_sums: Tensor | None,
    dz_sum: Tensor | None,
    logits: Tensor | None,
    indices: Tensor,
    scores: Tensor,
    e: int,
    scale: float,
    score: str,
    normalize: bool,
    eps: float,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """dlogits (t,e). scores (t,k): of the choices, before normalization. logits: only where a loss or a softmax that is
    not normalized again needs all of them.

    With g the gradient of a score's weight and S = sum s + eps: ds = (g - sum g s / S) / S, dz = ds s (1 - s).
    """
    t = indices.shape[0]
    g = dweights * scale
    if normalize:
        total = scores.sum(-1, keepdim=True) + eps
        g = (g - (g * scores).sum(-1, keepdim=True) / total) / total
    dz = g * scores
    if score == "sigmoid":
        dz = dz * (1 - scores)
    dlogits = dz.new_zeros(t, e + 1)
    dlogits.scatter_(1, indices.long().clamp(0, e), dz)
    dlogits = dlogits[:, :e]
    live = None if mask is None else mask[:, None]
    if score == "softmax" and not normalize:
        dlogits = dlogits - torch.softmax(logits, -1) * (g * scores).sum(-1, keepdim=True)
    if dscore_sums is not None:
        where, _ = _sequence(cu_seqlens, t, dz.device)
        s = _scores(logits, score)
        total = s.sum(-1, keepdim=True) if score == "sigmoid" else 1.0
        share = s / total
        d = dscore_sums[where]
        d = share * (d - (d * share).sum(-1, keepdim=True))
        dlogits = dlogits + (d * (1 - s) if score == "sigmoid" else d)
    if dz_sum is not None:
        lse = torch.logsumexp(logits, -1, keepdim=True)
        dlogits = dlogits + 2 * dz_sum * lse * torch.exp(logits - lse)
    return dlogits.contiguous() if live is None else torch.where(live, dlogits, 0)
