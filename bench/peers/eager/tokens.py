"""Plain torch for token reduction: softmax weights of a few queries, top-k of each sequence, index_select."""

import torch

from tigon.bench.peers.eager.parts import Parts, named
from tigon.bench.workloads import Workload


def attention_token_scores(work: Workload) -> Parts:
    """All keys must be seen for the softmax; the listed ones are taken after it."""
    queries, keys = work.options["query_index"], work.options["key_index"]

    def compute(q, k):
        t, heads, dim = k.shape
        rows = q[queries].unflatten(1, (heads, -1))
        logits = torch.einsum("qhed,khd->hqek", rows, k).float() * dim**-0.5
        hidden = torch.arange(t, device=k.device) > queries[:, None]
        weights = logits.masked_fill_(hidden[:, None], -torch.inf).softmax(-1)
        return (weights.mean((0, 1, 2))[keys],)

    return named("q", "k"), compute


def ssd_token_scores(work: Workload) -> Parts:
    """Without decay the mean over a group's heads is that of their dt."""
    queries, keys, decay = (work.options.get(n) for n in ("query_index", "key_index", "decay"))

    def compute(C, B, dt, A):
        groups = (C.shape[1], -1)
        weights = torch.einsum("qgn,kgn->gqk", C[queries], B[keys]).float().abs()
        hidden = keys > queries[:, None]
        steps = dt[keys].T.unflatten(0, groups)
        if decay:
            passed = (dt * A).cumsum(0)
            gone = passed[queries].T[:, :, None] - passed[keys].T[:, None]
            gone = gone.masked_fill_(hidden, -torch.inf).exp_().unflatten(0, groups)
            weights = weights * (gone * steps[:, :, None]).mean(1)
        else:
            weights = (weights * steps.mean(1)[:, None]).masked_fill_(hidden, 0.0)
        return (weights.mean((0, 1)),)

    return named("C", "B", "dt", "A"), compute


def select_tokens(work: Workload) -> Parts:
    """A top-k a sequence. Lengths and counts are numbers on the host, as models have them."""
    bounds, keep = work.options["cu_seqlens"].tolist(), work.options["keep"].tolist()
    spans = [(i, end, min(k, end - i)) for i, end, k in zip(bounds, bounds[1:], keep)]
    cu_kept = torch.tensor([0, *(k for _, _, k in spans)]).cumsum(0).int()
    cu_kept = cu_kept.to(work.inputs["scores"].device)

    def compute(scores):
        index = torch.cat([scores[i:end].topk(k)[1].sort()[0] + i for i, end, k in spans])
        place = torch.arange(index.shape[0], device=scores.device, dtype=torch.int32)
        inverse = torch.full_like(scores, -1, dtype=torch.int32).index_copy_(0, index, place)
        return index.int(), cu_kept, inverse

    return named("scores"), compute


def compact_tokens(work: Workload) -> Parts:
    index = work.options["selection"].index

    def compute(*tensors):
        return tuple(t.index_select(0, index) for t in tensors)

    return named("x", "residual", "positions"), compute


PARTS = {
    part.__name__: part
    for part in (attention_token_scores, ssd_token_scores, select_tokens, compact_tokens)
}
