"""transformers' NemotronH layer, with random weights, as an oracle of moe_route and moe_experts; Megatron's placement.

Then routings as hypothesis draws them, odd ones above all: what holds for any of them is checked in fp64.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close_to_oracle

import tigon

pytest.importorskip("transformers", minversion="5.23")
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHExperts,
    NemotronHMoE,
    NemotronHTopkRouter,
)

D, E, M, K, SHARED, SCALE = 24, 16, 20, 5, 28, 2.5
LAYERS = {
    "latent": {"moe_latent_size": 12},
    "full width": {},
    "latent, groups": {"moe_latent_size": 12, "n_group": 4, "topk_group": 2},
    "full width, groups": {"n_group": 4, "topk_group": 3},
    "not normalized": {"moe_latent_size": 12, "norm_topk_prob": False},
}


def config(**changes):
    sizes = {
        "hidden_size": D,
        "n_routed_experts": E,
        "num_experts_per_tok": K,
        "moe_intermediate_size": M,
        "moe_shared_expert_intermediate_size": SHARED,
        "routed_scaling_factor": SCALE,
        "norm_topk_prob": True,
    }
    found = NemotronHConfig(**(sizes | changes))
    found._experts_implementation = "eager"
    return found


def built(kind, dtype=torch.float32, **changes):
    module = kind(config(**changes))
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            t.normal_(std=0.2 if "bias" in name else t.shape[-1] ** -0.5)
    return module.to(dtype)


def rule(router):
    return {
        "top_k": router.top_k,
        "scale": router.routed_scaling_factor,
        "normalize": router.norm_topk_prob,
        "groups": router.num_group,
        "top_groups": router.topk_group,
    }


def layer(moe, x, **options):
    """NemotronHMoE on Tigon's ops."""
    logits = F.linear(x.float(), moe.gate.weight.float())
    routing = tigon.moe_route(logits, moe.gate.e_score_correction_bias.float(), **rule(moe.gate))
    y = tigon.moe_experts(
        moe.fc1_latent_proj(x), moe.experts.up_proj, moe.experts.down_proj, routing, **options
    )
    return moe.fc2_latent_proj(y) + moe.shared_experts(x)


@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS.keys())
def test_the_router_chooses_and_weighs_alike(changes):
    router, x = built(NemotronHTopkRouter, **changes), torch.randn(60, D)
    logits, weights, indices = router(x)
    routing = tigon.moe_route(logits, router.e_score_correction_bias, **rule(router))
    want = torch.zeros(60, E).scatter(1, indices, weights)
    got = torch.zeros(60, E).scatter(1, routing.indices.long(), routing.weights)
    torch.testing.assert_close(got, want)
    assert torch.equal(got > 0, want > 0)
    assert routing.counts.tolist() == indices.flatten().bincount(minlength=E).tolist()
    dw = torch.randn(60, E)
    grads = [
        torch.autograd.grad((y * dw).sum(), router.weight, retain_graph=True)[0]
        for y in (want, got)
    ]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("save", ["hidden", "relu", "nothing"])
@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS.keys())
def test_the_layer_and_every_gradient_in_fp32(changes, save):
    moe, x = built(NemotronHMoE, **changes), torch.randn(60, D, requires_grad=True)
    leaves = {"x": x} | dict(moe.named_parameters())
    want, got = moe(x), layer(moe, x, save=save)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for name, a, b in zip(
        leaves,
        torch.autograd.grad(got, list(leaves.values()), dy),
        torch.autograd.grad(want, list(leaves.values()), dy),
        strict=True,
    ):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda t, name=name: name + t)


@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS.keys())
def test_bf16_experts_are_as_near_to_fp64_as_transformers(changes):
    """Both are given the same choices, so that no flip of one hides what is measured."""
    experts = built(NemotronHExperts, torch.bfloat16, **changes)
    width = experts.up_proj.shape[2]
    x, dy = torch.randn(2, 60, width).bfloat16()
    routing = tigon.moe_route(torch.randn(60, E), top_k=K, scale=SCALE)

    def run(call, dtype):
        given = [
            t.detach().to(dtype).requires_grad_() for t in (x, experts.up_proj, experts.down_proj)
        ]
        weights = routing.weights.to(
            max(dtype, torch.float32, key=lambda d: d.itemsize)
        ).requires_grad_()
        y = call(*given, weights)
        return y, *torch.autograd.grad(y, [*given, weights], dy.to(dtype))

    def theirs(x, up, down, weights):
        del experts.up_proj, experts.down_proj
        experts.up_proj, experts.down_proj = up, down
        return experts(x, routing.indices.long(), weights)

    def ours(x, up, down, weights):
        return tigon.moe_experts(x, up, down, tigon.moe_sort(routing.indices, weights, experts=E))

    got, honest = run(ours, torch.bfloat16), run(theirs, torch.bfloat16)
    oracle = run(theirs, torch.float64)
    for name, a, b, right in zip(
        ("y", "dx", "dup", "ddown", "dw"), got, honest, oracle, strict=True
    ):
        assert_close_to_oracle(name, a, right, b)


def megatron(x, up, down, probs, indices):
    """Megatron-LM's experts: rows permuted, probs times relu(h)^2 in fp32, then fc2; unpermuted without weights."""
    t, k = indices.shape
    order = indices.flatten().argsort(stable=True)
    rows, p = x[order // k], probs.flatten()[order, None]
    out = torch.cat([
        F.linear((F.relu(F.linear(row, up[e])).to(probs.dtype).square() * q).to(x.dtype), down[e])
        for e, (row, q) in enumerate(zip(*(
            v.split(indices.flatten().bincount(minlength=len(up)).tolist()) for v in (rows, p)
        ), strict=True))
    ])  # fmt: skip
    back = torch.empty_like(order)
    back[order] = torch.arange(t * k)
    return out[back].view(t, k, -1).to(probs.dtype).sum(1).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_placement", ["weights", "output"])
def test_megatron_s_placement_and_its_gradients(dtype, scale_placement):
    logits = torch.randn(50, E, requires_grad=True)
    routing = tigon.moe_route(logits, top_k=K, scale=SCALE, scale_placement=scale_placement)
    leaves = [torch.randn(s, dtype=dtype) for s in ((50, 12), (E, M, 12), (E, 12, M))]
    leaves = [(t * t.shape[-1] ** -0.5).requires_grad_() for t in leaves]
    dy = torch.randn(50, 12).to(dtype)

    def results(y, wanted):
        return y, *torch.autograd.grad(y, wanted, dy.to(y.dtype), retain_graph=True)

    y = tigon.moe_experts(*leaves, routing, weight_placement="before_down")
    got = results(y * routing.output_scale, [*leaves, logits])
    weights = routing.weights * routing.output_scale
    honest = results(megatron(*leaves, weights, routing.indices), [*leaves, logits])
    wide = [t.double() for t in (*leaves, weights)]
    oracle = results(megatron(*wide, routing.indices), [*leaves, logits])
    for name, a, b, right in zip(
        ("y", "dx", "dup", "ddown", "dz"), got, honest, oracle, strict=True
    ):
        assert_close_to_oracle(name, a, right.double(), b)
    if dtype == torch.bfloat16 and scale_placement == "weights":
        assert (got[0] == honest[0]).float().mean() > 0.99  # the same rounding points: sums differ


ROUTINGS = st.fixed_dictionaries({
    "t": st.integers(1, 12),
    "e": st.integers(1, 9),
    "k": st.integers(1, 9),
    "kind": st.sampled_from(["random", "one set", "half empty", "ties", "large bias"]),
    "masked": st.booleans(),
    "save": st.sampled_from(["hidden", "relu", "nothing"]),
    "placement": st.sampled_from(["after_down", "before_down"]),
    "seed": st.integers(0, 2**31),
})  # fmt: skip


def drawn(case):
    """(logits that require a gradient, bias, mask, k) of a case."""
    t, e, kind = case["t"], case["e"], case["kind"]
    torch.manual_seed(case["seed"])
    logits, bias = torch.randn(t, e, dtype=torch.float64), torch.zeros(e, dtype=torch.float64)
    k, shift = min(case["k"], e), torch.zeros(e, dtype=torch.float64)
    if kind == "one set":
        shift[torch.randperm(e)[:k]] = 9
    if kind == "half empty":
        k = min(k, (e + 1) // 2)
        shift[(e + 1) // 2 :] = -9
    if kind == "ties":
        logits = logits.round()
    if kind == "large bias":
        bias = 100 * torch.randperm(e).double()
    mask = torch.rand(t) < 0.6 if case["masked"] else None
    return (logits + shift).requires_grad_(), bias, mask, k


@given(ROUTINGS)
def test_any_routing_gives_transformers_outputs_and_keeps_its_laws(case):
    logits, bias, mask, k = drawn(case)
    t, e = logits.shape
    live = torch.ones(t, dtype=torch.bool) if mask is None else mask
    routing = tigon.moe_route(logits, bias, top_k=k, scale=SCALE, mask=mask)
    chosen = routing.indices[live]
    assert routing.counts.sum() == routing.offsets[-1] == live.sum() * k
    assert all(len(set(row)) == k for row in chosen.tolist())
    torch.testing.assert_close(routing.weights.sum(1), SCALE * live.double())
    if case["kind"] == "one set":
        assert (routing.counts > 0).sum() == (k if live.any() else 0)
    if case["kind"] == "half empty":
        assert not routing.counts[(e + 1) // 2 :].any()
    if case["kind"] == "large bias":
        assert (chosen == bias.argsort(descending=True)[:k]).all()

    x, up, down = (torch.randn(s, dtype=torch.float64) for s in ((t, 4), (e, 6, 4), (e, 4, 6)))
    leaves = [v.requires_grad_() for v in (x, up, down)]
    options = {"save": case["save"], "weight_placement": case["placement"]}
    y = tigon.moe_experts(x, up, down, routing, **options)
    experts = NemotronHExperts(config(hidden_size=4, n_routed_experts=e, moe_intermediate_size=6))
    del experts.up_proj, experts.down_proj
    experts.up_proj, experts.down_proj = up, down
    # transformers has no masked tokens: expert 0 with weight 0 stands for none.
    want = experts(x, torch.where(live[:, None], routing.indices, 0).long(), routing.weights)
    torch.testing.assert_close(y, want)

    dy = torch.randn_like(y)
    wanted = [*leaves, logits, routing.weights]
    kept = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(y, wanted, dy, **kept)
    right = torch.autograd.grad(want, wanted, dy, **kept)
    for a, b in zip(grads[:4], right, strict=False):
        torch.testing.assert_close(a, b)
    # Euler: y is of degree 1 in down and in the weights, of degree 2 in x and in up.
    value = (y * dy).sum()
    dx, dup, ddown, dlogits, dweights = grads
    for degree, v, d in (
        (2, x, dx),
        (2, up, dup),
        (1, down, ddown),
        (1, routing.weights, dweights),
    ):
        torch.testing.assert_close((v * d).sum(), degree * value)
    # Weights that are normalized do not feel a common factor of the scores.
    score = torch.sigmoid(logits)
    torch.testing.assert_close((dlogits / (1 - score)).sum(1), torch.zeros(t, dtype=torch.float64))
    empty = routing.counts == 0
    assert not dup[empty].any() and not ddown[empty].any()
    # Experts that are alike: the weights' sum is all that is left of a routing.
    alike = [v[:1].expand_as(v).contiguous() for v in (up, down)]
    one = F.linear(F.linear(x, up[0]).relu().square(), down[0])
    got = tigon.moe_experts(x, *alike, routing, **options)
    torch.testing.assert_close(got, SCALE * one * live[:, None])


def test_a_skipped_choice_gives_nothing_whatever_its_weight():
    x, up, down = (torch.randn(s) for s in ((3, 4), (2, 6, 4), (2, 4, 6)))
    indices = torch.tensor([[0, 2], [1, -1], [1, 0]], dtype=torch.int32)
    weights = torch.tensor([[1, torch.nan], [1, torch.inf], [1, 1]])
    for placement in ("after_down", "before_down"):
        options = {"weight_placement": placement}
        given = tigon.moe_sort(indices, weights.requires_grad_(), experts=2)
        y = tigon.moe_experts(x, up, down, given, **options)
        clean = tigon.moe_sort(indices, weights.detach().nan_to_num(0, 0), experts=2)
        torch.testing.assert_close(y, tigon.moe_experts(x, up, down, clean, **options))
        (dw,) = torch.autograd.grad(y.sum(), weights)
        assert dw.isfinite().all() and dw[0, 1] == dw[1, 1] == 0
