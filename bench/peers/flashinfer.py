"""flashinfer: chain_speculative_sampling, which takes probabilities; its softmaxes are part of the call."""

from collections.abc import Callable

import torch

from tigon.bench.workloads import Workload

OPS = ("verify_draft",)
DEVICES = ("cuda",)


def build(work: Workload) -> Callable:
    """inputs -> (tokens (b,K+1), accepted (b)). Its random numbers are its own, of one seed for all rows."""
    if work.variant not in ("token", "token-greedy-drafts"):
        raise NotImplementedError(f"flashinfer's chain has no {work.variant}")
    from flashinfer.sampling import chain_speculative_sampling, softmax

    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        return softmax(logits.flatten(0, 1).float()).view(logits.shape)

    def call(inputs):
        target, tokens = inputs["target_logits"], inputs["draft_tokens"]
        p = probabilities(target)
        if "draft_logits" in inputs:
            q = probabilities(inputs["draft_logits"])
        else:
            q = torch.zeros_like(p[:, :-1]).scatter_(-1, tokens.long()[..., None], 1.0)
        out, _, _ = chain_speculative_sampling(q, tokens, p)
        return out, (out >= 0).sum(-1, dtype=torch.int32) - 1

    return call
