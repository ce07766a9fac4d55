"""causal_conv1d kernels against the fp64 reference: every output and gradient, at stretch and sequence boundaries.

Inputs lie in guarded memory (NaN around them), outputs start as NaN. Stretches are cut to a few tokens, so that a
short sequence crosses several of them.
"""

import pytest
import torch
from memory import guarded, sliced
from numerics import assert_close_to_oracle
from options import case_id, pairwise

from tigon.kernels import causal_conv1d as kernels
from tigon.kernels.launch import ConvConfig, plan
from tigon.reference import conv1d as reference

LAYOUTS = {
    "dense": (2, 9, None),
    "short": (2, 2, None),
    "packed": (1, 11, [0, 0, 3, 3, 4, 11, 11]),
}
CASES = pairwise(
    layout=list(LAYOUTS),
    width=[4, 1, 2, 8],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    initial=[True, False],
    dfinal=[True, False],
    silu=[True, False],
    bias=[True, False],
    strided=[True, False],
)
OUTPUTS = ("y", "final_state")
GRADIENTS = ("dx", "dweight", "dbias", "dinitial")


@pytest.fixture
def short_stretches(monkeypatch):
    """Stretches of 5 tokens."""
    monkeypatch.setattr(
        kernels,
        "plan",
        lambda op, *a, **k: dict.fromkeys(("convolve", "convolve_backward"), ConvConfig(5, 32, 1)),
    )


@pytest.fixture
def poisoned(monkeypatch):
    """What a launcher allocates without filling starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def make(layout, width, dtype, initial, dfinal, silu, bias, strided, device, d=29):
    """(arguments of conv1d_forward, dy, dfinal); weight and bias in fp32 beside low precision."""
    b, l, cu = LAYOUTS[layout]
    rows = b if cu is None else len(cu) - 1

    def draw(*shape, dtype=torch.float32):
        return guarded(torch.randn(*shape, device=device).to(dtype))

    def activation():
        t = draw(b, l, d, dtype=dtype)
        return sliced(t, 1) if strided else t

    args = (
        activation(),
        draw(d, width),
        draw(d) if bias else None,
        draw(rows, d, width - 1) if initial else None,
        None if cu is None else guarded(torch.tensor(cu, dtype=torch.int32, device=device)),
        silu,
    )
    return args, activation(), draw(rows, d, width - 1, dtype=dtype) if dfinal else None


def widened(values):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in values]


def compare(names, got, oracle, baseline):
    for name, g, o, base in zip(names, got, oracle, baseline, strict=True):
        assert (g is None) == (o is None), name
        if g is not None:
            assert g.dtype == base.dtype, name
            assert_close_to_oracle(name, g, o, base)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradients_match_the_oracle(case, device, short_stretches, poisoned):
    args, dy, dfinal = make(**case, device=device)
    forward, backward = kernels.conv1d_forward(*args), kernels.conv1d_backward(dy, dfinal, *args)
    ref = reference.conv1d_forward, reference.conv1d_backward
    compare(OUTPUTS, forward, ref[0](*widened(args)), ref[0](*args))
    every = (dy, dfinal, *args)
    compare(GRADIENTS, backward, ref[1](*widened(every)), ref[1](*every))


def test_the_shipped_launch_table_gives_the_same_as_short_stretches(device, request):
    args, dy, dfinal = make(
        "packed", 3, torch.float32, True, True, True, True, False, device=device, d=9
    )
    whole = kernels.conv1d_forward(*args), kernels.conv1d_backward(dy, dfinal, *args)
    request.getfixturevalue("short_stretches")
    cut = kernels.conv1d_forward(*args), kernels.conv1d_backward(dy, dfinal, *args)
    assert torch.equal(whole[0][0], cut[0][0])  # a token's result does not depend on the cut
    assert torch.equal(whole[1][0], cut[1][0])
    torch.testing.assert_close(whole[1][1], cut[1][1])


def test_repeating_a_call_gives_the_same_bits(device, short_stretches):
    args, dy, dfinal = make(
        "packed", 2, torch.bfloat16, True, True, True, True, True, device=device, d=37
    )
    once, again = (
        (*kernels.conv1d_forward(*args), *kernels.conv1d_backward(dy, dfinal, *args))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.parametrize("cu", [None, [0, 0, 0]], ids=["dense", "packed"])
def test_no_tokens_hand_the_state_through(cu, device):
    b = 2 if cu is None else 1
    bounds = None if cu is None else torch.tensor(cu, device=device)
    x, weight = torch.zeros(b, 0, 5, device=device), torch.randn(5, 4, device=device)
    initial, dfinal = torch.randn(2, 2, 5, 3, device=device)
    y, final = kernels.conv1d_forward(x, weight, None, initial, bounds, True)
    dx, dweight, _, dinitial = kernels.conv1d_backward(
        x, dfinal, x, weight, None, initial, bounds, True
    )
    assert y.shape == dx.shape == x.shape
    assert torch.equal(final, initial) and torch.equal(dinitial, dfinal)
    assert not dweight.any()


def test_wrong_bounds_never_leave_the_buffers(device, short_stretches):
    """Nobody looks at the values of cu_seqlens on a GPU."""
    args, dy, dfinal = make(
        "dense", 3, torch.float32, False, False, True, True, False, device=device
    )
    x, initial = args[0][:1], guarded(torch.randn(4, 29, 2, device=device))
    for bounds in ([3, 99, -7, 2**30, 5], [-9, 5, 4, 3, 2]):
        cu = torch.tensor(bounds, dtype=torch.int32, device=device)
        y, final = kernels.conv1d_forward(x, *args[1:3], initial, cu, True)
        kernels.conv1d_backward(dy[:1], final, x, *args[1:3], initial, cu, True)
        assert y.shape == x.shape


@pytest.mark.parametrize("far", ["batch", "token"])
def test_addresses_are_64_bit(far, device):
    """The third batch row or token lies 2^31 elements away; the buffer is allocated but hardly touched."""
    step, d = 2**30, 8
    buffer = torch.empty(2 * step + 64 * d, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, 3, d), (step, d, 1) if far == "batch" else (d, step, 1))
    x.copy_(torch.randn(3, 3, d))
    weight = torch.randn(d, 4, device=device)
    near = x.contiguous()
    rest = (weight, None, None, None, True)
    assert torch.equal(kernels.conv1d_forward(x, *rest)[0], kernels.conv1d_forward(near, *rest)[0])
    for got, expected in zip(
        kernels.conv1d_backward(x, None, x, *rest)[:2],
        kernels.conv1d_backward(near, None, near, *rest)[:2],
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_launch_table_covers_every_size(arch):
    for width in range(1, 9):
        for d, itemsize in ((1, 4), (37, 2), (10240, 2), (10240, 4)):
            sizes = dict(b=1, l=8192, d=d, width=width, itemsize=itemsize)
            (forward,) = plan("causal_conv1d", arch, **sizes).values()
            (backward,) = plan("causal_conv1d_backward", arch, states=True, **sizes).values()
            for config in (forward, backward):
                assert config.block % (32 * config.warps) == 0
                assert config.block // (32 * config.warps) * itemsize <= 16
