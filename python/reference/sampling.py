"""Sampling and verification of drafts, in plain PyTorch.

A row's processed distribution p is softmax(logits / temperature) over the kept tokens: the top_k largest logits (equal
ones by index), then of these the smallest set of largest probabilities whose mass reaches top_p, renormalized.
Temperature 0 is the point mass at the largest logit.

A draw is a race: token x with weight w(x) finishes after E(x) / w(x), E = -log1p(-v), v = (word + 1/2) 2^-32, and the
first one wins; in logarithms, the largest log w(x) - log E(x). v keeps all 32 bits where E is small, which is where
races are won; it is at most 1 - 2^-24, so that E is finite. The word is that of
philox(vocabulary index // 4, position, 1 << 24 | purpose; seed), word index % 4; an acceptance takes word 0 of index 0.

The first functions are the laws (probabilities, any float dtype): the sampler below and the proof by enumeration in
tests/ops/test_sampling_laws.py both use them. The CPU backend follows.

Sources: Leviathan et al. 2022 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318), Sun et al. 2024, "Block
Verification Accelerates Speculative Decoding" (arXiv 2403.10444).
"""

import enum
import math

import torch
from torch import Tensor

from tigon.reference.philox import MASK, philox

INF = math.inf
COLDEST = 1e-6  # a temperature below counts as 0


class VerifyRule(enum.IntEnum):
    """Rules of `verify_draft`, as its int8 tensor `rule` holds them."""

    TOKEN = 0
    BLOCK = 1
    STRICT = 2
    GREEDY = 3


class Purpose(enum.IntEnum):
    """Streams of random bits, independent of one another."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    BONUS = 3


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """Probability of accepting a draft of target probability p and draft probability q: min(1, p / q).

    1 where q = 0 < p, and 0 where p = 0.
    """
    return torch.where(p >= q, torch.ones_like(p), p / q).where(p > 0, torch.zeros_like(p))


def residual(p: Tensor, q: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Weights (…,V) of the token that replaces a rejected draft: max(scale p - q, 0).

    All zero only where p = q up to rounding, which rejects with probability 0: then the likeliest token of p.
    """
    w = (scale * p - q).clamp(min=0)
    likeliest = torch.zeros_like(w).scatter(-1, p.argmax(-1, keepdim=True), 1.0)
    return w.where((w > 0).any(-1, keepdim=True), likeliest)


def block_scales(p: Tensor, q: Tensor) -> Tensor:
    """P_i = min(1, P_{i-1} p_i / q_i), P_0 = 1, of the drafts' probabilities p, q (…,K): (…,K+1)."""
    scales = [torch.ones_like(p[..., 0]) if p.shape[-1] else p.new_ones(p.shape[:-1])]
    for i in range(p.shape[-1]):
        ratio = scales[-1] * p[..., i]
        at_most_one = torch.where(ratio >= q[..., i], torch.ones_like(ratio), ratio / q[..., i])
        scales.append(at_most_one.where(ratio > 0, torch.zeros_like(ratio)))
    return torch.stack(scales, -1)


def block_acceptance(scale: Tensor, mass: Tensor) -> Tensor:
    """h_i = Z_i / (Z_i + 1 - P_i) with Z_i = sum max(P_i p - q, 0), of i drafts with another one after them.

    The last draft's is P_K. The longest i whose own uniform is at most h_i is accepted.
    """
    return torch.where(scale >= 1, torch.ones_like(scale), mass / (mass + 1 - scale))


def uniforms(seeds: Tensor, positions: Tensor, purpose: Tensor | int, count: int, dtype) -> Tensor:
    """v (…,count) in (0,1) of vocabulary entries 0 to count-1; seeds, positions (and purpose): (…)."""
    seeds, positions = seeds[..., None], positions[..., None]
    if isinstance(purpose, Tensor):
        purpose = purpose[..., None]
    index = torch.arange(-(-count // 4), device=seeds.device)
    counter = (index, positions & MASK, positions >> 32 & MASK, purpose | 1 << 24)
    words = philox(counter, (seeds & MASK, seeds >> 32 & MASK))
    words = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :count]
    return words.to(dtype).mul_(2.0**-32).add_(2.0**-33).clamp_(max=1 - 2.0**-24)


def noise(seeds: Tensor, positions: Tensor, purpose: Tensor | int, count: int, dtype) -> Tensor:
    """-log E (…,count), Gumbel variables; what must be added to log weights before the largest wins."""
    return uniforms(seeds, positions, purpose, count, dtype).neg_().log1p_().neg_().log_().neg_()


class Settings:
    """Temperature, top_k and top_p of b rows: (b) tensors, or numbers for all of them."""

    def __init__(self, temperatures, temperature, top_ks, top_k, top_ps, top_p):
        self.temperature = temperature if temperatures is None else temperatures
        self.top_k = top_k if top_ks is None else top_ks
        self.top_p = top_p if top_ps is None else top_ps

    @property
    def all_greedy(self) -> bool:
        """Whether temperature is 0 for all rows."""
        return not isinstance(self.temperature, Tensor) and self.temperature < COLDEST

    @property
    def maybe_greedy(self) -> bool:
        """Whether rows may have temperature 0."""
        return isinstance(self.temperature, Tensor) or self.all_greedy

    def greedy(self, b: int, device) -> Tensor:
        """(b) bool: rows of temperature 0."""
        if isinstance(self.temperature, Tensor):
            return ~(self.temperature >= COLDEST)
        return torch.full((b,), self.all_greedy, device=device)

    def scaled(self, logits: Tensor) -> Tensor:
        """logits / temperature, -inf where top_k or top_p drop the token; (b,m,V) fp32, or fp64. Rows of temperature 0
        stay as they are."""
        x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        t = self.temperature
        if isinstance(t, Tensor):
            t = t.to(x.dtype).where(t >= COLDEST, 1.0)[:, None, None]
            x = x / t
        elif t >= COLDEST and t != 1:
            x = x / t
        return self.filtered(x)

    def filtered(self, x: Tensor) -> Tensor:
        k, p = self.top_k, self.top_p
        some = isinstance(k, Tensor) or k > 0, isinstance(p, Tensor) or p < 1
        if not any(some):
            return x
        rank = torch.arange(x.shape[-1], device=x.device)
        values, order = x.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(values, dtype=torch.bool)
        if some[0]:
            k = k.view(-1, 1, 1) if isinstance(k, Tensor) else k
            keep &= (rank < k) | (k <= 0) if isinstance(k, Tensor) else rank < k
            values = values.where(keep, -INF)
        if some[1]:
            p = p.to(x.dtype).view(-1, 1, 1) if isinstance(p, Tensor) else p
            share = values.softmax(-1)
            before = share.cumsum(-1) - share
            kept = (before < p) | (rank == 0)
            keep &= kept | ~(p < 1) if isinstance(p, Tensor) else kept
        keep = torch.zeros_like(keep).scatter(-1, order, keep)
        if self.maybe_greedy:
            keep |= self.greedy(x.shape[0], x.device)[:, None, None]
        return x.where(keep | x.isnan(), -INF)


def winner(score: Tensor, greedy: Tensor | None) -> Tensor:
    """Index of the largest score (…) int64, the first of equal ones; -1 where one is NaN, or +inf unless greedy
    (broadcasts), or all are -inf."""
    best, index = score.max(-1)
    fine = best < INF if greedy is None else (best < INF) | (greedy & ~best.isnan())
    return index.where(fine & (best > -INF), -1)


def own_draws(
    logits: Tensor,
    settings: Settings,
    seeds: Tensor,
    positions: Tensor,
    purpose: int,
    largest: Tensor | bool | None = None,
) -> Tensor:
    """The target's own draw at each of m positions: logits (b,m,V), positions (b,m) -> (b,m) int64, -1: bad logits.

    largest: which rows (b) take the largest logit whatever their temperature; True for all.
    """
    b, _, V = logits.shape
    if largest is True or settings.all_greedy:
        wide = logits.dtype == torch.float64
        x = logits if wide else logits.float()
        return winner(x, torch.ones((), dtype=torch.bool, device=x.device))
    x = settings.scaled(logits)
    g = noise(seeds[:, None], positions, purpose, V, x.dtype)
    if largest is None and not settings.maybe_greedy:
        return winner(x + g, None)
    greedy = settings.greedy(b, x.device)
    if largest is not None:
        x = torch.where(largest[:, None, None], logits.to(x.dtype), x)
        greedy = greedy | largest
    g = g.masked_fill(greedy[:, None, None], 0)
    return winner(x + g, greedy[:, None])


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    purpose: int,
) -> Tensor:
    """One token a row: logits (b,V), seeds, positions (b) int64 -> (b) int32, -1 for bad logits.

    temperatures, top_ks, top_ps: (b), or None where the number after them holds for all rows.
    """
    settings = Settings(temperatures, temperature, top_ks, top_k, top_ps, top_p)
    drawn = own_draws(logits[:, None], settings, seeds, positions[:, None], purpose)
    return drawn[:, 0].to(torch.int32)


def verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    num_draft: Tensor | None,
    rules: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    rule: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    """(tokens (b,K+1), num_accepted (b)) int32; target_logits (b,K+1,V), draft_tokens (b,K), draft_logits (b,K,V).

    rules (b), or None where `rule` holds for all rows; so with the settings. A draft that is no token of the vocabulary
    ends its row's drafts.
    """
    settings = Settings(temperatures, temperature, top_ks, top_k, top_ps, top_p)
    b, width, V = target_logits.shape
    K, device = width - 1, target_logits.device
    d = draft_tokens.long()
    step = torch.arange(width, device=device)
    inside = ((d >= 0) & (d < V)).long().cumprod(-1)
    n = inside.sum(-1)
    if num_draft is not None:
        n = torch.minimum(n, num_draft.long())
    at = positions[:, None] + step
    rejecting = rules is not None or rule in (VerifyRule.TOKEN, VerifyRule.BLOCK)
    rejecting = rejecting and not settings.all_greedy
    comparing = rules is not None or not rejecting or settings.maybe_greedy
    codes = torch.full((b,), rule, device=device) if rules is None else rules

    results = []
    if comparing:
        largest = None if rule != VerifyRule.GREEDY else True
        largest = largest if rules is None else rules == VerifyRule.GREEDY
        y = own_draws(target_logits, settings, seeds, at, Purpose.DRAFT, largest)
        equal = (y[:, :K] == d) & (step[:K] < n[:, None])
        accepted = equal.long().cumprod(-1).sum(-1)
        final = y.gather(1, accepted[:, None])[:, 0]
        results.append((accepted, final, ((y < 0) & (step <= n[:, None])).any(-1)))
    if rejecting:
        drafts = d.clamp(0, max(V - 1, 0))
        block = rules is not None or rule == VerifyRule.BLOCK
        token = rules is not None or rule == VerifyRule.TOKEN
        results.append(
            _reject(target_logits, drafts, draft_logits, n, settings, seeds, at,
                    codes == VerifyRule.BLOCK if block and token else block)
        )  # fmt: skip
    accepted, final, bad = results[0]
    if len(results) == 2:
        draws = (codes != VerifyRule.TOKEN) & (codes != VerifyRule.BLOCK)
        draws = draws | settings.greedy(b, device)
        accepted, final, bad = (torch.where(draws, *pair) for pair in zip(*results, strict=True))
    bad = bad | (n < 0)
    accepted = accepted.masked_fill(bad, -1)
    tokens = torch.nn.functional.pad(d, (0, 1)).where(step < accepted[:, None], -1)
    tokens = torch.where(step == accepted[:, None], final[:, None], tokens)
    return tokens.to(torch.int32), accepted.to(torch.int32)


def _reject(
    target_logits, d, draft_logits, n, settings: Settings, seeds, at, block: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(accepted, final token, bad logits), each (b), by rejection; block: the rule of the rows, else token."""
    b, width, V = target_logits.shape
    K = width - 1
    x = settings.scaled(target_logits)
    step = torch.arange(width, device=x.device)
    drafted = step[:K] < n[:, None]  # (b,K)
    p = x.softmax(-1)
    bad = (p[..., 0].isnan() & (step <= n[:, None])).any(-1)
    if draft_logits is None:
        q = torch.zeros_like(p[:, :K]).scatter(-1, d[..., None], 1.0)
    else:
        q = settings.scaled(draft_logits).softmax(-1)
        bad = bad | (q[..., 0].isnan() & drafted).any(-1)
    u = uniforms(seeds[:, None], at[:, :K], Purpose.ACCEPT, 1, x.dtype)[..., 0]
    pd, qd = p[:, :K].gather(-1, d[..., None])[..., 0], q.gather(-1, d[..., None])[..., 0]

    scale = torch.ones_like(p[:, 0, 0])
    if block is not True:
        accepted = ((u < acceptance(pd, qd)) & drafted).long().cumprod(-1).sum(-1)
    if block is not False:
        scales = block_scales(pd, qd)
        h = scales[:, 1:].clone()
        if K > 1:
            mass = (scales[:, 1:-1, None] * p[:, 1:-1] - q[:, 1:]).clamp(min=0).sum(-1)
            last = (n[:, None] == step[1:K]) if K else None
            h[:, :-1] = torch.where(last, h[:, :-1], block_acceptance(scales[:, 1:-1], mass))
        longest = (((u <= h) & drafted) * step[1:]).amax(-1) if K else n.clamp(min=0)
        if block is True:
            accepted, scale = longest, scales.gather(1, longest[:, None])[:, 0]
        else:
            accepted = torch.where(block, longest, accepted)
            scale = torch.where(block, scales.gather(1, longest[:, None])[:, 0], scale)

    def take(t: Tensor, place: Tensor) -> Tensor:
        return t.gather(1, place[:, None, None].expand(b, 1, V))[:, 0]

    last = accepted == n
    weight = take(x, accepted)
    purpose = torch.where(last, int(Purpose.BONUS), int(Purpose.RESIDUAL))
    if K:
        w = residual(take(p, accepted), take(q, accepted.clamp(max=K - 1)), scale[:, None])
        weight = torch.where(last[:, None], weight, w.log())
    place = at.gather(1, accepted[:, None])[:, 0]
    final = winner(weight + noise(seeds, place, purpose, V, x.dtype), None)
    return accepted, final, bad


def _ancestors(
    first_child: Tensor, next_sibling: Tensor, num_nodes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(bits of the ancestors without the node's own, depth, whether reached), each (b,N)."""
    b, N = first_child.shape
    device = first_child.device
    index = torch.arange(N, device=device)
    bound = N if num_nodes is None else num_nodes.long().clamp(max=N)[:, None, None]
    live = (index < bound) & (index[:, None] < bound) & (index > 0)  # (b, above, below)
    child = (first_child[..., None] == index) & live
    sibling = (next_sibling[..., None] == index) & live
    is_child = child.any(1)
    up = torch.where(is_child, child.long().argmax(1), sibling.long().argmax(1))
    linked = is_child | sibling.any(1) | (index == 0)
    up = torch.where(linked, up, index)  # what hangs nowhere points at itself
    above = torch.where(is_child, torch.ones_like(up) << up, 0)
    depth = is_child.long()
    for _ in range(max(N - 1, 1).bit_length()):
        above = above | above.gather(1, up)
        depth = depth + depth.gather(1, up)
        up = up.gather(1, up)
    return above, depth, up == 0


def tree_ancestors(first_child: Tensor, next_sibling: Tensor) -> tuple[Tensor, Tensor]:
    """(bits, depth), both (b,N) int32, of trees given by first child and next sibling (b,N) int32, root 0.

    A node hangs below the lowest node that names it as first child, else beside the lowest that names it as sibling;
    indices outside [1, N) name nothing. A node that does not hang on node 0 has its own bit only, and depth 0.
    """
    above, depth, reached = _ancestors(first_child, next_sibling, None)
    own = torch.ones_like(above) << torch.arange(above.shape[1], device=above.device)
    bits = own | above.where(reached, 0)
    # Bit 31 is the sign of int32.
    return _signed(bits), depth.where(reached, 0).to(torch.int32)


def _signed(bits: Tensor) -> Tensor:
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def verify_tree(
    target_logits: Tensor,
    tokens: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    num_nodes: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    rule: int,
    temperature: float,
    top_k: int,
    top_p: float,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(path (b,max_depth), tokens (b,max_depth+1), num_accepted (b)) int32; target_logits (b,N,V), tokens (b,N).

    At a node the target's own draw y is emitted, and the walk goes on to the child of token y, of several to the one of
    the lowest index.
    """
    settings = Settings(temperatures, temperature, top_ks, top_k, top_ps, top_p)
    b, N, _ = target_logits.shape
    index = torch.arange(N, device=target_logits.device)
    above, depth, reached = _ancestors(first_child, next_sibling, num_nodes)
    at = positions[:, None] + depth.where(reached, 0)
    y = own_draws(
        target_logits,
        settings,
        seeds,
        at,
        Purpose.DRAFT,
        True if rule == VerifyRule.GREEDY else None,
    )
    bad = ((y < 0) & reached).any(-1)
    if num_nodes is not None:
        bad = ((y < 0) & reached & (index < num_nodes[:, None])).any(-1) | (num_nodes < 1)
    below = above | torch.ones_like(above) << index  # the ancestors of a node's children
    node = torch.zeros_like(above[:, :1])
    going, path, emitted = ~bad[:, None], [], []
    for i in range(max_depth + 1):
        drawn = y.gather(1, node)
        emitted.append(drawn.where(going, -1))
        if i == max_depth:
            break
        child = (above == below.gather(1, node)) & reached & (tokens == drawn) & (index > 0)
        going = going & child.any(1, keepdim=True)
        node = torch.where(going, child.long().argmax(1, keepdim=True), node)
        path.append(node.where(going, -1))
    path = torch.cat(path, 1) if path else y.new_empty(b, 0)
    count = (path >= 0).sum(1).masked_fill(bad, -1)
    return path.to(torch.int32), torch.cat(emitted, 1).to(torch.int32), count.to(torch.int32)
