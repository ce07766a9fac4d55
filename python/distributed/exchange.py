"""Tokens to the ranks that hold their experts, and their sums back.

A token goes to a rank once, however many of its choices live there, with the list of its choices; the rank returns one
row, the weighted sum of its own experts. So both ways carry at most min(k, ranks) rows a token, in the latent width.

    rows[i] = x[token[i]]                     take: what a rank sends
    y[t] = sum over ranks r of rows[slot[t,r]]       give: what comes back, in fp32 and in the order of the ranks

Each is the other's gradient, and neither adds in an order that could change.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd


@dataclass(frozen=True)
class Plan:
    """token: (n) the token of each row sent, -1 for none; rows lie by rank. slot: (t,ranks) the row of a token at a
    rank, -1 for none. send, receive: rows to and from each rank. dropped: () how often a token found no room."""

    token: Tensor
    slot: Tensor
    send: list[int]
    receive: list[int]
    dropped: Tensor


def plan(indices: Tensor, owner: Tensor, group: dist.ProcessGroup, capacity: int | None) -> Plan:
    """Who goes where. indices: (t,k) experts, those outside owner (e), the rank of each expert, go nowhere.

    Without a capacity the counts are exchanged and read by the host, once; with one every rank sends `capacity` rows to
    every other, and nothing waits.
    """
    ranks, (t, _) = group.size(), indices.shape
    e = owner.shape[0]
    known = (indices >= 0) & (indices < e)
    rank = torch.where(known, owner[indices.clamp(0, e - 1).long()], ranks)
    wanted = torch.zeros(t, ranks + 1, dtype=torch.bool, device=indices.device)
    wanted = wanted.scatter_(1, rank, True)[:, :ranks]
    before = wanted.long().cumsum(0) - 1  # the token's place among those for the same rank
    if capacity is None:
        counts = wanted.sum(0)
        theirs = all_to_all_single(counts, None, None, group)
        send, receive = torch.stack([counts, theirs]).tolist()
        fits, first = wanted, counts.cumsum(0) - counts
    else:
        send = receive = [capacity] * ranks
        fits = wanted & (before < capacity)
        first = torch.arange(ranks, device=indices.device) * capacity
    slot = torch.where(fits, first + before, -1)
    rows = sum(send)
    token = torch.full((rows + 1,), -1, dtype=torch.int64, device=indices.device)
    place = torch.where(fits, slot, rows)
    source = torch.arange(t, device=indices.device)[:, None].expand(t, ranks)
    token.scatter_(0, place.flatten(), source.flatten())
    return Plan(token[:rows], slot, send, receive, (wanted & ~fits).sum())


def _take(x: Tensor, token: Tensor) -> Tensor:
    """(n, …): the rows of x at `token`, zeros at -1."""
    if not x.shape[0]:
        return x.new_zeros(token.shape[0], *x.shape[1:])
    rows = x[token.clamp(min=0)]
    return torch.where((token >= 0).view(-1, *[1] * (x.dim() - 1)), rows, 0)


def _give(rows: Tensor, slot: Tensor) -> Tensor:
    """(t, …): the sum of each token's rows, fp32 (fp64 of fp64) in the order of the ranks, in the rows' dtype."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    y = rows.new_zeros(slot.shape[0], *rows.shape[1:], dtype=wide)
    for column in slot.unbind(1):
        y += _take(rows, column).to(wide)
    return y.to(rows.dtype)


class Take(torch.autograd.Function):
    """rows[i] = x[token[i]]."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return _take(x, token)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, drows: Tensor):
        return _give(drows, *ctx.saved_tensors), None, None


class Give(torch.autograd.Function):
    """y[t] = sum_r rows[slot[t,r]]."""

    @staticmethod
    def forward(ctx, rows: Tensor, token: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _give(rows, slot)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        return _take(dy, *ctx.saved_tensors), None, None


def send(x: Tensor, way: Plan, group: dist.ProcessGroup, fill: int | None = None) -> Tensor:
    """The rows of x (t, …) that other ranks hold experts for, exchanged. fill: what rows of nobody hold (integers)."""
    if not x.is_floating_point():
        rows = _take(x, way.token)
        if fill is not None:
            rows = torch.where((way.token >= 0)[:, None], rows, fill)
        return all_to_all_single(rows, way.receive, way.send, group)
    rows = Take.apply(x, way.token, way.slot)
    return all_to_all_single_autograd(rows, way.receive, way.send, group)


def give_back(rows: Tensor, way: Plan, group: dist.ProcessGroup) -> Tensor:
    """The sums (t, …) of what the ranks made of the rows they received."""
    rows = all_to_all_single_autograd(rows, way.send, way.receive, group)
    return Give.apply(rows, way.token, way.slot)
