"""Depthwise causal convolution in plain PyTorch: forward, backward and the decode step.

    y[t, c] = act( bias[c] + sum_{j < width} weight[c, width-1-j] * u[t-j, c] )        act = SiLU or identity

where u is the sequence, preceded by `initial_state` (its last width-1 inputs, newest last; zeros if None).
x, y: (b,l,d), weight (d,width), bias (d), states (b,d,width-1). Packed batches have b = 1 and cu_seqlens
(s+1); each sequence has its own (s,d,width-1) state. Sums in fp32 (fp64 for fp64 inputs), input dtype out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.reference import elementwise
from tigon.reference.slots import write_slots


class _Taps:
    """u[t-j] for all tokens t and taps j, dense or packed, without waiting for the device."""

    def __init__(self, x: Tensor, width: int, initial: Tensor | None, cu_seqlens: Tensor | None):
        self.batch, self.length, self.channels = x.shape
        self.packed = cu_seqlens is not None
        self.width = width
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x = x.to(self.acc)
        if self.packed:
            bounds = cu_seqlens.to(torch.int64).clamp(0, self.length)
            self.start, self.end = bounds[:-1], bounds[1:]
            token = torch.arange(self.length, device=x.device)
            sequence = torch.searchsorted(bounds, token, right=True) - 1
            self.place = token - bounds[sequence]  # of each token in its sequence
        else:
            self.place = torch.arange(self.length, device=x.device)
        self.sequences = self.batch if not self.packed else cu_seqlens.numel() - 1
        shape = (self.sequences, width - 1, self.channels)
        self.initial = torch.zeros(shape, dtype=self.acc, device=x.device)
        self.has_initial = initial is not None
        if initial is not None:
            self.initial.copy_(initial.transpose(1, 2))
        # Tokens that still see the initial state, the first width-1 of each sequence: rows of a buffer with
        # one dummy row at the end for sequences that are shorter.
        head = torch.arange(max(width - 1, 0), device=x.device)
        if self.packed:
            row = self.start[:, None] + head
            self.head_live = row < self.end[:, None]
            self.head_row = torch.where(self.head_live, row, self.length)

    def earlier(self, j: int) -> Tensor:
        """x[t-j] within the sequence, else 0: (b,l,d)."""
        if j == 0:
            return self.x
        shifted = F.pad(self.x, (0, 0, j, 0))[:, : self.length]
        return torch.where((self.place >= j)[:, None], shifted, 0) if self.packed else shifted

    def later(self, g: Tensor, j: int) -> Tensor:
        """The transpose of `earlier`: g[t+j] within the sequence, else 0."""
        if j == 0:
            return g
        if self.packed:
            g = torch.where((self.place >= j)[:, None], g, 0)
        return F.pad(g, (0, 0, 0, j))[:, j:]

    def add_head(self, y: Tensor, weight: Tensor) -> Tensor:
        """Add what the initial state contributes to the first width-1 tokens of each sequence."""
        if not self.has_initial or not self.length or self.width == 1:
            return y
        head = torch.stack(
            [self._head(r, weight) for r in range(self.width - 1)], 1
        )  # (s,width-1,d)
        if not self.packed:
            y[:, : self.width - 1] += head[:, : self.length]
            return y
        padded = F.pad(y, (0, 0, 0, 1))
        return padded.index_add_(1, self.head_row.flatten(), head.flatten(0, 1)[None])[:, :-1]

    def _head(self, r: int, weight: Tensor) -> Tensor:
        """Token r of each sequence from the initial state: taps j > r reach back into it."""
        taps = range(r + 1, self.width)
        # input at place r-j < 0 is column width-1+r-j of the state
        return sum(
            weight[:, self.width - 1 - j] * self.initial[:, self.width - 1 + r - j] for j in taps
        )

    def head_of(self, g: Tensor) -> Tensor:
        """g at the first width-1 tokens of each sequence, 0 where there is none: (s,width-1,d)."""
        if self.packed:
            rows = F.pad(g, (0, 0, 0, 1))[0, self.head_row]
            return torch.where(self.head_live[..., None], rows, 0)
        head = g[:, : self.width - 1]
        return F.pad(head, (0, 0, 0, self.width - 1 - head.shape[1]))

    def tail_index(self) -> tuple[Tensor, Tensor]:
        """Where the last width-1 inputs of each sequence are: (token, or negative: place before the first)."""
        column = torch.arange(self.width - 1, device=self.x.device)
        if self.packed:
            place = (self.end - self.start)[:, None] - (self.width - 1) + column
            return place, self.start[:, None] + place
        place = (self.length - (self.width - 1) + column).expand(self.sequences, -1)
        return place, place


def _preactivation(taps: _Taps, weight: Tensor, bias: Tensor | None) -> Tensor:
    w = weight.t().contiguous()  # a tap's channels side by side
    y = taps.x * w[-1]
    for j in range(1, taps.width):
        if taps.packed:
            y.addcmul_(taps.earlier(j), w[taps.width - 1 - j])
        else:
            y[:, j:].addcmul_(taps.x[:, : max(taps.length - j, 0)], w[taps.width - 1 - j])
    y = taps.add_head(y, weight)
    return y if bias is None else y.add_(bias)


def conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """(y, final_state): final_state (b or s, d, width-1) holds each sequence's last width-1 inputs, in x's dtype."""
    taps = _Taps(x, weight.shape[1], initial_state, cu_seqlens)
    y = _preactivation(taps, weight.to(taps.acc), None if bias is None else bias.to(taps.acc))
    if silu:
        y = elementwise.silu(y)
    place, token = taps.tail_index()
    older = taps.initial.gather(1, _columns(place + taps.width - 1, taps))
    if taps.length:
        newer = _rows_at(taps, taps.x, token)
        older = torch.where((place >= 0)[..., None], newer, older)
    return y.to(x.dtype), older.transpose(1, 2).to(x.dtype).contiguous()


def _columns(index: Tensor, taps: _Taps) -> Tensor:
    """Gather index into the initial state's columns, for all channels."""
    return index.clamp(0, max(taps.width - 2, 0))[..., None].expand(-1, -1, taps.channels)


def _rows_at(taps: _Taps, t: Tensor, token: Tensor) -> Tensor:
    """t (b,l,d) at tokens (s, width-1): (s,width-1,d)."""
    token = token.clamp(0, taps.length - 1)
    if taps.packed:
        return t[0, token]
    return t.gather(1, token[..., None].expand(-1, -1, taps.channels))


def conv1d_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `conv1d_forward`: (dx, dweight, dbias, dinitial), each in its input's dtype."""
    taps = _Taps(x, weight.shape[1], initial_state, cu_seqlens)
    w = weight.to(taps.acc)
    g = dy.to(taps.acc)
    if silu:
        pre = _preactivation(taps, w, None if bias is None else bias.to(taps.acc))
        sig = torch.sigmoid(pre)
        g = g * sig * (1 + pre * (1 - sig))
    width = taps.width
    dx = torch.zeros_like(taps.x)
    dweight = torch.zeros_like(w)
    for j in range(width):
        dx += taps.later(g, j) * w[:, width - 1 - j]
        dweight[:, width - 1 - j] = (g * taps.earlier(j)).sum((0, 1))
    head = taps.head_of(g)
    dinitial = torch.zeros_like(taps.initial)
    for r in range(width - 1):
        for j in range(r + 1, width):
            dinitial[:, width - 1 + r - j] += w[:, width - 1 - j] * head[:, r]
            dweight[:, width - 1 - j] += (taps.initial[:, width - 1 + r - j] * head[:, r]).sum(0)
    if dfinal is not None:
        _final_backward(taps, dfinal.to(taps.acc).transpose(1, 2), dx, dinitial)
    return (
        dx.to(x.dtype),
        dweight.to(weight.dtype),
        None if bias is None else g.sum((0, 1)).to(bias.dtype),
        None
        if initial_state is None
        else dinitial.transpose(1, 2).to(initial_state.dtype).contiguous(),
    )


def _final_backward(taps: _Taps, dfinal: Tensor, dx: Tensor, dinitial: Tensor) -> None:
    """Each column of the final state is a token of the sequence or, if that was short, of its initial state."""
    place, token = taps.tail_index()
    from_initial = torch.where((place < 0)[..., None], dfinal, 0)
    dinitial.scatter_add_(1, _columns(place + taps.width - 1, taps), from_initial)
    if not taps.length:
        return
    from_x = dfinal - from_initial
    token = token.clamp(0, taps.length - 1)
    if taps.packed:
        dx[0].index_add_(0, token.flatten(), from_x.flatten(0, 1))
    else:
        dx.scatter_add_(1, token[..., None].expand(-1, -1, taps.channels), from_x)


def conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    silu: bool,
) -> Tensor:
    """m steps on slot-indexed windows, updated in place: x (b,m,d) -> y (b,m,d).

    conv_state (slots,d,W), W >= width-1, holds the last W inputs, newest last. Rows whose slot is out of
    [0, slots) and tokens from num_tokens[row] on are padding: zeros come out, nothing is touched.
    """
    batch, m, _ = x.shape
    slots, _, window = conv_state.shape
    width = weight.shape[1]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    everything = state_indices is None and num_tokens is None
    if not everything:
        rows = torch.arange(batch, device=x.device)
        index = rows if state_indices is None else state_indices.to(torch.int64)
        live = (index >= 0) & (index < slots)
        count = torch.full_like(index, m) if num_tokens is None else num_tokens.to(torch.int64)
        count = torch.where(live, count, 0).clamp(0, m)
    before = conv_state[:batch] if everything else conv_state[index.clamp(0, slots - 1)]
    inputs = torch.cat([before.to(acc), x.to(acc).transpose(1, 2)], 2)  # (b,d,W+m), oldest first
    w = weight.to(acc)
    seen = inputs[:, :, window - (width - 1) :]
    y = sum(seen[:, :, k : k + m] * w[:, k : k + 1] for k in range(width))
    if bias is not None:
        y = y + bias.to(acc)[:, None]
    y = elementwise.silu(y) if silu else y
    if everything:
        conv_state[:batch] = inputs[:, :, m:]
    else:
        y = torch.where(torch.arange(m, device=x.device) < count[:, None, None], y, 0)
        # After n real tokens the window is inputs[n : n + W].
        kept = count[:, None] + torch.arange(window, device=x.device)
        new = inputs.gather(2, kept[:, None].expand(-1, inputs.shape[1], -1))
        write_slots(conv_state, new, index, live)
    return y.transpose(1, 2).to(x.dtype).contiguous()
