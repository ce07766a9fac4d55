"""rms_norm and gated_rms_norm kernels against the fp64 reference: y, dx, dz and dweight.

Inputs lie in guarded memory (NaN around them), outputs start as NaN.
"""

import pytest
import torch
from memory import guarded, sliced
from numerics import assert_close_to_oracle
from options import case_id, pairwise

from tigon.kernels import gated_norm as kernels
from tigon.kernels.launch import NormConfig, plan
from tigon.reference import norm as reference

CASES = pairwise(
    shape=[(5, 24), (2, 3, 10), (1, 1000), (21, 4)],
    groups=[1, 2],
    gate=[None, "first", "last"],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    eps=[1e-5, 0.3],
    strided=[True, False],
    pieces=[False, True],
)

OUTPUTS = ("y", "dx", "dz", "dweight")


@pytest.fixture
def poisoned(monkeypatch):
    """What a launcher allocates without filling starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def small_tiles(monkeypatch):
    """Groups go in pieces of 4 channels or more, several rows and row blocks."""

    def planned(op, *a, group_size, **k):
        block = 4
        while 4 * block < group_size:
            block *= 2
        return {op: NormConfig(rows=2, block=block, warps=1, row_blocks=3)}

    monkeypatch.setattr(kernels, "plan", planned)


def make(shape, groups, gate, dtype, eps, strided, device):
    """(arguments of norm_forward, dy); weight in fp32 beside low precision."""

    def activation():
        t = guarded(torch.randn(*shape, device=device).to(dtype))
        return sliced(t, 1) if strided else t

    x, z = activation(), None if gate is None else activation()
    weight = guarded(torch.randn(shape[-1], device=device))
    return (x, z, weight, eps, shape[-1] // groups, gate == "last"), activation()


def widened(values):
    return [t.double() if torch.is_tensor(t) else t for t in values]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradients_match_the_oracle(case, device, poisoned, monkeypatch):
    if case["pieces"]:
        small_tiles(monkeypatch)
    args, dy = make(**{k: v for k, v in case.items() if k != "pieces"}, device=device)
    got = kernels.norm_forward(*args), *kernels.norm_backward(dy, *args)
    wide, dy_wide = widened(args), dy.double()
    oracle = reference.norm_forward(*wide), *reference.norm_backward(dy_wide, *wide)
    baseline = reference.norm_forward(*args), *reference.norm_backward(dy, *args)
    for name, g, o, base in zip(OUTPUTS, got, oracle, baseline, strict=True):
        assert (g is None) == (o is None), name
        if g is not None:
            assert g.dtype == base.dtype, name
            assert_close_to_oracle(name, g, o, base)


@pytest.mark.parametrize("d", [640, 16384])
def test_whole_rows_with_the_shipped_launch_table(d, device, poisoned):
    args, dy = make((3, d), 1, "first", torch.bfloat16, 1e-5, True, device)
    y, (dx, dz, dweight) = kernels.norm_forward(*args), kernels.norm_backward(dy, *args)
    wide = widened(args)
    oracle = reference.norm_forward(*wide), *reference.norm_backward(dy.double(), *wide)
    baseline = reference.norm_forward(*args), *reference.norm_backward(dy, *args)
    for name, g, o, base in zip(OUTPUTS, (y, dx, dz, dweight), oracle, baseline):
        assert_close_to_oracle(name, g, o, base)


def test_repeating_a_call_gives_the_same_bits(device):
    args, dy = make((300, 24), 2, "last", torch.bfloat16, 1e-5, True, device)
    once, again = (
        (kernels.norm_forward(*args), *kernels.norm_backward(dy, *args)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_a_row_does_not_depend_on_the_others(device):
    args, dy = make((37, 24), 2, "first", torch.float32, 1e-5, False, device)
    (x, z, *rest), row = args, slice(20, 21)
    one = x[row], z[row], *rest
    assert torch.equal(kernels.norm_forward(*args)[row], kernels.norm_forward(*one))
    for whole, alone in zip(
        kernels.norm_backward(dy, *args)[:2], kernels.norm_backward(dy[row], *one)[:2]
    ):
        assert torch.equal(whole[row], alone)


def test_rows_past_the_end_leave_dweight_alone_without_eps(device):
    """Their mean square is 0: rsqrt gives inf, and 0 * inf is NaN."""
    args, dy = make((5, 24), 1, "first", torch.float32, 0.0, False, device)
    dweight = kernels.norm_backward(dy, *args)[2]
    torch.testing.assert_close(dweight, reference.norm_backward(dy, *args)[2])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_no_gradient(shape, device):
    x, weight = torch.zeros(shape, device=device), torch.randn(8, device=device)
    assert kernels.norm_forward(x, x, weight, 1e-5, 4, True).shape == x.shape
    dx, dz, dweight = kernels.norm_backward(x, x, x, weight, 1e-5, 4, True)
    assert dx.shape == dz.shape == x.shape and not dweight.any()


def test_addresses_are_64_bit(device):
    """Rows lie 2^30 elements apart; the buffer is allocated but hardly touched."""
    far, d = 2**30, 8
    buffer = torch.empty(2 * far + d, dtype=torch.float16, device=device)
    x = buffer.as_strided((3, d), (far, 1))
    x.copy_(torch.randn(3, d))
    rest = (torch.randn(d, device=device), 1e-5, d, False)
    near = x.contiguous()
    assert torch.equal(kernels.norm_forward(x, x, *rest), kernels.norm_forward(near, near, *rest))
    far_grads = kernels.norm_backward(x, x, x, *rest)
    for got, expected in zip(far_grads, kernels.norm_backward(near, near, near, *rest)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_launch_table_covers_every_size(arch):
    for d, groups, itemsize in ((1, 1, 4), (8192, 8, 2), (5120, 8, 2), (16384, 1, 4)):
        sizes = dict(t=100, d=d, group_size=d // groups, itemsize=itemsize)
        (forward,) = plan("rms_norm", arch, **sizes).values()
        (backward,) = plan("gated_rms_norm_backward", arch, **sizes).values()
        assert 1 <= backward.row_blocks <= 1024
        for config in (forward, backward):
            assert config.rows * config.block >= 32 * config.warps
