"""`moe_route` on the reference: the rule token by token, the order by expert, losses, gradients, odd rows, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from options import case_id, pairwise

import tigon


def rule(z, bias, k, scale, score, normalize, eps, groups, top_groups):
    """(choices, weights) of one token's logits, in Python floats."""
    e = len(z)
    if score == "sigmoid":
        s = [1 / (1 + math.exp(-v)) for v in z]
    else:
        total = sum(math.exp(v - max(z)) for v in z)
        s = [math.exp(v - max(z)) / total for v in z]
    rank = [a + b for a, b in zip(s, bias, strict=True)]
    size = e // groups
    best = [sum(sorted(rank[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-best[g], g))[:top_groups]
    inside = [i for i in range(e) if i // size in kept]
    chosen = sorted(inside, key=lambda i: (-rank[i], i))[:k]
    below = sum(s[i] for i in chosen) + eps if normalize else 1.0
    return chosen, [scale * s[i] / below for i in chosen]


CASES = pairwise(
    sizes=[(7, 12, 3), (1, 4, 4), (5, 1, 1), (20, 48, 22), (0, 8, 2)],
    grouped=[False, True],
    score=["sigmoid", "softmax"],
    normalize=[True, False],
    bias=[False, True],
    scale=[1.0, 5.0],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_choices_and_weights_are_the_rule(case):
    t, e, k = case["sizes"]
    groups = 4 if case["grouped"] and e % 4 == 0 else 1
    top_groups = min(groups, 3)
    k = min(k, e // groups * top_groups)
    logits = torch.randn(t, e, dtype=torch.float64)
    bias = torch.randn(e, dtype=torch.float64) * 0.2 if case["bias"] else torch.zeros(e).double()
    options = {name: case[name] for name in ("score", "normalize", "scale")}
    r = tigon.moe_route(
        logits, bias, top_k=k, groups=groups, top_groups=top_groups, eps=1e-20, **options
    )
    for i in range(t):
        chosen, weights = rule(
            logits[i].tolist(), bias.tolist(), k, case["scale"], case["score"], case["normalize"],
            1e-20, groups, top_groups,
        )  # fmt: skip
        assert r.indices[i].tolist() == chosen
        assert r.weights[i].tolist() == pytest.approx(weights, rel=1e-12)
    assert r.counts.tolist() == [int((r.indices == i).sum()) for i in range(e)]


@given(
    st.integers(1, 6).flatmap(
        lambda e: st.tuples(
            st.just(e), st.lists(st.lists(st.integers(-1, e + 1), min_size=2, max_size=2))
        )
    )
)
def test_order_is_a_stable_sort_and_inverse_its_inverse(drawn):
    """Any choices, skipped ones (outside 0 to e-1) included."""
    e, rows = drawn
    indices = torch.tensor(rows, dtype=torch.int32).reshape(-1, 2)
    counts, offsets, order, inverse = torch.ops.tigon.moe_sort(indices, e)
    flat = indices.flatten().tolist()
    live = [c for expert in range(e) for c, i in enumerate(flat) if i == expert]
    assert order.tolist() == live + [-1] * (len(flat) - len(live))
    assert offsets.tolist() == [0, *torch.tensor(counts.tolist()).cumsum(0).tolist()]
    assert all(inverse[c] == r for r, c in enumerate(live))
    assert sum(i == -1 for i in inverse.tolist()) == len(flat) - len(live)


def test_ties_go_to_the_lower_index():
    r = tigon.moe_route(torch.zeros(3, 10), top_k=4)
    assert r.indices.tolist() == [[0, 1, 2, 3]] * 3
    assert r.weights.tolist() == [[0.25] * 4] * 3
    r = tigon.moe_route(torch.zeros(3, 10), top_k=2, groups=5, top_groups=1)
    assert r.indices.tolist() == [[0, 1]] * 3


def test_the_bias_chooses_and_does_not_weigh():
    logits = torch.randn(6, 8)
    bias = torch.zeros(8)
    bias[5] = 100.0
    r = tigon.moe_route(logits, bias, top_k=2, normalize=False)
    assert r.indices[:, 0].tolist() == [5] * 6
    torch.testing.assert_close(r.weights[:, 0], torch.sigmoid(logits[:, 5]))


def test_a_masked_token_chooses_nobody():
    logits, mask = torch.randn(5, 8), torch.tensor([True, False, True, True, False])
    r = tigon.moe_route(logits, top_k=3, mask=mask, aux="batch", z_loss=True)
    alone = tigon.moe_route(logits[mask], top_k=3, aux="batch", z_loss=True)
    assert (r.indices[~mask] == 8).all() and not r.weights[~mask].any()
    for name in ("counts", "offsets", "score_sums", "aux_counts", "z_sum"):
        torch.testing.assert_close(getattr(r, name), getattr(alone, name))
    assert r.order[9:].tolist() == [-1] * 6 and (r.inverse.view(5, 3)[~mask] == -1).all()


def test_a_nan_stays_with_its_token_and_infinities_are_scores_of_0_and_1():
    logits = torch.randn(4, 6)
    logits[1, 2] = torch.nan
    logits[2, 0], logits[2, 1] = torch.inf, -torch.inf
    logits[3] = -torch.inf
    r = tigon.moe_route(logits, top_k=3)
    clean = tigon.moe_route(logits[:1], top_k=3)
    assert torch.equal(r.weights[0], clean.weights[0])
    assert r.weights[1].isnan().all() and 2 not in r.indices[1]
    assert r.indices[2, 0] == 0 and 1 not in r.indices[2] and r.weights[2].isfinite().all()
    assert r.indices[3].tolist() == [0, 1, 2] and not r.weights[3].any()


def test_losses_are_megatrons():
    """aux = e / (k n^2) sum_e P_e n_e a sequence, n_e chosen without the bias; z = mean logsumexp^2."""
    logits, bias = torch.randn(9, 6), torch.tensor([9.0, 0, 0, 0, 0, 0])
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    r = tigon.moe_route(logits, bias, top_k=2, aux="sequence", z_loss=True, cu_seqlens=bounds)
    s = torch.sigmoid(logits)
    share = s / s.sum(-1, keepdim=True)
    losses = []
    for a, b in ((0, 4), (4, 4), (4, 9)):
        chosen = torch.zeros(b - a, 6).scatter(1, s[a:b].topk(2)[1], 1)
        n = max(b - a, 1)
        losses.append(6 / (2 * n * n) * (share[a:b].sum(0) * chosen.sum(0)).sum())
    torch.testing.assert_close(r.aux_loss(), torch.stack(losses).mean())
    torch.testing.assert_close(r.z_loss(), torch.logsumexp(logits, -1).square().mean())
    assert r.aux_counts.sum(-1).tolist() == [8, 0, 10]
    whole = tigon.moe_route(logits, bias, top_k=2, aux="batch")
    torch.testing.assert_close(whole.score_sums[0], r.score_sums.sum(0))


GRADIENTS = pairwise(
    score=["sigmoid", "softmax"],
    normalize=[True, False],
    aux=[None, "batch", "sequence"],
    z_loss=[True, False],
    masked=[True, False],
    grouped=[True, False],
)


@pytest.mark.parametrize("case", GRADIENTS, ids=case_id)
def test_gradients(case):
    logits = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True, False]) if case["masked"] else None
    cu = torch.tensor([0, 3, 7]) if case["aux"] == "sequence" else None
    weigh = torch.randn(7, 3, dtype=torch.float64)

    def loss(z):
        r = tigon.moe_route(
            z, top_k=3, scale=2.5, score=case["score"], normalize=case["normalize"],
            groups=4 if case["grouped"] else 1, top_groups=2 if case["grouped"] else 1,
            aux=case["aux"], z_loss=case["z_loss"], cu_seqlens=cu, mask=mask,
        )  # fmt: skip
        total = (r.weights * weigh).sum()
        total = total + r.aux_loss() if case["aux"] else total
        return total + r.z_loss() if case["z_loss"] else total

    assert torch.autograd.gradcheck(loss, (logits,))


def kept_bytes(**options):
    """Bytes that autograd keeps for one routing, the logits' own storage counted apart."""
    logits, seen = torch.randn(64, 128, requires_grad=True), {}

    def pack(t):
        seen[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tigon.moe_route(logits, top_k=4, **options)
    return sum(seen.values())


def test_without_losses_nothing_of_the_size_of_the_logits_is_kept():
    compact, dense = 64 * 4 * 8, 64 * 128 * 4
    assert kept_bytes() == kept_bytes(score="softmax") == compact
    for options in ({"aux": "batch"}, {"z_loss": True}, {"score": "softmax", "normalize": False}):
        assert kept_bytes(**options) == compact + dense


def test_follows_the_law_of_registered_ops():
    logits = torch.randn(5, 8, requires_grad=True)
    rest = (torch.zeros(8), 3, 1.0, "sigmoid", True, 1e-20, 1, 1, True, True, None, None)
    # Not test_aot_dispatch_dynamic: it adds floats to an integer sum where the first output is one. Below instead.
    laws = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tigon.moe_route, (logits, *rest), test_utils=laws)

    def step(z):
        return tigon.moe_route(z, top_k=2, aux="batch", z_loss=True)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)):
        r = function(logits)
        loss = r.weights.square().sum() + r.aux_loss() + r.z_loss()
        results.append((r.indices, r.weights, r.order, *torch.autograd.grad(loss, logits)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_waits_for_the_device(no_host_sync):
    r = tigon.moe_route(
        torch.randn(9, 8, requires_grad=True), torch.zeros(8), top_k=2, groups=4, top_groups=2,
        aux="sequence", z_loss=True, cu_seqlens=torch.tensor([0, 4, 9]), mask=torch.ones(9, dtype=torch.bool),
    )  # fmt: skip
    (r.weights.sum() + r.aux_loss() + r.z_loss()).backward()


def test_double_backward_raises():
    logits = torch.randn(5, 8, requires_grad=True)
    r = tigon.moe_route(logits, top_k=2)
    (g,) = torch.autograd.grad(r.weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        g.sum().backward()


def test_choices_made_elsewhere_become_a_routing():
    r = tigon.moe_route(torch.randn(9, 6), top_k=2, mask=torch.arange(9) != 4)
    weights = r.weights.clone().requires_grad_()
    again = tigon.moe_sort(r.indices.long(), weights, experts=6)
    for name in ("indices", "weights", "counts", "offsets", "order", "inverse"):
        assert torch.equal(getattr(again, name), getattr(r, name)), name
    assert again.weights.requires_grad
    with pytest.raises(ValueError, match=r"weights has shape \(9, 1\), expected \(t, k\) with t=9"):
        tigon.moe_sort(r.indices, weights[:, :1], experts=6)
    with pytest.raises(ValueError, match="experts=0 must lie in 1 to 4096"):
        tigon.moe_sort(r.indices, weights, experts=0)


WRONG = [
    (dict(top_k=0), "top_k=0 must lie in 1 to 8"),
    (dict(top_k=9), "top_k=9 must lie in 1 to 8"),
    (dict(top_k=5, groups=4, top_groups=2), "top_k=5 must lie in 1 to 4"),
    (dict(top_k=2, groups=3), "groups=3 must divide e=8"),
    (dict(top_k=2, groups=4, top_groups=5), "top_groups=5 must lie in 1 to groups=4"),
    (dict(top_k=2, score="relu"), "score='relu' is not one of 'sigmoid', 'softmax'"),
    (dict(top_k=2, aux="tokens"), "aux='tokens' is not one of"),
    (dict(top_k=2, aux="sequence"), "aux='sequence' needs cu_seqlens"),
    (dict(top_k=2, scale_placement="input"), "scale_placement='input' is not one of"),
    (
        dict(top_k=2, bias=torch.zeros(7)),
        "bias has shape (7,), expected (e) with e=8 (from logits)",
    ),
    (
        dict(top_k=2, mask=torch.ones(3, dtype=torch.bool)),
        "mask has shape (3,), expected (t) with t=5",
    ),
    (dict(top_k=2, cu_seqlens=torch.tensor([0, 4])), "cu_seqlens must start at 0"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=lambda v: str(v)[:40])
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError) as caught:
        tigon.moe_route(torch.randn(5, 8), **options)
    assert message in str(caught.value)


def test_wrong_dtypes_and_sizes_are_named():
    with pytest.raises(TypeError, match="logits has dtype bfloat16, allowed: float32, float64"):
        tigon.moe_route(torch.randn(5, 8).bfloat16(), top_k=2)
    with pytest.raises(ValueError, match="e=5000 is not supported, 1 to 4096 are"):
        tigon.moe_route(torch.randn(2, 5000), top_k=2)
    with pytest.raises(ValueError, match=r"pass the 2\^31 choices"):
        tigon.moe_route(torch.empty(2**26, 64, device="meta"), top_k=64)
