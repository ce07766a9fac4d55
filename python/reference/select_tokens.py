"""Which tokens of a sequence stay, and the move: the reference of `tigon.select_tokens` and `tigon.compact_tokens`."""

import torch
from torch import Tensor


def kept_of_sequence(
    scores: list[float], protected: list[bool], keep: int, multiple: int
) -> list[int]:
    """The rule: the places of one sequence that stay, ascending."""
    protected_count = sum(protected)
    count = min(-(-max(keep, protected_count) // multiple) * multiple, len(scores))
    value = [float("-inf") if s != s else s for s in scores]
    best = sorted(range(len(scores)), key=lambda i: (not protected[i], -value[i], i))
    return sorted(best[:count])


def kept_counts(
    t: int, keep: Tensor, cu_seqlens: Tensor, protected: Tensor | None, multiple: int
) -> Tensor:
    """(s) int64: how many tokens of each sequence stay."""
    bounds = cu_seqlens.long().clamp(0, t)
    least = keep.long().clamp(min=0)
    if protected is not None:
        before = torch.nn.functional.pad(protected.long().cumsum(0), (1, 0))
        least = torch.maximum(least, before[bounds[1:]] - before[bounds[:-1]])
    rounded = (least + multiple - 1) // multiple * multiple
    return torch.minimum(rounded, (bounds[1:] - bounds[:-1]).clamp(min=0))


def select_tokens(
    scores: Tensor,
    keep: Tensor,
    cu_seqlens: Tensor,
    protected: Tensor | None,
    multiple: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(index (capacity), cu_kept (s+1), inverse (t)) int32; arguments as `tigon.select_tokens` names them."""
    t, s, device = scores.shape[0], keep.shape[0], scores.device
    bounds = cu_seqlens.long().clamp(0, t)
    counts = kept_counts(t, keep, cu_seqlens, protected, multiple)
    place = torch.arange(t, device=device)
    # Tokens past the last bound belong to the pseudo-sequence s, of which nothing stays.
    sequence = torch.searchsorted(bounds[1:].contiguous(), place, right=True)
    value = torch.where(scores.isnan(), -torch.inf, scores)
    order = value.sort(descending=True, stable=True)[1]
    if protected is not None:
        order = order[protected[order].long().sort(descending=True, stable=True)[1]]
    order = order[sequence[order].sort(stable=True)[1]]
    start, room = bounds, torch.cat([counts, counts.new_zeros(1)])
    # Sequences lie one after the other in `order` too, so rank counts from the sequence's start.
    stays = place - start[sequence[order]] < room[sequence[order]]
    kept = torch.zeros(t, dtype=torch.bool, device=device).scatter(0, order, stays)
    target = kept.long().cumsum(0) - 1
    fits = kept & (target < capacity)
    inverse = torch.where(fits, target, -1).int()
    index = torch.full((capacity + 1,), -1, dtype=torch.int32, device=device)
    index = index.scatter(0, torch.where(fits, target, capacity), place.int())[:capacity]
    cu_kept = torch.zeros(s + 1, dtype=torch.int32, device=device)
    cu_kept[1:] = counts.cumsum(0).clamp(max=capacity)
    return index, cu_kept, inverse


def gather_rows(tensors: list[Tensor], index: Tensor, fills: list[float]) -> list[Tensor]:
    """Row index[i] of each tensor, its fill where index[i] names none."""
    rows = index.long()
    out = []
    for t, fill in zip(tensors, fills, strict=True):
        real = (rows >= 0) & (rows < t.shape[0])
        if t.shape[0] == 0:
            out.append(t.new_full((rows.shape[0], *t.shape[1:]), fill))
            continue
        taken = t[rows.clamp(0, t.shape[0] - 1)]
        mask = real.view(-1, *[1] * (t.dim() - 1))
        out.append(torch.where(mask, taken, torch.full((), fill, dtype=t.dtype, device=t.device)))
    return out
