"""Plain torch for sampling and chains of drafts, as gpt-fast and transformers write them: a draw is the argmax of the
probabilities over exponential noise, which waits for nothing.

Random numbers are torch's own. The workloads' logits leave little to them, so tokens can be compared all the same.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.bench.peers.eager.parts import Parts, named
from tigon.bench.workloads import Workload


def _race(weights: Tensor) -> Tensor:
    return (weights / torch.empty_like(weights).exponential_(1)).argmax(-1)


def _best(logits: Tensor, k: int, p: float) -> tuple[Tensor, Tensor]:
    """(values, their indices) of the k best, -inf where top-p drops them."""
    values, index = logits.topk(k, -1)
    share = values.softmax(-1)
    return values.masked_fill(share.cumsum(-1) - share >= p, -torch.inf), index


def sample(work: Workload) -> Parts:
    k, p = work.options.get("top_k"), work.options.get("top_p")

    def compute(logits):
        if work.variant == "greedy":
            return (logits.argmax(-1),)
        if k is None:
            return (_race(logits.float().softmax(-1)),)
        values, index = _best(logits.float(), k, p)
        return (index.gather(-1, _race(values.softmax(-1))[..., None])[..., 0],)

    return named("logits"), compute


def verify_draft(work: Workload) -> Parts:
    rule, k = work.options["rule"], work.options.get("top_k")
    if rule == "block":
        raise NotImplementedError("models in plain torch verify by token")

    def probabilities(logits: Tensor) -> Tensor:
        logits = logits.float()
        if k is not None:
            values, index = _best(logits, k, work.options["top_p"])
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, index, values)
        return logits.softmax(-1)

    def emitted(drafts: Tensor, accepted: Tensor, last: Callable) -> tuple[Tensor, Tensor]:
        count = accepted.int().cumprod(1).sum(1, keepdim=True)
        place = torch.arange(drafts.shape[1] + 1, device=drafts.device)
        tokens = F.pad(drafts, (0, 1), value=-1).where(place < count, -1)
        return tokens.scatter(1, count, last(count).to(tokens.dtype)), count[:, 0]

    def equal(target, drafts):
        own = target.argmax(-1) if rule == "greedy" else _race(probabilities(target))
        return emitted(drafts, own[:, :-1] == drafts, lambda count: own.gather(1, count))

    def compare(target, drafts, draft_logits):
        p, index = probabilities(target), drafts.long()[..., None]
        q = None if draft_logits is None else probabilities(draft_logits)
        at_p = p[:, :-1].gather(-1, index)[..., 0]
        at_q = 1 if q is None else q.gather(-1, index)[..., 0]
        b, K = drafts.shape

        def last(count: Tensor) -> Tensor:
            row, at = torch.arange(b, device=p.device), count[:, 0].clamp(max=K - 1)
            rejected = (count < K).float()
            if q is None:
                lost = torch.zeros_like(p[:, 0]).scatter_(1, index[row, at], rejected)
            else:
                lost = q[row, at] * rejected
            return _race((p[row, count[:, 0]] - lost).clamp(min=0))[:, None]

        return emitted(drafts, torch.rand_like(at_p) * at_q < at_p, last)

    if rule != "token":
        return named("target_logits", "draft_tokens"), equal

    def take(inputs):
        return inputs["target_logits"], inputs["draft_tokens"], inputs.get("draft_logits")

    return take, compare


PARTS = {part.__name__: part for part in (sample, verify_draft)}
