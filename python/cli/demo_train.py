"""The demo's training loop: the model's loss on random windows, AdamW, cosine learning rate, time-boxed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tigon.models import HybridLM

# After 200 kB of text, bits per byte on the held-out part: 2.70 with batches of 8 windows, 2.53 with 4, 2.43 with 2.
# A peak of 8e-3 in place of 4e-3: 2.48.
BATCH, LENGTH = 2, 256
PEAK, WARMUP = 4e-3, 0.05
WEIGHT_DECAY = 0.1
BALANCE = 1e-3  # rate of the routers' biases, as published for Nemotron 3


@dataclass
class History:
    """nats: the next byte's cross entropy in every step. seconds: what training took."""

    nats: list[float] = field(default_factory=list)
    seconds: float = 0.0


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to a hundredth, over progress in [0, 1]."""
    if progress < WARMUP:
        return PEAK * (0.02 + progress / WARMUP)
    down = (progress - WARMUP) / (1 - WARMUP)
    return PEAK * (0.01 + 0.99 * (1 + math.cos(math.pi * min(down, 1.0))) / 2)


def _optimizer(model: HybridLM) -> torch.optim.AdamW:
    """Matrices decay; vectors, and what a layer marks with _no_weight_decay, do not."""
    decays = {True: [], False: []}
    for p in model.parameters():
        decays[p.dim() > 1 and not getattr(p, "_no_weight_decay", False)].append(p)
    groups = [
        {"params": decays[True], "weight_decay": WEIGHT_DECAY},
        {"params": decays[False], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)


def _windows(text: Tensor, generator: torch.Generator) -> Tensor:
    start = torch.randint(0, text.numel() - LENGTH, (BATCH, 1), generator=generator)
    return text[start + torch.arange(LENGTH + 1)]


def train(
    model: HybridLM,
    text: Tensor,
    *,
    seconds: float,
    steps: int | None = None,
    seed: int = 0,
    report: Callable[[float, float], None] = lambda progress, nats: None,
) -> History:
    """Train on `text` (t) int64 for `seconds`, or for `steps` if given (then the result does not depend on speed)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model)
    history, start = History(), time.perf_counter()
    model.train()
    while True:
        elapsed = time.perf_counter() - start
        progress = elapsed / seconds if steps is None else len(history.nats) / steps
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        ids = _windows(text, generator)
        losses = model.losses(ids[:, :-1], ids[:, 1:], return_routing=True)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if losses.routings:
            model.update_bias(torch.stack([r.counts for r in losses.routings]), BALANCE)
        history.nats.append(losses.cross_entropy.item())
        report(progress, history.nats[-1])
    history.seconds = time.perf_counter() - start
    model.eval()
    return history


@torch.no_grad()
def bits_per_byte(model: HybridLM, text: Tensor, window: int = 2048) -> float:
    """Mean -log2 p of each byte of `text` (t) but the first; windows continue each other through a cache."""
    cache = model.allocate_cache(1, text.numel())
    bits = 0.0
    for i in range(0, text.numel() - 1, window):
        ids = text[i : min(i + window + 1, text.numel())][None]
        nats = model(ids[:, :-1], cache=cache, labels=ids[:, 1:])
        bits += nats.item() / math.log(2) * (ids.shape[1] - 1)
    return bits / (text.numel() - 1)
