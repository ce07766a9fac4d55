"""`moe_experts` and `grouped_mm` on the reference: the definition, rounding points, gradients, what is kept, errors."""

import pytest
import torch
import torch.nn.functional as F
from memory import sliced
from numerics import assert_close_to_oracle
from options import case_id, pairwise

import tigon


def definition(x, up, down, routing, activation, first=0, last=None):
    """y token by token, choice by choice."""
    last = routing.experts if last is None else last
    y = []
    for i in range(x.shape[0]):
        total = torch.zeros_like(x[i])
        for j in range(routing.top_k):
            e = routing.indices[i, j].item()
            if first <= e < last:
                h = up[e - first] @ x[i]
                if activation == "relu2":
                    a = F.relu(h).square()
                else:
                    gate, value = h.chunk(2)
                    a = F.silu(gate) * value
                total = total + routing.weights[i, j] * (down[e - first] @ a)
        y.append(total)
    return torch.stack(y) if y else torch.zeros_like(x)


def route(t, e, k, dtype=torch.float64, kind="random", **options):
    logits = torch.randn(t, e, dtype=dtype)
    if kind == "one expert":
        logits[:, 0] += 100
    return tigon.moe_route(logits, top_k=k, scale=2.0, **options)


def leaves(e, m, l, t, gates, dtype=torch.float64):
    shapes = ((t, l), (e, gates * m, l), (e, l, m))
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


CASES = pairwise(
    sizes=[(6, 4, 3, 5, 2), (1, 3, 7, 4, 3), (9, 16, 5, 8, 1), (0, 4, 3, 5, 2)],
    activation=["relu2", "swiglu"],
    placement=["after_down", "before_down"],
    save=["hidden", "relu", "nothing"],
    kind=["random", "one expert"],
    part=[None, (1, 3), (2, 2)],
    masked=[True, False],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_every_gradient_equal_the_definition(case):
    t, e, m, l, k = case["sizes"]
    if case["activation"] == "swiglu" and case["save"] == "relu":
        case = case | {"save": "hidden"}
    mask = torch.arange(t) % 3 != 1 if case["masked"] else None
    logits = torch.randn(t, e, dtype=torch.float64, requires_grad=True)
    first, last = case["part"] or (0, e)
    gates = 2 if case["activation"] == "swiglu" else 1
    x, up, down = leaves(last - first, m, l, t, gates)
    shift = 100.0 * (torch.arange(e) == 0) if case["kind"] == "one expert" else 0
    routing = tigon.moe_route(logits + shift, top_k=min(k, e), scale=2.0, mask=mask)
    got = tigon.moe_experts(
        x, up, down, routing, activation=case["activation"], weight_placement=case["placement"],
        save=case["save"], expert_range=case["part"],
    )  # fmt: skip
    want = definition(x, up, down, routing, case["activation"], first, last)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    inputs = (x, up, down, logits)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    if not want.requires_grad:
        want = want + 0 * sum(v.sum() for v in inputs)
    for a, b in zip(
        torch.autograd.grad(got, inputs, dy, **options),
        torch.autograd.grad(want, inputs, dy, **options),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", ["after_down", "before_down"])
def test_low_precision_keeps_the_numerics_contract(dtype, placement):
    routing = route(40, 8, 3, torch.float32)
    x, up, down = (t.detach().to(dtype) for t in leaves(8, 32, 16, 40, 1, torch.float32))
    got = tigon.moe_experts(x, up, down, routing, weight_placement=placement)
    oracle = definition(x.double(), up.double(), down.double(), routing, "relu2")
    h = torch.stack([up[e] @ x[i] for i, e in enumerate(routing.indices[:, 0].tolist())])
    assert h.dtype == dtype
    rounded = definition(x.float(), up.float(), down.float(), routing, "relu2").to(dtype)
    assert_close_to_oracle("y", got, oracle, rounded * (1 + torch.finfo(dtype).eps))


def test_transformers_rounding_points_bit_for_bit():
    """One choice a token: no sum whose order could differ. h, relu(h)^2 and D act(h) are each rounded to bf16."""
    routing = route(12, 4, 1, torch.float32)
    x, up, down = (t.detach().bfloat16() for t in leaves(4, 8, 16, 12, 1, torch.float32))
    after = tigon.moe_experts(x, up, down, routing)
    before = tigon.moe_experts(x, up, down, routing, weight_placement="before_down")
    for i in range(12):
        e, w = routing.indices[i, 0], routing.weights[i, 0]
        h = F.linear(x[i : i + 1], up[e])
        y = F.linear(F.relu(h).square(), down[e])
        assert torch.equal(after[i : i + 1], (y * w).bfloat16())
        a = (F.relu(h).float().square() * w).bfloat16()
        assert torch.equal(before[i : i + 1], F.linear(a, down[e]))


def test_gradient_buffers_are_overwritten_or_added_to():
    routing = route(6, 4, 2, torch.float32)
    x, up, down = (t.detach() for t in leaves(4, 3, 5, 6, 1, torch.float32))
    plain = [t.clone().requires_grad_() for t in (x, up, down)]
    tigon.moe_experts(*plain, routing).square().sum().backward()
    for accumulate in (False, True):
        given = [t.clone().requires_grad_() for t in (x, up, down)]
        start = [torch.full_like(t, 7.0) for t in (up, down)]
        buffers = tuple(t.clone() for t in start)
        y = tigon.moe_experts(*given, routing, grad_buffers=buffers, accumulate=accumulate)
        y.square().sum().backward()
        assert given[1].grad is None and given[2].grad is None
        torch.testing.assert_close(given[0].grad, plain[0].grad)
        for buffer, before, leaf in zip(buffers, start, plain[1:], strict=True):
            torch.testing.assert_close(buffer, leaf.grad + before * accumulate)


def test_an_empty_expert_has_exact_zero_gradients():
    routing = route(6, 4, 1, torch.float32, kind="one expert")
    x, up, down = leaves(4, 3, 5, 6, 1, torch.float32)
    tigon.moe_experts(x, up, down, routing).sum().backward()
    assert not up.grad[1:].any() and not down.grad[1:].any() and up.grad[0].any()


def kept_bytes(save):
    routing = route(64, 8, 4, torch.float32)
    x, up, down = leaves(8, 96, 16, 64, 1, torch.float32)
    own, seen = {t.data_ptr() for t in (x, up, down)}, {}

    def pack(t):
        if t.data_ptr() not in own:
            seen[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tigon.moe_experts(x, up, down, routing, save=save)
    return sum(seen.values())


def test_save_nothing_keeps_the_routing_and_nothing_else():
    hidden = 64 * 4 * 96 * 4
    assert kept_bytes("hidden") - kept_bytes("nothing") == hidden
    assert kept_bytes("relu") == kept_bytes("hidden")
    assert kept_bytes("nothing") < 64 * 4 * 4 * 6


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_in_batch_invariant_mode_a_token_alone_is_the_token_among_many(activation):
    gates = 2 if activation == "swiglu" else 1
    logits = torch.randn(37, 4)
    x, up, down = (t.detach() for t in leaves(4, 24, 40, 37, gates, torch.float32))
    with tigon.batch_invariant():
        whole = tigon.moe_experts(
            x, up, down, tigon.moe_route(logits, top_k=2), activation=activation
        )
        for rows in (slice(0, 1), slice(20, 21), slice(3, 36)):
            part = tigon.moe_route(logits[rows], top_k=2)
            assert torch.equal(
                tigon.moe_experts(x[rows], up, down, part, activation=activation), whole[rows]
            )


def test_in_batch_invariant_mode_a_row_of_grouped_mm_and_its_gradient_do_not_feel_the_others():
    w, x, dy = torch.randn(1, 200, 160), torch.randn(37, 160), torch.randn(37, 200)

    def both(rows):
        part = x[rows].clone().requires_grad_()
        y = tigon.grouped_mm(part, w, torch.tensor([0, len(part)], dtype=torch.int32))
        return y.detach(), *torch.autograd.grad(y, part, dy[rows])

    with tigon.batch_invariant():
        whole = both(slice(0, 37))
        for rows in (slice(0, 1), slice(20, 21), slice(3, 36)):
            assert all(torch.equal(a, b[rows]) for a, b in zip(both(rows), whole, strict=True))


@pytest.mark.parametrize("format", ["nvfp4", "fp8-tensor", "fp8-row"])
def test_quantized_experts_equal_their_dequantized_ones(format):
    routing = route(9, 4, 2, torch.float32)
    x, up, down = (t.detach() for t in leaves(4, 20, 36, 9, 1, torch.float32))

    def quantize(w):
        if format == "nvfp4":
            return tigon.quantize_nvfp4(w, amax=w.abs().amax((1, 2))[:, None].expand(w.shape[:2]))
        return tigon.quantize_fp8(w, granularity=format[4:])

    up, down = quantize(up), quantize(down)
    with torch.no_grad():
        got = tigon.moe_experts(x, up, down, routing)
        want = tigon.moe_experts(x, up.dequantize(), down.dequantize(), routing)
    torch.testing.assert_close(got, want)
    y = tigon.moe_experts(x.requires_grad_(), up, down, routing)
    with pytest.raises(RuntimeError, match="quantized experts have no backward"):
        y.sum().backward()


def test_slices_are_taken_without_a_copy():
    routing = route(6, 4, 2, torch.float32)
    x, up, down = (t.detach() for t in leaves(4, 3, 5, 6, 1, torch.float32))
    assert tigon.explain("moe_experts", sliced(x, 1), up, down, routing).copies == ()
    assert tigon.explain(
        "moe_experts", x, up.transpose(1, 2).contiguous().transpose(1, 2), down, routing
    ).copies


def test_grouped_mm_and_its_gradients():
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 6, 7], dtype=torch.int32)
    y = tigon.grouped_mm(x, w, offsets)
    for e in range(4):
        rows = slice(offsets[e], offsets[e + 1])
        torch.testing.assert_close(y[rows], x[rows] @ w[e].T)
    assert not y[7:].any()
    assert torch.autograd.gradcheck(lambda x, w: tigon.grouped_mm(x, w, offsets), (x, w))
    (dw,) = torch.autograd.grad(y.sum(), w)
    assert not dw[1].any()


def test_follow_the_law_of_registered_ops():
    routing = route(6, 4, 2, torch.float32)
    x, up, down = leaves(4, 3, 5, 6, 1, torch.float32)
    plain = (up, None, None, "plain", down, None, None, "plain")
    places = (routing.indices, routing.offsets, routing.order, routing.inverse)
    rest = ("relu2", False, "hidden", 0, 4, None, None, False)
    torch.library.opcheck(torch.ops.tigon.moe_experts, (x, *plain, routing.weights, *places, *rest))
    torch.library.opcheck(
        torch.ops.tigon.grouped_mm, (torch.randn(12, 5, requires_grad=True), up, routing.offsets)
    )

    def step(x, up, down, logits):
        return tigon.moe_experts(x, up, down, tigon.moe_route(logits, top_k=2))

    logits = torch.randn(6, 4, requires_grad=True)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        y = function(x, up, down, logits)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, up, down, logits))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_waits_for_the_device(no_host_sync):
    for activation, gates in (("relu2", 1), ("swiglu", 2)):
        x, up, down = leaves(4, 3, 5, 6, gates, torch.float32)
        y = tigon.moe_experts(x, up, down, route(6, 4, 2, torch.float32), activation=activation)
        y.sum().backward()


def test_autocast_lowers_activations_and_weights():
    x, up, down = leaves(4, 3, 5, 6, 1, torch.float32)
    routing = route(6, 4, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = tigon.moe_experts(x, up, down, routing)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert up.grad.dtype == torch.float32


def test_wrong_arguments_are_named():
    routing = route(6, 4, 2, torch.float32)
    x, up, down = (t.detach() for t in leaves(4, 3, 5, 6, 1, torch.float32))
    wrong = [
        (
            (x, up, down, routing),
            {"activation": "gelu"},
            ValueError,
            "activation='gelu' is not one of",
        ),
        (
            (x, up, down, routing),
            {"weight_placement": "both"},
            ValueError,
            "weight_placement='both' is not",
        ),
        ((x, up, down, routing), {"save": "all"}, ValueError, "save='all' is not one of"),
        (
            (x, up, down, routing),
            {"activation": "swiglu", "save": "relu"},
            ValueError,
            "save='relu' is for",
        ),
        (
            (x, up, down, routing),
            {"activation": "swiglu"},
            ValueError,
            "up has shape (4, 3, 5), expected (4, 6, 5)",
        ),
        ((x[:5], up, down, routing), {}, ValueError, "routing is of 6 tokens, x has 5"),
        ((x, up[:3], down, routing), {}, ValueError, "up has shape (3, 3, 5), expected (4, 3, 5)"),
        (
            (x, up, down[..., :2], routing),
            {},
            ValueError,
            "up has shape (4, 3, 5), expected (4, 2, 5)",
        ),
        (
            (x, up, down, routing),
            {"expert_range": (2, 5)},
            ValueError,
            "expert_range=(2, 5) must lie in 0 to 4",
        ),
        ((x, up.double(), down, routing), {}, TypeError, "up has dtype float64, allowed: float32"),
        ((x, up, down, routing.indices), {}, TypeError, "routing must be a Routing, got Tensor"),
        (
            (x, up, down, routing),
            {"grad_buffers": (up, down[:1])},
            ValueError,
            "grad_buffers[down] has shape",
        ),
        (
            (x, tigon.quantize_mxfp8(up), down, routing),
            {},
            TypeError,
            "up must be a Tensor, an NVFP4Tensor",
        ),
    ]
    for args, options, error, message in wrong:
        with pytest.raises(error) as caught:
            tigon.moe_experts(*args, **options)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most 6"):
        tigon.grouped_mm(x, up, torch.tensor([0, 3, 2, 6, 6], dtype=torch.int32))
