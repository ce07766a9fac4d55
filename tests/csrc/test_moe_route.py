"""csrc/moe_route.cu, moe_sort.cu, moe_sums.cu and moe_route_backward.cu against the reference, in guarded memory."""

import pytest
import torch
from decode_cases import moved
from memory import guarded
from options import case_id, pairwise
from route_cases import (
    backward_case,
    bounds,
    check_backward,
    check_route,
    check_sort,
    launched,
    masked,
    odd,
    route_arguments,
    route_case,
    spread,
)

import tigon
from tigon import native
from tigon.native import loader, moe
from tigon.reference import moe as reference

INF, NAN = float("inf"), float("nan")
CASES = pairwise(
    e=[512, 1, 6, 48, 96, 160, 384, 576, 1000, 4096],
    k=[22, 1, 6, 64],
    t=[5, 70, 1, 33],
    groups=[1, 4],
    bias=[torch.float32, None, torch.float64],
    score=["sigmoid", "softmax"],
    normalize=[True, False],
    masking=[False, True],
    sums=[False, True],
    z_loss=[False, True],
    cu=[None, "int32", "int64"],
    layout=["packed", "sliced"],
    scale=[1.0, 5.0],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_routes_as_the_reference(kernels, case):
    check_route(moved(route_case(**case), kernels))


TIES = [(70, 512, 22), (5, 512, 64), (3, 4096, 64), (3, 1000, 1), (9, 40, 22), (40, 96, 33)]


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("size", TIES, ids=str)
def test_ties_go_to_the_lower_index(kernels, size, levels):
    """Few different logits: a choice among hundreds of equal scores, and the same with a bias and for the losses."""
    t, e, k = size
    logits = torch.randint(levels, (t, e)).float()
    bias = torch.randint(2, (e,)).float() if levels == 2 else None
    arguments = route_arguments(logits=logits, k=k, bias=bias, sums=True, normalize=levels > 1)
    check_route(moved(arguments, kernels), exact=True)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("groups, top", [(2, 1), (8, 3), (16, 16), (48, 20), (96, 30)])
def test_groups_that_tie_go_to_the_lower_index(kernels, groups, top, levels):
    logits = torch.randint(levels, (9, 96)).float()
    k = min(96 // groups * top, 20)
    arguments = route_arguments(logits=logits, k=k, groups=groups, top_groups=top, sums=True)
    check_route(moved(arguments, kernels), exact=True)


def test_as_many_groups_as_the_largest_row_has_experts(kernels):
    case = route_arguments(3, 4096, 40, groups=4096, top_groups=1000, score="softmax")
    check_route(moved(case, kernels), exact=True)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("normalize", [True, False])
def test_numbers_that_are_not_finite_stay_in_their_token(kernels, score, groups, normalize):
    arguments = route_arguments(
        logits=odd(), k=22, score=score, groups=groups, top_groups=(groups + 1) // 2, normalize=normalize
    )  # fmt: skip
    if (
        score == "sigmoid"
    ):  # fp32's smallest numbers are no exact ground for the reference's own exp
        arguments["logits"] = arguments["logits"][torch.arange(14) != 7]
    got = check_route(moved(arguments, kernels), exact=True)
    assert got["weights"][0].isfinite().all() and got["weights"][-1].isfinite().all()


def test_scores_below_the_normal_numbers_keep_their_order(kernels):
    z = -torch.arange(60, 100, 0.5)[None]
    got = check_route(moved(route_arguments(logits=z, k=50, normalize=False), kernels), exact=True)
    assert got["indices"][0].tolist() == list(range(50))


def test_losses_of_rows_that_are_not_finite(kernels):
    """Their sums are not finite, as the reference's; the masked rows' do not count."""
    for score in ("sigmoid", "softmax"):
        for row in (1, 3, 4, 5, 6):
            z = torch.stack([odd()[0], odd()[row]])
            for mask in (None, torch.tensor([True, False])):
                case = dict(logits=z, k=3, score=score, sums=True, z_loss=True, mask=mask)
                got = check_route(moved(route_arguments(**case), kernels), exact=True)
                if mask is not None:
                    assert got["score_sums"].isfinite().all() and got["z_sum"].isfinite()


def test_a_huge_bias_chooses_and_does_not_weigh(kernels):
    bias = torch.zeros(300)
    bias[[7, 299]], bias[5], bias[8] = torch.tensor([1e30, 3e38]), INF, -INF
    case = route_arguments(40, 300, 4, bias=bias, normalize=False)
    got = check_route(moved(case, kernels), exact=True)
    assert (got["indices"][:, :3] == torch.tensor([5, 299, 7])).all()
    assert (got["weights"] <= 1).all()


def test_a_group_with_both_infinities_comes_first(kernels):
    """Its sum is NaN, which torch sorts before all numbers."""
    bias = torch.tensor([0.0, 0, 0, 0, INF, -INF, 0, 0])
    case = route_arguments(3, 8, 2, bias=bias, groups=4, top_groups=1)
    got = check_route(moved(case, kernels), exact=True)
    assert got["indices"].tolist() == [[4, 5]] * 3


@pytest.mark.parametrize("sums", [False, True])
def test_no_tokens(kernels, sums):
    case = route_arguments(0, 12, 3, sums=sums, z_loss=sums, cu_seqlens=bounds("int32", 0))
    check_route(moved(case, kernels))
    empty = backward_case(0, 12, 3, "softmax", False, "sums z", None, False, "packed", 1.0)
    assert native.moe_route_backward(**moved(empty, kernels)).shape == (0, 12)


@pytest.mark.parametrize("t", [9, 80])
def test_all_tokens_masked(kernels, t):
    case = route_arguments(t, 33, 5, mask=torch.zeros(t, dtype=torch.bool), sums=True, z_loss=True)
    got = check_route(moved(case, kernels))
    assert not got["counts"].any() and (got["order"] == -1).all()


def test_a_row_has_the_same_bits_alone(kernels):
    case = moved(route_arguments(70, 160, 22, bias=torch.randn(160)), kernels)
    together = launched("moe_route", case)
    for row in (0, 40, 69):
        alone = launched("moe_route", case | {"logits": case["logits"][row : row + 1]})
        for a, b in zip(together[:3], alone[:3], strict=True):
            assert torch.equal(a[row : row + 1], b)


def test_offsets_past_two_to_the_31_elements(kernels):
    far, logits = 2**31 + 64, spread(3, 96)
    memory = torch.empty(2 * far + 96, dtype=torch.float32, device=kernels)
    rows = memory.as_strided((3, 96), (far, 1)).copy_(logits)
    check_route(moved(route_arguments(logits=logits), kernels) | {"logits": rows})


@pytest.mark.parametrize("size", [(1, 1, 1), (40, 6, 3), (300, 22, 512), (70, 9, 4096), (0, 4, 7)])
def test_choices_made_elsewhere_are_sorted(kernels, size):
    """Any numbers: the same expert twice for a token, and indices that are none."""
    t, k, e = size
    indices = guarded(torch.randint(-2, e + 2, (t, k), dtype=torch.int32))
    check_sort(moved(dict(indices=indices, e=e), kernels))


@pytest.mark.parametrize("chunks", [1, 31, 257, 1024])
def test_histogram_becomes_prefixes(kernels, chunks):
    """moe_count alone, for as many chunks as only many tokens make."""
    e = 45
    rows = torch.randint(50, (chunks, e), dtype=torch.int32)
    histogram, z = rows.to(kernels, copy=True), torch.rand(chunks, device=kernels)
    counts = torch.full((e,), -1, dtype=torch.int32, device=kernels)
    z_sum = torch.full((), NAN, device=kernels)
    pointers = (t.data_ptr() for t in (histogram, counts, z, z_sum))
    loader.run(moe.plan_count(e), kernels, moe.MOE_COUNT.pack(*pointers, chunks, e))
    assert torch.equal(counts.cpu(), rows.sum(0).int())
    assert torch.equal(histogram.cpu(), (rows.cumsum(0) - rows).int())
    torch.testing.assert_close(z_sum, z.sum())


def test_chunks_of_many_tokens(kernels, monkeypatch):
    """As with millions of tokens: chunks of more than 32."""
    monkeypatch.setattr(moe, "CHUNKS", 2)
    moe.plan_route.cache_clear()
    case = route_arguments(
        150, 24, 5, sums=True, cu_seqlens=bounds("int64", 150), mask=masked(150), z_loss=True
    )
    try:
        assert moe.plan_route(150, 24)[1] == 96
        check_route(moved(case, kernels))
    finally:
        moe.plan_route.cache_clear()


GRADIENTS = pairwise(
    e=[512, 1, 6, 96, 160, 1000, 4096],
    k=[22, 1, 6, 64],
    t=[5, 1, 20],
    score=["sigmoid", "softmax"],
    normalize=[True, False],
    losses=["", "sums z", "sums", "z"],
    cu=[None, "int32", "int64"],
    masking=[False, True],
    layout=["packed", "sliced"],
    scale=[1.0, 5.0],
)


@pytest.mark.parametrize("case", GRADIENTS, ids=case_id)
def test_gradient_is_the_references(kernels, case):
    check_backward(moved(backward_case(**case), kernels))


def test_gradient_of_a_row_that_is_not_finite_stays_in_it(kernels):
    for losses in ("", "sums z"):
        case = backward_case(14, 70, 22, "softmax", False, losses, None, False, "packed", 1.0)
        case["logits"] = odd()
        got = native.moe_route_backward(**moved(case, kernels)).cpu()
        want = reference.moe_route_backward(**case)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert got[0].isfinite().all() and got[-1].isfinite().all()


OPTIONS = dict(
    top_k=5, groups=4, top_groups=2, scale=2.5, aux="sequence", z_loss=True, score="softmax"
)


def public(logits):
    """Everything at once, through the public function, with gradients."""
    t, e = logits.shape
    r = tigon.moe_route(
        logits, torch.zeros(e, device=logits.device), normalize=False, **OPTIONS,
        cu_seqlens=torch.tensor([0, 4, t], device=logits.device), mask=torch.arange(t, device=logits.device) != 3,
    )  # fmt: skip
    loss = r.weights.square().sum() + r.aux_loss() + r.z_loss()
    return r.indices, r.weights, r.order, r.inverse, torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("t", [9, 70])
def test_public_function_reaches_the_kernels(kernels, t):
    logits = spread(t, 48).to(kernels).requires_grad_()
    results = []
    for backend in ("kernel", "reference"):
        with tigon.backend(backend):
            results.append(public(logits))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_nothing_waits_for_the_device(kernels, no_host_sync):
    with tigon.backend("kernel"):
        public(torch.randn(70, 48, device=kernels, requires_grad=True))


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_explain_shows_the_launches(kernels, arch):
    told = tigon.explain("moe_route", torch.empty(8192, 512), top_k=22, arch=arch).launch
    assert list(told) == ["moe_route", "moe_count", "moe_sort"]
    assert told["moe_route"] == moe.plan_route(8192, 512)[0]
    assert "<16>" in told["moe_route"].kernel and told["moe_route"].grid == (256, 1)
    alone = tigon.explain("moe_route", torch.empty(32, 512), top_k=22, arch=arch).launch
    assert list(alone) == ["moe_route"]
    options = dict(top_k=8, groups=8, top_groups=4, aux="batch")
    losses = tigon.explain("moe_route", torch.empty(64, 256), arch=arch, **options)
    assert "<0>" in losses.launch["moe_route"].kernel and "moe_join" in losses.launch


def test_plans_fit_every_chip():
    """99 KB is what sm_120 gives a block; all tokens have a block, and no launch passes a grid."""
    for e in (1, 31, 512, 513, 1024, 1025, 4095, 4096):
        for groups in (1, e):
            for t in (1, 17, 64, 65, 8192, 2**20, 2**20 + 1, moe.LONGEST):
                launch, chunk = moe.plan_route(t, e, groups)
                assert launch.shared_bytes <= 99 * 1024 and 32 <= launch.block <= 512
                assert launch.grid[0] * chunk >= t > (launch.grid[0] - 1) * chunk
                assert launch.grid[0] <= moe.CHUNKS
        assert moe.plan_backward(17, e).shared_bytes <= 48 * 1024
        assert moe.plan_sort(5, e).shared_bytes <= 48 * 1024
    for plan in (moe.plan_route, moe.plan_backward):
        with pytest.raises(ValueError, match="tokens are over"):
            plan(2**31 - 1, 1)
