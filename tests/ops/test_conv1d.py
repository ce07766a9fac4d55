"""causal_conv1d and its decode step on the reference backend: against torch's own convolution and each other."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from memory import sliced
from options import case_id, pairwise

import tigon


def oracle(x, weight, bias, activation, initial):
    """One dense batch by torch's convolution: (y, final_state)."""
    d, width = weight.shape
    if initial is None:
        initial = x.new_zeros(x.shape[0], d, width - 1)
    u = torch.cat([initial, x.transpose(1, 2)], 2)
    # One zero at the end, dropped again: torch refuses an empty output.
    y = F.conv1d(F.pad(u, (0, 1)), weight[:, None], bias, groups=d)[:, :, :-1].transpose(1, 2)
    return (F.silu(y) if activation else y), u[:, :, u.shape[2] - (width - 1) :]


PACKED = [0, 2, 2, 3, 17]
CASES = pairwise(
    width=[1, 2, 4, 8],
    bias=[True, False],
    activation=["silu", None],
    initial=[True, False],
    packed=[True, False],
    length=[17, 2, 0],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradients_equal_torch(case):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    length, width, d = case["length"], case["width"], 5
    bounds = [min(c, length) for c in PACKED]
    rows = len(bounds) - 1 if case["packed"] else 2
    x, weight = draw(1 if case["packed"] else 2, length, d), draw(d, width)
    bias = draw(d) if case["bias"] else None
    initial = draw(rows, d, width - 1) if case["initial"] else None
    cu = torch.tensor(bounds, dtype=torch.int32) if case["packed"] else None
    got = tigon.causal_conv1d(
        *(x, weight, bias),
        activation=case["activation"],
        initial_state=initial,
        cu_seqlens=cu,
        return_final_state=True,
    )
    if case["packed"]:
        parts = [
            oracle(
                x[:, a:b],
                weight,
                bias,
                case["activation"],
                None if initial is None else initial[k : k + 1],
            )
            for k, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        want = torch.cat([y for y, _ in parts], 1), torch.cat([f for _, f in parts])
    else:
        want = oracle(x, weight, bias, case["activation"], initial)
    cotangents = [torch.randn_like(t) for t in want]
    leaves = [t for t in (x, weight, bias, initial) if t is not None]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    expected = torch.autograd.grad(want, leaves, cotangents, allow_unused=True)
    actual = torch.autograd.grad(got, leaves, cotangents, allow_unused=True)
    for leaf, a, e in zip(leaves, actual, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(leaf) if e is None else e)


STEPS = pairwise(
    width=[1, 2, 4, 8], wider=[0, 2], m=[1, 3, 16], bias=[True, False], activation=["silu", None],
    slots=["by row", "indexed"], tokens=["all", "ragged"],
)  # fmt: skip


@pytest.mark.parametrize("case", STEPS, ids=case_id)
def test_decode_continues_the_sequence_and_leaves_padding_alone(case):
    width, m, d = case["width"], case["m"], 5
    indexed = case["slots"] == "indexed"
    weight, bias = torch.randn(d, width), torch.randn(d) if case["bias"] else None
    state = torch.randn(7 if indexed else 4, d, width - 1 + case["wider"])
    x = torch.randn(4, m, d)
    slots = [5, -1, 0, 3] if indexed else [0, 1, 2, 3]
    tokens = [m, m, 0, (m + 1) // 2] if case["tokens"] == "ragged" else [m] * 4
    before = state.clone()
    y = tigon.causal_conv1d_update(
        *(x, state, weight, bias),
        activation=case["activation"],
        state_indices=torch.tensor(slots) if indexed else None,
        num_tokens=torch.tensor(tokens) if case["tokens"] == "ragged" else None,
    )
    for r, (slot, count) in enumerate(zip(slots, tokens, strict=True)):
        if slot < 0 or not count:
            assert not y[r].any()
            continue
        window = before[slot : slot + 1, :, state.shape[2] - (width - 1) :]
        want, _ = oracle(x[r : r + 1, :count], weight, bias, case["activation"], window)
        torch.testing.assert_close(y[r : r + 1, :count], want)
        seen = torch.cat([before[slot], x[r, :count].T], 1)
        torch.testing.assert_close(state[slot], seen[:, seen.shape[1] - state.shape[2] :])
        assert not y[r, count:].any()
    live = {s for s, t in zip(slots, tokens, strict=True) if s >= 0 and t}
    for slot in set(range(len(before))) - live:
        assert torch.equal(state[slot], before[slot])


def test_slices_of_one_projection_are_taken_without_a_copy():
    x, weight = torch.randn(2, 9, 6), torch.randn(6, 4)
    assert tigon.explain("causal_conv1d", sliced(x, 1), weight).copies == ()
    torch.testing.assert_close(
        tigon.causal_conv1d(sliced(x, 1), weight), tigon.causal_conv1d(x, weight)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, 9, 6), (6, 4), (6,)))
    want = oracle(x.double(), weight.double(), bias.double(), "silu", None)[0]
    got = tigon.causal_conv1d(x, weight, bias)
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.usefixtures("no_host_sync")
def test_nothing_waits_for_the_device():
    x = torch.randn(1, 9, 6, requires_grad=True)
    y, final = tigon.causal_conv1d(
        x, torch.randn(6, 4), cu_seqlens=torch.tensor([0, 1, 9]), return_final_state=True
    )
    (y.sum() + final.sum()).backward()
    tigon.causal_conv1d_update(
        torch.randn(2, 6),
        torch.randn(3, 6, 3),
        torch.randn(6, 4),
        state_indices=torch.tensor([2, -1]),
    )


def test_opcheck():
    t = lambda *shape: torch.randn(*shape, requires_grad=True)  # noqa: E731
    cu = torch.tensor([0, 1, 9], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.tigon.causal_conv1d.default, (t(1, 9, 6), t(6, 4), t(6), t(2, 6, 3), cu, True)
    )
    index = torch.tensor([2, -1], dtype=torch.int32)
    args = (torch.randn(2, 1, 6), torch.randn(3, 6, 3), torch.randn(6, 4), None, index, None, True)
    torch.library.opcheck(torch.ops.tigon.causal_conv1d_update.default, args)


def test_a_step_that_wants_a_gradient_is_refused():
    x, weight = torch.zeros(2, 6), torch.zeros(6, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="causal_conv1d_update: weight requires a gradient"):
        tigon.causal_conv1d_update(x, torch.zeros(2, 6, 3), weight)


def test_a_tree_without_replay_is_refused():
    with pytest.raises(ValueError, match=r"causal_conv1d_update: ancestors .* they need replay"):
        tigon.causal_conv1d_update(X[:, 0], torch.zeros(2, 6, 3), W, ancestors=torch.ones(2).int())


X, W = torch.zeros(2, 9, 6), torch.zeros(6, 4)
REFUSED = {
    "x dimensions": ((X[0], W), {}, ValueError, r"x has shape \(9, 6\), expected \(b, l, d\)"),
    "weight channels": ((X, W[:5]), {}, ValueError, r"weight has shape \(5, 4\), expected \(d, width\) with d=6"),
    "width": ((X, torch.zeros(6, 9)), {}, ValueError, "width=9, allowed: 1 to 8"),
    "bias": ((X, W, torch.zeros(5)), {}, ValueError, "bias has shape"),
    "activation": ((X, W), {"activation": "relu"}, ValueError, "activation must be 'silu' or None, got 'relu'"),
    "initial state": ((X, W), {"initial_state": torch.zeros(2, 6, 4)}, ValueError, "initial_state has shape"),
    "packed batch": ((X, W), {"cu_seqlens": torch.tensor([0, 9])}, ValueError, "b must be 1"),
    "cu_seqlens": ((X[:1], W), {"cu_seqlens": torch.tensor([0, 8])}, ValueError, "end at l=9"),
    "dtype": ((X.bfloat16(), W.half()), {}, TypeError, "weight has dtype float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
    args, kw, error, message = REFUSED[name]
    with pytest.raises(error, match=f"causal_conv1d: .*{message}"):
        tigon.causal_conv1d(*args, **kw)


S = torch.zeros(3, 6, 3)
REFUSED_STEP = {
    "window": ((X[:, 0], S[:, :, :2], W), {}, ValueError, "W=2 inputs, at least width-1=3"),
    "slots": ((torch.zeros(4, 6), S, W), {}, ValueError, "3 slots for b=4 rows"),
    "index twice": ((X[:, 0], S, W), {"state_indices": torch.tensor([1, 1])}, ValueError, "names a slot twice"),
    "index range": ((X[:, 0], S, W), {"state_indices": torch.tensor([1, 3])}, ValueError, "state_indices must lie"),
    "tokens": ((torch.zeros(2, 17, 6), S, W), {}, ValueError, "m=17"),
    "strides": ((X[:, 0], S.transpose(1, 2).contiguous().transpose(1, 2), W), {}, ValueError, "must be contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_STEP)
def test_a_bad_step_is_refused_by_name(name):
    args, kw, error, message = REFUSED_STEP[name]
    with pytest.raises(error, match=f"causal_conv1d_update: .*{message}"):
        tigon.causal_conv1d_update(*args, **kw)
