"""csrc/ssd_update.cu against the fp64 recurrence, in guarded memory; bit laws of rows, tokens and alignment."""

import pytest
import torch
from decode_cases import FLOATS, INF, moved, ssd_check, ssd_make, ssd_plain
from numerics import assert_close_to_oracle, relative_rms
from options import case_id, pairwise

from tigon import native
from tigon.reference.ssd import ssd_update as reference
from tigon.reference.state_format import decode_state, encode_state

CASES = pairwise(
    io=FLOATS,
    held=FLOATS,
    shape=[(64, 128), (80, 96), (17, 3), (5, 256), (3, 17), (100, 16), (7, 40)],
    m=[1, 4, 2, 16],
    heads=[(4, 2), (3, 3), (2, 1)],
    D=[None, "h", "hp"],
    z=[True, False],
    bias=[True, False],
    softplus=[True, False],
    limit=[(0.0, INF), (0.05, 0.4)],
    beside=["fp32", "io"],
    ragged=[False, True],
    slots=["padded", None],
    layout=["sliced", "packed"],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_untouched_memory(kernels, case):
    before = ssd_make(**case)
    arguments = moved(before, kernels)
    ssd_check(arguments, native.ssd_update(**arguments), before)


@pytest.mark.parametrize("slot", [-1, -(2**31), 5, 2**31 - 1])
def test_slot_outside_the_pool_writes_zeros_and_touches_nothing(kernels, slot):
    before = ssd_plain()
    before["state_indices"] = torch.tensor([2, slot, 0], dtype=torch.int32)
    arguments = moved(before, kernels)
    y = native.ssd_update(**arguments)
    assert (y[1] == 0).all()
    ssd_check(arguments, y, before)


def test_num_tokens_outside_its_range_is_clamped(kernels):
    before = ssd_plain(m=3)
    before["num_tokens"] = torch.tensor([-2, 99, 0], dtype=torch.int32)
    arguments = moved(before, kernels)
    y = native.ssd_update(**arguments)
    before["num_tokens"] = torch.tensor([0, 3, 0], dtype=torch.int32)
    ssd_check(arguments, y, before)


def row(arguments: dict, i: int, t: slice = slice(None)) -> dict:
    """The call that makes row i alone, of tokens t."""
    alone = dict(arguments)
    for name in ("x", "dt", "B", "C", "z"):
        alone[name] = arguments[name][i : i + 1, t]
    alone["state_indices"] = torch.tensor([i], dtype=torch.int32, device=arguments["x"].device)
    return alone


@pytest.mark.parametrize("held", FLOATS)
def test_row_has_the_same_bits_alone(kernels, held):
    together = moved(ssd_plain(held=held, m=3), kernels)
    apart = moved(together, kernels)
    y = native.ssd_update(**together)
    rows = [native.ssd_update(**row(apart, i)) for i in range(3)]
    assert torch.equal(y, torch.cat(rows))
    assert torch.equal(together["state"], apart["state"])


def test_tokens_one_call_each_give_the_bits_of_one_call(kernels):
    together = moved(ssd_plain(m=4), kernels)
    apart = moved(together, kernels)
    y = native.ssd_update(**together)
    steps = [native.ssd_update(**row(apart, 1, slice(t, t + 1))) for t in range(4)]
    assert torch.equal(y[1:2], torch.cat(steps, 1))
    assert torch.equal(together["state"][1], apart["state"][1])


@pytest.mark.parametrize("held", FLOATS)
def test_alignment_does_not_change_a_bit(kernels, held):
    aligned = moved(ssd_plain(held=held), kernels)
    shifted = dict(aligned)
    for name in ("state", "B", "C"):
        t = aligned[name]
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        shifted[name] = memory[1:].view(t.shape).copy_(t)
        assert shifted[name].data_ptr() % 16
    assert torch.equal(native.ssd_update(**aligned), native.ssd_update(**shifted))
    assert torch.equal(aligned["state"], shifted["state"])


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
def test_nan_stays_in_its_row(kernels, name):
    arguments = moved(ssd_plain(limit=(0.01, 1.0)), kernels)
    clean = moved(arguments, kernels)
    arguments[name][1] = float("nan")
    y, expected = native.ssd_update(**arguments), native.ssd_update(**clean)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])
    assert torch.equal(arguments["state"][[0, 2]], clean["state"][[0, 2]])


def test_offsets_past_two_to_the_31_elements(kernels):
    """Slot, batch and token strides of half the address range of int32, in memory that is hardly touched."""
    far = 2**31 + 64
    before = ssd_plain(io=torch.bfloat16, held=torch.bfloat16, shape=(8, 16), heads=(1, 1), m=1)
    arguments = moved(before, kernels)
    sizes = {"state": 8 * 16, "x": 8, "z": 8, "B": 16, "C": 16}
    memory = torch.empty(far + 4096, dtype=torch.bfloat16, device=kernels)
    start = 0
    for name, size in sizes.items():
        spread = memory[start:].as_strided(
            (2, *arguments[name].shape[1:]), (far, *arguments[name].stride()[1:])
        )
        arguments[name] = spread.copy_(arguments[name][:2])
        start += 2 * size  # stays a multiple of 16 bytes
    for name in ("dt",):
        arguments[name] = arguments[name][:2]
    before = {k: v[:2] if k in (*sizes, "dt") else v for k, v in before.items()}
    y = native.ssd_update(**arguments)
    expected = moved(before, "cpu")
    assert_close_to_oracle(
        "y", y.cpu(), reference(**moved(before, "cpu", torch.float64)), reference(**expected)
    )
    assert torch.allclose(
        arguments["state"].cpu().float(), expected["state"].float(), rtol=0.01, atol=1e-3
    )


def test_empty_batch_launches_nothing(kernels):
    arguments = moved(ssd_plain(), kernels)
    for name in ("x", "dt", "B", "C", "z"):
        arguments[name] = arguments[name][:0]
    assert native.ssd_update(**arguments).shape == (0, 2, 2, 64)


def test_int64_indices_do_not_wrap_into_a_slot(kernels):
    before = ssd_plain(m=1)
    before["state_indices"] = torch.tensor([2**32, 1, 2])
    arguments = moved(before, kernels)
    y = native.ssd_update(**arguments)
    assert (y[0] == 0).all() and (y[1:] != 0).any()
    assert torch.equal(arguments["state"][0].cpu(), before["state"][0])


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (5, 17), (3, 40)])
@pytest.mark.parametrize("held", [torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_narrow_states_agree_with_the_reference_to_a_place(kernels, held, shape, stochastic):
    """Several tokens a row, ragged, with padding; where fp32 sums end beside a tie a code may be one off."""
    before = ssd_plain(held=torch.float32, shape=shape, m=3, ragged=True, slots="padded")
    state = before["state"].nan_to_num(0)
    codes, scale = encode_state(state, held)
    before |= {"state": codes, "state_scale": scale, "layer": 3}
    if stochastic:
        before |= {"seeds": torch.tensor([4, 5, 6]), "positions": torch.tensor([9, 9, 2**35])}
    arguments, expected = moved(before, kernels), moved(before, "cpu")
    y, expected_y = native.ssd_update(**arguments).cpu(), reference(**expected)
    assert relative_rms(y, expected_y) < 5e-3
    got, want = (
        decode_state(
            a["state"].cpu(), None if scale is None else a["state_scale"].cpu(), torch.float32
        )
        for a in (arguments, expected)
    )
    place = {torch.int8: 1 / 127, torch.float8_e4m3fn: 2**-3, torch.float16: 2**-9}.get(held, 2**-6)
    largest = want.abs().amax(-1, keepdim=True)
    assert ((got - want).abs() <= place * largest + 1e-6).all()
    assert ((got - want).abs() > 1e-5 * largest).double().mean() < 0.01
    for slot in {0, 1, 2, 3, 4} - {4, 1}:
        assert torch.equal(
            arguments["state"][slot].cpu().view(torch.uint8), codes[slot].view(torch.uint8)
        )
