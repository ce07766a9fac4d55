"""csrc/quantize_nvfp4.cu and amax.cu against the reference, byte for byte, in guarded memory."""

import pytest
import torch
from options import case_id, pairwise
from quantize_cases import SIZES, check, moved, numbers, nvfp4, signs, source

FLOATS = [torch.bfloat16, torch.float32, torch.float16]
CASES = pairwise(
    dtype=FLOATS,
    size=SIZES,
    mode=["1x16", "16x16", "hadamard", "row"],
    rounding=["nearest", "stochastic", "stochastic_unbiased", "mae", "mse"],
    axis=["row", "both", "column"],
    prologue=["none", "relu2", "norm", "gate_first", "gate_last"],
    layout=["packed", "sliced"],
    swizzled=[False, True],
    amax=[None, "given"],
    offset=[0, 7, 2**33 + 16],
    special=[False, True],
)


def arguments_of(
    dtype, size, mode, rounding, axis, prologue, layout, swizzled, amax, offset, special
):
    m, k = size
    group = next(g for g in (5, 11, k) if k % g == 0)
    x, z, weight, rstd, _ = source(
        m, k, dtype, prologue, layout, weight=torch.float32, group=group, special=special
    )
    if mode == "row":
        axis = "row"  # an amax for each row belongs to the row-wise copy alone
    known = {"row": m} if mode == "row" else {"row": (), "column": (), "both": 2}
    given = torch.rand(known[axis]) * 8 if amax else None
    four_over_six = rounding if rounding in ("mae", "mse") else ""
    return dict(
        x=x,
        z=z,
        weight=weight,
        rstd=rstd,
        prologue=prologue,
        seed=torch.tensor(-(2**62) + 12345) if "stochastic" in rounding else None,
        offset=offset,
        hadamard=signs() if mode == "hadamard" else None,
        amax=given,
        per_row=mode == "row",
        square=mode == "16x16",
        rounding="nearest" if four_over_six else rounding,
        four_over_six=four_over_six,
        row=axis != "column",
        column=axis != "row",
        swizzled=swizzled,
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bytes_are_the_references(kernels, case):
    check("quantize_nvfp4", moved(arguments_of(**case), kernels))


@pytest.mark.parametrize("size", [(0, 32), (32, 0), (0, 0)])
@pytest.mark.parametrize("per_row", [False, True])
def test_nothing_to_quantize_still_has_a_tensor_scale(kernels, size, per_row):
    x = torch.empty(size, dtype=torch.bfloat16)
    for swizzled in (False, True):
        case = nvfp4(x, per_row=per_row, column=not per_row, swizzled=swizzled)
        check("quantize_nvfp4", moved(case, kernels))


@pytest.mark.parametrize("amax", [0.0, 1e-44, 1e-38, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("four_over_six", ["", "mae"])
def test_extreme_amax_gives_the_references_scales(kernels, amax, four_over_six):
    x = numbers(17, 48, torch.float32)
    x[3], x[4, 5] = x[3] * 1e-44, 3e38
    case = nvfp4(x, amax=torch.tensor(amax), four_over_six=four_over_six, column=False)
    check("quantize_nvfp4", moved(case, kernels))


def test_all_bf16_numbers_round_as_the_reference_does(kernels):
    """Under a block scale of 1: every value that E2M1 can meet, ties included."""
    bits = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    finite = bits[bits.float().abs() <= 6].float()
    finite = torch.nn.functional.pad(finite, (0, -len(finite) % 15))
    rows = torch.cat([finite.view(-1, 15), torch.full((len(finite) // 15, 1), 6.0)], 1)
    case = nvfp4(rows, amax=torch.tensor(2688.0))
    codes, scale, _ = check("quantize_nvfp4", moved(case, kernels))[:3]
    assert (scale.float() == 1).all() and len((codes & 15).unique()) == 16


@pytest.mark.parametrize("axis", ["row", "column"])
def test_padding_of_a_rotated_block_draws_no_random_bytes(kernels, axis):
    """It holds values, and is rounded with the byte 0, as in the reference."""
    x = numbers(35, 35, torch.bfloat16)
    options = dict(hadamard=signs(), rounding="stochastic", seed=torch.tensor(3))
    options |= dict(row=axis == "row", column=axis == "column")
    check("quantize_nvfp4", moved(nvfp4(x, **options), kernels))


@pytest.mark.parametrize("square", [False, True])
def test_four_over_six_takes_six_where_both_lose_nothing(kernels, square):
    x = torch.zeros(32, 32)
    x[:, ::3] = 6.0
    case = nvfp4(x, amax=torch.tensor(1536.0), four_over_six="mse", square=square)
    codes, scale, _ = check("quantize_nvfp4", moved(case, kernels))[:3]
    assert (scale.float() == 1).all() and set(codes.flatten().tolist()) <= {0, 7, 0x70, 0x77}


def test_stochastic_bits_depend_on_the_element_alone(kernels):
    """A slice of rows, quantized with the offset of its first element, has the bytes of the whole."""
    x = numbers(40, 48, torch.bfloat16)
    seed, amax = torch.tensor(7), torch.tensor(4.0)
    options = dict(seed=seed, amax=amax, rounding="stochastic")
    whole = check("quantize_nvfp4", moved(nvfp4(x, **options), kernels))
    part = check("quantize_nvfp4", moved(nvfp4(x[8:], offset=8 * 48, **options), kernels))
    assert torch.equal(whole[0][8:], part[0])


@pytest.mark.parametrize("axis", ["row", "column"])
def test_offsets_past_two_to_the_31_elements(kernels, axis):
    far = 2**31 + 64
    memory = torch.empty(far + 256, dtype=torch.bfloat16, device=kernels)
    x = memory.as_strided((2, 40), (far, 1))
    x.copy_(numbers(2, 40, torch.bfloat16))
    case = nvfp4(x, row=axis == "row", column=axis == "column")
    check("quantize_nvfp4", case)
