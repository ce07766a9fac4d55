"""A stack of residual blocks with one cache: what a backbone and a drafter have in common."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tigon.modules.latent_moe import LatentMoE
from tigon.ops import Routing


def run_layers(
    layers: Iterable[nn.Module],
    h: Tensor,
    cu_seqlens: Tensor | None = None,
    cache=None,
    *,
    slots: Tensor | None = None,
    num_tokens: Tensor | None = None,
    mask: Tensor | None = None,
    return_routing: bool = False,
    commit: bool = True,
    **options,
) -> tuple[Tensor, list[Routing]]:
    """h (b,l,d) through `layers` in order, each h -> h + mixer(norm(h)); with a cache, its tokens are counted after the
    last one.

    Args:
        cache: a `tigon.generation.HybridCache` of these layers' mixers. options: for the mixers that mix tokens.
        commit: False leaves the tokens uncounted, until `cache.commit` says how many of them stay.
        The others: as in `HybridLM.forward`.

    Returns:
        (h, the `Routing` of every mixture in order if return_routing, else an empty list).

    Raises:
        ValueError: slots, num_tokens or commit=False without a cache, a tree that is to be counted whole, no room in
            the cache. TypeError: unknown options.
    """
    if unknown := set(options) - {"ancestors", "first_node"}:
        raise TypeError(f"unexpected arguments: {', '.join(sorted(unknown))}")
    if not commit and cache is None:
        raise ValueError("commit=False leaves tokens of a cache uncounted; pass cache")
    if options.get("ancestors") is not None and commit:
        raise ValueError("ancestors make a tree, of which one path may stay: pass commit=False")
    length = h.shape[1]
    layers, routings = list(layers), []
    if cache is None:
        layer_caches = [None] * len(layers)
        if slots is not None or num_tokens is not None:
            raise ValueError("slots and num_tokens say which part of a cache is meant; pass cache")
    else:
        layer_caches = cache.layers
        options |= {"slots": slots, "num_tokens": num_tokens}
        rows = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        added = cache.begin(rows, length, slots, num_tokens, cu_seqlens, commit)
        if num_tokens is not None and mask is None:
            mask = torch.arange(length, device=h.device) < num_tokens[:, None]
    options["mask"] = mask
    for layer, layer_cache in zip(layers, layer_caches):
        if return_routing and isinstance(layer.mixer, LatentMoE):
            h, routing = layer(h, cu_seqlens, layer_cache, return_routing=True, **options)
            routings.append(routing)
        else:
            h = layer(h, cu_seqlens, layer_cache, **options)
    if cache is not None and commit:
        cache.finish(slots, added, length)
    return h, routings
