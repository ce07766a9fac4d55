"""The decode step of the causal convolution with rollback by replay: a ring of inputs in place of a rolling window.

ring (slots,d,Lc), the input of position t at t % Lc; positions below 0 count as zeros. New inputs go to positions
length, length+1, ...; which of them stay is decided afterwards. A token's taps are itself and the inputs before it; a
tree's node has its ancestors as taps, nearest first, then the committed inputs.
"""

import torch
from torch import Tensor

from tigon.reference import elementwise
from tigon.reference.slots import Rows, write_rings


def committed_window(ring: Tensor, index: Tensor, length: Tensor, count: int) -> Tensor:
    """The inputs at positions length - count .. length - 1 of the slots `index` (b), oldest first: (b,count,d)."""
    position = length[:, None] - count + torch.arange(count, device=ring.device)
    found = ring.transpose(1, 2)[index[:, None], position % ring.shape[2]]
    return found.masked_fill((position < 0)[..., None], 0)


def conv1d_replay(
    x: Tensor,
    ring: Tensor,
    length: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state_indices: Tensor | None,
    num_tokens: Tensor | None,
    ancestors: Tensor | None,
    silu: bool,
) -> Tensor:
    """x (b,m,d) -> y (b,m,d); the new inputs are put into the ring, length is only read. Padding as in
    conv1d_update."""
    batch, m, _ = x.shape
    width = weight.shape[1]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = Rows(batch, m, ring.shape[0], state_indices, num_tokens, x.device)
    first, real = length[rows.index], rows.real()
    before = committed_window(ring, rows.index, first, width - 1)
    place = (first[:, None] + torch.arange(m, device=x.device)) % ring.shape[2]
    write_rings((ring.transpose(1, 2),), (x,), rows.index, place, real)
    inputs = torch.cat([before.to(acc), x.to(acc)], 1)  # (b,width-1+m,d), oldest first
    w = weight.to(acc)
    if ancestors is None:
        y = sum(inputs[:, k : k + m] * w[:, k] for k in range(width))
    else:
        taps = tree_taps(ancestors, width)
        y = sum(
            inputs.gather(1, taps[..., k, None].expand(-1, -1, x.shape[2])) * w[:, k]
            for k in range(width)
        )
    if bias is not None:
        y = y + bias.to(acc)
    y = elementwise.silu(y) if silu else y
    y = y if real is None else torch.where(real[..., None], y, 0)
    return y.to(x.dtype)


def tree_taps(ancestors: Tensor, width: int) -> Tensor:
    """Where the taps of each node are among width-1 committed inputs and the m nodes behind them: (b,m,width), oldest
    first."""
    m = ancestors.shape[1]
    node = torch.arange(m, device=ancestors.device)
    bit = ancestors.to(torch.int64)[..., None] >> node & 1
    on_path = ((bit == 1) & (node < node[:, None])) | (node == node[:, None])  # (b,node,ancestor)
    depth = on_path.sum(-1, keepdim=True)  # with the node itself
    nearer = depth - on_path.cumsum(-1)  # nodes of the path behind this one
    nearest = torch.arange(width - 1, -1, -1, device=ancestors.device)  # 0: the node itself
    match = on_path[..., None] & (nearer[..., None] == nearest)  # (b,node,ancestor,tap)
    among = (match * node[:, None]).sum(2) + width - 1
    return torch.where(nearest < depth, among, width - 2 - (nearest - depth))
