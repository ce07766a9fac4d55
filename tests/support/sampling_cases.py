"""Verifications of many requests at once, whose outcomes are counted, and the chi-square test of the counts."""

import math

import torch

import tigon
from tigon.reference.sampling import Settings


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> float:
    """p-value of counts under a law of as many outcomes (Wilson and Hilferty's approximation); 0 if the impossible was
    counted. Rare outcomes are counted together."""
    counts, law = counts.double().flatten(), law.double().flatten()
    n = counts.sum()
    if (counts[law == 0] > 0).any():
        return 0.0
    rare = law * n < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    law = torch.cat([law[~rare], law[rare].sum()[None]])
    live = law > 0
    counts, law = counts[live], law[live]
    df = len(law) - 1
    if df == 0:
        return 1.0
    x = ((counts - n * law).square() / (n * law)).sum().item()
    z = ((x / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return 0.5 * math.erfc(z / math.sqrt(2))


def processed(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """The exact distributions (…,V) in fp64."""
    settings = Settings(None, temperature, None, top_k, None, top_p)
    return settings.scaled(logits.double()[None]).softmax(-1)[0]


def verified(
    targets,
    drafts,
    rule,
    n,
    K,
    dtype=torch.float32,
    device="cpu",
    rows=20_000,
    shared=False,
    **options,
):
    """(counts, law) of the first two tokens of n requests of one prompt.

    targets, drafts (1+V,V): logits after the prompt, and after the prompt and each first token. A third token, if K
    drafts need one, depends on nothing. Where a step emits one token, a second one is drawn from the target.
    """
    V = targets.shape[1]
    targets, drafts = (t.to(dtype).to(device) for t in (targets, drafts))
    counts = torch.zeros(V * V, dtype=torch.int64)
    positions = torch.full((rows,), 17, device=device)
    for start in range(0, n, rows):
        seeds = torch.arange(start, start + rows, device=device)
        first = drafts[:1].expand(rows, V)
        a = tigon.sample(first, seeds=seeds, positions=positions, **options)
        logits, tokens = [first], [a]
        for i in range(1, K):
            after = drafts[1 + a.long()] if i == 1 else first
            logits.append(after)
            tokens.append(tigon.sample(after, seeds=seeds, positions=positions + i, **options))
        t = [targets[:1].expand(rows, V), targets[1 + a.long()]] + [targets[:1].expand(rows, V)] * (
            K - 1
        )
        out, accepted = tigon.verify_draft(
            torch.stack(t, 1),
            torch.stack(tokens, 1),
            torch.stack(logits, 1),
            rule=rule,
            seeds=seeds,
            positions=positions,
            **options,
        )
        assert (accepted >= 0).all()
        out = out.long()
        again = tigon.sample(
            targets[1 + out[:, 0]],
            seeds=seeds + 10**9,
            positions=positions + 1,
            purpose="bonus",
            **options,
        )
        second = torch.where(accepted > 0, out[:, 1], again.long())
        counts += torch.bincount((out[:, 0] * V + second).cpu(), minlength=V * V)
    p = processed(targets.cpu(), **options)
    law = p[0][:, None] * p[1:]
    return counts, law.flatten()
