"""Plain torch for mixtures of experts: top-k and a stable sort, a loop over experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tigon.bench.peers.eager.parts import Parts, named
from tigon.bench.peers.find import once
from tigon.bench.workloads import Workload


def _places(indices: Tensor, experts: int) -> tuple[Tensor, ...]:
    """(counts, offsets, order, inverse): nothing is read on the host."""
    by_expert, order = indices.flatten().sort(stable=True)
    expert = torch.arange(experts + 1, device=indices.device, dtype=indices.dtype)
    offsets = torch.searchsorted(by_expert, expert, out_int32=True)
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    return offsets.diff(), offsets, order.int(), inverse.int()


def moe_route(work: Workload) -> Parts:
    """The router of the DeepSeek-V3 class, with its losses in the variant that has them."""
    given = {"score": "sigmoid", "normalize": True, "groups": 1, **work.options}
    bias, k, groups = given["bias"], given["top_k"], given["groups"]

    def compute(logits):
        scores = logits.sigmoid() if given["score"] == "sigmoid" else logits.softmax(-1)
        rank = scores if bias is None else scores + bias
        if groups > 1:
            grouped = rank.unflatten(-1, (groups, -1))
            best = grouped.topk(2, -1)[0].sum(-1).topk(given["top_groups"], -1)[1]
            mask = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            rank = grouped.masked_fill(mask[..., None], -torch.inf).flatten(-2)
        indices = rank.topk(k, -1)[1]
        weights = scores.gather(-1, indices)
        if given["normalize"]:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        places = _places(indices, logits.shape[1])
        out = indices.int(), weights * given["scale"], *places
        if not given.get("aux"):
            return out
        share = scores / scores.sum(-1, keepdim=True)
        z = logits.logsumexp(-1).square().sum()
        return *out, share.sum(0, keepdim=True), places[0][None], z

    return named("logits"), compute


def moe_sort(work: Workload) -> Parts:
    def compute(indices, weights):
        return indices, weights, *_places(indices, work.options["experts"])

    return named("indices", "weights"), compute


def grouped_mm(work: Workload) -> Parts:
    def compute(x, w):
        counts = work.options["offsets"].diff().tolist()
        return (torch.cat([rows @ matrix.T for rows, matrix in zip(x.split(counts), w)]),)

    return named("x", "w"), compute


def moe_experts(work: Workload) -> Parts:
    """A loop over the experts with rows. Quantized weights are dequantized before the clock runs."""
    options = {"activation": "relu2", "weight_placement": "after_down", **work.options}
    early = options["weight_placement"] == "before_down"
    routing = work.call()["routing"]
    dense = once(
        lambda inputs: [
            inputs[name]
            if isinstance(inputs[name], Tensor)
            else inputs[name].dequantize(work.dtype)
            for name in ("up", "down")
        ]
    )

    def act(h: Tensor) -> Tensor:
        if options["activation"] == "swiglu":
            gate, up = h.chunk(2, -1)
            return F.silu(gate) * up
        return F.relu(h).square()

    def compute(x, up, down, weights):
        order, k = routing.order, weights.shape[1]
        rows, counts = x[order // k], routing.counts.tolist()
        own = weights.flatten()[order][:, None] if early else None
        out = []
        up, down = up.unbind(), down.unbind()  # up[expert] would have a gradient of all experts
        for expert, first, last in _spans(counts):
            h = act(rows[first:last] @ up[expert].T)
            h = (h * own[first:last]).to(h.dtype) if early else h
            out.append(h @ down[expert].T)
        chosen = torch.cat(out)[routing.inverse].unflatten(0, (-1, k))
        y = chosen.float() if early else chosen * weights[..., None]
        return (y.sum(1).to(x.dtype),)

    def take(inputs):
        return inputs["x"], *dense(inputs), inputs["weights"]

    return take, compute


def _spans(counts: list[int]):
    """(expert, its first row, past its last) of those with rows."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, first, first + count
        first += count


PARTS = {part.__name__: part for part in (moe_route, moe_sort, grouped_mm, moe_experts)}
