"""Expert MLPs on routed tokens, forward and backward, in plain PyTorch.

    y_t = sum_j w_tj D_e act(U_e x_t),  e = indices[t,j]        act(h) = relu(h)^2, or silu(gate) up

x (t,l), U (e,m,l) (SwiGLU: (e,2m,l), gate rows first), D (e,l,m). Products accumulate in fp32 (fp64 for fp64); what is
stored is rounded to x's dtype: h, act(h), each D act, and their sum. Rows are taken in expert order (`order`).
Source: "Nemotron 3" (arXiv 2512.20856), section 2.2.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.reference.elementwise import silu
from tigon.reference.quantize import dequantize

ROWS = 16  # of a tile in batch-invariant mode
BLOCK = 2**17  # numbers of the hidden width that are worked on at once: they stay in a core's cache
SMALL = 2**14  # numbers of a matrix that two threads multiply faster in a batch, on padded rows


def product(a: Tensor, b: Tensor, invariant: bool, out: Tensor | None = None) -> Tensor:
    """a @ b, into `out` if given; in row tiles of one shape where a row must not feel how many there are."""
    if not invariant or not a.shape[0]:
        return torch.mm(a, b, out=out)
    tiles = F.pad(a, (0, 0, 0, -a.shape[0] % ROWS)).split(ROWS)
    found = torch.cat([tile @ b for tile in tiles])[: a.shape[0]]
    return found if out is None else out.copy_(found)


def _rows(offsets: Tensor, total: int) -> list[int]:
    """How many of `total` rows each expert has. tensor_split reads the offsets in C++."""
    bounds = offsets[1:].cpu() if offsets.is_cuda else offsets[1:].long()
    return [piece.shape[0] for piece in offsets.new_empty(total).tensor_split(bounds)][:-1]


def _products(
    x: Tensor, w: Tensor, rows: list[int], invariant: bool, out: Tensor | None = None
) -> Tensor:
    """Each expert's rows of x (rows,k) times its matrix of w (e,k,n), into `out` if given."""
    out = x.new_empty(x.shape[0], w.shape[2]) if out is None else out
    for piece, matrix, target in zip(x.split(rows), w, out.split(rows), strict=True):
        if piece.shape[0]:
            product(piece, matrix, invariant, target)
    return out


def _padded(rows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(place, own) of a batch with equally many rows an expert: the row that each is, and where the rows are in it."""
    count = torch.tensor(rows, device=device)[:, None]
    each = torch.arange(max(rows), device=device)
    place = (count.cumsum(0) - count + each).clamp_(max=sum(rows) - 1).flatten()
    return place, torch.arange(place.shape[0], device=device)[(each < count).flatten()]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor, invariant: bool = False) -> Tensor:
    """y (rows,n): x (rows,k) in expert order, w (e,n,k). Rows past offsets[e] give zeros."""
    rows = _rows(offsets, x.shape[0])
    y = x.new_empty(x.shape[0], w.shape[1])
    total = sum(rows)
    _products(x[:total], w.mT, rows, invariant, y[:total])
    y[total:].zero_()
    return y


def _gradients(dw: Tensor, d: Tensor, x: Tensor, rows: list[int], accumulate: bool) -> None:
    """dw (e,n,k) = d.T @ x of each expert's rows, or that added to it, in fp32 (fp64); exact zeros without rows."""
    d, x = d.to(_accumulator(d)), x.to(_accumulator(x))
    for out, left, right in zip(dw, d.split(rows), x.split(rows), strict=True):
        if out.dtype == d.dtype:
            out.addmm_(left.T, right, beta=float(accumulate))
        elif accumulate:
            out += left.T @ right
        else:
            out.copy_(left.T @ right)


def grouped_mm_backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """(dx, dw); an expert without rows gets exact zeros."""
    rows = _rows(offsets, x.shape[0])
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    _gradients(dw, dy[: sum(rows)], x[: sum(rows)], rows, False)
    return grouped_mm(dy, w.mT, offsets, invariant), dw


def weight(codes, scale, outer, format: str, width: int, dtype: torch.dtype) -> Tensor:
    """(e,rows,width) of `dtype` from plain or quantized expert weights."""
    if format == "plain":
        return codes
    e, rows = codes.shape[:2]
    flat = [None if t is None else t.flatten(0, 1) if t.dim() > 1 else t for t in (scale, outer)]
    values = dequantize(codes.flatten(0, 1), *flat, format, width, False, dtype)
    return values.unflatten(0, (e, rows))


def _activate(h: Tensor, activation: str, gate: Tensor | None = None) -> Tensor:
    """act(h) rounded where transformers rounds it, or gate act(h) where Megatron does."""
    acc = _accumulator(h)
    if activation == "relu2":
        r = F.relu(h)
        return r.mul_(r) if gate is None else (r.to(acc).square() * gate).to(h.dtype)
    first, second = h.chunk(2, -1)
    a = silu(first.to(acc)).to(h.dtype) * second
    return a if gate is None else (a.to(acc) * gate).to(h.dtype)


class _Local:
    """The rows of experts first to last in expert order: how many each has, their choices and tokens."""

    def __init__(self, indices, offsets, order, first, last):
        rows = _rows(offsets, order.shape[0])
        self.shape, self.start, self.rows = indices.shape, sum(rows[:first]), rows[first:last]
        self.total = sum(self.rows)
        self.choice = order[self.start : self.start + self.total].long()
        self.token = self.choice // max(self.shape[1], 1)

    def blocks(self, width: int) -> Iterator[tuple[slice, slice, list[int]]]:
        """(experts, their rows, how many each has) of as many experts at once as BLOCK holds."""
        edges, held = [0], 0
        for i, count in enumerate(self.rows):
            if held and (held + count) * width > BLOCK:
                edges.append(i)
                held = 0
            held += count
        begin = 0
        for first, last in pairwise([*edges, len(self.rows)]):
            rows = self.rows[first:last]
            yield slice(first, last), slice(begin, begin + sum(rows)), rows
            begin += sum(rows)

    def combine(self, rows: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
        """y (t,l): the k rows of each token, weighted, added in fp32 in the order of its choices. The last of
        `rows` is overwritten: it stands for the choices of experts elsewhere.
        """
        rows[-1].zero_()
        place = inverse.view(self.shape).long() - self.start
        mine = (place >= 0) & (place < self.total)
        place = torch.where(mine, place, self.total).T.contiguous()
        if weights is not None:
            weights = torch.where(mine, weights, 0).T[..., None]
        y = rows.new_zeros(place.shape[1], rows.shape[1], dtype=_accumulator(rows))
        for j, chosen in enumerate(place):
            row = rows.index_select(0, chosen).to(y.dtype)
            y += row if weights is None else row.mul_(weights[j])
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
    m = up.shape[1] // (2 if activation == "swiglu" else 1)
    up = weight(up, up_scale, up_outer, up_format, x.shape[1], x.dtype)
    down = weight(down, down_scale, down_outer, down_format, m, x.dtype)
    local = _Local(indices, offsets, order, first, last)
    gates = weights.flatten()[local.choice][:, None] if before_down else None
    kept = None if save == "nothing" else x.new_empty(t * k, up.shape[1])
    out = x.new_empty(local.total + 1, x.shape[1])
    small = 0 < up.numel() <= len(up) * SMALL and torch.get_num_threads() > 1
    for some, r, rows in local.blocks(up.shape[1]):
        u, d, token = up.mT[some], down.mT[some], local.token[r]
        keep, gate = (None if v is None else v[r] for v in (kept, gates))
        if small and not batch_invariant and 0 < len(rows) * max(rows) <= 2 * sum(rows):
            place, own = _padded(rows, x.device)
            h = torch.bmm(x.index_select(0, token[place]).view(len(rows), -1, x.shape[1]), u)
            a = _activate(h.flatten(0, 1), activation, None if gate is None else gate[place])
            y = torch.bmm(a.view(len(rows), -1, d.shape[1]), d).flatten(0, 1)
            torch.index_select(y, 0, own, out=out[r])
            if keep is not None:
                torch.index_select(h.flatten(0, 1), 0, own, out=keep)
        else:
            h = _products(x.index_select(0, token), u, rows, batch_invariant, keep)
            _products(_activate(h, activation, gate), d, rows, batch_invariant, out[r])
        if save == "relu":
            keep.relu_()
    y = local.combine(out, inverse, None if before_down else weights)
    if kept is None:
        return y, x.new_empty(0)
    kept[local.total :].zero_()
    return y, kept


def _activation_backward(h, activation, acc):
    """(act(h), function dact -> dh), fp32. For ReLU^2 h may be relu(h)."""
    if activation == "relu2":
        r = F.relu(h).to(acc)
        return r.square().to(h.dtype).to(acc), lambda d: d.mul_(r).mul_(2)
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
    local, acc = _Local(indices, offsets, order, first, last), _accumulator(x)
    into, add = up_buffer is not None, up_buffer is not None and accumulate
    dups, ddowns = (
        (up_buffer, down_buffer)
        if into
        else (torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in (up, down))
    )
    gates = weights.flatten()[local.choice][:, None]
    dgates = weights.new_empty(local.total)
    drows = x.new_empty(local.total + 1, x.shape[1])
    for some, r, rows in local.blocks(up.shape[1]):
        piece, d = (v.index_select(0, local.token[r]) for v in (x, dy))
        h = kept[r] if save != "nothing" else _products(piece, up.mT[some], rows, batch_invariant)
        act, pull = _activation_backward(h, activation, acc)
        g = _products(d, down[some], rows, batch_invariant).to(acc)
        dgates[r] = (act * g).sum(-1)
        dh = pull(g.mul_(gates[r])).to(x.dtype)
        _products(dh, up[some], rows, batch_invariant, drows[r])
        _gradients(dups[some], dh, piece, rows, add)
        _gradients(ddowns[some], d, act.mul_(gates[r]).to(x.dtype), rows, add)
    dx = local.combine(drows, inverse, None)
    dweights = weights.new_zeros(t * k)
    dweights[local.choice] = dgates
    if into:
        dups = ddowns = x.new_empty(0)
    return dx, dups, ddowns, dweights.view(t, k)
