"""csrc/quantize_fp8.cu, amax.cu and dequantize.cu against the reference, byte for byte, in guarded memory."""

import pytest
import torch
from options import case_id, pairwise
from quantize_cases import SIZES, check, moved, numbers, nvfp4, source

from tigon import native

FLOATS = [torch.bfloat16, torch.float32, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
CASES = pairwise(
    dtype=FLOATS,
    size=[*SIZES, (257, 144), (144, 257)],
    granularity=["mx", "tensor", "row", "1x128", "128x128", "static"],
    e5m2=[False, True],
    power_of_two=[False, True],
    axis=["row", "both", "column"],
    prologue=["none", "relu2", "norm", "gate_first", "gate_last"],
    layout=["packed", "sliced"],
    swizzled=[False, True],
    special=[False, True],
)


def arguments_of(
    dtype, size, granularity, e5m2, power_of_two, axis, prologue, layout, swizzled, special
):
    m, k = size
    fields = source(m, k, dtype, prologue, layout, weight=torch.bfloat16, special=special)
    both = dict(zip(("x", "z", "weight", "rstd", "prologue"), fields), e5m2=e5m2)
    both |= dict(row=axis != "column", column=axis != "row")
    if granularity == "mx":
        return "quantize_mxfp8", both | dict(swizzled=swizzled)
    amax = torch.tensor(3.0) if granularity == "static" else None
    kind = "tensor" if granularity == "static" else granularity
    return "quantize_fp8", both | dict(amax=amax, granularity=kind, power_of_two=power_of_two)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bytes_are_the_references(kernels, case):
    name, arguments = arguments_of(**case)
    check(name, moved(arguments, kernels))


def fp8(x, **changes) -> dict:
    return dict(
        x=x, z=None, weight=None, rstd=None, prologue="none", amax=None, granularity="tensor", e5m2=False,
        power_of_two=False, row=True, column=True,
    ) | changes  # fmt: skip


@pytest.mark.parametrize("size", [(0, 32), (32, 0), (0, 0)])
def test_nothing_to_quantize_gives_what_the_reference_gives(kernels, size):
    x = torch.empty(size, dtype=torch.bfloat16)
    for granularity in ("tensor", "row", "1x128", "128x128"):
        check("quantize_fp8", moved(fp8(x, granularity=granularity), kernels))
    mx = fp8(x, swizzled=True)
    for name in ("amax", "granularity", "power_of_two"):
        del mx[name]
    check("quantize_mxfp8", moved(mx, kernels))
    for dtype in FLOATS:
        codes, scale = torch.empty(size, dtype=FP8[0]), torch.ones(())
        check("dequantize", moved(decode(codes, scale, "fp8-tensor", size[1], dtype), kernels))


@pytest.mark.parametrize("e5m2", [False, True])
def test_every_16_bit_number_rounds_as_the_reference_does(kernels, e5m2):
    """A static amax of the format's maximum: the codes are the cast of x. Ties, subnormals, infinities, NaNs."""
    bits = torch.arange(2**16).to(torch.int16)
    most = torch.tensor(57344.0 if e5m2 else 448.0)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).view(256, 256)
        codes = check("quantize_fp8", moved(fp8(x, amax=most, e5m2=e5m2, column=False), kernels))[0]
        assert len(codes.view(torch.uint8).unique()) > 245


@pytest.mark.parametrize("e5m2", [False, True])
def test_scales_at_the_ends_of_the_range(kernels, e5m2):
    """Blocks of denormals, of zeros, of the largest floats, and with infinities and NaNs."""
    x = torch.ones(14, 160)
    for i, size in enumerate([0, 1e-45, 3e-45, 1e-42, 1e-39, 5e-39, 6e-39, 1.2e-38, 1e30, 3.4e38]):
        x[i] *= size
    x[10], x[11, 3], x[12, 40], x[13, 7] = (
        448 * 2.0**-130,
        float("inf"),
        float("nan"),
        -float("inf"),
    )
    for granularity in ("row", "1x128"):
        for power_of_two in (False, True):
            case = fp8(x, granularity=granularity, e5m2=e5m2, power_of_two=power_of_two)
            check("quantize_fp8", moved(case, kernels))
    mx = fp8(x, e5m2=e5m2, swizzled=False)
    for name in ("amax", "granularity", "power_of_two"):
        del mx[name]
    check("quantize_mxfp8", moved(mx, kernels))


DEQUANTIZE = pairwise(
    format=["nvfp4", "mxfp8", "fp8-tensor", "fp8-row", "fp8-1x128", "fp8-128x128"],
    dtype=FLOATS,
    size=[(3, 64), (130, 33), (5, 4112), (257, 15), (1, 1)],
    swizzled=[False, True],
    e5m2=[False, True],
    per_row=[False, True],
    sliced=[False, True],
)


def decode(codes, scale, format, k, dtype, tensor_scale=None, swizzled=False) -> dict:
    return dict(codes=codes, scale=scale, tensor_scale=tensor_scale, format=format, k=k, swizzled=swizzled,
                dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("case", DEQUANTIZE, ids=case_id)
def test_values_are_the_references(kernels, case):
    """From random bytes, so that every code and scale occurs: NaN scales, subnormals, infinities."""
    (m, k), format = case["size"], case["format"]
    block = {"nvfp4": 16, "mxfp8": 32}.get(format)
    swizzled = case["swizzled"] and block is not None

    def random_bytes(*shape):
        t = torch.randint(256, shape, dtype=torch.uint8)
        return torch.cat([t, t, t], 0)[m : 2 * m] if case["sliced"] and shape[0] == m else t

    if format == "nvfp4":
        codes = random_bytes(m, -(-k // 16) * 8)
    else:
        codes = random_bytes(m, k).view(FP8[case["e5m2"]])
    if block:
        blocks = -(-k // block)
        shape = (-(-m // 128) * 128 * (-(-blocks // 4) * 4),) if swizzled else (m, blocks)
        scale = random_bytes(*shape)
        scale = scale.view(torch.float8_e4m3fn) if format == "nvfp4" else scale
    else:
        high, wide = -(-m // 128), -(-k // 128)
        shape = {"tensor": (), "row": (m,), "1x128": (m, wide), "128x128": (high, wide)}[format[4:]]
        scale = torch.rand(shape)
    outer = torch.rand((m,) if case["per_row"] else ()) if format == "nvfp4" else None
    arguments = decode(codes, scale, format, k, case["dtype"], outer, swizzled)
    check("dequantize", moved(arguments, kernels))


def test_dequantize_takes_rows_of_wider_tensors(kernels):
    """Codes and scales with row strides and odd addresses."""
    codes, scale = torch.randint(256, (9, 71), dtype=torch.uint8), torch.rand(9, 5)
    inside = decode(codes[1:8, 3:67].view(FP8[0]), scale[1:8, 2:3], "fp8-1x128", 64, torch.bfloat16)
    check("dequantize", moved(inside, kernels))
    scales = torch.randint(126, (9, 7), dtype=torch.uint8).view(torch.float8_e4m3fn)
    arguments = decode(codes[1:8, 3:35], scales[1:8, 1:5], "nvfp4", 64, torch.float16)
    check("dequantize", moved(arguments | {"tensor_scale": torch.tensor(0.5)}, kernels))


def test_quantized_numbers_come_back(kernels):
    """Quantize and dequantize together: within half a step of the format."""
    x = numbers(40, 96, torch.bfloat16)
    codes, scale, outer = native.quantize_nvfp4(**moved(nvfp4(x), kernels))[:3]
    back = native.dequantize(codes, scale, outer, "nvfp4", 96, False, torch.float32).cpu()
    block = x.float().abs().view(40, 6, 16).amax(-1).repeat_interleave(16, 1)
    assert ((back - x.float()).abs() <= block / 5.5 + outer.cpu() * 0.05).all()
