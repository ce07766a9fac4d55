"""The quantizers as ops, on the reference: formula element by element, prologues, copies, tensors, errors."""

import math
import struct

import pytest
import torch
import torch.nn.functional as F
from memory import sliced
from options import case_id, pairwise

import tigon
from tigon.ops import GatedRMSNorm, RMSNorm
from tigon.reference.philox import philox

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIGNS = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


def equal(a, b):
    """Two quantized tensors hold the same bytes."""
    assert (a.shape, type(a)) == (b.shape, type(b))
    for name, t in a.tensors().items():
        other = b.tensors()[name]
        assert t.dtype == other.dtype and t.shape == other.shape, name
        assert torch.equal(byte_view(t), byte_view(other)), name


def byte_view(t):
    return t.contiguous().flatten().view(torch.uint8)


def f32(v: float) -> float:
    """The fp32 nearest to v. A product or quotient of fp32 numbers in Python's floats rounds twice, which for these
    operations gives the fp32 result."""
    return struct.unpack("f", struct.pack("f", v))[0]


def e4m3(v: float) -> float:
    return float(torch.tensor(min(v, 448.0)).to(torch.float8_e4m3fn).float())


def nearest_code(a: float) -> int:
    """By search: the nearest magnitude, of two equally near ones the even code."""
    return min(range(8), key=lambda c: (abs(E2M1[c] - a), c % 2))


def nvfp4_block(block: list[float], amax: float) -> tuple[float, list[int]]:
    """(block scale, codes) of 16 numbers, one operation at a time."""
    s_enc = f32(2688.0 / amax)
    s = e4m3(f32(max(map(abs, block)) * f32(s_enc * f32(1 / 6))))
    down = f32(s * f32(1 / s_enc))
    mult = f32(1 / down) if down else 3.4028234663852886e38
    codes = []
    for x in block:
        v = max(-6.0, min(6.0, f32(x * mult)))
        codes.append(nearest_code(abs(v)) + 8 * (math.copysign(1, v) < 0))
    return s, codes


def test_nvfp4_is_the_formula_operation_by_operation():
    x = torch.randn(3, 50) * torch.logspace(-6, 3, 50)
    q = tigon.quantize_nvfp4(x)
    amax = x.abs().max().item()
    assert q.tensor_scale.item() == f32(amax / 2688)
    for i in range(3):
        row = F.pad(x[i], (0, 14)).tolist()
        for block in range(4):
            s, codes = nvfp4_block(row[block * 16 : block * 16 + 16], amax)
            packed = q.codes[i, block * 8 : block * 8 + 8].tolist()
            assert [c for byte in packed for c in (byte & 15, byte >> 4)] == codes
            assert q.block_scale[i, block].float().item() == s


def test_every_tie_goes_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat([ties, torch.tensor([6.0]), -ties, torch.tensor([-6.0])])
    q = tigon.quantize_nvfp4(x, amax=torch.tensor(2688.0))
    assert q.block_scale.float().item() == 1
    assert q.dequantize().tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -1, -2, -2, -4, -4, -6]


@pytest.mark.parametrize("block", ["1x16", "16x16"])
def test_column_copy_is_the_quantized_transpose(block):
    x = torch.randn(37, 50)
    row, column = tigon.quantize_nvfp4(x, block=block, axis="both")
    equal(row, tigon.quantize_nvfp4(x, block=block))
    equal(column, tigon.quantize_nvfp4(x.T.contiguous(), block=block))
    equal(column, tigon.quantize_nvfp4(x, block=block, axis="column"))
    if block == "16x16":
        assert torch.equal(row.dequantize(), column.dequantize().T)


def test_mxfp8_and_fp8_column_copies_are_quantized_transposes():
    x = torch.randn(37, 150)
    for quantize, options in (
        (tigon.quantize_mxfp8, {}),
        *((tigon.quantize_fp8, {"granularity": g}) for g in ("tensor", "row", "1x128", "128x128")),
    ):
        row, column = quantize(x, axis="both", **options)
        equal(row, quantize(x, **options))
        equal(column, quantize(x.T.contiguous(), **options))


def test_hadamard_is_of_the_contraction_and_only_of_the_column_copy_of_both():
    x = torch.randn(64, 48)
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rotate = SIGNS[:, None] * matrix / 4
    rotated = (x.unflatten(1, (-1, 16)) @ rotate).flatten(1)
    q = tigon.quantize_nvfp4(x, hadamard=SIGNS)
    back = (q.dequantize().unflatten(1, (-1, 16)) @ rotate.T).flatten(1)
    assert (q.dequantize() - rotated).norm() < 0.11 * rotated.norm()
    assert (back - x).norm() < 0.11 * x.norm()
    row, column = tigon.quantize_nvfp4(x, hadamard=SIGNS, axis="both")
    equal(row, tigon.quantize_nvfp4(x))
    equal(column, tigon.quantize_nvfp4(x.T.contiguous(), hadamard=SIGNS))


def test_random_bits_are_those_of_the_elements_place():
    """Every code of a constant tensor is 2 or 3: x = 1.25 rounds up where byte >= 128."""
    m, k, seed, offset = 5, 23, -7, 2**36 + 5
    x = torch.full((m, k), 1.25)
    q = tigon.quantize_nvfp4(
        x,
        rounding="stochastic",
        seed=seed,
        offset=offset,
        amax=torch.tensor(1.25 * 448),
        axis="both",
    )
    unsigned = seed + 2**64
    key = (torch.tensor(unsigned & 0xFFFFFFFF), torch.tensor(unsigned >> 32))
    for stream, copy in enumerate(q):
        codes = torch.stack([copy.codes & 15, copy.codes >> 4], -1).flatten(-2)
        s = copy.block_scale.float()[0, 0] * copy.tensor_scale
        for i in range(m):
            for j in range(k):
                e = i * k + j + offset
                words = philox(
                    (torch.tensor(e // 16 & 0xFFFFFFFF), torch.tensor(e // 16 >> 32), stream, 0),
                    key,
                )
                byte = int(words[e % 16 // 4]) >> 8 * (e % 4) & 255
                a = f32(1.25 * f32(1 / s.item()))
                t = a + byte / 256 * (2 if a >= 4 else 1)
                code = 7 if t >= 6 else 6 if t >= 4 else 5
                assert codes[(i, j) if stream == 0 else (j, i)] == code, (stream, i, j)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prologues_equal_the_two_steps_byte_for_byte(dtype):
    x, z, weight = torch.randn(9, 96).to(dtype), torch.randn(9, 96).to(dtype), torch.randn(96)
    steps = [
        ("relu2", F.relu(x).square()),
        (RMSNorm(weight, 1e-3), tigon.rms_norm(x, weight, eps=1e-3)),
        (tigon.modules.RMSNorm(96, dtype=dtype), None),
    ]
    for last in (False, True):
        options = {"eps": 1e-3, "group_size": 32, "norm_before_gate": last}
        steps.append(
            (GatedRMSNorm(z, weight, **options), tigon.gated_rms_norm(x, z, weight, **options))
        )
    for prologue, y in steps:
        if y is None:
            y = prologue(x).detach()
            prologue.requires_grad_(False)
        for quantize, options in (
            (tigon.quantize_nvfp4, {"axis": "both", "hadamard": SIGNS}),
            (tigon.quantize_nvfp4, {"rounding": "stochastic", "seed": 3}),
            (tigon.quantize_mxfp8, {"axis": "both"}),
            (tigon.quantize_fp8, {"granularity": "1x128", "axis": "both"}),
            (tigon.quantize_fp8, {"granularity": "tensor"}),
        ):
            fused, apart = quantize(x, prologue=prologue, **options), quantize(y, **options)
            for a, b in zip(
                *((v if isinstance(v, tuple) else (v,)) for v in (fused, apart)), strict=True
            ):
                equal(a, b)


CASES = pairwise(
    shape=[(2, 3, 40), (7, 16), (33,), (0, 32), (3, 0), (130, 70)],
    format=["nvfp4", "mxfp8", "tensor", "row", "1x128", "128x128"],
    layout=["linear", "128x4"],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    axis=["row", "column", "both"],
)


def quantize(x, format, layout="linear", **options):
    if format == "nvfp4":
        return tigon.quantize_nvfp4(x, scale_layout=layout, **options)
    if format == "mxfp8":
        return tigon.quantize_mxfp8(x, scale_layout=layout, **options)
    return tigon.quantize_fp8(x, granularity=format, **options)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_any_shape_comes_back(case):
    x = torch.randn(case["shape"]).to(case["dtype"])
    made = quantize(x, case["format"], case["layout"], axis=case["axis"])
    meta = quantize(x.to("meta"), case["format"], case["layout"], axis=case["axis"])
    matrix = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    wanted = {"row": [x], "column": [matrix.T], "both": [x, matrix.T]}[case["axis"]]
    single = case["axis"] != "both"
    for q, shapes, want in zip(
        [made] if single else made, [meta] if single else meta, wanted, strict=True
    ):
        assert q.shape == tuple(want.shape) and q.numel() == want.numel()
        for name, t in q.tensors().items():
            assert (t.shape, t.dtype) == (
                shapes.tensors()[name].shape,
                shapes.tensors()[name].dtype,
            )
        back = q.dequantize(torch.float32)
        assert back.shape == want.shape
        if want.numel():
            allowed = 0.12 if case["format"] == "nvfp4" else 0.04
            assert (back - want.float()).norm() <= allowed * want.float().norm()


def test_padding_bytes_are_zero():
    x = torch.ones(3, 5)
    for layout in ("linear", "128x4"):
        q = tigon.quantize_nvfp4(x, scale_layout=layout)
        assert (
            q.codes[:, 2].tolist() == [q.codes[0, 0].item() & 15] * 3 and not q.codes[:, 3:].any()
        )
        assert (q.block_scale.view(torch.uint8) != 0).sum() == 3
    q = tigon.quantize_mxfp8(x, scale_layout="128x4")
    assert q.block_scale.shape == (512,) and (q.block_scale != 0).sum() == 3


def test_swizzled_scales_lie_where_the_formula_says():
    x = torch.randn(200, 100)
    for quantize, width in ((tigon.quantize_nvfp4, 7), (tigon.quantize_mxfp8, 4)):
        linear, packed = quantize(x), quantize(x, scale_layout="128x4")
        tiles = -(-width // 4)
        for m in (0, 1, 31, 32, 127, 128, 199):
            for k in range(width):
                at = (
                    (m // 128) * tiles * 512
                    + k // 4 * 512
                    + m % 32 * 16
                    + m % 128 // 32 * 4
                    + k % 4
                )
                assert (
                    packed.block_scale.view(torch.uint8)[at]
                    == linear.block_scale.view(torch.uint8)[m, k]
                )
        assert torch.equal(packed.dequantize(), linear.dequantize())


def test_rows_can_be_picked():
    x = torch.randn(4, 6, 40)
    for format in ("nvfp4", "mxfp8", "tensor", "row", "1x128"):
        q, whole = quantize(x, format), None
        whole = q.dequantize()
        for index in (
            2,
            (1, 3),
            slice(1, 3),
            (slice(None), 4),
            torch.tensor([3, 0]),
            whole[:, 0, 0] > 0,
        ):
            assert torch.equal(q[index].dequantize(), whole[index])
        assert len(q) == 4
    per_row = tigon.quantize_nvfp4(x, amax="row")
    assert torch.equal(per_row[1:3].dequantize(), per_row.dequantize()[1:3])
    blocks = tigon.quantize_fp8(torch.randn(300, 40), granularity="128x128")
    assert torch.equal(blocks[128:290].dequantize(), blocks.dequantize()[128:290])
    with pytest.raises(ValueError, match="multiple of 128"):
        blocks[1:]
    with pytest.raises(IndexError, match="last dimension is not indexed"):
        per_row[0, 0, 0]
    with pytest.raises(ValueError, match="128x4 scale layout cannot be picked"):
        tigon.quantize_nvfp4(x, scale_layout="128x4")[0]


def test_slices_of_a_projection_are_taken_without_a_copy():
    x = sliced(torch.randn(6, 32), 1)
    assert not x.is_contiguous()
    for op in ("quantize_nvfp4", "quantize_mxfp8", "quantize_fp8"):
        assert tigon.explain(op, x).copies == ()
        assert tigon.explain(op, x.T).copies
    equal(tigon.quantize_nvfp4(x), tigon.quantize_nvfp4(x.contiguous()))


def test_an_amax_a_row_makes_rows_independent():
    x = torch.randn(5, 40) * torch.logspace(-3, 3, 5)[:, None]
    q = tigon.quantize_nvfp4(x, amax="row")
    for i in range(5):
        equal(q[i], tigon.quantize_nvfp4(x[i]))
    given = tigon.quantize_nvfp4(x, amax=x.abs().amax(-1))
    equal(q, given)
    assert tigon.quantize_fp8(x[0], granularity="row").scale.shape == ()


def test_saved_moved_cloned(tmp_path):
    x = torch.randn(5, 40)
    for q in (tigon.quantize_nvfp4(x), tigon.quantize_mxfp8(x), tigon.quantize_fp8(x)):
        torch.save(q, tmp_path / "q.pt")
        equal(torch.load(tmp_path / "q.pt", weights_only=True), q)
        equal(q.clone(), q)
        assert q.to("meta").device.type == "meta" and q.to("meta").shape == q.shape
        assert q.nbytes == sum(t.numel() * t.element_size() for t in q.tensors().values())
        with pytest.raises(TypeError, match="takes a device"):
            q.to(torch.bfloat16)


@pytest.mark.parametrize("axis", ["row", "both"])
def test_compiles_in_one_graph_with_quantized_inputs_and_outputs(axis):
    x, w = torch.randn(20, 48), tigon.quantize_nvfp4(torch.randn(8, 48))

    def step(x, w):
        q = tigon.quantize_nvfp4(x, axis=axis, rounding="stochastic", seed=torch.tensor(5))
        row = q[0] if axis == "both" else q
        return q, tigon.scaled_mm(row, w)

    got, y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w)
    want, expected = step(x, w)
    for a, b in zip(*((v if axis == "both" else (v,)) for v in (got, want)), strict=True):
        equal(a, b)
    assert torch.equal(y, expected)


def test_nothing_waits_for_the_device(no_host_sync):
    x = torch.randn(20, 48)
    for format in ("nvfp4", "mxfp8", "tensor", "row", "1x128", "128x128"):
        quantize(x, format, axis="both")
    tigon.quantize_nvfp4(x, rounding="stochastic", hadamard=SIGNS, four_over_six=None).dequantize()


def test_seeds():
    x = torch.randn(20, 48)
    draw = lambda seed: tigon.quantize_nvfp4(x, rounding="stochastic", seed=seed)  # noqa: E731
    equal(draw(5), draw(torch.tensor(5)))
    equal(draw(-1), draw(2**64 - 1))
    assert not torch.equal(draw(5).codes, draw(6).codes)
    torch.manual_seed(1)
    first, second = draw(None), draw(None)
    assert not torch.equal(first.codes, second.codes)
    torch.manual_seed(1)
    equal(draw(None), first)


def test_explaining_draws_and_computes_nothing(monkeypatch):
    monkeypatch.setattr("tigon.ops.quantize.run", None)
    state = torch.get_rng_state()
    told = tigon.explain(
        "quantize_nvfp4", torch.ones(4, 8), rounding="stochastic", prologue=RMSNorm(torch.ones(8))
    )
    assert told.op == "quantize_nvfp4" and torch.equal(torch.get_rng_state(), state)


def test_one_graph_serves_all_seeds_and_offsets():
    graphs, x = [], torch.randn(5, 48)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def codes(seed, offset):
        return tigon.quantize_nvfp4(x, rounding="stochastic", seed=seed, offset=offset).codes

    torch._dynamo.reset()
    compiled = torch.compile(codes, fullgraph=True, backend=backend, dynamic=True)
    for i in range(3, 6):
        assert torch.equal(compiled(i, i * 240), codes(i, i * 240))
    assert len(graphs) == 1


WRONG = [
    (dict(block="32x32"), ValueError, "block='32x32' is not one of '1x16', '16x16'"),
    (dict(rounding="up"), ValueError, "rounding='up' is not one of"),
    (dict(axis="rows"), ValueError, "axis='rows' is not one of"),
    (dict(scale_layout="8x4"), ValueError, "scale_layout='8x4' is not one of"),
    (dict(four_over_six="max"), ValueError, "four_over_six='max' is not one of"),
    (
        dict(four_over_six="mae", rounding="stochastic"),
        ValueError,
        "four_over_six needs rounding='nearest'",
    ),
    (dict(hadamard=SIGNS, block="16x16"), ValueError, "hadamard is not for block='16x16'"),
    (dict(hadamard=SIGNS[:8]), ValueError, "hadamard has shape (8,), expected (16)"),
    (dict(offset=-1), ValueError, "offset=-1 must lie in"),
    (dict(seed=2**64, rounding="stochastic"), ValueError, "does not fit 64 bits"),
    (dict(seed=torch.tensor(1.0), rounding="stochastic"), TypeError, "seed has dtype float32"),
    (dict(amax="row", axis="both"), ValueError, "amax='row' needs axis='row'"),
    (dict(amax=torch.ones(3)), ValueError, "amax has shape (3,), expected (m) with m=4 (from x)"),
    (dict(amax=torch.ones(3), axis="both"), ValueError, "amax has shape (3,), expected (2)"),
    (
        dict(amax=torch.ones(2), axis="both", block="16x16"),
        ValueError,
        "amax has shape (2,), expected ()",
    ),
    (dict(prologue="gelu"), ValueError, "prologue='gelu' is not one of 'relu2'"),
    (
        dict(prologue=RMSNorm(torch.ones(7))),
        ValueError,
        "prologue.weight has shape (7,), expected (k) with k=8",
    ),
    (
        dict(prologue=GatedRMSNorm(torch.ones(4, 8), torch.ones(8), group_size=3)),
        ValueError,
        "group_size=3 must divide",
    ),
    (
        dict(prologue=GatedRMSNorm(None, torch.ones(8))),
        TypeError,
        "prologue.z must be a Tensor, got NoneType",
    ),
    (
        dict(prologue=RMSNorm(torch.ones(8), -1.0)),
        ValueError,
        "prologue.eps must not be negative, got -1.0",
    ),
    (dict(prologue=torch.nn.LayerNorm(8)), TypeError, "or GatedRMSNorm, got LayerNorm"),
    (
        dict(prologue=tigon.modules.GatedRMSNorm(8)),
        TypeError,
        "got GatedRMSNorm; of a module with a gate, pass GatedRMSNorm(z, weight, …)",
    ),
    (
        dict(prologue=torch.nn.GELU()),
        TypeError,
        "prologue must be None, 'relu2', RMSNorm or GatedRMSNorm, got GELU",
    ),
]


@pytest.mark.parametrize("options, error, message", WRONG, ids=lambda v: str(v)[:40])
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error) as caught:
        tigon.quantize_nvfp4(torch.ones(4, 8), **options)
    assert message in str(caught.value)


def test_wrong_inputs_are_named():
    with pytest.raises(TypeError, match="x has dtype float64, allowed: float32, bfloat16, float16"):
        tigon.quantize_nvfp4(torch.ones(4, 8).double())
    with pytest.raises(RuntimeError, match="x requires a gradient and this op has none"):
        tigon.quantize_fp8(torch.ones(4, 8, requires_grad=True))
    with pytest.raises(
        TypeError, match=r"dtype=torch.float16 is not one of float8_e4m3fn, float8_e5m2"
    ):
        tigon.quantize_mxfp8(torch.ones(4, 8), dtype=torch.float16)
    with pytest.raises(ValueError, match="amax is for granularity='tensor'"):
        tigon.quantize_fp8(torch.ones(4, 8), granularity="row", amax=torch.ones(()))
    q = tigon.quantize_nvfp4(torch.ones(4, 40))
    with pytest.raises(
        TypeError, match="q must be an NVFP4Tensor, MXFP8Tensor or FP8Tensor, got Tensor"
    ):
        tigon.dequantize(q.codes)
    broken = type(q)(q.codes, q.block_scale[:, :1], q.tensor_scale, q.shape)
    with pytest.raises(ValueError, match=r"q.block_scale has shape \(4, 1\), expected \(4, 3\)"):
        tigon.dequantize(broken)
