"""scaled_mm kernels against the fp64 product of what their operands stand for, in every combination of formats.

Operands lie in guarded memory, outputs start as NaN. Tiles are small but for the test of the shipped table, and the
launch is that of each architecture in turn: sm_80 decodes FP8 by its bits, sm_90 in `quad_order`, sm_100 and sm_120
go through `dot_scaled`, which the interpreter is given here.
"""

from dataclasses import replace

import pytest
import torch
from interpreted_dots import rowwise_products, scaled_products
from memory import guarded
from numerics import assert_close_to_oracle
from options import case_id, pairwise

from tigon.kernels import gemm
from tigon.kernels.launch import assume, plan
from tigon.reference import quantize
from tigon.reference.gemm import scaled_mm as reference

COMBINATIONS = [
    ("plain", "nvfp4"),
    ("fp8-tensor", "nvfp4"),
    ("fp8-row", "nvfp4"),
    ("fp8-1x128", "nvfp4"),
    ("nvfp4", "nvfp4"),
    ("mxfp8", "mxfp8"),
    ("fp8-tensor", "fp8-row"),
    ("fp8-row", "fp8-tensor"),
    ("fp8-1x128", "fp8-128x128"),
    ("fp8-1x128", "fp8-1x128"),
]
ARCHS = [80, 90, 100, 120]

CASES = pairwise(
    formats=COMBINATIONS,
    arch=ARCHS,
    shape=[(5, 37, 200), (70, 20, 97), (33, 66, 256), (3, 130, 15), (1, 1, 1)],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    swizzled=[False, True],
    e5m2=[False, True],
    bias=[None, torch.float32, torch.bfloat16],
    relu2=[False, True],
    out=["new", "given", "accumulate"],
    rows=[False, True],
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a launcher allocates without filling starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def shrunk(config):
    """The same launch in small tiles: 32 k, or as many as its order or format of k needs."""
    block_k = 64 if config.quads or config.scaled else 32
    right = 32 if config.right > 16 else 16
    return replace(config, left=32, right=right, block_k=block_k)


@pytest.fixture
def small_tiles(monkeypatch, request):
    monkeypatch.setattr(
        gemm, "plan", lambda *a, **k: {n: shrunk(c) for n, c in plan(*a, **k).items()}
    )


def quantized(x, format, swizzled=False, e5m2=False, per_row=False):
    """(codes, scale, tensor_scale, format, swizzled) of x, as scaled_mm takes them, in guarded memory."""
    if format == "plain":
        return guarded(x), None, None, format, False
    wide, tensor_scale = x.float(), None
    plain = (wide, None, None, None, "none")
    if format == "nvfp4":
        amax = wide.abs().amax(1) if per_row else None
        codes, scale, tensor_scale, *_ = quantize.quantize_nvfp4(
            *plain, None, 0, None, amax, per_row, False, "nearest", "", True, False, swizzled
        )
    elif format == "mxfp8":
        codes, scale, *_ = quantize.quantize_mxfp8(*plain, e5m2, True, False, swizzled)
    else:
        codes, scale, *_ = quantize.quantize_fp8(*plain, None, format[4:], e5m2, False, True, False)
        swizzled = False
    return fenced(codes), fenced(scale), guarded(tensor_scale), format, swizzled


def fenced(t):
    """`guarded`, where bytes beside the tensor are the codes of NaN."""
    if t.element_size() > 1:
        return guarded(t)
    buffer = torch.full((t.numel() + 128,), 0x7F, dtype=torch.uint8, device=t.device)
    copy = buffer[64 : 64 + t.numel()].view(t.shape)
    copy.copy_(t.view(torch.uint8))
    return copy.view(t.dtype)


def operands(formats, shape, dtype, device, swizzled=False, e5m2=False, rows=False):
    m, n, k = shape
    a, b = (torch.randn(count, k, device=device).to(dtype) for count in (m, n))
    one = quantized(a, formats[0], swizzled, e5m2, rows)
    return one, quantized(b, formats[1], swizzled, False, rows)


def check(got, a, b, k, bias, relu2, before=None, name="out"):
    """Against fp64, where the reference in fp32 of the same operands is the baseline."""
    dtype = got.dtype
    oracle = reference(*a, *b, k, bias, relu2, torch.float64, None, False)
    baseline = reference(*a, *b, k, bias, relu2, torch.float32, None, False)
    if before is not None:
        oracle, baseline = before + oracle, before + baseline
    assert_close_to_oracle(name, got, oracle, baseline.to(dtype))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_products_match_the_oracle(case, device, small_tiles, monkeypatch):
    m, n, k = case["shape"]
    scaled_products(monkeypatch)
    a, b = operands(
        case["formats"], case["shape"], case["dtype"], device,
        case["swizzled"], case["e5m2"], case["rows"],
    )  # fmt: skip
    bias = guarded(torch.randn(n, device=device).to(case["bias"])) if case["bias"] else None
    out_dtype = torch.float32 if case["out"] == "accumulate" else case["dtype"]
    out = before = None
    if case["out"] != "new":
        buffer = torch.randn(m, n + 3, device=device).to(out_dtype)
        out = buffer[:, 1 : n + 1]
        before = out.clone() if case["out"] == "accumulate" else None
        edges = buffer[:, 0].clone(), buffer[:, n + 1 :].clone()
    with assume(case["arch"]):
        got = gemm.scaled_mm(
            *a, *b, k, bias, case["relu2"], out_dtype, out, case["out"] == "accumulate"
        )
    assert got.dtype == out_dtype
    if out is not None:
        assert got is out
        assert torch.equal(buffer[:, 0], edges[0]) and torch.equal(buffer[:, n + 1 :], edges[1])
    check(got, a, b, k, bias, case["relu2"], before)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("k", [288, 992])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_whole_tiles_of_swizzled_scales_reach_their_rows(format, k, tma, device, monkeypatch):
    """Tiles of 128 rows take scales 512 bytes at a time; rows and k end inside such a piece."""
    scaled_products(monkeypatch)

    def planned(*args, **sizes):
        config = plan(*args, **sizes)["multiply"]
        assert config.tma and config.scaled
        return {"multiply": replace(config, left=128, right=128, block_k=256, tma=tma)}

    monkeypatch.setattr(gemm, "plan", planned)
    a, b = operands((format, format), (200, 140, k), torch.bfloat16, device, swizzled=True)
    with assume(100):
        got = gemm.scaled_mm(*a, *b, k, None, False, torch.float32, None, False)
    check(got, a, b, k, None, False)


@pytest.mark.parametrize("formats", COMBINATIONS, ids="-".join)
def test_k_is_split_and_summed_in_order(formats, device, small_tiles, monkeypatch):
    """Few rows and a long k: several segments, a sum kernel, the same bits every time."""
    m, n, k = 3, 20, 1030
    a, b = operands(formats, (m, n, k), torch.bfloat16, device)
    bias = torch.randn(n, device=device)
    sizes = dict(m=m, n=n, k=k, itemsize=2, a_format=formats[0], b_format=formats[1])
    assert plan("scaled_mm", 90, **sizes)["add_splits"].splits > 1
    call = (*a, *b, k, bias, True, torch.float32, None, False)
    with assume(90):
        got, again = gemm.scaled_mm(*call), gemm.scaled_mm(*call)
    assert torch.equal(got, again)
    check(got, a, b, k, bias, True)


@pytest.mark.parametrize("formats", COMBINATIONS, ids="-".join)
def test_batch_invariant_rows_depend_neither_on_m_nor_on_their_neighbours(
    formats, device, small_tiles, monkeypatch
):
    """One row alone, a few, and among many (where one program walks all segments of k) have the same bits."""
    m, n, k = 70, 24, 1030
    rowwise_products(monkeypatch)
    a, b = operands(formats, (m, n, k), torch.bfloat16, device, rows=True)
    rest = (*b, k, None, False, torch.float32, None, False, True)

    def rows(picked):
        codes, scale, tensor_scale, *kind = a
        scale = scale if scale is None or scale.dim() == 0 else scale[picked]
        tensor_scale = None if tensor_scale is None else tensor_scale[picked]
        return codes[picked], scale, tensor_scale, *kind

    with assume(90):
        whole = gemm.scaled_mm(*a, *rest)
        for picked in (slice(0, 1), slice(37, 38), slice(60, 70)):
            assert torch.equal(gemm.scaled_mm(*rows(picked), *rest), whole[picked]), picked
    check(whole, a, b, k, None, False)


@pytest.mark.parametrize("m", [3, 80])
@pytest.mark.parametrize("formats", [("plain", "nvfp4"), ("fp8-1x128", "fp8-128x128")])
def test_the_shipped_table(formats, m, device):
    n, k = 150, 520
    a, b = operands(formats, (m, n, k), torch.bfloat16, device)
    got = gemm.scaled_mm(*a, *b, k, None, False, torch.bfloat16, None, False)
    check(got, a, b, k, None, False)


@pytest.mark.parametrize("shape", [(0, 8, 16), (8, 0, 16), (4, 8, 0)])
@pytest.mark.parametrize("formats", [("plain", "nvfp4"), ("fp8-tensor", "fp8-tensor")])
def test_empty_sizes(formats, shape, device):
    m, n, k = shape
    a, b = (quantized(torch.ones(rows, 16), f) for rows, f in zip((m, n), formats))
    a, b = ((t[0][:, : t[0].shape[1] * k // 16], *t[1:]) for t in (a, b))
    bias = torch.arange(n, dtype=torch.float32, device=device)
    got = gemm.scaled_mm(*a, *b, k, bias, False, torch.float32, None, False)
    assert torch.equal(got, bias.expand(m, n))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("formats", COMBINATIONS, ids="-".join)
def test_nan_stays_in_its_row_and_column(formats, arch, device, small_tiles, monkeypatch):
    """NaN in an element, or in what scales it, reaches the products of its row and no other."""
    scaled_products(monkeypatch)
    (m, n, k), row, column = (6, 20, 160), 2, 7
    a, b = operands(formats, (m, n, k), torch.float16, device)
    put_nan(a, row)
    put_nan(b, column)
    with assume(arch):
        got = gemm.scaled_mm(*a, *b, k, None, True, torch.float32, None, False)
    expected = torch.zeros(m, n, dtype=torch.bool, device=device)
    expected[row] = True
    expected[:, column] = True
    if formats[1] == "fp8-128x128":
        expected[:] = True
    assert torch.equal(got.isnan(), expected)


def put_nan(operand, row):
    codes, scale, _, format, _ = operand
    if format == "plain":
        codes[row, 100] = float("nan")
    elif format == "nvfp4":
        scale.view(torch.uint8)[row, 6] = 0x7F
    elif format == "mxfp8":
        scale[row, 3] = 255
    elif format == "fp8-128x128":
        scale[0, 0] = float("nan")
    else:
        codes.view(torch.uint8)[row, 100] = 0x7F


def unit_row(k, device):
    """NVFP4 (1, 16): 1 0 0 ..., which picks the first element of a row."""
    codes = torch.zeros(1, k // 2, dtype=torch.uint8, device=device)
    codes[0, 0] = 2
    scale = torch.full((1, k // 16), 0x38, dtype=torch.uint8, device=device)
    return (
        codes,
        scale.view(torch.float8_e4m3fn),
        torch.ones((), device=device),
        "nvfp4",
        False,
    )


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_code_is_decoded_exactly(dtype, arch, device, small_tiles):
    codes = torch.zeros(256, 16, dtype=torch.uint8, device=device)
    codes[:, 0] = torch.arange(256)
    side = codes.view(dtype), torch.ones((), device=device), None, "fp8-tensor", False
    rest = *unit_row(16, device), 16, None, False, torch.float32, None, False
    with assume(arch):
        got = gemm.scaled_mm(*side, *rest)[:, 0]
    expected = codes.view(dtype)[:, 0].float()
    assert torch.equal(got[expected.isfinite()], expected[expected.isfinite()])
    assert not got[~expected.isfinite()].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_nvfp4_code_and_scale_is_decoded_exactly(dtype, device, small_tiles):
    """The rows of an identity times rows that hold all codes, one row for each block scale but NaN."""
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    codes = (codes[0::2] | codes[1::2] << 4).expand(127, 8).contiguous()
    scale = torch.arange(127, dtype=torch.uint8, device=device)[:, None].view(torch.float8_e4m3fn)
    side = codes, scale, torch.ones((), device=device), "nvfp4", False
    unit = torch.eye(16, device=device).to(dtype)
    got = gemm.scaled_mm(
        unit, None, None, "plain", False, *side, 16, None, False, torch.float32, None, False
    )
    assert torch.equal(got, quantize.block_values(codes, scale, "nvfp4", 16, False).T)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_mxfp8_scales_are_decoded_exactly_down_to_where_bf16_ends(dtype, device, small_tiles):
    """One row for each exponent; the other side is 1."""
    exponents = torch.arange(17, 240, dtype=torch.uint8, device=device)[:, None]
    values = torch.tensor([1.0, -1.75, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal])
    codes = torch.zeros(len(exponents), 32, device=device)
    codes[:, :4] = values
    unit = torch.zeros(4, 32, device=device)
    unit[:, :4] = torch.eye(4)
    one = torch.full((4, 1), 127, dtype=torch.uint8, device=device)
    side = codes.to(dtype), exponents, None, "mxfp8", False
    other = unit.to(torch.float8_e4m3fn), one, None, "mxfp8", False
    got = gemm.scaled_mm(*side, *other, 32, None, False, torch.float32, None, False)
    assert torch.equal(got, quantize.block_values(side[0], exponents, "mxfp8", 32, False)[:, :4])


def test_e4m3_scales_beside_fp8_codes_are_refused(device, small_tiles):
    """Where a kernel would take them, sm_120 would read the scales as exponents of other blocks, in silence."""
    a, b = operands(("nvfp4", "nvfp4"), (4, 8, 64), torch.float32, device)
    b = b[0].view(torch.float8_e4m3fn), *b[1:]
    with assume(120), pytest.raises(Exception, match="E4M3 scales go with 4-bit codes"):
        gemm.scaled_mm(*a, *b, 64, None, False, torch.float32, None, False)


def test_addresses_are_64_bit(device):
    """Rows lie 2^30 elements apart; the buffer is allocated but hardly touched."""
    far, k = 2**30, 16
    a, b = operands(("fp8-tensor", "nvfp4"), (3, 5, k), torch.bfloat16, device)
    buffer = torch.empty_strided((2 * far + k,), (1,), dtype=torch.uint8, device=device)
    codes = buffer.as_strided((3, k), (far, 1))
    codes.copy_(a[0].view(torch.uint8))
    rest = (*a[1:], *b, k, None, False, torch.float32, None, False)
    got = gemm.scaled_mm(codes.view(a[0].dtype), *rest)
    assert torch.equal(got, gemm.scaled_mm(a[0], *rest))


def test_tma_gets_no_empty_or_overlapping_rows(device, monkeypatch):
    """Tensor descriptors have no size 0, and rows that are at least as far apart as they are long."""
    plans = []
    monkeypatch.setattr(gemm, "plan", lambda *a, **k: plans.append(k) or plan(*a, **k))
    buffer = torch.randn(80, 64, device=device).bfloat16()
    for a, aligned in (
        (buffer, True),
        (buffer[:1].expand(80, 64), False),
        (buffer.as_strided((80, 64), (16, 1)), False),
        (buffer[:, :0], False),
    ):
        _, b = operands(("plain", "nvfp4"), (1, 70, a.shape[1]), torch.float32, device)
        side = a, None, None, "plain", False
        rest = a.shape[1], None, False, torch.float32, None, False
        with assume(90):
            got = gemm.scaled_mm(*side, *b, *rest)
        check(got, side, b, a.shape[1], None, False)
        assert plans.pop()["aligned"] is aligned


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("formats", COMBINATIONS, ids="-".join)
def test_the_launch_table_covers_every_shape(arch, formats):
    for m, n, k, itemsize in (
        (1, 1, 1, 4),
        (8192, 18560, 4096, 2),
        (64, 64, 8192, 2),
        (0, 3, 0, 1),
    ):
        sizes = dict(n=n, k=k, itemsize=itemsize, a_format=formats[0], b_format=formats[1])
        row = plan("scaled_mm", arch, m=m, **sizes)["multiply"]
        assert row.splits * row.split_k >= k and row.split_k % 128 == row.split_k % row.block_k == 0
        assert not row.promote or 128 % row.block_k == 0
        assert not row.scaled or (formats[0] == formats[1] and formats[0] in ("nvfp4", "mxfp8"))
        assert not (row.scaled and arch == 100) or row.left >= 128
        same = {
            replace(
                plan("scaled_mm", arch, m=rows, batch_invariant=True, **sizes)["multiply"],
                walk=False,
            )
            for rows in (1, 64, 65, 100_000)
        }
        assert len(same) == 1
