"""Attention whose rows do not feel each other: batch-invariant mode.

Queries are taken in tiles of QUERIES rows and keys in blocks of KEYS, both padded to that shape, with the running
maximum and sum of Milakov and Gimelshein 2018 (arXiv 1805.02867). A block that a query may not see changes none of
its bits: the maximum stays, the weights are exact zeros. So a query's result depends on its own keys alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES, KEYS = 16, 64


def attend_tiled(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """q (b,l,hq,dim), k and v (b,n,hkv,dim), visible (b,l,n) bool -> (b,l,hq,dim). Every query sees a key."""
    length, dim, dtype = q.shape[1], q.shape[-1], q.dtype
    pad_q, pad_k = -length % QUERIES, -k.shape[1] % KEYS
    acc = torch.promote_types(q.dtype, torch.float32)
    q = F.pad(q.to(acc) * dim**-0.5, (0, 0, 0, 0, 0, pad_q))
    k, v = (F.pad(t.to(acc), (0, 0, 0, 0, 0, pad_k)) for t in (k, v))
    visible = F.pad(visible, (0, pad_k, 0, pad_q))
    rows = [
        torch.cat(
            [_tile(*tile, k_row, v_row) for tile in zip(q_row.split(QUERIES), seen.split(QUERIES))]
        )
        for q_row, k_row, v_row, seen in zip(q, k, v, visible)
    ]
    return torch.stack(rows)[:, :length].to(dtype)


def _tile(q: Tensor, visible: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One tile (QUERIES,hq,dim) over all key blocks of one row."""
    hq, dim = q.shape[1:]
    hkv = k.shape[1]
    each = hq // hkv
    # (hkv, QUERIES * each, dim): the query heads of a key head side by side
    q = q.view(QUERIES, hkv, each, dim).transpose(0, 1).reshape(hkv, QUERIES * each, dim)
    top = q.new_full((hkv, QUERIES * each, 1), float("-inf"))
    total = torch.zeros_like(top)
    out = torch.zeros_like(q)
    for k_block, v_block, seen in zip(k.split(KEYS), v.split(KEYS), visible.split(KEYS, 1)):
        scores = q @ k_block.permute(1, 2, 0)  # (hkv, QUERIES * each, KEYS)
        hidden = ~seen.repeat_interleave(each, 0)
        scores = scores.masked_fill(hidden, float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        anchor = new_top.clamp(min=torch.finfo(q.dtype).min)  # padded queries have seen nothing
        weight = torch.exp(scores - anchor)
        scale = torch.exp(top - anchor)
        total = total * scale + weight.sum(-1, keepdim=True)
        out = out * scale + weight @ v_block.transpose(0, 1)
        top = new_top
    out = out / total.clamp(min=torch.finfo(q.dtype).tiny)
    return out.view(hkv, QUERIES, each, dim).transpose(0, 1).reshape(QUERIES, hq, dim)
