"""Workloads of sampling and verification. `draw` is a workloads.Draw, `choice` what variants.VARIANTS says.

Tokens are integers, which a check compares one by one. Logits are therefore drawn so that rounding decides nothing: in
each row one token leads all others by far more than noise can make up. Drafts are the leader with probability 3/4, so
that prefixes of every length are accepted; where they are not, the replacement is the leader.
"""

import torch
from torch import Tensor

from tigon.bench import lowprec

SMALL = {
    "sample": {"b": 5, "V": 1000},
    "verify_draft": {"b": 6, "K": 3, "V": 1000},
    "verify_tree": {"b": 5, "N": 7, "V": 1000},
    "tree_ancestors": {"b": 5, "N": 9},
}
LEAD = 60.0


def leading(draw, *shape: int) -> tuple[Tensor, Tensor]:
    """(logits, leaders): normal logits with one far above all."""
    logits = draw.normal(*shape, dtype=torch.float32)
    leaders = draw.parameter(*shape).argmax(-1, keepdim=True)
    return logits.scatter_add(-1, leaders, torch.full_like(logits[..., :1], LEAD)), leaders[..., 0]


def keys(draw, b: int) -> dict:
    index = torch.arange(b, device=draw.device)
    return {"seeds": 1234 + index, "positions": 100 + 7 * index}


def built(inputs: dict, options: dict, *outputs: str) -> dict:
    return {
        "inputs": inputs,
        "options": options,
        "outputs": outputs,
        "exact": True,
        "oracle": lowprec.by_reference,
    }


def sample(draw, choice: dict, b: int, V: int) -> dict:
    logits = leading(draw, b, V)[0].to(draw.dtype)
    return built({"logits": logits}, {**keys(draw, b), **choice}, "tokens")


def verify_draft(draw, choice: dict, b: int, K: int, V: int) -> dict:
    options = dict(choice)
    target, leaders = leading(draw, b, K + 1, V)
    wrong = draw.parameter(b, K, low=0.0, high=1.0) > 0.75
    drafts = torch.where(wrong, (leaders[:, :K] + 1) % V, leaders[:, :K])
    inputs = {"target_logits": target.to(draw.dtype), "draft_tokens": drafts.to(torch.int32)}
    if options.pop("draft_logits"):
        logits = draw.normal(b, K, V, dtype=torch.float32)
        lead = torch.full_like(logits[..., :1], LEAD)
        inputs["draft_logits"] = logits.scatter_add(-1, drafts[..., None], lead).to(draw.dtype)
    return built(inputs, {**keys(draw, b), **options}, "tokens", "num_accepted")


def links(draw, b: int, N: int) -> dict:
    """Binary trees: node i has the children 2 i + 1 and 2 i + 2."""
    index = torch.arange(N, device=draw.device, dtype=torch.int32)
    child = torch.where(2 * index + 1 < N, 2 * index + 1, -1)
    sibling = torch.where((index % 2 == 1) & (index + 1 < N), index + 1, -1)
    return {"first_child": child.repeat(b, 1), "next_sibling": sibling.repeat(b, 1)}


def verify_tree(draw, choice: dict, b: int, N: int, V: int) -> dict:
    target, leaders = leading(draw, b, N, V)
    index = torch.arange(N, device=draw.device)
    parents = leaders[:, (index - 1).clamp(min=0) // 2]
    other = draw.parameter(b, N, low=0.0, high=1.0) > 0.75
    hit = (index % 2 == 1) ^ other
    tokens = torch.where(hit, parents, (parents + index) % V).to(torch.int32)
    inputs = {"target_logits": target.to(draw.dtype), "tokens": tokens, **links(draw, b, N)}
    return built(inputs, {**keys(draw, b), **choice}, "path", "tokens", "num_accepted")


def tree_ancestors(draw, b: int, N: int) -> dict:
    return built(links(draw, b, N), {}, "bits", "depth")


BUILDERS = {build.__name__: build for build in (sample, verify_draft, verify_tree, tree_ancestors)}
