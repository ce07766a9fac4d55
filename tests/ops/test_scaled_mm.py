"""`scaled_mm` on the reference: every pair of formats against the fp64 product of the dequantized operands."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_oracle
from options import case_id, pairwise

import tigon
from tigon.ops.gemm import PAIRS


def operand(x, format, dtype=torch.bfloat16, layout="linear"):
    if format == "plain":
        return x.to(dtype)
    if format == "nvfp4":
        return tigon.quantize_nvfp4(x, scale_layout=layout)
    if format == "mxfp8":
        return tigon.quantize_mxfp8(x, scale_layout=layout)
    return tigon.quantize_fp8(x, granularity=format.removeprefix("fp8-"))


def exact(t):
    """fp64 values: codes times block scales times outer scales, none of it rounded."""
    if isinstance(t, torch.Tensor):
        return t.double()
    if isinstance(t, tigon.NVFP4Tensor):
        one = type(t)(t.codes, t.block_scale, torch.ones(()), t.shape, t.scale_layout)
        scale = t.tensor_scale.double()
        return one.dequantize().double() * (scale[:, None] if scale.dim() else scale)
    if isinstance(t, tigon.MXFP8Tensor):
        return t.dequantize().double()
    values, (m, k) = t.codes.double(), t.shape
    spread = {
        "tensor": lambda s: s,
        "row": lambda s: s[:, None],
        "1x128": lambda s: s.repeat_interleave(128, 1)[:, :k],
        "128x128": lambda s: s.repeat_interleave(128, 0)[:m].repeat_interleave(128, 1)[:, :k],
    }
    return values * spread[t.granularity](t.scale.double())


CASES = pairwise(
    pair=list(PAIRS),
    sizes=[(1, 1, 1), (5, 7, 50), (33, 130, 257), (4, 3, 0), (0, 3, 8), (20, 150, 384)],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    out_dtype=[torch.bfloat16, torch.float16, torch.float32],
    bias=[None, torch.float32, torch.bfloat16],
    activation=[None, "relu2"],
    layout=["linear", "128x4"],
    into=[None, "write", "accumulate"],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_products_match_the_oracle(case):
    m, n, k = case["sizes"]
    left, right = case["pair"]
    a = operand(torch.randn(m, k), left, case["dtype"], case["layout"])
    b = operand(torch.randn(n, k), right, layout=case["layout"])
    bias = None if case["bias"] is None else torch.randn(n).to(case["bias"])

    def formula(left, right, dtype):
        result = left.to(dtype) @ right.to(dtype).T
        if bias is not None:
            result = result + bias.to(dtype)
        return F.relu(result).square() if case["activation"] else result

    want, baseline = (formula(exact(a), exact(b), t) for t in (torch.float64, torch.float32))
    options = {"bias": bias, "activation": case["activation"], "out_dtype": case["out_dtype"]}
    if case["into"]:
        dtype = torch.float32 if case["into"] == "accumulate" else case["out_dtype"]
        out = torch.randn(m, n + 3).to(dtype)[:, :n]
        if case["into"] == "accumulate":
            want, baseline = want + out.double(), baseline + out
        options |= {"out": out, "accumulate": case["into"] == "accumulate"}
        del options["out_dtype"]
    got = tigon.scaled_mm(a, b, **options)
    if case["into"]:
        assert got is out
    assert_close_to_oracle("out", got, want, baseline.to(got.dtype))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(p))
@pytest.mark.parametrize("k", [50, 384])
def test_in_batch_invariant_mode_a_row_alone_is_the_row_among_many(pair, k):
    """Given the same codes; scales of a whole tensor are the quantizer's affair."""
    x, w = torch.randn(37, k), operand(torch.randn(60, k), pair[1])
    if pair[0] == "nvfp4":
        a = tigon.quantize_nvfp4(x, amax="row")
    else:
        a = operand(x, pair[0])
    with tigon.batch_invariant():
        whole = tigon.scaled_mm(a, w, out_dtype=torch.float32)
        for rows in (slice(0, 1), slice(20, 21), slice(3, 36)):
            part = a[rows]
            assert torch.equal(tigon.scaled_mm(part, w, out_dtype=torch.float32), whole[rows])


def test_compiles_and_follows_the_law_of_registered_ops():
    a, b = tigon.quantize_fp8(torch.randn(4, 40)), tigon.quantize_nvfp4(torch.randn(6, 40))
    from tigon.ops.quantize import unpack

    operands = (*unpack(a), *unpack(b), 40, torch.randn(6), True)
    # Without test_schema: it compares clones of the inputs by arithmetic that torch does not have for FP8.
    laws = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, rest in (
        ("scaled_mm", (torch.bfloat16,)),
        ("scaled_mm_out", (torch.zeros(4, 6), True)),
    ):
        torch.library.opcheck(
            getattr(torch.ops.tigon, op).default, (*operands, *rest), test_utils=laws
        )
    compiled = torch.compile(
        lambda a, b: tigon.scaled_mm(a, b), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(a, b), tigon.scaled_mm(a, b))


def test_nothing_waits_for_the_device(no_host_sync):
    x, w = torch.randn(4, 40), torch.randn(6, 40)
    for left, right in PAIRS:
        tigon.scaled_mm(operand(x, left), operand(w, right))


def test_one_graph_serves_any_number_of_tokens_even_where_they_are_contracted():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(x):
        row, column = tigon.quantize_fp8(x, axis="both")
        return tigon.scaled_mm(column, column), row.dequantize()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for tokens in (5, 18, 33):
        x = torch.randn(tokens, 40)
        assert all(map(torch.equal, compiled(x), step(x)))
    assert len(graphs) == 1


def test_out_may_be_columns_beside_an_input_but_not_lie_on_one():
    w = tigon.quantize_nvfp4(torch.randn(6, 40))
    buffer = torch.randn(9, 60)
    a, beside = buffer[:4, :40], buffer[:4, 40:46]
    want = tigon.scaled_mm(a, w, out_dtype=torch.float32)
    assert torch.equal(tigon.scaled_mm(a, w, out=beside), want)
    one, above = buffer[:1, :40], buffer[1:2, :6]
    torch.testing.assert_close(tigon.scaled_mm(one, w, out=above), want[:1])
    for out in (buffer[:4, 36:42], buffer[3:7, :6], buffer.flatten()[61:85].view(4, 6)):
        with pytest.raises(ValueError, match="out lies on memory of a"):
            tigon.scaled_mm(a, w, out=out)
    with pytest.raises(ValueError, match="out lies on memory of bias"):
        tigon.scaled_mm(torch.ones(9, 40), w, out=buffer[:, :6], bias=buffer[4, :6])


def test_wrong_arguments_are_named():
    x, w = torch.randn(4, 40), tigon.quantize_nvfp4(torch.randn(6, 40))
    fp8 = tigon.quantize_fp8(x)
    wrong = [
        ((x, x), {}, TypeError, "b must be an NVFP4Tensor, MXFP8Tensor or FP8Tensor, got Tensor"),
        (
            (w, fp8),
            {},
            TypeError,
            "nvfp4 x fp8-tensor is not supported; these are: fp8-tensor x fp8-tensor",
        ),
        ((x[:, :30], w), {}, ValueError, "a has k=30 columns, b has 40"),
        (
            (x, w),
            {"bias": torch.ones(5)},
            ValueError,
            "bias has shape (5,), expected (n) with n=6 (from b)",
        ),
        (
            (x, w),
            {"activation": "gelu"},
            ValueError,
            "activation='gelu' is not one of None, 'relu2'",
        ),
        ((x, w), {"accumulate": True}, ValueError, "accumulate needs out"),
        ((x, w), {"out": torch.empty(4, 5)}, ValueError, "out has shape (4, 5), expected (m, n)"),
        (
            (x, w),
            {"out": torch.empty(4, 6).half(), "accumulate": True},
            TypeError,
            "out has dtype float16",
        ),
        ((x, w), {"out": torch.empty(6, 4).T}, ValueError, "out must have contiguous rows"),
        (
            (x, w),
            {"out": torch.empty(1, 6).expand(4, 6)},
            ValueError,
            "out must have rows that do not overlap",
        ),
        ((x, w), {"out_dtype": torch.int8}, TypeError, "out_dtype=torch.int8 is not one of"),
        ((x.double(), w), {}, TypeError, "a has dtype float64"),
        ((tigon.quantize_nvfp4(torch.ones(2, 3, 40)), w), {}, ValueError, "expected a matrix"),
        ((x.requires_grad_(), w), {}, RuntimeError, "a requires a gradient and this op has none"),
    ]
    for args, options, error, message in wrong:
        args = tuple(
            t.detach() if isinstance(t, torch.Tensor) and error is not RuntimeError else t
            for t in args
        )
        with pytest.raises(error) as caught:
            tigon.scaled_mm(*args, **options)
        assert message in str(caught.value)
