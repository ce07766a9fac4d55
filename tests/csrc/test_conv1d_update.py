"""csrc/conv1d_update.cu against the fp64 reference, in guarded memory."""

import pytest
import torch
from memory import guarded, sliced
from numerics import assert_close_to_oracle
from options import case_id, pairwise

from tigon import native
from tigon.reference.conv1d import conv1d_update as reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CASES = pairwise(
    io=FLOATS,
    held=[None, *FLOATS],
    width=[4, 2, 3, 5, 6, 7, 8],
    extra=[0, 1, 3],
    m=[1, 4, 16, 2],
    d=[3, 96, 130],
    bias=[True, False],
    beside=["fp32", "io"],
    silu=[True, False],
    ragged=[False, True],
    slots=["padded", None],
    layout=["sliced", "packed"],
    channels_last=[False, True],
)


def make(io, held, width, extra, m, d, bias, beside, silu, ragged, slots, layout, channels_last):
    """Arguments of one call, by name; the window holds `extra` inputs more than the width needs."""
    small = io if beside == "io" else torch.float32
    window = width - 1 + extra
    pool = torch.randn(5, window, d) if channels_last else torch.randn(5, d, window)
    pool = guarded(pool.to(held or io))
    x = torch.randn(3, m, d).to(io)
    return {
        "x": sliced(x, 1) if layout == "sliced" else guarded(x),
        "conv_state": pool.transpose(1, 2) if channels_last else pool,
        "weight": guarded(torch.randn(d, width).to(small)),
        "bias": guarded(torch.randn(d).to(small)) if bias else None,
        "state_indices": guarded(torch.tensor([4, -1, 1], dtype=torch.int32)) if slots else None,
        "num_tokens": guarded(torch.tensor([m, m, m // 2], dtype=torch.int32)) if ragged else None,
        "silu": silu,
    }


def moved(arguments: dict, device, dtype=None) -> dict:
    def move(t):
        if not isinstance(t, torch.Tensor):
            return t
        if dtype:
            return t.to(dtype) if t.is_floating_point() else t.clone()
        base = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        return base.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())

    return {name: move(value) for name, value in arguments.items()}


def plain(**changes) -> dict:
    case = dict(
        io=torch.bfloat16,
        held=None,
        width=4,
        extra=0,
        m=2,
        d=96,
        bias=True,
        beside="io",
        silu=True,
        ragged=False,
        slots=None,
        layout="packed",
        channels_last=False,
    )
    return make(**(case | changes))


def check(arguments: dict, y: torch.Tensor, before: dict) -> None:
    exact, honest = moved(before, "cpu", torch.float64), moved(before, "cpu")
    oracle, baseline = reference(**exact), reference(**honest)
    assert_close_to_oracle("y", y.cpu(), oracle, baseline)
    # Inputs are moved and rounded once, never computed: every bit must be the reference's, guards included.
    state, expected = arguments["conv_state"], honest["conv_state"]
    size = state.untyped_storage().nbytes() // state.element_size()
    bits = torch.int16 if state.element_size() == 2 else torch.int32
    for got, want in [(state, expected)]:
        got = got.as_strided((size,), (1,), 0).cpu().view(bits)
        assert torch.equal(got, want.as_strided((size,), (1,), 0).view(bits))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_untouched_memory(kernels, case):
    before = make(**case)
    arguments = moved(before, kernels)
    check(arguments, native.conv1d_update(**arguments), before)


@pytest.mark.parametrize("slot", [-7, 5, 2**31 - 1])
def test_slot_outside_the_pool_writes_zeros_and_touches_nothing(kernels, slot):
    before = plain()
    before["state_indices"] = torch.tensor([2, slot, 0], dtype=torch.int32)
    arguments = moved(before, kernels)
    y = native.conv1d_update(**arguments)
    assert (y[1] == 0).all()
    check(arguments, y, before)


def test_row_has_the_same_bits_alone(kernels):
    together = moved(plain(m=3), kernels)
    apart = moved(together, kernels)
    y = native.conv1d_update(**together)
    rows = []
    for i in range(3):
        index = torch.tensor([i], dtype=torch.int32, device=kernels)
        alone = apart | {"x": apart["x"][i : i + 1], "state_indices": index}
        rows.append(native.conv1d_update(**alone))
    assert torch.equal(y, torch.cat(rows))
    assert torch.equal(together["conv_state"], apart["conv_state"])


def test_tokens_one_call_each_give_the_bits_of_one_call(kernels):
    together = moved(plain(m=4, extra=1), kernels)
    apart = moved(together, kernels)
    y = native.conv1d_update(**together)
    steps = [native.conv1d_update(**(apart | {"x": apart["x"][:, t : t + 1]})) for t in range(4)]
    assert torch.equal(y, torch.cat(steps, 1))
    assert torch.equal(together["conv_state"], apart["conv_state"])


def test_offsets_past_two_to_the_31_elements(kernels):
    far = 2**31 + 64
    before = plain(m=1, d=8)
    arguments = moved(before, kernels)
    memory = torch.empty(far + 256, dtype=torch.bfloat16, device=kernels)
    for name, start in (("x", 0), ("conv_state", 64)):
        t = arguments[name][:2]
        arguments[name] = memory[start:].as_strided(t.shape, (far, *t.stride()[1:])).copy_(t)
    before = before | {name: before[name][:2] for name in ("x", "conv_state")}
    y = native.conv1d_update(**arguments)
    expected = moved(before, "cpu")
    torch.testing.assert_close(y.cpu(), reference(**expected), rtol=0.01, atol=1e-2)
    assert torch.equal(arguments["conv_state"].cpu(), expected["conv_state"])
