"""Causal grouped-query attention without positional encoding.

    q_i, k_j, v_j = x_i Wq, x_j Wk, x_j Wv            query head h reads key head h // (hq / hkv)
    o_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(dim)) v_j

Shapes: q (b,l,hq,dim), k and v (b,l,hkv,dim). Sources: Ainslie et al. 2023, "GQA" (arXiv 2305.13245);
Nemotron-H (arXiv 2504.03624) for the absence of positions: the Mamba layers carry them.
"""

from collections.abc import Callable
from functools import cache as once
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tigon.modules.attention_tiles import attend_tiled
from tigon.modules.linear import Linear, activation_dtype
from tigon.modules.state import KVCache, Lengths, check_feed, read_slots
from tigon.ops.dispatch import is_batch_invariant


@once
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


def _flash(q: Tensor) -> bool:
    """Whether flash-attn takes it: installed, on a GPU, in half precision."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and not is_batch_invariant() and _has_flash_attn()


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Causal if `visible` (b,l,n) bool is None, else over the keys that it shows. (b,l,hq,dim)."""
    if visible is not None and is_batch_invariant():
        return attend_tiled(q, k, v, visible)
    if visible is None and is_batch_invariant():
        causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        return attend_tiled(q, k, v, causal.expand(q.shape[0], -1, -1))
    if visible is None and _flash(q):
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True)
    out = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=None if visible is None else visible[:, None],
        is_causal=visible is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal within each packed sequence: (1,l,hq,dim)."""
    length = q.shape[1]
    if _flash(q):
        from flash_attn import flash_attn_varlen_func

        bounds = cu_seqlens.to(torch.int32)
        q, k, v = q[0], k[0], v[0]
        return flash_attn_varlen_func(q, k, v, bounds, bounds, length, length, causal=True)[None]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        pieces = [
            _attend(q[:, i:j], k[:, i:j], v[:, i:j])
            for i, j in pairwise(cu_seqlens.tolist())
            if i < j
        ]
        return torch.cat(pieces, 1) if pieces else q
    if is_batch_invariant():
        raise NotImplementedError(
            "Attention: packed sequences in batch-invariant mode run on the CPU only"
        )
    token = torch.arange(length, device=q.device)
    sequence = torch.searchsorted(cu_seqlens.to(torch.int64), token, right=True)
    visible = (sequence[:, None] == sequence) & (token[:, None] >= token)
    return _attend(q, k, v, visible[None])


class Attention(nn.Module):
    """Causal attention layer: x (b,l,d_model) -> (b,l,d_model).

    Uses flash-attn where that is installed and takes the tensors, else `scaled_dot_product_attention`.

    Args:
        d_model: width. num_heads (hq), num_kv_heads (hkv, divides hq), head_dim (d_model / hq if None).
        bias: whether the four products have one.

    Parameters: q_proj.weight (hq dim, d_model), k_proj.weight and v_proj.weight (hkv dim, d_model),
    o_proj.weight (d_model, hq dim).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads <= 0 or num_heads % num_kv_heads:
            raise ValueError(
                f"Attention: num_kv_heads={num_kv_heads} must divide num_heads={num_heads}"
            )
        if head_dim is None and d_model % num_heads:
            raise ValueError(
                f"Attention: num_heads={num_heads} must divide d_model={d_model}, or pass head_dim"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = Linear(d_model, num_heads * self.head_dim, **factory)
        self.k_proj = Linear(d_model, num_kv_heads * self.head_dim, **factory)
        self.v_proj = Linear(d_model, num_kv_heads * self.head_dim, **factory)
        self.o_proj = Linear(num_heads * self.head_dim, d_model, **factory)

    def allocate_cache(
        self,
        slots: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        lengths: Lengths | None = None,
    ) -> KVCache:
        """Room for `max_length` tokens in each of `slots`; `lengths` is shared by the layers of a model."""
        device = self.k_proj.weight.device if device is None else device
        dtype = dtype or activation_dtype(self.k_proj)
        if lengths is None:
            lengths = Lengths(torch.zeros(slots, dtype=torch.int64, device=device), max_length)
        shape = (slots, max_length + 1, self.num_kv_heads, self.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVCache(keys, values, lengths)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        slots: Tensor | None = None,
        num_tokens: Tensor | None = None,
        ancestors: Tensor | None = None,
        first_node: int = 0,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Mix tokens; with a cache, after those that it holds, and add the new ones to it.

        Arguments as in `Mamba2.forward`. `cache.lengths` is read, not advanced: layers share it, so the caller
        does that once, after the last (`cache.lengths.advance`).

        first_node: how many tokens earlier calls have written behind those that `lengths` counts. With ancestors the
            bits count from the first of them, and there are 32 at most.
        watch: called with q and k of the call's tokens, (b,l,heads,dim): token scores are made of them.
        """
        check_feed("Attention", cu_seqlens, cache, slots, num_tokens)
        if ancestors is not None and (cache is None or cu_seqlens is not None):
            raise ValueError("Attention: ancestors are for dense batches with a cache")
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if watch is not None:
            watch(q, k)
        fresh = cache is None or cache.lengths.bound + first_node == 0
        if cache is not None:
            b, length = x.shape[:2]
            rows = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
            row, slot, position = cache.places(rows, length, slots, cu_seqlens, first_node)
            cache.append(k, v, slot, position)
        if ancestors is not None:
            out = _attend_tree(q, cache, slots, rows, ancestors, first_node)
        elif fresh and cu_seqlens is not None:
            out = _attend_packed(q, k, v, cu_seqlens)
        elif fresh:
            out = _attend(q, k, v)
        else:
            packed_row = row if cu_seqlens is not None else None
            out = _attend_cached(q, cache, slots, rows, position, packed_row, first_node)
        return self.o_proj(out.flatten(-2))


def _attend_tree(q, cache: KVCache, slots, rows: int, ancestors: Tensor, first: int) -> Tensor:
    """Nodes of a tree over their slots' tokens and their own ancestors, themselves included."""
    n = min(cache.lengths.bound + first + q.shape[1], cache.lengths.capacity)
    index = slice(rows) if slots is None else slots.clamp(min=0)
    k, v = (t[index, :n].to(q.dtype) for t in cache.tensors())
    before = read_slots(cache.lengths.tensor, slots, rows)[:, None]
    node = torch.arange(n, device=q.device) - before  # (rows,n), negative for tokens
    bit = ancestors[..., None] >> node.clamp(0, 31)[:, None] & 1  # (b,l,n)
    visible = (node < 0)[:, None] | ((node < first + q.shape[1])[:, None] & (bit == 1))
    return _attend(q, k, v, visible)


def _attend_cached(
    q, cache: KVCache, slots, rows: int, position: Tensor, packed_row, first: int
) -> Tensor:
    """New queries over all that their slots hold, themselves included."""
    n = min(cache.lengths.bound + first + q.shape[1], cache.lengths.capacity)
    index = slice(rows) if slots is None else slots.clamp(min=0)
    k, v = (t[index, :n].to(q.dtype) for t in cache.tensors())  # (rows,n,hkv,dim)
    visible = torch.arange(n, device=q.device) <= position[..., None]  # (b,l,n)
    if packed_row is None:
        return _attend(q, k, v, visible)
    if is_batch_invariant():
        each = [_attend(q, k[r : r + 1], v[r : r + 1], visible) for r in range(rows)]
        chosen = packed_row[..., None, None]
        return torch.stack(each).gather(0, chosen.expand_as(q)[None])[0]
    mine = packed_row[..., None] == torch.arange(rows, device=q.device)  # (1,l,rows)
    visible = (mine[..., None] & visible[:, :, None]).flatten(-2)
    return _attend(q, k.flatten(0, 1)[None], v.flatten(0, 1)[None], visible)
