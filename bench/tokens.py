"""Workloads of the token-reduction ops. `draw` is a workloads.Draw, `choice` what variants.VARIANTS says.

A prompt is nk visual tokens and then nq text tokens that ask. Scores that are selected from are a permutation, so that
every backend must choose the same tokens.
"""

import math

import torch

import tigon
from tigon.bench import lowprec

SMALL = {
    "attention_token_scores": {"nq": 10, "nk": 150, "hq": 4, "hkv": 2, "dim": 32},
    "ssd_token_scores": {"nq": 10, "nk": 150, "h": 8, "g": 2, "n": 32},
    "select_tokens": {"t": 900, "s": 3, "keep": 80},
    "compact_tokens": {"t": 300, "d": 40, "kept": 70},
}


def _lists(draw, nq: int, nk: int) -> dict:
    rows = torch.arange(nk, nk + nq, device=draw.device, dtype=torch.int32)
    keys = torch.arange(nk, device=draw.device, dtype=torch.int32)
    return {"query_index": rows, "key_index": keys}


def attention_token_scores(draw, nq: int, nk: int, hq: int, hkv: int, dim: int) -> dict:
    inputs = {"q": draw.normal(nk + nq, hq, dim), "k": draw.normal(nk + nq, hkv, dim)}
    return {"inputs": inputs, "options": _lists(draw, nq, nk), "outputs": ("scores",)}


def ssd_token_scores(draw, choice: dict, nq: int, nk: int, h: int, g: int, n: int) -> dict:
    t = nk + nq
    inputs = {
        "C": draw.normal(t, g, n),
        "B": draw.normal(t, g, n, scale=1 / math.sqrt(n)),
        "dt": draw.parameter(t, h, low=0.001, high=0.1),
        "A": -draw.parameter(h, low=1.0, high=16.0),
    }
    options = _lists(draw, nq, nk) | choice
    return {"inputs": inputs, "options": options, "outputs": ("scores",)}


def _sequences(draw, t: int, s: int, keep: int) -> tuple[torch.Tensor, dict]:
    """(scores (t), the other arguments but the capacity) of s sequences about as long as each other."""
    scores = draw.parameter(t).argsort().float()
    bounds = torch.arange(s + 1, device=draw.device) * t // s
    counts = torch.full((s,), keep, dtype=torch.int32, device=draw.device)
    return scores, {"keep": counts, "cu_seqlens": bounds.int()}


def select_tokens(draw, t: int, s: int, keep: int) -> dict:
    scores, options = _sequences(draw, t, s, keep)
    return {
        "inputs": {"scores": scores},
        "options": options | {"capacity": s * keep},
        "outputs": ("index", "cu_kept", "inverse"),
        "exact": True,
        "oracle": lowprec.by_reference,
    }


def compact_tokens(draw, t: int, d: int, kept: int) -> dict:
    """Hidden states, their residual, and positions."""
    scores, options = _sequences(draw, t, 1, kept)
    selection = tigon.select_tokens(scores, capacity=kept, **options)
    positions = torch.arange(t, device=draw.device)

    def arguments(inputs: dict) -> dict:
        return {"tensors": (inputs["x"], inputs["residual"]), "slot_map": inputs["positions"]}

    inputs = {"x": draw.normal(t, d), "residual": draw.normal(t, d), "positions": positions}
    return {
        "inputs": inputs,
        "options": {"selection": selection},
        "outputs": ("x", "residual", "positions"),
        "arguments": arguments,
    }


BUILDERS = {
    build.__name__: build
    for build in (attention_token_scores, ssd_token_scores, select_tokens, compact_tokens)
}
