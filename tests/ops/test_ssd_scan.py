"""ssd_scan on the reference backend: against the fp64 recurrence, and the laws of every op.

The kernels' own tests are in tests/kernels; here the public function, its gradients and its refusals.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import sliced
from numerics import assert_close_to_oracle
from options import case_id, pairwise

import tigon
from tigon.reference.ssd import ssd_forward, ssd_recurrence

INF = float("inf")
TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def make(
    b=1,
    l=70,
    h=4,
    p=5,
    g=2,
    n=6,
    D=None,
    z=False,
    bias=True,
    initial=False,
    cu=None,
    positions=None,
    dtype=torch.float64,
):
    """Inputs of one call, by argument name; A, D and biases in fp32 beside low precision."""
    beside = dtype if dtype == torch.float64 else torch.float32

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    sequences = b if cu is None else len(cu) - 1
    return {
        "x": draw(b, l, h, p),
        "dt": draw(b, l, h),
        "A": -torch.rand(h, dtype=torch.float64).to(beside) * 2,
        "B": draw(b, l, g, n) / math.sqrt(n),
        "C": draw(b, l, g, n),
        "D": None if D is None else draw(*((h,) if D == "h" else (h, p)), dtype=beside),
        "z": draw(b, l, h, p) if z else None,
        "dt_bias": draw(h, dtype=beside) if bias else None,
        "initial_states": draw(sequences, h, p, n, dtype=beside) if initial else None,
        "cu_seqlens": None if cu is None else torch.tensor(cu, dtype=torch.int32),
        "state_positions": None if positions is None else torch.tensor(positions),
    }


def scan(inputs, **kw):
    """All outputs of the public function."""
    positional = [inputs[k] for k in ("x", "dt", "A", "B", "C")]
    named = {k: v for k, v in inputs.items() if k not in ("x", "dt", "A", "B", "C")}
    return tigon.ssd_scan(*positional, **named, return_final_states=True, **kw)


def positional(inputs):
    return [inputs[k] for k in (*TENSORS, "cu_seqlens", "state_positions")]


def oracle(inputs, softplus, limit):
    wide = [
        t.double() if t is not None and t.is_floating_point() else t for t in positional(inputs)
    ]
    return ssd_recurrence(*wide, softplus, *limit)


PACKED = [0, 3, 3, 33, 97]
CASES = pairwise(
    D=[None, "h", "hp"],
    z=[False, True],
    bias=[True, False],
    softplus=[True, False],
    limit=[(0.0, INF), (0.2, 0.9)],
    initial=[False, True],
    layout=["dense", "packed", "positions", "packed positions"],
    p=[5, 1],
    g=[1, 2, 4],
)


def case_inputs(case, **kw):
    options = {k: case[k] for k in ("D", "z", "bias", "initial", "p", "g")}
    if case["layout"] == "dense":
        options |= {"b": 2}
    if "packed" in case["layout"]:
        options |= {"cu": PACKED}
    if "positions" in case["layout"]:
        options |= {"positions": [0, 64, 3, 97, 40, 40]}
    return make(l=97, **options, **kw)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradients_equal_the_recurrence(case):
    inputs = case_inputs(case)
    leaves = [inputs[k].requires_grad_() for k in TENSORS if inputs[k] is not None]
    kw = {"dt_softplus": case["softplus"], "dt_limit": case["limit"]}
    got = scan(inputs, **kw)
    want = oracle(inputs, case["softplus"], case["limit"])[: len(got)]
    cotangents = [torch.randn_like(t) for t in want]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(want, leaves, cotangents)
    actual = torch.autograd.grad(got, leaves, cotangents)
    for leaf, a, e in zip(leaves, actual, expected, strict=True):
        assert a.shape == leaf.shape
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["dense", "packed positions"])
def test_low_precision_stays_within_the_contract(dtype, layout):
    case = {"D": "h", "z": True, "bias": True, "initial": True, "layout": layout, "p": 16, "g": 2}
    inputs = case_inputs(case, dtype=dtype, n=32)
    got = scan(inputs, dt_softplus=True)
    want = oracle(inputs, True, (0.0, INF))
    args = (*positional(inputs), True, 0.0, INF)
    baseline = ssd_forward(*args, round_operands=True)
    for name, g, w, base in zip(("y", "final", "states"), got, want, baseline, strict=False):
        assert_close_to_oracle(name, g, w, base)
    assert got[0].dtype == dtype
    assert all(t.dtype == torch.float32 for t in got[1:])


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=4),
    h_per_g=st.integers(1, 3),
    g=st.integers(1, 3),
    p=st.integers(1, 9),
    n=st.integers(1, 9),
    initial=st.booleans(),
)
def test_drawn_packed_shapes_equal_separate_calls(lengths, h_per_g, g, p, n, initial):
    cu = [0]
    for length in lengths:
        cu.append(cu[-1] + length)
    inputs = make(l=cu[-1], h=g * h_per_g, g=g, p=p, n=n, D="h", z=True, initial=initial, cu=cu)
    y, final = scan(inputs, dt_softplus=True)
    for k, (start, end) in enumerate(itertools.pairwise(cu)):
        alone = {
            key: t[:, start:end] if key in ("x", "dt", "B", "C", "z") else t
            for key, t in inputs.items()
        }
        alone["cu_seqlens"] = None
        if initial:
            alone["initial_states"] = inputs["initial_states"][k : k + 1]
        y_k, final_k = scan(alone, dt_softplus=True)
        torch.testing.assert_close(y[:, start:end], y_k, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(final[k : k + 1], final_k, rtol=1e-10, atol=1e-10)


def test_gradcheck_of_every_input():
    inputs = make(
        l=7, h=2, p=2, g=1, n=3, D="hp", z=True, initial=True, cu=[0, 2, 2, 7], positions=[1, 7, 0]
    )
    leaves = [inputs[k].requires_grad_() for k in TENSORS]

    def run(*tensors):
        return scan(inputs | dict(zip(TENSORS, tensors, strict=True)), dt_softplus=True)

    assert torch.autograd.gradcheck(run, leaves)


def test_an_extreme_decay_neither_overflows_nor_loses_its_gradient():
    """|A dt| of thousands underflows to exact zeros, never to inf or NaN (mamba #352 and its kin)."""
    inputs = make(l=130, dtype=torch.float32)
    inputs["A"] = torch.tensor([-1e4, -50.0, -1e-4, 0.0])
    inputs["dt"] = inputs["dt"].abs() * 100
    leaves = [inputs[k].requires_grad_() for k in TENSORS if inputs[k] is not None]
    y, final = scan(inputs)
    grads = torch.autograd.grad(y.sum() + final.sum(), leaves)
    assert all(torch.isfinite(t).all() for t in (y, final, *grads))
    assert (grads[0] != 0).any()


def test_a_growing_state_is_not_clamped():
    """A > 0 is unusual and allowed: only exponents that the maths bounds by 0 are held there."""
    inputs = make(l=80, D="h")
    inputs["A"] = torch.tensor([0.05, -0.5, 0.0, 0.01], dtype=torch.float64)
    inputs["dt"] = inputs["dt"].abs()
    leaves = [inputs[k].requires_grad_() for k in ("x", "dt", "A", "B", "C")]
    got, want = scan(inputs, dt_softplus=True), oracle(inputs, True, (0.0, INF))[:2]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    grads = [torch.autograd.grad(t[0].sum() + t[1].sum(), leaves) for t in (got, want)]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w)


def test_nan_in_one_sequence_stays_there():
    inputs = make(l=40, cu=[0, 17, 40])
    inputs["x"][0, 5] = float("nan")
    y, final = scan(inputs)
    assert torch.isnan(y[0, 5:17]).all()
    assert torch.isfinite(y[0, 17:]).all() and torch.isfinite(final[1]).all()


@pytest.mark.parametrize("length", [0, 1, 64, 65])
def test_edge_lengths(length):
    inputs = make(l=length, b=2, initial=True)
    y, final = scan(inputs)
    want = oracle(inputs, False, (0.0, INF))
    torch.testing.assert_close(y, want[0])
    torch.testing.assert_close(final, want[1])


def test_no_tokens_at_all_in_a_packed_batch_gives_the_initial_states_back():
    inputs = make(l=0, initial=True, cu=[0, 0, 0], positions=[0])
    y, final, states = scan(inputs)
    assert y.shape == (1, 0, 4, 5)
    torch.testing.assert_close(final, inputs["initial_states"])
    torch.testing.assert_close(states[0], inputs["initial_states"][0])
    assert final.data_ptr() != inputs["initial_states"].data_ptr()


def test_slices_of_one_projection_are_taken_without_a_copy():
    inputs = make(dtype=torch.float32, b=2, z=True)
    strided = inputs | {k: sliced(inputs[k], 2) for k in ("x", "B", "C", "z")}
    strided["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(scan(strided), scan(inputs))
    args = [strided[k] for k in ("x", "dt", "A", "B", "C")]
    assert tigon.explain("ssd_scan", *args, z=strided["z"]).copies == ()
    turned = strided["x"].transpose(2, 3).contiguous().transpose(2, 3)
    copies = tigon.explain("ssd_scan", turned, *args[1:]).copies
    assert len(copies) == 1 and copies[0].startswith("x ")


def test_chunk_size_is_accepted_and_changes_nothing():
    inputs = make(l=100)
    torch.testing.assert_close(
        scan(inputs, chunk_size=16), scan(inputs, chunk_size=256), rtol=0, atol=0
    )


@pytest.mark.parametrize("layout", ["dense", "packed positions"])
@pytest.mark.usefixtures("no_host_sync")
def test_nothing_waits_for_the_device(layout):
    case = {"D": "h", "z": True, "bias": True, "initial": True, "layout": layout, "p": 4, "g": 2}
    inputs = case_inputs(case, dtype=torch.float32)
    inputs["x"].requires_grad_()
    y, *_ = scan(inputs, dt_softplus=True)
    y.sum().backward()


@pytest.mark.parametrize("layout", ["dense", "packed positions"])
def test_opcheck(layout):
    case = {"D": "hp", "z": True, "bias": True, "initial": True, "layout": layout, "p": 3, "g": 2}
    inputs = case_inputs(case, dtype=torch.float32)
    for k in TENSORS:
        inputs[k].requires_grad_()
    torch.library.opcheck(
        torch.ops.tigon.ssd_scan.default, (*positional(inputs), True, 0.0, INF, 128)
    )


def test_compiles_as_one_graph_and_gives_the_same_gradients():
    inputs = make(dtype=torch.float32, z=True, D="h")
    x = inputs["x"].requires_grad_()
    compiled = torch.compile(
        lambda t: scan(t, dt_softplus=True)[0], fullgraph=True, backend="aot_eager"
    )
    (want,) = torch.autograd.grad(scan(inputs, dt_softplus=True)[0].sum(), x)
    (got,) = torch.autograd.grad(compiled(inputs).sum(), x)
    torch.testing.assert_close(got, want)


def test_meta_tensors_give_shapes_and_dtypes():
    inputs = make(b=2, initial=True, dtype=torch.bfloat16)
    meta = {k: None if t is None else t.to("meta") for k, t in inputs.items()}
    for got, want in zip(scan(meta), scan(inputs), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_autocast_runs_in_the_autocast_dtype_and_returns_gradients_in_the_inputs():
    inputs = make(dtype=torch.float32, z=True)
    inputs["x"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = scan(inputs)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    y.sum().backward()
    assert inputs["x"].grad.dtype == torch.float32


def test_autocast_leaves_fp64_alone_and_so_refuses_it_beside_fp32():
    inputs = make(dtype=torch.float32) | {"B": torch.zeros(1, 70, 2, 6, dtype=torch.float64)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="B has dtype float64"):
            scan(inputs)
        assert scan(make())[0].dtype == torch.float64


def test_double_backward_raises():
    inputs = make(l=5)
    x = inputs["x"].requires_grad_()
    (grad,) = torch.autograd.grad(scan(inputs)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_a_row_does_not_depend_on_its_batch_mates_in_batch_invariant_mode():
    inputs = make(b=3, l=90, dtype=torch.float32, D="h", z=True, initial=True)
    dy = torch.randn_like(inputs["x"])

    def run(inputs, dy):
        leaves = {
            k: t.detach().requires_grad_()
            for k, t in inputs.items()
            if k in TENSORS and t is not None
        }
        y, final = scan(inputs | leaves)
        return y, final, torch.autograd.grad((y * dy).sum() + final.sum(), list(leaves.values()))

    def row(t, i):
        return t[i : i + 1] if t is not None and t.dim() > 2 else t

    with tigon.batch_invariant():
        y, final, grads = run(inputs, dy)
        alone = [run({k: row(t, i) for k, t in inputs.items()}, dy[i : i + 1]) for i in range(3)]
    assert torch.equal(y, torch.cat([r[0] for r in alone]))
    assert torch.equal(final, torch.cat([r[1] for r in alone]))
    for g, *rows in zip(grads, *(r[2] for r in alone), strict=True):
        together = torch.cat(rows) if g.dim() > 2 else sum(rows)
        assert torch.equal(g, together)


def test_repeated_runs_are_bit_identical():
    inputs = make(b=2, l=130, dtype=torch.float32, D="h", z=True)
    x = inputs["x"].requires_grad_()
    runs = []
    for _ in range(2):
        y, final = scan(inputs)
        runs.append((y, final, *torch.autograd.grad(y.sum() + final.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


REFUSED = {
    "x must be a Tensor": ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    "x dimensions": ({"x": torch.zeros(1, 70, 20)}, ValueError, r"x has shape .*, expected \(b, l, h, p\)"),
    "x dtype": ({"x": torch.zeros(1, 70, 4, 5, dtype=torch.int64)}, TypeError, "x has dtype int64, allowed: float32"),
    "dt length": ({"dt": torch.zeros(1, 69, 4)}, ValueError, r"dt has shape .*, expected .* with .*l=70 \(from x\)"),
    "dt dtype": ({"dt": torch.zeros(1, 70, 4, dtype=torch.bfloat16)}, TypeError, "dt has dtype bfloat16"),
    "A heads": ({"A": torch.zeros(3)}, ValueError, r"A has shape \(3,\)"),
    "B dtype": ({"B": torch.zeros(1, 70, 2, 6, dtype=torch.float16)}, TypeError, "B has dtype float16"),
    "C groups": ({"C": torch.zeros(1, 70, 4, 6)}, ValueError, r"C has shape .* g=2 \(from B\)"),
    "groups do not divide heads": (
        {"B": torch.zeros(1, 70, 3, 6), "C": torch.zeros(1, 70, 3, 6)}, ValueError, "g=3 must divide h=4"),
    "p too large": ({"x": torch.zeros(1, 70, 4, 257)}, ValueError, "p=257 is not supported, 1 to 256 are"),
    "p of nothing": ({"x": torch.zeros(1, 70, 4, 0)}, ValueError, "p=0 is not supported"),
    "n too large": (
        {"B": torch.zeros(1, 70, 2, 300), "C": torch.zeros(1, 70, 2, 300)}, ValueError, "n=300 is not supported"),
    "n of nothing": (
        {"B": torch.zeros(1, 70, 2, 0), "C": torch.zeros(1, 70, 2, 0)}, ValueError, "n=0 is not supported"),
    "D shape": ({"D": torch.zeros(4, 6)}, ValueError, r"D has shape \(4, 6\)"),
    "D dimensions": ({"D": torch.zeros(4, 5, 1)}, ValueError, r"expected \(h\) or \(h, p\)"),
    "z shape": ({"z": torch.zeros(1, 70, 4, 6)}, ValueError, "z has shape"),
    "dt_bias shape": ({"dt_bias": torch.zeros(1, 4)}, ValueError, "dt_bias has shape"),
    "initial states": ({"initial_states": torch.zeros(2, 4, 5, 6)}, ValueError, "initial_states has shape"),
    "device": ({"B": torch.zeros(1, 70, 2, 6, device="meta")}, ValueError, "B is on meta, but x is on cpu"),
    "chunk size": ({"chunk_size": 0}, ValueError, "chunk_size must be positive"),
    "dt_limit": ({"dt_limit": (1.0, 0.5)}, ValueError, "dt_limit must be"),
    "dt_limit negative": ({"dt_limit": (-1.0, 0.5)}, ValueError, "dt_limit must be"),
    "cu_seqlens dtype": ({"cu_seqlens": torch.tensor([0.0, 70.0])}, TypeError, "cu_seqlens has dtype float32"),
    "cu_seqlens start": ({"cu_seqlens": torch.tensor([1, 70])}, ValueError, "cu_seqlens must start at 0"),
    "cu_seqlens end": ({"cu_seqlens": torch.tensor([0, 69])}, ValueError, r"end at l=70, got \[0, 69\]"),
    "cu_seqlens order": ({"cu_seqlens": torch.tensor([0, 40, 30, 70])}, ValueError, "never fall"),
    "cu_seqlens empty": ({"cu_seqlens": torch.tensor([0])}, ValueError, "at least 2 bounds"),
    "positions range": ({"state_positions": torch.tensor([71])}, ValueError, r"state_positions must lie in \[0, 70\]"),
    "positions dtype": ({"state_positions": torch.tensor([1.0])}, TypeError, "state_positions has dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
    change, error, message = REFUSED[name]
    inputs = make(dtype=torch.float32) | change
    with pytest.raises(error, match=f"ssd_scan: .*{message}"):
        scan(inputs)


def test_packed_sequences_and_positions_need_one_batch_row():
    inputs = make(b=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="b must be 1"):
        scan(inputs | {"cu_seqlens": torch.tensor([0, 70])})
    with pytest.raises(ValueError, match="need b = 1"):
        scan(inputs | {"state_positions": torch.tensor([3])})


def test_values_are_looked_at_only_where_that_is_free(monkeypatch):
    """TIGON_CHECK=0 trusts the caller; bounds are then clamped and stay inside the buffers."""
    monkeypatch.setenv("TIGON_CHECK", "0")
    inputs = make(dtype=torch.float32) | {"cu_seqlens": torch.tensor([0, 40, 1000])}
    y, final = scan(inputs)
    assert torch.isfinite(y).all() and final.shape[0] == 2
