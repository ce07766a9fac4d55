"""Calls of the sampling kernels in guarded memory, and outcomes of many requests that are counted and tested."""

import math
import random

import torch
from memory import guarded, sliced
from quantize_cases import POISON, poisoned_outputs

import tigon
from tigon import native
from tigon.native import sampling as launchers
from tigon.reference import sampling as reference
from tigon.reference.sampling import Purpose, Settings


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


def draw(logits, seeds, positions, stream, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """Tokens (b) int32 of the reference with the random bits of any purpose."""
    numbers = (None, None, None, temperature, top_k, top_p)
    return reference.sample(logits, seeds, positions, *numbers, stream)


def verified(targets, drafts, rule, n, K, dtype=torch.float32, device="cpu", backend="reference",
             stream=Purpose.DRAFT, **options):  # fmt: skip
    """(counts, law) of the first two tokens of n requests of one prompt; `backend` verifies.

    stream: the random bits that drafts are drawn with; the law holds for `token` and `block` only with their own.

    targets, drafts (1+V,V): logits after the prompt, and after the prompt and each first token. A third token, if K
    drafts need one, depends on nothing. Where a step emits one token, a second one is drawn from the target.
    """
    V = targets.shape[1]
    targets, drafts = (t.to(dtype).to(device) for t in (targets, drafts))
    seeds = torch.arange(n, device=device)
    positions = torch.full((n,), 17, device=device)
    first = drafts[:1].expand(n, V)
    logits, tokens = [], []
    for i in range(K):
        logits.append(drafts[1 + tokens[0].long()] if i == 1 else first)
        at = positions + i
        tokens.append(draw(logits[i], seeds, at, stream, **options))
    plain = targets[:1].expand(n, V)
    t = [plain, targets[1 + tokens[0].long()], *[plain] * (K - 1)]
    inputs = (torch.stack(v, 1) for v in (t, tokens, logits))
    with tigon.backend(backend):
        out, accepted = tigon.verify_draft(
            *inputs, rule=rule, seeds=seeds, positions=positions, **options
        )
    assert (accepted >= 0).all()
    out = out.long()
    fresh = dict(seeds=seeds + 10**9, positions=positions + 1, purpose="bonus", **options)
    second = torch.where(accepted > 0, out[:, 1], tigon.sample(targets[1 + out[:, 0]], **fresh))
    counts = torch.bincount((out[:, 0] * V + second).cpu(), minlength=V * V)
    p = processed(targets.cpu(), **options)
    return counts, (p[0][:, None] * p[1:]).flatten()


RULES = ("token", "block", "strict", "greedy", "mixed")


def make(b=6, K=3, V=1000, dtype=torch.bfloat16, rule="token", logits=True, ragged=False, layout="packed",
         temperature=1.0, top_k=0, top_p=1.0, spread=2.0, drafts="close"):  # fmt: skip
    """Arguments of verify_draft's backends, in guarded memory. temperature, top_k, top_p: "rows" for a tensor.

    drafts: "close" to the target's likeliest tokens, so that prefixes of all lengths are accepted, or also "bad" ones.
    """
    lay = sliced if layout == "sliced" else lambda t, dims: guarded(t)
    target = torch.randn(b, K + 1, V) * spread
    q = target[:, :K] + 0.7 * torch.randn(b, K, V)
    tokens = q.argmax(-1).to(torch.int32)
    other = torch.randint(V, (b, K), dtype=torch.int32)
    tokens = torch.where(torch.rand(b, K) < 0.2, other, tokens)
    if drafts == "bad":
        wrong = torch.tensor([-1, V, -(2**31), 2**31 - 1])[torch.randint(4, (b, K))]
        tokens = torch.where(torch.rand(b, K) < 0.3, wrong, tokens).to(torch.int32)
    settings = (
        guarded(torch.rand(b) + 0.5).masked_fill_(torch.arange(b) % 4 == 3, 0.0),
        guarded(torch.tensor([0, 1, 5, 2**31 - 1], dtype=torch.int32).repeat(b)[:b]),
        guarded(torch.tensor([1.0, 0.9, 0.3, 0.0]).repeat(b)[:b]),
    )
    rows = [v == "rows" for v in (temperature, top_k, top_p)]
    t, k, p = (s if use else None for s, use in zip(settings, rows, strict=True))
    mixed = torch.arange(b).remainder(4).to(torch.int8)
    return dict(
        target_logits=lay(target.to(dtype), 1),
        draft_tokens=guarded(tokens),
        draft_logits=lay(q.to(dtype), 1) if logits else None,
        num_draft=guarded(torch.arange(b, dtype=torch.int32).remainder(K + 2) - 1) if ragged else None,
        rules=guarded(mixed) if rule == "mixed" else None,
        seeds=guarded(torch.randint(-(2**62), 2**62, (b,))),
        positions=guarded(torch.randint(0, 2**40, (b,))),
        temperatures=t,
        top_ks=k,
        top_ps=p,
        rule=0 if rule == "mixed" else RULES.index(rule),
        temperature=0.0 if rows[0] else temperature,
        top_k=0 if rows[1] else top_k,
        top_p=0.0 if rows[2] else top_p,
    )  # fmt: skip


def launched(name: str, arguments: dict, know=lambda *_: None) -> tuple[torch.Tensor, ...]:
    """The launcher's results on the CPU; nothing beside them and the workspace may be written."""
    with poisoned_outputs(know, launchers) as made:
        got = getattr(native, name)(**arguments)
    for buffer, start, size in made:
        around = torch.cat([buffer[:start], buffer[start + size :]])
        assert (around == POISON).all(), "memory beside an output changed"
    return tuple(t.cpu() for t in (got if isinstance(got, tuple) else (got,)))


def nearly(name: str, arguments: dict) -> list[torch.Tensor]:
    """What the reference says, in fp32, in fp64, and for logits that are off by fp32's rounding: one row of numbers a
    request and answer, (answers, b, …)."""

    def answer(change):
        plain = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        for key in ("logits", "target_logits", "draft_logits"):
            if plain.get(key) is not None:
                plain[key] = change(plain[key])
        out = getattr(reference, name)(**plain)
        out = out if isinstance(out, tuple) else (out,)
        return torch.cat([t.reshape(t.shape[0], -1) for t in out], 1)

    def shaken(x):
        x = x.double()
        return x + 2e-6 * (1 + x.abs()) * torch.randn_like(x)

    return [answer(change) for change in (lambda x: x, torch.Tensor.double, shaken, shaken)]


def check(name: str, arguments: dict, know=lambda *_: None, exact: bool = False):
    """Launch and compare row by row with the reference, or with what it says where rounding decides.

    exact: rounding must decide nothing."""
    got = launched(name, arguments, know)
    rows = torch.cat([t.reshape(t.shape[0], -1) for t in got], 1)
    answers = nearly(name, arguments)[: 1 if exact else None]
    right = torch.stack([(rows == answer).all(1) for answer in answers])
    assert right.any(0).all(), (rows[~right.any(0)][:4], answers[0][~right.any(0)][:4])
    assert right[0].double().mean() > 0.9 or len(rows) < 20
    return got


def tree(b=12, N=9, V=5, dtype=torch.float32, rule="strict", sound=True, nodes=False, max_depth=None,
         temperature=1.0, top_k=0, top_p=1.0):  # fmt: skip
    """Arguments of verify_tree's backends; sound: random trees, else random links."""
    child, sibling = (torch.randint(-2, N + 2, (b, N), dtype=torch.int32) for _ in "cs")
    if sound:
        child.fill_(-1)
        sibling.fill_(-1)
        draw = random.Random(N)
        for row in range(b):
            last = {}
            for node in range(1, N):
                parent = draw.randrange(node)
                if parent in last:
                    sibling[row, last[parent]] = node
                else:
                    child[row, parent] = node
                last[parent] = node
    return dict(
        target_logits=guarded(torch.randn(b, N, V).to(dtype)),
        tokens=guarded(torch.randint(-1, V + 1, (b, N), dtype=torch.int32)),
        first_child=guarded(child),
        next_sibling=guarded(sibling),
        num_nodes=guarded(torch.arange(b, dtype=torch.int32).remainder(N + 2) - 1) if nodes else None,
        seeds=guarded(torch.arange(b)),
        positions=guarded(torch.arange(b) * 2**33),
        temperatures=None,
        top_ks=None,
        top_ps=None,
        rule=RULES.index(rule),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_depth=N - 1 if max_depth is None else max_depth,
    )  # fmt: skip
