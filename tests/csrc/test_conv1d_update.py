"""csrc/conv1d_update.cu against the fp64 reference, in guarded memory."""

import pytest
import torch
from decode_cases import FLOATS, conv1d_check, conv1d_make, conv1d_plain, moved
from options import case_id, pairwise

from tigon import native
from tigon.reference.conv1d import conv1d_update as reference

CASES = pairwise(
    io=FLOATS,
    held=[None, *FLOATS],
    width=[4, 2, 3, 5, 6, 7, 8],
    extra=[0, 1, 3, 9],
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


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_untouched_memory(kernels, case):
    before = conv1d_make(**case)
    arguments = moved(before, kernels)
    conv1d_check(arguments, native.conv1d_update(**arguments), before)


@pytest.mark.parametrize("slot", [-7, 5, 2**31 - 1])
def test_slot_outside_the_pool_writes_zeros_and_touches_nothing(kernels, slot):
    before = conv1d_plain()
    before["state_indices"] = torch.tensor([2, slot, 0], dtype=torch.int32)
    arguments = moved(before, kernels)
    y = native.conv1d_update(**arguments)
    assert (y[1] == 0).all()
    conv1d_check(arguments, y, before)


def test_row_has_the_same_bits_alone(kernels):
    together = moved(conv1d_plain(m=3), kernels)
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
    together = moved(conv1d_plain(m=4, extra=1), kernels)
    apart = moved(together, kernels)
    y = native.conv1d_update(**together)
    steps = [native.conv1d_update(**(apart | {"x": apart["x"][:, t : t + 1]})) for t in range(4)]
    assert torch.equal(y, torch.cat(steps, 1))
    assert torch.equal(together["conv_state"], apart["conv_state"])


def test_offsets_past_two_to_the_31_elements(kernels):
    far = 2**31 + 64
    before = conv1d_plain(m=1, d=8)
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
