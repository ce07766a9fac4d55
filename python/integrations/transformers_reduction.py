"""Token reduction in a transformers NemotronH: `NemotronHModel.forward` with tokens dropped between its layers.

`model(ids, reducible=mask)` runs layer l on its own n_l tokens, as `tigon.modules.reduced_stack` does. The layers of
transformers' `DynamicCache` have lengths of their own, and NemotronH's attention has no positions, so such a cache
holds what a reduced prompt leaves, and later tokens continue it: each attention layer sees the keys that it has.

What its cache cannot say: `get_seq_length` is that of the first attention layer, after reduction, not the prompt's.
Rows of a batch must keep equally many tokens, and none may be padded: its key tensors are dense.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tigon.modules.reduced_stack import Tokens
from tigon.modules.reducible import Reducible
from tigon.modules.token_reducer import KeptTokens, TokenReducer

LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}


def reduced_model_forward(
    self: nn.Module,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any | None = None,
    use_cache: bool | None = None,
    attention_mask: Tensor | None = None,
    *,
    reducer: TokenReducer,
    reducible: Tensor | Reducible | None = None,
    **kwargs: Any,
):
    """The model's own forward, but where `reducible` (b,l) bool is given or the cache holds a reduced prompt.

    last_hidden_state (b,n,d) is then of the tokens that the last layer has; `past_key_values.kept_tokens` says which.
    A mask of more tokens than the call has, with such a cache, is the prompt's, and has been used (`generate` hands it
    on).
    """
    given = input_ids if inputs_embeds is None else inputs_embeds
    reduced = getattr(past_key_values, "kept_tokens", None) is not None
    if reduced and isinstance(reducible, Tensor) and reducible.shape[1] > given.shape[1]:
        reducible = None
    if reducible is None and not reduced:
        return type(self).forward(
            self,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            attention_mask=attention_mask,
            **kwargs,
        )
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if reducible is not None:
        _refuse_padding(attention_mask)
    use_cache = self.config.use_cache if use_cache is None else use_cache
    if use_cache and past_key_values is None:
        from transformers import DynamicCache

        past_key_values = DynamicCache(config=self.config)
    h = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    cache = past_key_values if use_cache else None
    h, kept = _run(self, h, reducer, reducible, cache)
    if cache is not None and kept is not None:
        cache.kept_tokens = kept
    from transformers.modeling_outputs import MoeModelOutputWithPast

    return MoeModelOutputWithPast(last_hidden_state=self.norm_f(h), past_key_values=cache)


def reduced_lm_forward(
    self: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    reducible: Tensor | Reducible | None = None,
    **kwargs: Any,
):
    """NemotronHForCausalLM's own forward; it names `reducible`, without which `generate` refuses it."""
    if reducible is not None:
        if labels is not None:
            raise ValueError("tigon.patch: labels do not fit the logits of a reduced call")
        kwargs["reducible"] = reducible
    return type(self).forward(
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        labels=labels,
        use_cache=use_cache,
        logits_to_keep=logits_to_keep,
        **kwargs,
    )


def _run(self, h: Tensor, reducer, reducible, cache) -> tuple[Tensor, KeptTokens | None]:
    b = h.shape[0]
    tokens = None
    if reducible is not None:
        if isinstance(reducible, Tensor):
            if reducible.shape != h.shape[:2]:
                raise ValueError(
                    f"reducible has shape {tuple(reducible.shape)}, the input {tuple(h.shape[:2])}"
                )
            reducible = Reducible.of(reducible)
        pattern = "".join(LETTERS[block.block_type] for block in self.layers)
        tokens = Tokens(reducer, pattern, reducible)
        if any(len(set(counts)) > 1 for counts in tokens.counts):
            raise ValueError(
                "reducible: the rows of a transformers batch must have equally many tokens that may be dropped; "
                f"got {reducible.visual}"
            )
        h = tokens.enter(h).unflatten(0, (b, -1))
    for l, block in enumerate(self.layers):
        watch = None if tokens is None else tokens.watch(l, block.mixer)
        h = _block(block, h, cache, watch)
        if tokens is not None:
            h = tokens.leave(l, h.flatten(0, 1)).unflatten(0, (b, -1))
    return h, None if tokens is None else tokens.kept()


def _block(block: nn.Module, h: Tensor, cache, watch) -> Tensor:
    if block.block_type == "linear_attention":
        more = {} if watch is None else {"watch": watch}
        return block(h, past_key_values=cache, use_cache=cache is not None, **more)
    if block.block_type != "full_attention":
        return block(h)
    heads, hooks = {}, []
    if watch is not None:
        for name in ("q_proj", "k_proj"):
            hook = partial(_note, heads, name)
            hooks.append(getattr(block.mixer, name).register_forward_hook(hook))
    try:
        mask = _causal_mask(block.mixer, h, cache)
        h = block(h, past_key_values=cache, attention_mask=mask, use_cache=cache is not None)
    finally:
        for hook in hooks:
            hook.remove()
    if watch is not None:
        size = block.mixer.head_dim
        watch(*(heads[name].unflatten(-1, (-1, size)) for name in ("q_proj", "k_proj")))
    return h


def _note(found: dict, name: str, module: nn.Module, args: tuple, out: Tensor) -> None:
    found[name] = out


def _causal_mask(mixer: nn.Module, h: Tensor, cache) -> Tensor | None:
    """Additive (1,1,l,past+l) for new tokens over this layer's own keys; None where the kernel masks by itself."""
    length, kernel = h.shape[1], mixer.config._attn_implementation
    past = 0 if cache is None else cache.layers[mixer.layer_idx].get_seq_length()
    if length == 1 or "flash" in kernel or (past == 0 and kernel == "sdpa"):
        return None
    hidden = torch.full((length, past + length), torch.finfo(h.dtype).min, device=h.device)
    return hidden.to(h.dtype).triu(past + 1)[None, None]


def _refuse_padding(mask: Tensor | dict | None) -> None:
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
        raise ValueError(
            "tigon.patch: a reduced prompt may not be padded (attention_mask has zeros)"
        )
