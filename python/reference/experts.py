"""Expert MLPs on routed tokens, forward and backward, in plain PyTorch.

    y_t = sum_j w_tj D_e act(U_e x_t),  e = indices[t,j]        act(h) = relu(h)^2, or silu(gate) up

x (t,l), U (e,m,l) (SwiGLU: (e,2m,l), gate rows first), D (e,l,m). Products accumulate in fp32 (fp64 for fp64); what is
stored is rounded to x's dtype: h, act(h), each D act, and their sum. Rows are taken in expert order (`order`).
Source: "Nemotron 3" (arXiv 2512.20856), section 2.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.reference.elementwise import silu
from tigon.reference.quantize import dequantize

ROWS = 16  # of a tile in batch-invariant mode


def product(a: Tensor, b: Tensor, invariant: bool) -> Tensor:
    """a @ b.T; in row tiles of one shape where a row must not feel how many there are."""
    if not invariant or not a.shape[0]:
        return a @ b.T
    tiles = F.pad(a, (0, 0, 0, -a.shape[0] % ROWS)).split(ROWS)
    return torch.cat([tile @ b.T for tile in tiles])[: a.shape[0]]


def _pieces(rows: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """`rows` in expert order, one piece an expert; the rows past the last offset are dropped."""
    return rows.tensor_split(offsets[1:].cpu() if rows.is_cuda else offsets[1:].long())[:-1]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, invariant: bool = False) -> Tensor:
    """y (rows,n): x (rows,k) in expert order, w (e,n,k). Rows past offsets[e] give zeros."""
    y = x.new_zeros(x.shape[0], w.shape[1])
    for piece, out, weight in zip(_pieces(x, offsets), _pieces(y, offsets), w, strict=True):
        if piece.shape[0]:
            out.copy_(product(piece, weight, invariant))
    return y


def grouped_mm_backward(dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dw); an expert without rows gets exact zeros."""
    dw = torch.zeros_like(w)
    for d, piece, out in zip(_pieces(dy, offsets), _pieces(x, offsets), dw, strict=True):
        if piece.shape[0]:
            out.copy_(d.T @ piece)
    return grouped_mm(dy, w.transpose(1, 2), offsets), dw


def weight(codes, scale, outer, format: str, width: int, dtype: torch.dtype) -> Tensor:
    """(e,rows,width) of `dtype` from plain or quantized expert weights."""
    if format == "plain":
        return codes
    e, rows = codes.shape[:2]
    flat = [None if t is None else t.flatten(0, 1) if t.dim() > 1 else t for t in (scale, outer)]
    values = dequantize(codes.flatten(0, 1), *flat, format, width, False, dtype)
    return values.unflatten(0, (e, rows))


def _activate(h: Tensor, activation: str) -> Tensor:
    """act(h) rounded where transformers rounds it."""
    if activation == "relu2":
        return F.relu(h).square()
    gate, up = h.chunk(2, -1)
    acc = _accumulator(h)
    return silu(gate.to(acc)).to(h.dtype) * up


class _Local:
    """The rows of experts first to last: where they begin in expert order, their choices and tokens."""

    def __init__(self, offsets, order, k, first, last):
        self.offsets = (offsets[first : last + 1] - offsets[first]).clamp(min=0)
        position = torch.arange(order.shape[0], device=order.device)
        self.live = position < self.offsets[-1]
        start = offsets[first].long()
        choice = order[(position + start).clamp(max=max(order.shape[0] - 1, 0))].long()
        self.choice = torch.where(self.live, choice, 0)
        self.token = self.choice // k

    def gather(self, rows: Tensor) -> Tensor:
        return rows[self.token]


def _combine(rows: Tensor, inverse: Tensor, offsets: Tensor, first, last, k, weights) -> Tensor:
    """y (t,l): the k rows of each token, weighted, added in fp32 in the order of its choices."""
    place = inverse.long().view(-1, k) - offsets[first]
    mine = (inverse.view(-1, k) >= offsets[first]) & (inverse.view(-1, k) < offsets[last])
    acc = _accumulator(rows)
    y = rows.new_zeros(place.shape[0], rows.shape[1], dtype=acc)
    for j in range(k):
        row = rows[place[:, j].clamp(0, max(rows.shape[0] - 1, 0))].to(acc)
        row = row if weights is None else row * weights[:, j, None]
        y += torch.where(mine[:, j, None], row, 0)
    return y.to(rows.dtype)


def moe_experts(
    x: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_outer: Tensor | None,
    up_format: str,
    down: Tensor,
    down_scale: Tensor | None,
    down_outer: Tensor | None,
    down_format: str,
    weights: Tensor,
    indices: Tensor,
    offsets: Tensor,
    order: Tensor,
    inverse: Tensor,
    activation: str,
    before_down: bool,
    save: str,
    first: int,
    last: int,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y (t,l), kept): kept is h (save "hidden") or relu(h) ("relu") in expert order, else empty.

    weights (t,k) are applied to D act(h), or with before_down to act(h). Experts first to last - 1 are here.
    """
    t, k = indices.shape
    gates = 2 if activation == "swiglu" else 1
    m = up.shape[1] // gates
    if not t or not k or first == last:
        return torch.zeros_like(x), x.new_zeros(t * k if save != "nothing" else 0, m * gates)
    up = weight(up, up_scale, up_outer, up_format, x.shape[1], x.dtype)
    down = weight(down, down_scale, down_outer, down_format, m, x.dtype)
    local = _Local(offsets, order, k, first, last)
    rows, acc = local.gather(x), _accumulator(x)
    w = weights.flatten()[local.choice][:, None]
    kept = x.new_zeros(t * k if save != "nothing" else 0, m * gates)
    out = x.new_zeros(t * k, x.shape[1])
    keeps = _pieces(kept, local.offsets) if save != "nothing" else [None] * (last - first)
    pieces = (_pieces(v, local.offsets) for v in (rows, w, out))
    for piece, gate, target, keep, u, d in zip(*pieces, keeps, up, down, strict=True):
        if not piece.shape[0]:
            continue
        h = product(piece, u, batch_invariant)
        if keep is not None:
            keep.copy_(F.relu(h) if save == "relu" else h)
        if before_down and activation == "relu2":
            a = (F.relu(h).to(acc).square() * gate).to(x.dtype)
        else:
            a = _activate(h, activation)
            a = (a.to(acc) * gate).to(x.dtype) if before_down else a
        target.copy_(product(a, d, batch_invariant))
    y = _combine(out, inverse, offsets, first, last, k, None if before_down else weights)
    return y, kept


def _activation_backward(h, activation, acc):
    """(act(h), function dact -> dh), fp32. For ReLU^2 h may be relu(h)."""
    if activation == "relu2":
        r = F.relu(h).to(acc)
        return r.square().to(h.dtype).to(acc), lambda d: 2 * r * d
    gate, up = h.to(acc).chunk(2, -1)
    sig = 1 / (1 + torch.exp(-gate))
    value = silu(gate)
    slope = sig * (1 + gate * (1 - sig))
    act = _activate(h, activation).to(acc)
    return act, lambda d: torch.cat([d * up * slope, d * value], -1)


def moe_experts_backward(
    dy: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    offsets: Tensor,
    order: Tensor,
    inverse: Tensor,
    kept: Tensor,
    activation: str,
    before_down: bool,
    save: str,
    first: int,
    last: int,
    up_buffer: Tensor | None,
    down_buffer: Tensor | None,
    accumulate: bool,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dup, ddown, dweights). With G = dy D: dw = <act, G>, dact = w G, dh = act'(h) dact, dx = sum dh U,
    dU = dh^T x, dD = dy^T (w act).

    Given fp32 buffers take dU and dD (added to with `accumulate`), which then come back empty.
    """
    t, k = indices.shape
    acc = _accumulator(x)
    dup = torch.zeros_like(up) if up_buffer is None else up_buffer
    ddown = torch.zeros_like(down) if down_buffer is None else down_buffer
    if up_buffer is not None and not accumulate:
        dup.zero_(), ddown.zero_()
    dweights = weights.new_zeros(t * k)
    dx = torch.zeros_like(x)
    if t and k and last > first:
        local = _Local(offsets, order, k, first, last)
        rows, grads = local.gather(x), local.gather(dy)
        w = weights.flatten()[local.choice][:, None]
        dw = weights.new_zeros(t * k)
        drows = x.new_zeros(t * k, x.shape[1])
        keeps = _pieces(kept, local.offsets) if save != "nothing" else [None] * (last - first)
        pieces = (_pieces(v, local.offsets) for v in (rows, grads, w, dw, drows))
        for i, (piece, d, gate, dgate, drow, keep) in enumerate(zip(*pieces, keeps, strict=True)):
            if not piece.shape[0]:
                continue
            h = product(piece, up[i], batch_invariant) if save == "nothing" else keep
            act, pull = _activation_backward(h, activation, acc)
            g = product(d, down[i].T, batch_invariant).to(acc)
            dgate.copy_((act * g).sum(-1))
            dh = pull(gate * g).to(x.dtype)
            drow.copy_(product(dh, up[i].T, batch_invariant))
            dup[i] += (dh.to(acc).T @ piece.to(acc)).to(dup.dtype)
            ddown[i] += (d.to(acc).T @ (gate * act).to(x.dtype).to(acc)).to(ddown.dtype)
        dx = _combine(drows, inverse, offsets, first, last, k, None)
        scattered = weights.new_zeros(t * k + 1)
        scattered[torch.where(local.live, local.choice, t * k)] = dw
        dweights = scattered[: t * k]
    empty = x.new_empty(0)
    if up_buffer is not None:
        dup = ddown = empty
    return dx, dup, ddown, dweights.view(t, k)
