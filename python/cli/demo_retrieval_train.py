"""A tiny hybrid that learns two-hop retrieval: its sizes, its training, a curriculum of lengths.

The loss is the cross entropy of the answers, and the model is shown how to go about it: two attention layers get -log
of the weight that each question gives to its first and to its second record, and behind the first of them its state has
to spell the pointer. Without this help no hop was learned in 450 steps; with it both are after 350. Where the help
ended with the shortest length, a seed forgot both hops again.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.cli.demo_retrieval_task import VOCABULARY, Retrieval, draw
from tigon.models import HybridConfig, HybridLM

PATTERN = "M*-M*--M*--M*--M*---"
STEPS = 900
HOPS = (1, 4)  # the attention layers that are shown the first and the second record
CHAINS = (6, 12, 32)  # of the curriculum: 48, 96 and 255 visual tokens
ROWS = (16, 8, 3)  # sequences of a batch
ENOUGH = 0.9  # answers that are right, a running mean, for the next length
PEAK, WARMUP, DECAY_FROM = 4e-3, 50, 0.6


def config() -> HybridConfig:
    """0.4 million parameters. The head is the embeddings: a symbol that was read looks like one that is asked."""
    return HybridConfig(
        pattern=PATTERN,
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        mamba_num_heads=2,
        mamba_head_dim=64,
        ssm_state_size=16,
        n_groups=1,
        initializer_range=0.08,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


@dataclass
class History:
    """By step: right, the share of two-hop questions answered; chains."""

    right: list[float] = field(default_factory=list)
    chains: list[int] = field(default_factory=list)
    seconds: float = 0.0


def _rate(progress: float, step: int) -> float:
    down = max(0.0, (progress - DECAY_FROM) / (1 - DECAY_FROM))
    return PEAK * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * (1 + math.cos(math.pi * down)) / 2)


def _optimizer(model: HybridLM) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98), fused=True)


def _loss(model: HybridLM, batch: Retrieval) -> tuple[Tensor, float]:
    """The loss, and the share of questions that were answered."""
    h, visual = model.backbone.embeddings(batch.ids), batch.visual
    loss = 0.0

    def spelled() -> Tensor:
        return model.logits(model.backbone.norm_f(h[:, visual:])).flatten(0, 1)

    for l, layer in enumerate(model.backbone.layers):
        if l not in HOPS:
            h = layer(h)
            continue
        seen: list[tuple[Tensor, Tensor]] = []
        h = layer(h, watch=lambda q, k, seen=seen: seen.append((q, k)))
        weights = _weights(seen[0][0][:, visual:], seen[0][1])[..., :visual].mean(1)
        mass = (weights * batch.needle_tokens(HOPS.index(l))).sum(-1)
        loss = loss - mass.clamp(min=1e-9).log().mean()
        if l == HOPS[0]:
            loss = loss + F.cross_entropy(spelled(), batch.pointers.flatten())
    logits, values = spelled(), batch.values.flatten()
    right = (logits.argmax(-1) == values).float().mean().item()
    return loss + F.cross_entropy(logits, values), right


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax weights (b,h,q,l) of the last tokens' queries (b,q,h,dim) on keys (b,l,h,dim)."""
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


def train(
    model: HybridLM,
    *,
    seconds: float,
    steps: int | None = None,
    seed: int = 0,
    report: Callable[[float, float], None] = lambda progress, right: None,
) -> History:
    """Train for `seconds`, or for `steps` if given (then the result does not depend on speed)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model)
    history, start = History(), time.perf_counter()
    level, mean = 0, 0.0
    model.train()
    while True:
        step = len(history.right)
        progress = (time.perf_counter() - start) / seconds if steps is None else step / steps
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = _rate(progress, step)
        chains = CHAINS[level]
        batch = draw(ROWS[level], chains, chains, generator)
        loss, right = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.right.append(right)
        history.chains.append(chains)
        mean += 0.1 * (history.right[-1] - mean)
        report(progress, mean)
        if mean > ENOUGH and level + 1 < len(CHAINS):
            level, mean = level + 1, 0.0
    history.seconds = time.perf_counter() - start
    model.eval()
    return history
