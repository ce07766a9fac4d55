"""Workloads of the mixture-of-experts ops. `draw` is a workloads.Draw, `choice` what variants.VARIANTS says.

What the ops must agree upon exactly is the choice: the scores that are drawn lie further apart than fp32 rounds. A
routing is made before the clock runs; of its tensors only the weights are an input, as only they have a gradient.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

import tigon
from tigon.bench import lowprec
from tigon.ops.routing import Routing

SMALL = {
    "moe_route": {"t": 70, "e": 48, "k": 6},
    "moe_sort": {"t": 70, "e": 48, "k": 6},
    "grouped_mm": {"rows": 150, "e": 12, "n": 72, "k": 40},
    "moe_experts": {"t": 50, "k": 3, "e": 12, "m": 72, "l": 40},
}
QUANTIZERS = {
    "nvfp4": tigon.quantize_nvfp4,
    "fp8-row": lambda w: tigon.quantize_fp8(w, granularity="row"),
}
PLACES = ("indices", "weights", "counts", "offsets", "order", "inverse")


def scores(draw, t: int, e: int) -> tuple[Tensor, Tensor]:
    """(logits (t,e), bias (e)): in each row the biased scores are a permutation of e steps, with a little noise."""
    bias = draw.parameter(e, low=-0.2, high=0.2)
    rank = draw.parameter(t, e).argsort(-1)
    biased = 0.25 + (rank + draw.parameter(t, e, low=0.0, high=0.5)) / (2 * e)
    return torch.logit(biased - bias), bias


def moe_route(draw, choice: dict, t: int, e: int, k: int) -> dict:
    logits, bias = scores(draw, t, e)
    outputs = PLACES
    if choice.get("aux"):
        outputs, bias = (*outputs, "score_sums", "aux_counts", "z_sum"), None
    options = {"bias": bias, "top_k": k, "scale": 2.5, **choice}
    return {"inputs": {"logits": logits}, "options": options, "outputs": outputs}


def chosen(draw, t: int, e: int, k: int) -> tuple[Tensor, Tensor]:
    """(indices (t,k), weights (t,k)) of as many tokens."""
    indices = draw.parameter(t, e).argsort(-1)[:, :k].to(torch.int32)
    return indices, draw.parameter(t, k, low=0.1)


def moe_sort(draw, t: int, e: int, k: int) -> dict:
    indices, weights = chosen(draw, t, e, k)
    return {
        "inputs": {"indices": indices, "weights": weights},
        "options": {"experts": e},
        "outputs": PLACES,
        "exact": True,
        "oracle": lowprec.by_reference,
    }


def grouped_mm(draw, rows: int, e: int, n: int, k: int) -> dict:
    offsets = tigon.moe_sort(*chosen(draw, rows, e, 1), experts=e).offsets
    inputs = {"x": draw.normal(rows, k), "w": draw.normal(e, n, k, scale=1 / math.sqrt(k))}
    return {"inputs": inputs, "options": {"offsets": offsets}, "outputs": ("y",)}


def moe_experts(draw, choice: dict, t: int, k: int, e: int, m: int, l: int) -> dict:
    options = dict(choice)
    format = options.pop("format", "plain")
    routing = tigon.moe_sort(*chosen(draw, t, e, k), experts=e)
    rows = 2 * m if options.get("activation") == "swiglu" else m
    up = draw.normal(e, rows, l, scale=1 / math.sqrt(l))
    down = draw.normal(e, l, m, scale=1 / math.sqrt(m))
    if format != "plain":
        up, down = (QUANTIZERS[format](w) for w in (up, down))

    def arguments(inputs: dict) -> dict:
        given = dict(inputs)
        return given | {"routing": replace(routing, weights=given.pop("weights"))}

    built = {
        "inputs": {"x": draw.normal(t, l), "up": up, "down": down, "weights": routing.weights},
        "options": options,
        "outputs": ("y",),
        "arguments": arguments,
    }
    return built if format == "plain" else built | {"oracle": exact_experts}


def exact_experts(work) -> tuple[Tensor]:
    """By the fp64 values that quantized experts stand for."""
    with tigon.backend("reference"):
        wide = {
            name: lowprec.values(t) if name in ("up", "down") else t.double()
            for name, t in work.inputs.items()
        }
        return work.run(wide)


def tensors(routing: Routing) -> tuple[Tensor, ...]:
    found = (getattr(routing, name) for name in Routing.TENSORS)
    return tuple(t for t in found if t is not None)


BUILDERS = {build.__name__: build for build in (moe_route, moe_sort, grouped_mm, moe_experts)}
