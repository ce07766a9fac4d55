"""Exactly lossless: every outcome of a verification is enumerated, with its probability, by the laws of the reference.

What is emitted has the target's law if the tokens after it come from the target too: the law of the first K + 1 tokens
must be the target's to 1e-12, whatever the drafts' distributions are, for contexts that change both. And the sampler
draws by these laws: its outcomes are counted for a case where no two rules agree.
"""

from itertools import product

import pytest
import torch
from sampling_cases import chi_square, verified

from tigon.reference.sampling import (
    Purpose,
    acceptance,
    block_acceptance,
    block_scales,
    noise,
    residual,
    uniforms,
)

TINY = 1e-12


def table(
    V: int, length: int, sharp: float = 1.5, zeros: bool = False
) -> dict[tuple, torch.Tensor]:
    """A distribution over V tokens for each context of up to `length` tokens."""

    def draw():
        logits = sharp * torch.randn(V, dtype=torch.float64)
        if zeros:
            logits[torch.randint(V, ())] = -torch.inf
        return logits.softmax(-1)

    return {c: draw() for n in range(length + 1) for c in product(range(V), repeat=n)}


def target_law(p: dict, V: int, length: int) -> dict[tuple, float]:
    law = {(): 1.0}
    for _ in range(length):
        law = {(*c, x): w * p[c][x].item() for c, w in law.items() for x in range(V)}
    return law


def completed(emitted: dict[tuple, float], p: dict, V: int, length: int) -> dict[tuple, float]:
    """The law of `length` tokens if the target goes on after what was emitted."""
    law = {}
    for start, weight in emitted.items():
        rest = {start: weight}
        for _ in range(length - len(start)):
            rest = {(*c, x): w * p[c][x].item() for c, w in rest.items() for x in range(V)}
        for c, w in rest.items():
            law[c] = law.get(c, 0.0) + w
    return law


def add(law: dict, tokens: tuple, weights) -> None:
    for x, w in enumerate(weights.tolist()):
        if w:
            law[(*tokens, x)] = law.get((*tokens, x), 0.0) + w


def chain(p, q, d, one_hot):
    """(p_d (K), q_d (K), p (K+1,V), q (K,V)) along the drafts d; q is a point mass with one_hot."""
    contexts = [d[:i] for i in range(len(d) + 1)]
    ps = torch.stack([p[c] for c in contexts])
    qs = torch.stack([q[c] for c in contexts[:-1]]) if d else ps[:0]
    if one_hot:
        qs = torch.nn.functional.one_hot(torch.tensor(d, dtype=torch.long), ps.shape[1]).double()
    index = torch.arange(len(d))
    at = torch.tensor(d, dtype=torch.long)
    return ps[index, at], qs[index, at], ps, qs


def token_law(p, q, V, K, one_hot=False, drafts=None):
    """The law of what the token rule emits."""
    law = {}
    for d, weight in drafts.items():
        pd, qd, ps, qs = chain(p, q, d, one_hot)
        reached, accept = weight, acceptance(pd, qd)
        for i in range(K):
            w = residual(ps[i], qs[i])
            add(law, d[:i], reached * (1 - accept[i]) * w / w.sum())
            reached = reached * accept[i]
        add(law, d, reached * ps[K])
    return law


def block_law(p, q, V, K, one_hot=False, drafts=None):
    law = {}
    for d, weight in drafts.items():
        pd, qd, ps, qs = chain(p, q, d, one_hot)
        scales = block_scales(pd, qd)
        mass = (scales[:K, None] * ps[:K] - qs).clamp(min=0).sum(-1)
        h = [block_acceptance(scales[i], mass[i]) for i in range(1, K)] + [scales[K]]
        longer = weight  # probability that no longer prefix was accepted
        for i in range(K, -1, -1):
            here = longer * h[i - 1] if i else longer
            w = ps[K] if i == K else residual(ps[i], qs[i], scales[i])
            add(law, d[:i], here * w / w.sum())
            longer = longer - here
    return law


def strict_law(p, q, V, K, one_hot=False, drafts=None):
    law = {}
    for d, weight in drafts.items():
        reached = weight
        for i in range(K):
            own = p[d[:i]].clone()
            hit = own[d[i]].item()
            own[d[i]] = 0
            add(law, d[:i], reached * own)
            reached = reached * hit
        add(law, d, reached * p[d])
    return law


RULES = {"token": token_law, "block": block_law, "strict": strict_law}


def assert_same_law(law, want):
    assert max(abs(law.get(c, 0.0) - w) for c, w in want.items()) < TINY
    assert set(law) <= set(want) and abs(sum(law.values()) - 1) < TINY


@pytest.mark.parametrize("drafts", ["sampled", "fixed", "sampled with zeros", "the target's own"])
@pytest.mark.parametrize("V, K", [(2, 3), (3, 3), (4, 2), (4, 1), (1, 2), (3, 0)])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_emitted_has_the_targets_law(rule, V, K, drafts):
    for _ in range(3):
        zeros = drafts == "sampled with zeros" and V > 1
        p, q = table(V, K, zeros=zeros), table(V, K, zeros=zeros)
        if drafts == "the target's own":
            q = p
        if drafts == "fixed":
            drawn = {tuple(torch.randint(V, (K,)).tolist()): 1.0}
        else:
            drawn = target_law(q, V, K)
        emitted = RULES[rule](p, q, V, K, one_hot=drafts == "fixed", drafts=drawn)
        assert_same_law(completed(emitted, p, V, K + 1), target_law(p, V, K + 1))


def test_block_accepts_at_least_as_much_as_token():
    means = {"token": 0.0, "block": 0.0}
    for _ in range(5):
        p, q = table(3, 3), table(3, 3)
        drawn = target_law(q, 3, 3)
        found = {}
        for rule in means:
            law = RULES[rule](p, q, 3, 3, drafts=drawn)
            found[rule] = sum((len(c) - 1) * w for c, w in law.items())
            means[rule] += found[rule]
        assert found["block"] >= found["token"] - TINY
    assert means["block"] > means["token"] + 0.01


def test_a_tree_walked_by_the_targets_own_draws_has_the_targets_law():
    """The tree is any function of the context; here: the first two tokens below each node of a binary tree."""
    V, one = 3, torch.eye(3, dtype=torch.float64).__getitem__
    p = table(V, 2)
    emitted, first, second = {}, {0, 2}, {0: {1}, 2: {0, 1}}
    for a in range(V):
        wa = p[()][a].item()
        if a not in first:
            add(emitted, (), wa * one(a))
            continue
        for b in range(V):
            wb = wa * p[(a,)][b].item()
            if b in second[a]:
                add(emitted, (a, b), wb * p[(a, b)])
            else:
                add(emitted, (a,), wb * one(b))
    assert_same_law(completed(emitted, p, V, 3), target_law(p, V, 3))


V8 = 8


def outcome_counts(rule: str, n: int, K: int = 2, **options):
    """Counts of the first two tokens over n requests, and the target's law; contexts change both sides."""
    g = torch.Generator().manual_seed(5)
    targets = 1.5 * torch.randn(1 + V8, V8, generator=g)
    drafts = 1.5 * torch.randn(1 + V8, V8, generator=g)
    return verified(targets, drafts, rule, n, K, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_sampler_draws_by_the_law(rule, options):
    counts, law = outcome_counts(rule, 60_000, **options)
    assert chi_square(counts, law) > 1e-6


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_shared_stream_breaks_the_law(rule, monkeypatch):
    """Drafts drawn with the noise of acceptance and replacement: what the four purposes are there for."""
    from tigon.reference import sampling

    def same(make):
        return lambda seeds, positions, purpose, *rest: make(seeds, positions, 0, *rest)

    monkeypatch.setattr(sampling, "uniforms", same(uniforms))
    monkeypatch.setattr(sampling, "noise", same(noise))
    counts, law = outcome_counts(rule, 60_000)
    assert chi_square(counts, law) < 1e-6


def test_noise_is_uniform_in_32_bits_and_finite():
    """The smallest of many uniforms lies far below 2^-24, and no exponential is infinite."""
    seeds = torch.arange(64)
    v = uniforms(seeds, seeds, Purpose.DRAFT, 2**16, torch.float32)
    assert 0 < v.min() < 2.0**-20 and v.max() < 1
    g = noise(seeds, seeds, Purpose.DRAFT, 2**16, torch.float32)
    assert g.isfinite().all() and g.min() > -3
    bins = torch.histc(v.double(), 64, 0, 1)
    assert chi_square(bins, torch.full((64,), 1 / 64, dtype=torch.float64)) > 1e-6
