"""Workloads of the decode steps: plain, with narrow states, and with rollback by replay."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

import tigon
from tigon.ops import ReplayCache, ReplayCursor
from tigon.reference.state_format import decode_state, encode_state, is_scaled

SMALL = {
    "ssd_update": {"b": 4, "m": 2, "h": 8, "p": 64, "g": 2, "n": 128},
    "causal_conv1d_update": {"b": 4, "m": 3, "d": 160, "width": 4},
}


def step(draw, h: int) -> dict:
    """Parameters of the state-space layer: time scales 1/(A dt) of a few to a few hundred tokens."""
    return {
        "A": -draw.parameter(h, low=1.0, high=16.0),
        "D": draw.parameter(h),
        "dt_bias": draw.parameter(h, low=-7.0, high=-2.0),
    }


def _cursor(draw, b: int, m: int, flush: int) -> dict[str, Tensor]:
    """Rows at every distance from a write of their state: m in flush of them have one due, as in the long run."""
    place = torch.arange(b, device=draw.device) * m % flush
    length = 1024 + place
    checkpoint = torch.where(place < m, length - place - flush, length - place)
    return {"checkpoint": checkpoint, "length": length}


def _tree(draw, b: int, m: int) -> Tensor:
    """`ancestors` of binary trees: node i hangs on node (i - 1) // 2."""
    bits = [1]
    for node in range(1, m):
        bits.append(1 << node | bits[(node - 1) // 2])
    return torch.tensor(bits, device=draw.device).to(torch.int32).repeat(b, 1)


def _replay(inputs: Mapping[str, Tensor], *, flush: int, conv: bool) -> dict[str, object]:
    """The arguments of a call: rings and cursors are made of the workload's tensors."""
    rings = ("ring_x", "ring_B", "ring_dt", "ring_conv")
    given = {k: t for k, t in inputs.items() if k not in (*rings, "checkpoint", "length")}
    none = inputs["x"].new_empty(0)
    cache = ReplayCache(*(inputs.get(name, none) for name in rings))
    cursor = ReplayCursor(inputs["checkpoint"], inputs["length"], flush)
    return given | {"replay": (cache, cursor)} | ({"conv_state": None} if conv else {})


def _decoded(inputs: Mapping[str, Tensor]) -> Tensor:
    return decode_state(inputs["state"], inputs["state_scale"], torch.float32)


def _oracle(work) -> tuple[Tensor, ...]:
    """Of an 8-bit state: its numbers go through the reference in fp64, without a rounding."""
    wide = {
        k: t.double() if t.is_floating_point() else t
        for k, t in work.inputs.items()
        if k != "state_scale"
    }
    wide["state"] = _decoded(work.inputs).double()
    with tigon.backend("reference"):
        y = tigon.ssd_update(**work.arguments(wide), **work.options)
    return y, wide["state"]


def ssd_update(
    draw, choice: dict, b: int, m: int, h: int, p: int, g: int, n: int
) -> dict[str, object]:
    dtype = getattr(torch, choice.get("state", "float32"))
    codes, scale = encode_state(draw.normal(b, h, p, n, dtype=torch.float32), dtype)
    inputs = {
        "state": codes,
        "x": draw.normal(b, m, h, p),
        "dt": draw.normal(b, m, h),
        "B": draw.normal(b, m, g, n, scale=1 / math.sqrt(n)),
        "C": draw.normal(b, m, g, n),
        **step(draw, h),
    }
    built: dict[str, object] = {"outputs": ("y", "state"), "mutated": "state"}
    options: dict[str, object] = {"dt_softplus": True}
    if scale is not None:
        inputs["state_scale"] = scale
    if dtype != torch.float32:
        built["cap"] = 5e-2  # the state's format decides
    if is_scaled(dtype):
        built |= {"held": _decoded, "oracle": _oracle}
    if choice.get("rounding"):
        options |= {"rounding": choice["rounding"], "layer": 1}
        inputs["seeds"] = torch.arange(b, device=draw.device)
        if "flush" not in choice:
            inputs["positions"] = torch.arange(b, device=draw.device) + 1024
    if flush := choice.get("flush"):
        length = flush + 2 * m - 1
        inputs |= {
            "ring_x": draw.normal(b, length, h, p),
            "ring_B": draw.normal(b, length, g, n, scale=1 / math.sqrt(n)),
            "ring_dt": draw.parameter(b, length, h, low=0.001, high=0.1),
            **_cursor(draw, b, m, flush),
        }
        if choice.get("tree"):
            inputs["ancestors"] = _tree(draw, b, m)
        built["arguments"] = partial(_replay, flush=flush, conv=False)
    return built | {"inputs": inputs, "options": options}


def causal_conv1d_update(
    draw, choice: dict, b: int, m: int, d: int, width: int
) -> dict[str, object]:
    inputs = {
        "x": draw.normal(b, m, d),
        "weight": draw.parameter(d, width),
        "bias": draw.parameter(d),
    }
    built: dict[str, object] = {"options": {}}
    if flush := choice.get("flush"):
        inputs |= {"ring_conv": draw.normal(b, d, width - 1 + m), **_cursor(draw, b, m, flush)}
        if choice.get("tree"):
            inputs["ancestors"] = _tree(draw, b, m)
        built["arguments"] = partial(_replay, flush=flush, conv=True)
        built |= {"outputs": ("y", "ring"), "mutated": "ring_conv"}
    else:
        inputs["conv_state"] = draw.normal(b, d, width - 1)
        built |= {"outputs": ("y", "conv_state"), "mutated": "conv_state"}
    return built | {"inputs": inputs}


BUILDERS: dict[str, Callable[..., dict]] = {
    build.__name__: build for build in (ssd_update, causal_conv1d_update)
}
