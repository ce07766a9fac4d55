"""The training loss of multi-token prediction, depth by depth, and how often its guesses are right.

    h^(d) = mtp(h^(d-1), emb(ids_{i+d}))           h^(0): the backbone's output
    loss_d = mean over i of -log softmax(head(h^(d)_i))[labels_{i+d}]

labels_i is the token after token i, so depth d predicts token i+d+1. A position counts at depth d if i+d lies in the
same row or packed sequence, labels_{i+d} is not -100, and neither i nor i+d is padding.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.modules.mtp import MTP
from tigon.ops import Routing

IGNORED = -100


class MTPLosses(NamedTuple):
    """losses (depths) fp32 (fp64 for fp64): mean nats of each depth, 0 where nothing counts. Without gradients: right
    (depths), the share of counted positions where the likeliest token is the label, and accepted (depths), the share of
    those counted at every depth up to this one that are right at all of them; None if not asked for.
    routings: of the mixtures, depth by depth."""

    losses: Tensor
    right: Tensor | None
    accepted: Tensor | None
    routings: list[Routing]


def reach(t: Tensor, by: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """(b,l) bool: whether position i + by of t (b,l,...) is in the same row, or packed sequence of cu_seqlens (s+1)."""
    token = torch.arange(t.shape[1], device=t.device)
    end = t.shape[1]
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(torch.int64)
        which = torch.searchsorted(bounds, token, right=True)
        end = bounds[which.clamp(max=bounds.numel() - 1)]
    return (token + by < end).expand(t.shape[:2])


def mtp_losses(
    mtp: MTP,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    input_ids: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    depths: int,
    mask: Tensor | None = None,
    metrics: bool = True,
    return_routing: bool = False,
) -> MTPLosses:
    """See the module's docstring; embed: token ids (b,l) -> (b,l,d), logits: hidden (b,l,d) -> (b,l,V)."""
    losses, right, accepted, routings = [], [], [], []
    all_right = all_seen = torch.ones_like(labels, dtype=torch.bool)
    embedded = embed(input_ids)
    for depth in range(1, depths + 1):
        # What `roll` brings round from the front is out of reach, and causal mixing lets nobody within reach see it.
        valid = reach(input_ids, depth, cu_seqlens)
        if mask is not None:
            valid = valid & mask & mask.roll(-depth, 1)
        target = labels.roll(-depth, 1).masked_fill(~valid, IGNORED)
        hidden, new = mtp(
            hidden, embedded.roll(-depth, 1), cu_seqlens, mask=valid, return_routing=True
        )
        routings += new if return_routing else []
        scores = logits(hidden)
        seen = target != IGNORED
        count = seen.sum().clamp(min=1)
        nats = F.cross_entropy(
            scores.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        losses.append(nats / count)
        if metrics:
            hit = scores.detach().argmax(-1) == target
            all_right, all_seen = all_right & hit, all_seen & seen
            right.append(hit.sum() / count)
            accepted.append(all_right.sum() / all_seen.sum().clamp(min=1))
    return MTPLosses(
        torch.stack(losses),
        torch.stack(right) if metrics else None,
        torch.stack(accepted) if metrics else None,
        routings,
    )
