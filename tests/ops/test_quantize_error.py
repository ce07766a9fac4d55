"""How far quantized numbers are from what they stand for, on the reference: signal to noise in dB, bias of random
rounding, published random bits, hostile values, what must not depend on how a tensor is cut.

The dB figures of the normal, Laplace, Student and uniform columns were found with numpy and ml_dtypes by the formulas
of the formats; the last column is the mean of 24 draws of 2048^2, since outliers make single draws vary by 0.05.
"""

import math

import pytest
import torch

import tigon
from tigon.ops.quantize import unpack
from tigon.reference import e2m1, quantize
from tigon.reference.philox import philox, rounding_bytes

SIDE = 2048
SIGNS = torch.tensor([1.0, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


def outliers(shape):
    x = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.002, x * 30, x)


DRAWS = {  # name: (draw, how many)
    "normal": (torch.randn, 1),
    "laplace": (lambda s: torch.empty(s).exponential_() * torch.randn(s).sign(), 1),
    "student": (lambda s: torch.distributions.StudentT(5.0).sample(s), 1),
    "uniform": (lambda s: torch.rand(s) * 2 - 1, 1),
    "outliers": (outliers, 4),
}


def hadamard_matrix():
    """diag(signs) H16 / 4."""
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return SIGNS[:, None] * matrix / 4


def there_and_back(x):
    q = tigon.quantize_nvfp4(x, hadamard=SIGNS)
    return (q.dequantize().unflatten(1, (-1, 16)) @ hadamard_matrix().T).flatten(1)


def nvfp4(**options):
    return lambda x: tigon.quantize_nvfp4(x, **options).dequantize()


def fp8(granularity, dtype=torch.float8_e4m3fn):
    return lambda x: tigon.quantize_fp8(x, granularity=granularity, dtype=dtype).dequantize()


FORMATS = {
    "1x16": nvfp4(),
    "16x16": nvfp4(block="16x16"),
    "stochastic": nvfp4(rounding="stochastic", seed=5),
    "four over six, mse": nvfp4(four_over_six="mse"),
    "four over six, mae": nvfp4(four_over_six="mae"),
    "hadamard": there_and_back,
    "mxfp8": lambda x: tigon.quantize_mxfp8(x).dequantize(),
    "fp8 tensor": fp8("tensor"),
    "fp8 row": fp8("row"),
    "fp8 1x128": fp8("1x128"),
    "fp8 128x128": fp8("128x128"),
    "fp8 e5m2": fp8("tensor", torch.float8_e5m2),
}
FIGURES = {  # dB by format, one a distribution in the order of DRAWS
    "1x16": (20.44, 20.66, 20.69, 19.86, 21.36),
    "16x16": (19.07, 17.77, 17.34, 19.16, 12.23),
    "stochastic": (17.24, 17.39, 17.42, 16.78, 17.43),
    "four over six, mse": (21.21, 21.20, 21.24, 21.19, 21.77),
    "four over six, mae": (21.08, 21.06, 21.12, 21.07, 21.71),
    "hadamard": (20.44, 20.35, 20.35, 20.49, 19.25),
    "mxfp8": (31.52, 31.54, 31.54, 32.53, 31.55),
    "fp8 tensor": (31.54, 31.54, 31.54, 31.86, 31.54),
    "fp8 row": (31.55, 31.61, 31.66, 31.87, 33.61),
    "fp8 1x128": (31.80, 32.11, 32.19, 31.97, 35.88),
    "fp8 128x128": (31.55, 31.55, 31.58, 31.86, 32.05),
    "fp8 e5m2": (25.56, 25.56, 25.56, 25.84, 25.58),
}


def squares(t):
    return t.double().square().sum().item()


def decibel(signal, noise):
    return 10 * math.log10(signal / noise)


@pytest.mark.parametrize("name", DRAWS)
def test_every_format_has_its_signal_to_noise_ratio(name):
    draw, count = DRAWS[name]
    signal, noise = 0.0, dict.fromkeys(FORMATS, 0.0)
    for i in range(count):
        torch.manual_seed(i)
        x = draw((SIDE, SIDE))
        signal += squares(x)
        for format, through in FORMATS.items():
            noise[format] += squares(through(x) - x)
    found = {format: decibel(signal, noise[format]) for format in FORMATS}
    column = list(DRAWS).index(name)
    wrong = {k: v for k, v in found.items() if abs(v - FIGURES[k][column]) > 0.05}
    assert not wrong, {k: (round(v, 3), FIGURES[k][column]) for k, v in wrong.items()}


def row_fp8(x):
    return tigon.quantize_fp8(x, granularity="row")


PRODUCTS = {  # of independent normal matrices: left, right, dB
    "nvfp4 x nvfp4": (tigon.quantize_nvfp4, tigon.quantize_nvfp4, 17.44),
    "nvfp4 x 16x16": (
        tigon.quantize_nvfp4,
        lambda w: tigon.quantize_nvfp4(w, block="16x16"),
        16.72,
    ),
    "fp32 x nvfp4": (lambda x: x, tigon.quantize_nvfp4, 20.42),
    "fp8 x nvfp4": (row_fp8, tigon.quantize_nvfp4, 20.10),
    "fp8 x fp8": (row_fp8, row_fp8, 28.54),
    "mxfp8 x mxfp8": (tigon.quantize_mxfp8, tigon.quantize_mxfp8, 28.53),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_has_its_signal_to_noise_ratio(name):
    left, right, figure = PRODUCTS[name]
    torch.manual_seed(0)
    a, b = torch.randn(512, 4096), torch.randn(512, 4096)
    exact = a.double() @ b.double().T
    got = tigon.scaled_mm(left(a), right(b), out_dtype=torch.float32)
    found = decibel(squares(exact), squares(got - exact))
    assert abs(found - figure) <= 0.05, found


def test_stochastic_rounding_has_the_right_mean_to_a_256th_of_a_step():
    """The mean over all 256 bytes is the number cut to a 256th of the grid's step; above 6 it is 6."""
    a = torch.cat([torch.linspace(0, 6, 6007), torch.arange(0, 6.25, 0.25)])
    mean = e2m1.stochastic(a[:, None], torch.arange(256, dtype=torch.uint8)).clamp(max=6).mean(1)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0)) / 256
    inside = a < 6
    assert torch.equal(mean[inside], (torch.floor(a / step) * step)[inside])
    assert (mean[~inside] == 6).all()


def draws(x, rounding, count):
    """(sum, sum of squares) of `count` dequantized draws, fp64."""
    total, square = torch.zeros_like(x, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for seed in range(count):
        y = tigon.quantize_nvfp4(x, rounding=rounding, seed=seed).dequantize().double()
        total += y
        square = square + (y - x).square().sum()
    return total, square.item()


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic_unbiased"])
def test_many_draws_average_out(rounding):
    x, count = torch.randn(512, 512), 64
    total, _ = draws(x, rounding, count)
    assert decibel(squares(x), squares(total / count - x)) >= 34.0


def test_unbiased_rounding_is_unbiased_and_plain_rounding_is_not():
    """Mean error towards zero in units of the error of one draw, over all elements and draws. Bytes cut a 512th of a
    step off on average; plain rounding also cuts off what E4M3, rounding a block scale down, left above 6."""
    x, count = torch.randn(512, 512), 64
    bias = {}
    for rounding in ("stochastic", "stochastic_unbiased"):
        total, square = draws(x, rounding, count)
        one = math.sqrt(square / count / x.numel())
        bias[rounding] = ((total / count - x) * x.sign()).mean().item() / one
    confidence = 4 / math.sqrt(count * x.numel())
    cut = (
        1 / 512 * 3
    )  # a step is at most 2.4 times the error of a draw, whose variance is at least step^2/6 on average
    assert -cut - confidence < bias["stochastic_unbiased"] < confidence
    assert bias["stochastic"] < -2 * cut


def test_a_block_whose_scale_was_rounded_down_loses_its_largest_element_without_headroom():
    """b / 6 = 17 lies midway between the E4M3 numbers 16 and 18, and 16 is the even one: 102 becomes 96 for good."""
    x = torch.zeros(1, 16)
    x[0, 3] = 102.0
    amax = torch.tensor(2688.0)
    plain = [
        tigon.quantize_nvfp4(x, rounding="stochastic", seed=s, amax=amax).dequantize()[0, 3].item()
        for s in range(8)
    ]
    assert plain == [96.0] * 8
    total = sum(
        tigon.quantize_nvfp4(x, rounding="stochastic_unbiased", seed=s, amax=amax).dequantize()
        for s in range(512)
    )
    assert abs(total[0, 3].item() / 512 - 102) < 2.5


KNOWN = [  # of the Random123 distribution, philox4x32 with 10 rounds: counter, key, result
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("counter,key,result", KNOWN)
def test_philox_gives_the_published_words(counter, key, result):
    words = [[torch.tensor(int(w, 16)) for w in part.split()] for part in (counter, key)]
    assert [int(w) for w in philox(*words)] == [int(w, 16) for w in result.split()]


def test_random_bytes_are_the_words_low_byte_first():
    seed = torch.tensor(0x299F31D0A4093822)  # the key of the third vector
    element = 16 * (
        0x85A308D3 << 32 | 0x243F6A88
    )  # past 2^63: only the bytes of a counter that fits are asked for
    low = 16 * 0x243F6A88
    words = philox(
        tuple(torch.tensor(w) for w in (0x243F6A88, 0, 1, 0)),
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    want = [int(w) >> 8 * i & 255 for w in words for i in range(4)]
    assert rounding_bytes(seed, 1, 2, 8, low).flatten().tolist() == want
    assert rounding_bytes(seed, 1, 1, 5, low + 3).flatten().tolist() == want[3:8]
    assert element >= 2**63


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("block", ["1x16", "16x16"])
def test_a_slice_quantized_with_its_offset_is_the_slice_of_the_whole(block, rounding):
    """Also over the rows at which a tall tensor is cut up on a CPU."""
    k = 272
    x, amax = torch.randn(quantize.CHUNK // k + 300, k), torch.tensor(6.0)
    options = {"block": block, "rounding": rounding, "amax": amax, "seed": 11}
    whole = tigon.quantize_nvfp4(x, **options)
    (_, column) = tigon.quantize_nvfp4(x, axis="both", **options)
    for start, stop in ((0, 16), (48, 112), (464, 528), (320, x.shape[0] // 16 * 16)):
        part = tigon.quantize_nvfp4(x[start:stop], offset=start * k, **options)
        for name, t in part.tensors().items():
            assert torch.equal(t, whole[start:stop].tensors()[name]), name
        transposed = tigon.quantize_nvfp4(x[start:stop], offset=start * k, axis="column", **options)
        assert torch.equal(transposed.codes, column.codes[:, start // 2 : stop // 2])
        scales = column.block_scale.view(torch.uint8)[:, start // 16 : stop // 16]
        assert torch.equal(transposed.block_scale.view(torch.uint8), scales)


def quantizers():
    return {
        "nvfp4": tigon.quantize_nvfp4,
        "nvfp4 16x16": lambda x, **o: tigon.quantize_nvfp4(x, block="16x16", **o),
        "nvfp4 four over six": lambda x, **o: tigon.quantize_nvfp4(x, four_over_six="mse", **o),
        "nvfp4 stochastic": lambda x, **o: tigon.quantize_nvfp4(
            x, rounding="stochastic", seed=1, **o
        ),
        "mxfp8": tigon.quantize_mxfp8,
        **{
            f"fp8 {g}": lambda x, g=g, **o: tigon.quantize_fp8(x, granularity=g, **o)
            for g in ("tensor", "row", "1x128", "128x128")
        },
    }


@pytest.mark.parametrize("name", quantizers())
def test_zeros_stay_zeros_of_their_sign(name):
    x = torch.zeros(20, 40)
    x[:, 1::2] = -0.0
    q = quantizers()[name](x)
    assert torch.equal(q.dequantize(), x)
    assert torch.equal(torch.signbit(q.dequantize()), torch.signbit(x))
    scale = q.scale if hasattr(q, "scale") else getattr(q, "tensor_scale", torch.ones(()))
    assert (scale == 1).all()


@pytest.mark.parametrize("name", quantizers())
@pytest.mark.parametrize("size", [1e-40, 1e-30, 3e38])
def test_numbers_at_the_ends_of_fp32_stay_finite(name, size):
    x = (torch.rand(20, 40) * 1.8 - 0.9) * size
    y = quantizers()[name](x).dequantize()
    assert torch.isfinite(y).all() and y.abs().max() <= 1.1 * x.abs().max()
    if size != 1e-40:
        assert (y / size - x / size).norm() < 0.2 * (x / size).norm()


@pytest.mark.parametrize("name", quantizers())
def test_a_nan_is_told_and_spoils_no_block_but_its_own_where_the_amax_is_given(name):
    x = torch.randn(40, 48)
    x[3, 5] = math.nan
    assert quantizers()[name](x).dequantize()[3, 5].isnan()
    if name.startswith("nvfp4"):
        y = quantizers()[name](x, amax=torch.tensor(4.0)).dequantize()
        rows = slice(0, 16) if "16x16" in name else slice(3, 4)
        assert y[rows, :16].isnan().all()
        y[rows, :16] = 0
        assert not y.isnan().any()


@pytest.mark.parametrize("name", quantizers())
def test_an_infinity_keeps_its_sign_and_makes_no_other_number_infinite(name):
    """In NVFP4 where the amax is given: found here it makes the tensor's scale infinite, which tells of it."""
    x = torch.randn(40, 48)
    x[3, 5], x[30, 7] = math.inf, -math.inf
    if name.startswith("nvfp4"):
        assert tigon.quantize_nvfp4(x).tensor_scale.item() == math.inf
    y = quantizers()[name](x, **({"amax": torch.tensor(4.0)} if "nvfp4" in name else {}))
    y = y.dequantize()
    assert y[3, 5] == y.max() and y[30, 7] == y.min() and y.max() > 3
    assert torch.isfinite(
        y.where(torch.isfinite(x), 0)
    ).all()  # 448 x 2^127, MXFP8's largest, is infinite itself


@pytest.mark.parametrize("name", quantizers())
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0,), (2, 0, 16)])
def test_empty_tensors_come_back_empty(name, shape):
    q = quantizers()[name](torch.empty(shape))
    assert q.shape == shape and q.dequantize().shape == shape


@pytest.mark.parametrize("name", quantizers())
def test_what_was_quantized_once_is_not_changed_again(name):
    """Every block holds its largest magnitude, so its scale is found again: exactly, where no 1 / scale is rounded."""
    x = torch.randn(48, 256)
    options = {"amax": x.abs().max()} if name.startswith("nvfp4") else {}
    first = quantizers()[name](x, **options)
    again = quantizers()[name](first.dequantize(), **options)
    if name in ("nvfp4", "nvfp4 16x16"):
        for field, t in first.tensors().items():
            assert torch.equal(t, again.tensors()[field]), field
    exact = 0 if name.startswith(("nvfp4", "mxfp8")) else 2**-22
    if "stochastic" not in name:
        torch.testing.assert_close(again.dequantize(), first.dequantize(), rtol=exact, atol=0)


def test_the_hadamard_transform_is_orthonormal_and_its_own_inverse_but_for_the_signs():
    got = quantize.hadamard_16(torch.eye(16), SIGNS)
    assert torch.equal(got, hadamard_matrix())
    assert torch.equal(got @ got.T, torch.eye(16))
    x = torch.randn(64, 16)
    torch.testing.assert_close(
        quantize.hadamard_16(quantize.hadamard_16(x, SIGNS), torch.ones(16)) * SIGNS, x
    )


def test_codes_of_every_byte_are_decoded_and_encoded_back():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    values = e2m1.decode(codes)
    low = torch.tensor([*e2m1.E2M1, *(-v for v in e2m1.E2M1)])
    assert torch.equal(values[0, ::2], low.repeat(16))
    assert torch.equal(values[0, 1::2], low.repeat_interleave(16))
    assert torch.equal(e2m1.pack(e2m1.encode(values.clone(), None)), codes)
    assert torch.equal(e2m1.rounded(values), values)


LAWS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("op", ["quantize_nvfp4", "quantize_mxfp8", "quantize_fp8", "dequantize"])
def test_ops_follow_the_law_of_registered_ops(op):
    """Without test_schema: it compares clones of outputs by arithmetic that torch does not have for FP8."""
    x, weight, rstd = torch.randn(20, 48), torch.randn(48), torch.rand(20, 1)
    norm, plain = (x, None, weight, rstd, "norm"), (x, None, None, None, "none")
    q = tigon.quantize_nvfp4(x)
    random = (torch.tensor(3), 5, SIGNS, None, False, False, "stochastic", "")
    over = (None, 0, None, torch.rand(20), True, False, "nearest", "mse")
    square = (None, 0, None, torch.rand(2), False, True, "nearest", "")
    cases = {
        "quantize_nvfp4": [
            (*norm, *random, True, True, True),
            (*plain, *over, True, False, False),
            (*plain, *square, True, True, False),
        ],
        "quantize_mxfp8": [(*norm, True, True, True, True), (*plain, False, False, True, False)],
        "quantize_fp8": [
            (*plain, None, "128x128", False, True, True, True),
            (*norm, torch.tensor(3.0), "tensor", True, False, True, False),
        ],
        "dequantize": [(*unpack(q)[:4], 48, False, torch.bfloat16)],
    }
    for case in cases[op]:
        torch.library.opcheck(getattr(torch.ops.tigon, op).default, case, test_utils=LAWS)


def test_quantized_tensors_live_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.randn(20, 48, dtype=torch.bfloat16), torch.randn(8, 48)
        for quantizer in quantizers().values():
            assert quantizer(x)[:3].dequantize().shape == (3, 48) or "128x128" in str(quantizer)
        y = tigon.scaled_mm(x, tigon.quantize_nvfp4(w, scale_layout="128x4"))
        assert y.shape == (20, 8) and y.dtype == torch.bfloat16
