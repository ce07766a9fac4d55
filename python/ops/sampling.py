"""Speculative decoding: draws, and the verification of drafts against the target's logits.

The formulas and the random streams are at the top of `tigon.reference.sampling`. What is emitted follows the target's
processed distribution exactly, whatever the drafts are, under every rule:

    token    draft d of draft probability q(d) is accepted with probability min(1, p(d) / q(d)); the first rejected one
             is replaced by a draw from max(p - q, 0), and after all of them a bonus token is drawn from p
    block    the same for the drafts as a block: at least as many are accepted on average
    strict   what is emitted is the target's own draw, with the noise that `sample(purpose="draft")` uses at the same
             position; a draft is accepted if it equals it. The text depends neither on the drafts nor on their number
    greedy   strict at temperature 0

Sources: Leviathan et al. (arXiv 2211.17192) and Chen et al. (2302.01318) for `token`; Sun et al. (2403.10444) for
`block`; Salmon et al. 2011 for Philox.
"""

import torch
from torch import Tensor

from tigon.ops.checks import Check
from tigon.ops.dispatch import call, inner, run
from tigon.ops.library import register
from tigon.reference.sampling import Purpose, VerifyRule

MAX_DRAFT = 16
MAX_NODES = 32
PURPOSES = {"draft": Purpose.DRAFT, "bonus": Purpose.BONUS}
RULES = {rule.name.lower(): rule for rule in VerifyRule}
TREE_RULES = {name: RULES[name] for name in ("strict", "greedy")}

_SETTINGS = (
    "Tensor seeds, Tensor positions, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, "
    "{}float temperature, int top_k, float top_p"
)
_TREE = "Tensor first_child, Tensor next_sibling"


def _sample(logits, *rest):
    return run("sample", logits, logits, *rest)


def _sample_fake(logits, *rest):
    return logits.new_empty(logits.shape[0], dtype=torch.int32)


def _verify(target_logits, *rest):
    return run("verify_draft", target_logits, target_logits, *rest)


def _verify_fake(target_logits, *rest):
    b, width, _ = target_logits.shape
    return tuple(target_logits.new_empty(s, dtype=torch.int32) for s in ((b, width), (b,)))


def _tree(target_logits, *rest):
    return run("verify_tree", target_logits, target_logits, *rest)


def _tree_fake(target_logits, *rest):
    b, depth = target_logits.shape[0], rest[-1]
    shapes = ((b, depth), (b, depth + 1), (b,))
    return tuple(target_logits.new_empty(s, dtype=torch.int32) for s in shapes)


def _ancestors(first_child, next_sibling):
    return run("tree_ancestors", first_child, first_child, next_sibling)


def _ancestors_fake(first_child, next_sibling):
    return tuple(torch.empty_like(first_child, memory_format=torch.contiguous_format) for _ in "bd")


register(
    f"sample(Tensor logits, {_SETTINGS.format('')}, int purpose) -> Tensor", _sample, _sample_fake
)
register(
    "verify_draft(Tensor target_logits, Tensor draft_tokens, Tensor? draft_logits, Tensor? num_draft, "
    f"Tensor? rules, {_SETTINGS.format('int rule, ')}) -> (Tensor, Tensor)",
    _verify,
    _verify_fake,
)
register(
    f"verify_tree(Tensor target_logits, Tensor tokens, {_TREE}, Tensor? num_nodes, "
    f"{_SETTINGS.format('int rule, ')}, int max_depth) -> (Tensor, Tensor, Tensor)",
    _tree,
    _tree_fake,
)
register(f"tree_ancestors({_TREE}) -> (Tensor, Tensor)", _ancestors, _ancestors_fake)


def _setting(check: Check, name: str, value, dtype: torch.dtype, low: float, high: float):
    """(tensor or None, number) of a setting that is a (b) tensor of `dtype` or a number in [low, high]."""
    if isinstance(value, Tensor) and value.dim() > 0:
        check.tensor(name, value, "b", dtypes=(dtype,))
        check.within(name, value, low, high)
        return inner(name, value, 1), 0
    kinds = (int,) if dtype == torch.int32 else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        what = "an int" if dtype == torch.int32 else "a number"
        check.fail(f"{name} must be {what} or a (b) tensor, got {type(value).__name__}", TypeError)
    check.require(low <= value <= high, f"{name} must lie in [{low}, {high}], got {value}")
    return None, value


def _settings(check: Check, temperature, top_k, top_p, seeds, positions) -> tuple[tuple, tuple]:
    """(tensors, numbers) in the schema's order."""
    check.tensor("seeds", seeds, "b", dtypes=(torch.int64,))
    check.tensor("positions", positions, "b", dtypes=(torch.int64,))
    largest = torch.finfo(torch.float32).max
    found = (
        _setting(check, "temperature", temperature, torch.float32, 0, largest),
        _setting(check, "top_k", top_k, torch.int32, 0, 2**31 - 1),
        _setting(check, "top_p", top_p, torch.float32, 0, 1),
    )
    (t, temperature), (k, top_k), (p, top_p) = found
    tensors = (inner("seeds", seeds, 1), inner("positions", positions, 1), t, k, p)
    return tensors, (float(temperature), int(top_k), float(top_p))


def _choice(check: Check, name: str, value, known: dict) -> int:
    if not isinstance(value, str) or value not in known:
        check.fail(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return int(known[value])


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seeds: Tensor,
    positions: Tensor,
    purpose: str = "draft",
) -> Tensor:
    """Draw a token a row from softmax(logits / temperature), cut to top_k and then top_p.

    A pure function of a row's logits, settings, seed and position: neither batch nor slot changes it.

    Args:
        logits: (b,V) fp32, bf16 or fp16 (fp64 on the reference); -inf for tokens that may not be drawn.
        temperature: a number or (b) fp32; 0 (anything below 1e-6) takes the largest logit, of equal ones the
            lowest index.
        top_k: an int or (b) int32: keep so many of the largest logits, lower indices first among equal ones; 0: all.
        top_p: a number or (b) fp32: of these keep the smallest set of the likeliest tokens whose mass reaches top_p,
            at least one, lower indices first among equal ones; 1: all.
        seeds: (b) int64, the key of each request's random bits.
        positions: (b) int64, the absolute position of the token that is drawn.
        purpose: the stream of random bits: "draft", which `strict` verification shares, or "bonus".

    Returns:
        (b) int32; -1 for a row that holds a NaN, or +inf at a temperature above 0, or nothing above -inf.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("sample")
    code = _choice(check, "purpose", purpose, PURPOSES)
    check.tensor("logits", logits, "b V")
    check.size("V", 2**31 - 1)
    tensors, numbers = _settings(check, temperature, top_k, top_p, seeds, positions)
    sizes = {name: check.sizes[name] for name in "bV"} | {"itemsize": logits.element_size()}
    sizes |= _filters(tensors, numbers)
    return call("sample", logits, (inner("logits", logits, 1), *tensors, *numbers, code), sizes)


def verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None = None,
    *,
    num_draft: Tensor | None = None,
    rule: str | Tensor = "token",
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Accept a prefix of each row's drafts and draw the token after it, so that the target's distribution is kept.

    Args:
        target_logits: (b,K+1,V) fp32, bf16 or fp16; [:, i] predicts the token at positions + i. 0 <= K <= 16.
        draft_tokens: (b,K) int32. One outside the vocabulary ends its row's drafts: it is rejected, and p itself is
            drawn from.
        draft_logits: (b,K,V) in the target's dtype: the drafts were drawn from these logits with the same settings.
            None: the drafts are not random (greedy ones, n-grams), q is a point mass.
        num_draft: (b) int32, drafts of the row, 0 to K; negative: padding, nothing is emitted. None: K.
        rule: "token", "block", "strict" or "greedy" (top of the module), or (b) int8 codes of `VerifyRule`. Rows of
            temperature 0 are greedy under any rule.
        temperature, top_k, top_p, seeds: as in `sample`, for both sides.
        positions: (b) int64, the absolute position of the token that target_logits[:, 0] predicts.

    Returns:
        tokens (b,K+1) int32: the accepted drafts and one token more, then -1; num_accepted (b) int32, 0 to K. Rows
        whose logits (the target's up to num_draft, and under `token` and `block` the draft's before it) are bad as in
        `sample`, and padding: -1 in all places.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("verify_draft")
    check.tensor("target_logits", target_logits, "b K+1 V")
    check.size("K+1", MAX_DRAFT + 1)
    check.size("V", 2**31 - 1)
    check.sizes["K"], check.source["K"] = check.sizes["K+1"] - 1, "target_logits"
    check.tensor("draft_tokens", draft_tokens, "b K", dtypes=(torch.int32,))
    check.tensor(
        "draft_logits", draft_logits, "b K V", dtypes=(target_logits.dtype,), optional=True
    )
    check.tensor("num_draft", num_draft, "b", dtypes=(torch.int32,), optional=True)
    check.within("num_draft", num_draft, -(2**31), check.sizes["K"])
    rules, code = None, int(VerifyRule.TOKEN)
    if isinstance(rule, Tensor):
        check.tensor("rule", rule, "b", dtypes=(torch.int8,))
        check.within("rule", rule, 0, len(VerifyRule) - 1)
        rules = inner("rule", rule, 1)
    else:
        code = _choice(check, "rule", rule, RULES)
    tensors, numbers = _settings(check, temperature, top_k, top_p, seeds, positions)
    args = (
        inner("target_logits", target_logits, 1),
        inner("draft_tokens", draft_tokens, 1),
        inner("draft_logits", draft_logits, 1),
        *(None if num_draft is None else inner("num_draft", num_draft, 1), rules),
        *(*tensors, code, *numbers),
    )
    sizes = {name: check.sizes[name] for name in "bKV"} | {"itemsize": target_logits.element_size()}
    sizes |= {"rule": -1 if rules is not None else code, "logits": draft_logits is not None}
    return call("verify_draft", target_logits, args, sizes | _filters(tensors, numbers))


def _filters(tensors: tuple, numbers: tuple) -> dict[str, int]:
    """Whether rows may be cut to top_k or top_p; for the launch plan."""
    return {
        "filters": tensors[3] is not None
        or tensors[4] is not None
        or numbers[1] > 0
        or numbers[2] < 1
    }


def verify_tree(
    target_logits: Tensor,
    tokens: Tensor,
    first_child: Tensor,
    next_sibling: Tensor,
    *,
    rule: str = "strict",
    num_nodes: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    seeds: Tensor,
    positions: Tensor,
    max_depth: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk down a tree of drafts: emit the target's own draw at a node, go on to the child of that token, else stop.

    Lossless for any tree: what is emitted is the target's own draw, with the noise of `strict` (or `greedy`) at
    positions + depth, so the text does not depend on the tree either.

    Args:
        target_logits: (b,N,V) fp32, bf16 or fp16; [:, i] predicts the token after node i. 1 <= N <= 32.
        tokens: (b,N) int32; node 0 is the last committed token.
        first_child, next_sibling: (b,N) int32, -1: none. Links that make no tree are harmless: see `tree_ancestors`;
            of siblings with one token the lowest index is taken.
        rule: "strict" or "greedy".
        num_nodes: (b) int32, nodes of the row, at most N; less than 1: padding, nothing is emitted. None: N.
        temperature, top_k, top_p, seeds: as in `sample`.
        positions: (b) int64, the absolute position of the token that node 0's logits predict.
        max_depth: the longest path, 0 to N - 1 (the default).

    Returns:
        path (b,max_depth) int32, the accepted nodes after node 0, then -1; tokens (b,max_depth+1) int32, the emitted
        ones, then -1; num_accepted (b) int32. Rows with bad logits (as in `sample`) at a node that hangs on node 0, and
        padding: -1 in all places.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    check = Check("verify_tree")
    code = _choice(check, "rule", rule, TREE_RULES)
    check.tensor("target_logits", target_logits, "b N V")
    check.size("N", MAX_NODES)
    check.size("V", 2**31 - 1)
    for name, value in (
        ("tokens", tokens),
        ("first_child", first_child),
        ("next_sibling", next_sibling),
    ):
        check.tensor(name, value, "b N", dtypes=(torch.int32,))
    check.tensor("num_nodes", num_nodes, "b", dtypes=(torch.int32,), optional=True)
    N = check.sizes["N"]
    check.within("num_nodes", num_nodes, -(2**31), N)
    max_depth = N - 1 if max_depth is None else max_depth
    if not isinstance(max_depth, int) or not 0 <= max_depth < N:
        check.fail(f"max_depth must be an int in [0, {N - 1}], got {max_depth!r}")
    tensors, numbers = _settings(check, temperature, top_k, top_p, seeds, positions)
    args = (
        *(inner("target_logits", target_logits, 1), inner("tokens", tokens, 1)),
        *(inner("first_child", first_child, 1), inner("next_sibling", next_sibling, 1)),
        None if num_nodes is None else inner("num_nodes", num_nodes, 1),
        *(*tensors, code, *numbers, max_depth),
    )
    sizes = {name: check.sizes[name] for name in "bNV"} | {"itemsize": target_logits.element_size()}
    sizes |= {"rule": code} | _filters(tensors, numbers)
    return call("verify_tree", target_logits, args, sizes)


def tree_ancestors(first_child: Tensor, next_sibling: Tensor) -> tuple[Tensor, Tensor]:
    """The ancestors of each node of a draft tree as bits, and its depth: the mask of attention and state updates.

    Args:
        first_child, next_sibling: (b,N) int32, 1 <= N <= 32; -1, or any index outside [1, N): none. A node hangs below
            the lowest node that names it as first child, else beside the lowest one that names it as next sibling.

    Returns:
        bits (b,N) int32: bit j of bits[i] is set if node j is i or an ancestor of i; depth (b,N) int32, 0 for node 0. A
        node that does not hang on node 0 (loops among them) has its own bit only, and depth 0.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device, by name.
    """
    check = Check("tree_ancestors")
    check.tensor("first_child", first_child, "b N", dtypes=(torch.int32,))
    check.tensor("next_sibling", next_sibling, "b N", dtypes=(torch.int32,))
    check.size("N", MAX_NODES)
    args = inner("first_child", first_child, 1), inner("next_sibling", next_sibling, 1)
    return call("tree_ancestors", first_child, args, dict(check.sizes))
