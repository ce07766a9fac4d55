"""Calls of the routing kernels in guarded memory, and their check against tigon.reference.moe.

Logits of a row are evenly spaced and shuffled, so that scores of equal rank mean equal experts wherever no bias comes
in; with a bias, experts whose scores lie within rounding of each other may change places.
"""

import torch
from memory import guarded, sliced
from numerics import assert_close_to_oracle
from quantize_cases import POISON, poisoned_outputs

from tigon import native
from tigon.native import moe as launchers
from tigon.reference import moe as reference

NAMES = (
    "indices", "weights", "scores", "counts", "offsets", "order", "inverse", "score_sums", "aux_counts", "z_sum",
)  # fmt: skip
INF = float("inf")
ROUNDING = 4e-7  # of a score plus a bias of its size


def spread(t: int, e: int) -> torch.Tensor:
    """(t,e) logits from -5 to 5, each row in an order of its own."""
    levels = torch.linspace(-5, 5, e)
    return torch.stack([levels[torch.randperm(e)] for _ in range(t)]) if t else torch.empty(0, e)


def odd(e: int = 70) -> torch.Tensor:
    """Rows that are infinite here and there, or altogether, NaN, far below zero, far above, or denormal as scores."""
    z = spread(14, e)
    z[1, 3] = float("nan")
    z[2, :] = float("nan")
    z[3, 5], z[3, 6], z[3, 7] = INF, INF, -INF
    z[4, :] = -INF
    z[5, :] = INF
    z[6, 2:] = -INF
    z[7] = z[7] - 90  # sigmoids of fp32's smallest numbers
    z[8] = z[8] * 1e30
    z[9, 0], z[9, 1] = float("nan"), INF
    z[10] = z[10] - 1000
    z[11] = z[11] + 1000
    z[12, 0::2] = -float("nan")  # the other sign: their scores' bits would be the largest
    return z


def bounds(kind: str | None, t: int) -> torch.Tensor | None:
    """cu_seqlens of several sequences, empty ones among them; or None."""
    if kind is None:
        return None
    ends = [0, 0, t // 3, t // 3, t // 3, min(t // 3 + 1, t), t, t]
    return guarded(torch.tensor(ends, dtype=getattr(torch, kind)))


def masked(t: int) -> torch.Tensor:
    mask = torch.rand(t) < 0.7
    mask[0] = False
    return mask


def route_arguments(t=5, e=48, k=6, **changes) -> dict:
    """Arguments of moe_route by name, some changed."""
    given = changes.get("logits")
    plain = dict(
        logits=spread(t, e) if given is None else given, bias=None, top_k=k, scale=1.0, score="sigmoid",
        normalize=True, eps=1e-20, groups=1, top_groups=1, sums=False, z_loss=False, cu_seqlens=None, mask=None,
    )  # fmt: skip
    return plain | changes


def route_case(
    t, e, k, groups, bias, score, normalize, masking, sums, z_loss, cu, layout, scale
) -> dict:
    groups = groups if e % groups == 0 else 1
    top = (groups + 1) // 2
    return route_arguments(
        logits=sliced(spread(t, e), 1) if layout == "sliced" else guarded(spread(t, e)),
        bias=guarded(torch.randn(e).mul(0.2).to(bias)) if bias else None,
        k=min(k, e // groups * top),
        scale=scale,
        score=score,
        normalize=normalize,
        groups=groups,
        top_groups=top,
        sums=sums,
        z_loss=z_loss,
        cu_seqlens=bounds(cu, t) if sums else None,
        mask=masked(t) if masking else None,
    )


def launched(name: str, arguments: dict, know=lambda *_: None):
    """The launcher's results; nothing beside them may be written."""
    with poisoned_outputs(know, launchers) as made:
        got = getattr(native, name)(**arguments)
    for buffer, start, size in made:
        around = torch.cat([buffer[:start], buffer[start + size :]])
        assert (around == POISON).all(), "memory beside an output changed"
    return got


def on_cpu(arguments: dict, dtype=None) -> dict:
    def move(v):
        if not isinstance(v, torch.Tensor):
            return v
        return v.cpu().to(dtype) if dtype and v.is_floating_point() else v.cpu()

    return {name: move(v) for name, v in arguments.items()}


def check_route(arguments: dict, know=lambda *_: None, exact: bool = False) -> dict:
    """Launch and compare. exact: the choices are the reference's even where scores are equal or not finite."""
    got = dict(zip(NAMES, launched("moe_route", arguments, know), strict=True))
    got = {name: v.cpu() for name, v in got.items()}
    plain = on_cpu(arguments)
    want = dict(zip(NAMES, reference.moe_route(**plain), strict=True))
    for name in NAMES:
        assert (got[name].shape, got[name].dtype) == (want[name].shape, want[name].dtype), name
    (t, e), live = plain["logits"].shape, plain["mask"]
    live = torch.ones(t, dtype=torch.bool) if live is None else live
    chosen = got["indices"]
    assert (chosen[~live] == e).all() and not got["weights"][~live].any()
    if exact:
        assert torch.equal(chosen, want["indices"])
    else:
        same_choice(plain, chosen[live], want["indices"][live], live)

    s = reference._scores(plain["logits"].double(), plain["score"])[live]
    s = s.gather(1, chosen[live].long())
    s = torch.where(plain["logits"].isnan().any(1, keepdim=True)[live], torch.nan, s)
    w = s / (s.sum(-1, keepdim=True) + plain["eps"]) if plain["normalize"] else s
    for name, value in (("scores", s), ("weights", w * plain["scale"])):
        close = dict(rtol=1e-6, atol=1e-37, equal_nan=True)
        torch.testing.assert_close(got[name][live], value.float(), **close)
    for name, value in zip(NAMES[3:7], reference.moe_sort(chosen, e), strict=True):
        assert torch.equal(got[name], value), name
    assert torch.equal(got["aux_counts"], want["aux_counts"])
    for name in ("score_sums", "z_sum"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7, equal_nan=True)
    return got


def same_choice(arguments: dict, chosen, wanted, live) -> None:
    """The same experts, up to those whose ranks are equal within rounding; none twice."""
    rank = reference._scores(arguments["logits"], arguments["score"])[live]
    rank = rank if arguments["bias"] is None else rank + arguments["bias"].float()
    off = rank.gather(1, chosen.long()) - rank.gather(1, wanted.long())
    assert off.abs().max() <= ROUNDING if off.numel() else True
    ordered = chosen.sort(-1)[0]
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


def backward_case(t, e, k, score, normalize, losses, cu, masking, layout, scale) -> dict:
    """Arguments of moe_route_backward: of choices that a reference made, some of them skipped."""
    dsums, dz = "sums" in losses, "z" in losses
    logits = torch.randn(t, e) * 2
    logits = sliced(logits, 1) if layout == "sliced" else guarded(logits)
    mask, cu = masked(t) if masking else None, bounds(cu, t) if dsums else None
    routed = reference.moe_route(
        **route_arguments(logits=logits, k=min(k, e), score=score, mask=mask)
    )
    indices, scores = routed[0].clone(), routed[2]
    if t > 2:
        indices[2, 0] = e  # skipped
    needed = dsums or dz or (score == "softmax" and not normalize)
    return dict(
        dweights=guarded(torch.randn(t, min(k, e))),
        dscore_sums=guarded(torch.randn(1 if cu is None else cu.numel() - 1, e)) if dsums else None,
        dz_sum=guarded(torch.randn(1))[0] if dz else None,
        logits=logits if needed else None,
        indices=guarded(indices),
        scores=guarded(scores),
        e=e, scale=scale, score=score, normalize=normalize, eps=1e-20, cu_seqlens=cu, mask=mask,
    )  # fmt: skip


def check_backward(arguments: dict, know=lambda *_: None) -> torch.Tensor:
    got = launched("moe_route_backward", arguments, know).cpu()
    oracle = reference.moe_route_backward(**on_cpu(arguments, torch.float64))
    baseline = reference.moe_route_backward(**on_cpu(arguments))
    assert_close_to_oracle("dlogits", got, oracle, baseline)
    mask = arguments["mask"]
    if mask is not None:
        assert not got[~mask.cpu()].any()
    return got


def check_sort(arguments: dict, know=lambda *_: None) -> None:
    got = launched("moe_sort", arguments, know)
    for a, b in zip(got, reference.moe_sort(**on_cpu(arguments)), strict=True):
        assert torch.equal(a.cpu(), b)
