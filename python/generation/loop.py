"""A plain decode loop: prefill once, then one token a row and step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    on_step: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Continue prompts of any lengths through the recurrent decode path.

    Args:
        model: a `tigon.models.HybridLM`.
        prompts: r tensors (l_i) int64, none empty.
        max_new_tokens: tokens to add to each row.
        temperature: 0 takes the likeliest token, else one is drawn from softmax(logits / temperature).
        generator: of the draws; torch's default one if None.
        on_step: called with each step's logits (r,V) fp32 and tokens (r).

    Returns:
        (r, max_new_tokens) int64.
    """
    lengths = [p.numel() for p in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError("generate: prompts must not be empty")
    if temperature < 0:
        raise ValueError(f"generate: temperature must not be negative, got {temperature}")
    device = model.lm_head.weight.device
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(device)
    num_tokens = torch.tensor(lengths, device=device)
    cache = model.allocate_cache(len(lengths), max(lengths) + max_new_tokens)
    hidden = model.backbone(ids, cache=cache, num_tokens=num_tokens)
    rows = torch.arange(len(lengths), device=device)
    logits = model.logits(hidden[rows, num_tokens - 1])
    tokens = []
    for step in range(max_new_tokens):
        token = _choose(logits, temperature, generator)
        tokens.append(token)
        if on_step is not None:
            on_step(logits, token)
        if step + 1 < max_new_tokens:
            logits = model(token[:, None], cache=cache)[:, 0]
    return torch.stack(tokens, 1) if tokens else ids.new_empty(len(lengths), 0)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    weights = torch.softmax(logits / temperature, -1)
    return torch.multinomial(weights, 1, generator=generator)[:, 0]
