"""The quantizers against nvidia-modelopt and torchao on the CPU, and every cast against a search of the format.

All of them compute the same numbers in other orders (x / s against x (1 / s)), so scales and codes
are equal but where a number lies on a tie of the format within rounding; inputs whose scales are powers of two leave no
such freedom. What the others do on purpose is written into the expectation: scales are not let below 2^-9 (modelopt) or
2^-6 (torchao), modelopt gives blocks of zeros the scale 1 and -0 the code 0.
"""

import math

import peers
import pytest
import torch

import tigon

pytestmark = pytest.mark.xdist_group("peers")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SHAPE = (256, 512)


def laplace(*shape):
    return torch.empty(shape).exponential_() * torch.randn(shape).sign()


def hostile():
    """Blocks of zeros of both signs, blocks far below and far above the rest."""
    x = torch.randn(SHAPE) * torch.logspace(-9, 2, SHAPE[0])[:, None]
    x[3, 32:64], x[4, :64], x[5, 7::9] = 0.0, -0.0, -0.0
    return x


def pinned():
    """Scales that are powers of two, so that no order of operations rounds; half of all elements on ties of E2M1."""
    grid = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, *E2M1[1:]])
    x = grid[torch.randint(len(grid), (128, 32, 16))] * torch.randn(128, 32, 16).sign()
    x[..., 0] = 6
    x *= 2.0 ** torch.randint(-3, 9, (128, 32, 1))
    x[0, 0, 0] = 6 * 448  # block scale 448: not a power of two, so its block holds nothing else
    x[0, 0, 1:] = 0
    return x.flatten(1)


def e2m1_points():
    """Every value and tie of E2M1 and what lies beside them, both signs, in blocks that hold a 6."""
    exact = torch.tensor([*E2M1, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    up = torch.nextafter(exact, torch.tensor(math.inf))
    down = torch.nextafter(exact, torch.tensor(0.0))
    points = torch.cat([exact, up, down]).clamp(0, 6)
    points = torch.cat([points, -points])  # 90 of them
    return torch.cat([points.view(6, 15), torch.full((6, 1), 6.0)], 1)


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(20240521)
    normal = torch.randn(SHAPE)
    return {
        "normal": normal,
        "normal bf16": normal.bfloat16(),
        "laplace bf16": laplace(*SHAPE).bfloat16(),
        "hostile": hostile(),
        "hostile bf16": hostile().bfloat16(),
        "pinned": pinned(),
        "pinned bf16": pinned().bfloat16(),
    }


@pytest.fixture(scope="module")
def modelopt(inputs):
    kinds = ("nvfp4", "mxfp8", "fp8")
    questions = {f"modelopt_{kind}": inputs for kind in kinds}
    return peers.ask("peer_quantizers", questions | {"modelopt_e2m1": {"points": e2m1_points()}})


@pytest.fixture(scope="module")
def torchao(inputs):
    kinds = ("nvfp4", "mxfp8", "fp8")
    scales = {f"{m} x {k}": torch.randn(m, k) for m, k in SCALES}
    return peers.ask(
        "peer_quantizers",
        {f"torchao_{kind}": inputs for kind in kinds}
        | {"torchao_e2m1": {"points": e2m1_points()}, "torchao_to_blocked": scales},
    )


@pytest.fixture
def theirs(request):
    return lambda package, kind: request.getfixturevalue(package)[f"{package}_{kind}"]


def unpacked(codes):
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def bytes_of(t):
    return t.contiguous().view(torch.uint8)


def assert_codes_differ_at_ties_only(got, want, exact, values, share=0.003):
    """Magnitude codes of `exact`, whose format has `values` (by code): equal, or one step apart where `exact` lies
    midway between the two within fp32's rounding. At most `share` of them."""
    other = got != want
    assert other.double().mean() <= share
    a, b, exact = got[other].int(), want[other].int(), exact[other].abs().double()
    assert ((a - b).abs() == 1).all()
    middle = (values[a] + values[b]) / 2
    assert ((exact - middle).abs() <= 4 * torch.finfo(torch.float32).eps * middle).all()


NAMES = ["normal", "normal bf16", "laplace bf16", "hostile", "hostile bf16"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("package,least", [("modelopt", 2**-9), ("torchao", 2**-6)])
def test_nvfp4_scales_and_codes_are_theirs_but_at_ties(package, least, name, inputs, theirs):
    x, their = inputs[name], theirs(package, "nvfp4")[name]
    q = tigon.quantize_nvfp4(x)
    assert torch.equal(q.tensor_scale, their["tensor_scale"])
    blocks = x.double().unflatten(-1, (-1, 16))
    b = blocks.abs().amax(-1)
    scale, other = q.block_scale.float(), their["block_scale"].float()
    expected = scale.clamp(min=least)
    if package == "modelopt":
        expected = torch.where(b == 0, 1.0, expected)
    assert_codes_differ_at_ties_only(
        bytes_of(expected.to(torch.float8_e4m3fn)),
        bytes_of(their["block_scale"]),
        b / 6 / (b.max() / 2688),
        magnitudes(torch.float8_e4m3fn),
        # The quotient of two numbers of 8 bits, as bf16 has them, is a tie of E4M3 now and then.
        share=0.01 if "hostile" in name else 0,
    )

    same = (scale == other)[..., None].expand_as(blocks).flatten(-2)
    assert same.double().mean() > (0.3 if "hostile" in name else 0.999)
    got, want = unpacked(q.codes), unpacked(their["codes"])
    if package == "modelopt":
        got = torch.where(x == 0, 0, got)
    assert torch.equal(got[same] & 8, want[same] & 8)
    exact = blocks / (scale.double() * q.tensor_scale.double())[..., None]
    values = torch.tensor(E2M1).double()
    exact = exact.flatten(-2)[same].clamp(-6, 6)
    assert_codes_differ_at_ties_only(got[same] & 7, want[same] & 7, exact, values)


@pytest.mark.parametrize("name", ["pinned", "pinned bf16"])
@pytest.mark.parametrize("package", ["modelopt", "torchao"])
def test_where_no_order_of_operations_rounds_every_byte_is_theirs(package, name, inputs, theirs):
    their, q = theirs(package, "nvfp4")[name], tigon.quantize_nvfp4(inputs[name])
    assert torch.equal(q.tensor_scale, their["tensor_scale"]) and q.tensor_scale.item() == 1
    assert torch.equal(bytes_of(q.block_scale), bytes_of(their["block_scale"]))
    got = unpacked(q.codes)
    if package == "modelopt":
        got = torch.where(inputs[name] == 0, 0, got)
    assert torch.equal(got, unpacked(their["codes"]))
    assert torch.equal(q.dequantize(), their["values"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("package", ["modelopt", "torchao"])
def test_their_codes_mean_the_same_values_here(package, name, inputs, theirs):
    """They round the product of both scales first, which is one more rounding."""
    their = theirs(package, "nvfp4")[name]
    q = tigon.NVFP4Tensor(their["codes"], their["block_scale"], their["tensor_scale"], SHAPE)
    torch.testing.assert_close(q.dequantize(), their["values"], rtol=2**-22, atol=0)


def test_every_e2m1_value_and_tie_and_what_lies_beside_it(modelopt, torchao):
    x = e2m1_points()
    q = tigon.quantize_nvfp4(x, amax=torch.tensor(2688.0))
    assert (q.block_scale.float() == 1).all()
    got = unpacked(q.codes)
    for i, v in enumerate(x.flatten().tolist()):
        best = min(range(8), key=lambda c: (abs(E2M1[c] - abs(v)), c % 2))
        assert got.flatten()[i] == best + 8 * (math.copysign(1, v) < 0), v
    assert torch.equal(got, torchao["torchao_e2m1"]["points"]["codes"])
    assert torch.equal(got.where(x != 0, 0), modelopt["modelopt_e2m1"]["points"]["codes"])


def neighbours(exact):
    """fp32 numbers, and for each its neighbours above and below."""
    ends = (torch.full_like(exact, math.inf), torch.full_like(exact, -math.inf))
    return torch.cat([exact, *(torch.nextafter(exact, end) for end in ends)])


def magnitudes(dtype):
    """fp64: the finite values of an FP8 dtype by code, from 0 up."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    return values[values.isfinite()]


def searched(v, dtype):
    """Codes of fp64 magnitudes by search: the nearest value, of two equally near ones the even code; saturating."""
    values = magnitudes(dtype)
    low = torch.searchsorted(values, v.clamp(max=values[-1]), right=True) - 1
    high = (low + 1).clamp(max=len(values) - 1)
    down, up = v - values[low], values[high] - v
    return torch.where((up < down) | ((up == down) & (low % 2 == 1)), high, low)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_value_and_tie_and_what_lies_beside_it(dtype):
    values = magnitudes(dtype)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, values[-1:] * 1.5])
    points = neighbours(points.float()).abs()
    amax = values[-1].float()  # the scale is then 1
    for x in (points, -points):
        q = tigon.quantize_fp8(x, dtype=dtype, amax=amax)
        assert torch.equal(q.codes.view(torch.uint8) & 127, searched(points.double(), dtype))
        assert torch.equal(q.codes.view(torch.uint8) >> 7, torch.signbit(x).byte())


def test_every_e4m3_block_scale_and_tie_and_what_lies_beside_it():
    """With an amax of 2688 a block scale is e4m3(b / 6): b is put at six times every value and tie."""
    values = magnitudes(torch.float8_e4m3fn)
    points = neighbours(torch.cat([values, (values[1:] + values[:-1]) / 2]).float() * 6).abs()
    wanted = points * torch.tensor(1 / 6)
    assert (wanted.double() * 6 == points).double().mean() > 0.3  # the exact ones are met exactly
    x = torch.zeros(len(points), 16)
    x[:, 5] = points
    q = tigon.quantize_nvfp4(x, amax=torch.tensor(2688.0))
    assert torch.equal(
        q.block_scale.view(torch.uint8)[:, 0].long(),
        searched(wanted.double(), torch.float8_e4m3fn),
    )


@pytest.mark.parametrize("dtype,most", [(torch.float8_e4m3fn, 448), (torch.float8_e5m2, 57344)])
def test_every_e8m0_scale_is_the_least_power_of_two_that_cuts_nothing_off(dtype, most):
    exponents = torch.arange(-149.0, 128.0).double()
    powers = 2.0**exponents
    b = torch.cat([powers * most * 2.0**-15, powers]).float()
    b = b[b.isfinite() & (b > 0)].bfloat16()
    steps = torch.tensor([-1, 0, 1], dtype=torch.int16)
    b = (b.view(torch.int16)[:, None] + steps).flatten().view(torch.bfloat16)
    b = b[b.isfinite() & (b > 0)]
    x = torch.zeros(len(b), 32, dtype=torch.bfloat16)
    x[:, 7] = -b
    got = tigon.quantize_mxfp8(x, dtype=dtype).block_scale[:, 0]
    mantissa, exponent = torch.frexp(
        b.double() / most
    )  # b / most = mantissa 2^exponent, in [1/2, 1)
    want = (exponent - (mantissa == 0.5).int() + 127).clamp(0)
    assert torch.equal(got.int(), want)
    assert want.min() == 0 and want.max() > 230


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("package", ["modelopt", "torchao"])
def test_mxfp8_is_theirs(package, name, inputs, theirs):
    """But where b / 448 is a power of two within rounding, and not exactly; b of bf16 inputs never is."""
    x, their = inputs[name], theirs(package, "mxfp8")[name]
    dtypes = {"": torch.float8_e4m3fn}
    if package == "torchao":
        dtypes = {"e4m3 ": torch.float8_e4m3fn, "e5m2 ": torch.float8_e5m2}
    for prefix, dtype in dtypes.items():
        q = tigon.quantize_mxfp8(x, dtype=dtype)
        scale = their[f"{prefix}block_scale"]
        b = x.float().unflatten(-1, (-1, 32)).abs().amax(-1)
        log = torch.log2(b.double() / torch.finfo(dtype).max)
        off = (log - log.round()).abs()
        near = (off > 0) & (off < 1e-4)
        assert near.double().mean() < 1e-3 and not (near.any() and "bf16" in name)
        # torchao takes a scale of 2^-127 for 1; only blocks of zeros have it here.
        assert torch.equal(q.block_scale[~near], scale[~near])
        same = ~near[..., None].expand(-1, -1, 32).flatten(-2)
        codes = their[f"{prefix}codes"]
        assert torch.equal(bytes_of(q.codes)[same], bytes_of(codes)[same])


@pytest.mark.parametrize("name", NAMES)
def test_fp8_is_torchaos(name, inputs, torchao):
    """Its encode scales come from a division in fp64, which rounded to fp32 is the fp32 division. Blocks with an amax
    below its 1e-12 are left out."""
    x, their = inputs[name], torchao["torchao_fp8"][name]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for power in (False, True):
            for granularity in ("tensor", "row"):
                options = {"granularity": granularity, "dtype": dtype, "power_of_two": power}
                q = tigon.quantize_fp8(x, **options)
                key = f"{granularity} {dtype} {power}"
                assert torch.equal(q.scale, their[f"{key} scale"].view(q.scale.shape)), key
                assert torch.equal(bytes_of(q.codes), bytes_of(their[f"{key} codes"])), key
    for granularity in ("1x128", "128x128"):
        q = tigon.quantize_fp8(x, granularity=granularity)
        rows, wide = (1, 128) if granularity == "1x128" else (128, 128)
        b = x.abs().unflatten(1, (-1, wide)).unflatten(0, (-1, rows)).amax((1, 3))
        known = b > 1e-12
        assert torch.equal(q.scale[known], their[f"{granularity} scale"][known])
        spread = known.repeat_interleave(rows, 0).repeat_interleave(wide, 1)
        codes = their[f"{granularity} codes"]
        assert torch.equal(bytes_of(q.codes)[spread], bytes_of(codes)[spread])
        assert spread.double().mean() > 0.9


@pytest.mark.parametrize("name", ["normal", "laplace bf16"])
def test_fp8_is_modelopts_but_at_ties(name, inputs, modelopt):
    """It divides the amax by 448 and x by that, where x is multiplied with 448 / amax here: an ulp in the scale."""
    x, their = inputs[name].float(), modelopt["modelopt_fp8"][name]
    for granularity in ("tensor", "row", "1x128", "128x128"):
        q = tigon.quantize_fp8(x, granularity=granularity)
        scale = their[f"{granularity} scale"].view(q.scale.shape)
        torch.testing.assert_close(q.scale, scale, rtol=2**-22, atol=0)
        got, want = bytes_of(q.codes), bytes_of(their[f"{granularity} codes"])
        assert torch.equal(got & 128, want & 128)
        ones = tigon.FP8Tensor(torch.ones_like(x).to(q.codes.dtype), q.scale, q.shape, granularity)
        exact = x.double() / ones.dequantize().double()
        values = magnitudes(torch.float8_e4m3fn)
        assert_codes_differ_at_ties_only(got & 127, want & 127, exact, values)


SCALES = [(1, 1), (5, 3), (128, 4), (130, 9), (300, 33)]  # rows, blocks a row


@pytest.mark.parametrize("m,blocks", SCALES)
def test_swizzled_scales_are_torchaos_to_blocked(m, blocks, torchao):
    """The order of a matrix of distinct numbers, carried over to the bytes of the scales."""
    their = torchao["torchao_to_blocked"][f"{m} x {blocks}"]
    torch.testing.assert_close(their["back"].shape, torch.Size((m, blocks)))
    flat, back = their["blocked"], their["back"]
    place = {v: i for i, v in enumerate(flat.tolist()) if v}
    x = torch.randn(m, blocks * 32 - 5)
    for quantize, size in ((tigon.quantize_nvfp4, 16), (tigon.quantize_mxfp8, 32)):
        part = x[:, : blocks * size - 3]
        linear = quantize(part).block_scale.view(torch.uint8)
        swizzled = quantize(part, scale_layout="128x4").block_scale.view(torch.uint8)
        assert swizzled.shape == flat.shape and linear.shape == back.shape
        want = torch.zeros_like(swizzled)
        want[[place[v] for v in back.flatten().tolist()]] = linear.flatten()
        assert torch.equal(swizzled, want)


@pytest.mark.parametrize("name", ["normal", "laplace bf16"])
def test_torchao_writes_the_same_swizzled_bytes(name, inputs, torchao):
    q = tigon.quantize_nvfp4(inputs[name], scale_layout="128x4")
    assert torch.equal(
        bytes_of(q.block_scale), bytes_of(torchao["torchao_nvfp4"][name]["swizzled"])
    )
