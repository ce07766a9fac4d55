"""The Mamba2 layer against mamba_ssm's contract and a plain recurrence, and its cache against whole sequences."""

import pytest
import torch
import torch.nn.functional as F

from tigon.modules import Mamba2
from tigon.reference.ssd import ssd_recurrence

OPTIONS = {
    "plain": {},
    "groups": {"ngroups": 4},
    "mlp beside": {"d_ssm": 32},
    "D per channel": {"D_has_hdim": True},
    "gate in the scan": {"rmsnorm": False},
    "norm before gate": {"norm_before_gate": True, "ngroups": 2},
    "biases": {"bias": True, "conv_bias": False},
    "dt limit": {"dt_limit": (0.01, 0.05)},
    "wide conv": {"d_conv": 2, "conv_init": 0.5},
}


def layer(dtype=torch.float64, **options) -> Mamba2:
    torch.manual_seed(0)
    sizes = {"d_state": 8, "headdim": 8} | options
    made = Mamba2(32, **sizes, dtype=dtype)
    with torch.no_grad():
        made.D.normal_()
    return made.to(dtype)


def recurrence(m: Mamba2, u):
    """The layer in plain PyTorch, straight from its docstring."""
    z0, x0, z, xBC, dt = m.in_proj(u).split(m.splits, -1)
    weight, bias, d_conv = m.conv1d.weight, m.conv1d.bias, m.d_conv
    padded = F.pad(xBC.transpose(1, 2), (d_conv - 1, 0))
    xBC = F.silu(F.conv1d(padded, weight, bias, groups=m.conv_dim)).transpose(1, 2)
    x, B, C = xBC.split([m.d_ssm, m.ngroups * m.d_state, m.ngroups * m.d_state], -1)
    x, z = (t.unflatten(-1, (m.nheads, m.headdim)) for t in (x, z))
    B, C = (t.unflatten(-1, (m.ngroups, m.d_state)) for t in (B, C))
    D = m.D.view(m.nheads, m.headdim) if m.D_has_hdim else m.D
    low, high = m.dt_limit
    gate = None if m.rmsnorm else z
    arguments = {"D": D, "z": gate, "dt_bias": m.dt_bias, "dt_softplus": True}
    y, _, _ = ssd_recurrence(x, dt, -m.A_log.exp(), B, C, **arguments, dt_min=low, dt_max=high)
    y, z = y.flatten(-2), z.flatten(-2)
    if m.rmsnorm:
        late = m.norm.norm_before_gate
        grouped = (y if late else y * F.silu(z)).unflatten(-1, (m.ngroups, -1))
        r = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + 1e-5)
        y = (grouped * r).flatten(-2) * m.norm.weight * (F.silu(z) if late else 1)
    if m.d_inner > m.d_ssm:
        y = torch.cat([F.silu(z0) * x0, y], -1)
    return m.out_proj(y)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_output_and_every_gradient_equal_the_recurrence(options):
    m = layer(**options)
    u = torch.randn(2, 70, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 70, 32, dtype=torch.float64)
    results = []
    for function in (m, lambda u: recurrence(m, u)):
        y = function(u)
        grads = torch.autograd.grad((y * weight).sum(), [u, *m.parameters()])
        results.append([y, *grads])
    for name, got, expected in zip(["y", "u", *dict(m.named_parameters())], *results):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9, msg=name)


def test_parameter_names_and_shapes_are_those_of_mamba_ssm():
    shapes = {
        k: tuple(p.shape)
        for k, p in Mamba2(64, d_state=16, headdim=8, ngroups=2).named_parameters()
    }
    assert shapes == {
        "dt_bias": (16,),
        "A_log": (16,),
        "D": (16,),
        "in_proj.weight": (2 * 128 + 2 * 2 * 16 + 16, 64),
        "conv1d.weight": (128 + 64, 1, 4),
        "conv1d.bias": (192,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    wide = Mamba2(64, d_state=16, headdim=8, d_ssm=64, D_has_hdim=True, bias=True, rmsnorm=False)
    shapes = {k: tuple(p.shape) for k, p in wide.named_parameters()}
    assert shapes["in_proj.weight"] == (2 * 128 + 2 * 16 + 8, 64)
    assert shapes["D"] == (64,) and shapes["out_proj.weight"] == (64, 128)
    assert shapes["in_proj.bias"] == (2 * 128 + 2 * 16 + 8,) and "norm.weight" not in shapes


def test_initial_values_lie_where_mamba_ssm_puts_them_and_are_marked_against_weight_decay():
    torch.manual_seed(0)
    m = Mamba2(512, dt_min=0.01, dt_max=0.2, A_init_range=(2, 5), dtype=torch.bfloat16)
    dt = F.softplus(m.dt_bias.float())
    assert dt.min() > 0.0099 and dt.max() < 0.205
    assert m.A_log.float().exp().min() > 1.98 and m.A_log.float().exp().max() < 5.05
    assert m.D.dtype == torch.float32 and (m.D == 1).all()
    assert all(p._no_weight_decay for p in (m.A_log, m.D, m.dt_bias))


@pytest.mark.parametrize(
    "options", [{}, {"d_ssm": 32, "rmsnorm": False, "D_has_hdim": True}, {"d_conv": 1}]
)
def test_a_sequence_in_pieces_equals_one_pass(options):
    m, cache = layer(**options), layer(**options).allocate_cache(2, torch.float64, torch.float64)
    u = torch.randn(2, 60, 32, dtype=torch.float64)
    with torch.no_grad():
        pieces = [m(piece, cache=cache) for piece in u.split([20, 1, 1, 16, 17, 5], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), m(u), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [12, 24])
def test_padded_rows_and_slots_leave_each_sequence_as_if_alone(length):
    """Decode (12) and scan (24) paths: row 0 has no real token, row 2 is padding, slots are out of order."""
    m = layer()
    cache = m.allocate_cache(5, torch.float64, torch.float64)
    for t in cache.tensors():
        t.normal_()
    before = [t.clone() for t in cache.tensors()]
    u = torch.randn(4, length, 32, dtype=torch.float64)
    slots, counts = torch.tensor([3, 1, -1, 4]), torch.tensor([0, 7, length, length])
    with torch.no_grad():
        y = m(u, cache=cache, slots=slots, num_tokens=counts)
        for row, (slot, n) in enumerate(zip(slots.tolist(), counts.tolist())):
            if slot < 0 or n == 0:
                continue
            alone = m.allocate_cache(1, torch.float64, torch.float64)
            for t, held in zip(alone.tensors(), before):
                t.copy_(held[slot])
            torch.testing.assert_close(y[row : row + 1, :n], m(u[row : row + 1, :n], cache=alone))
            for now, expected in zip(cache.tensors(), alone.tensors()):
                torch.testing.assert_close(now[slot], expected[0])
    for now, old in zip(cache.tensors(), before):
        for slot in (0, 2, 3):  # not named, or without a real token
            assert torch.equal(now[slot], old[slot])


def test_packed_sequences_equal_separate_ones_with_and_without_a_cache():
    m = layer(ngroups=2)
    bounds = torch.tensor([0, 9, 9, 40, 42])
    u = torch.randn(1, 42, 32, dtype=torch.float64)
    cache = m.allocate_cache(4, torch.float64, torch.float64)
    slots = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        packed, fed = m(u, bounds), m(u, bounds, cache, slots=slots)
        more = m(u, bounds, cache, slots=slots)
        for i, j in zip(bounds.tolist(), bounds[1:].tolist()):
            if i < j:
                piece = u[:, i:j]
                torch.testing.assert_close(packed[:, i:j], m(piece))
                torch.testing.assert_close(fed[:, i:j], m(piece))
                twice = m(torch.cat([piece, piece], 1))[:, j - i :]
                torch.testing.assert_close(more[:, i:j], twice)
    assert (cache.ssm[0] == 0).all(), "the empty sequence changed its slot"


def test_step_sizes_and_decays_stay_fp32_in_a_bf16_model():
    """A_log rounded to bf16 shifts the decay; kept in fp32 beside bf16 weights it must be used as it is."""
    m = layer(dtype=torch.float32, dt_limit=(1.0, 1.0))
    low = layer(dtype=torch.float32, dt_limit=(1.0, 1.0)).to(torch.bfloat16)
    low.A_log.data = m.A_log.data.clone()
    u = torch.randn(1, 30, 32)
    y, exact = low(u.bfloat16()), m(u)
    assert y.dtype == torch.bfloat16
    assert (y - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()
    seen = []
    low.in_proj.register_forward_hook(lambda *_: seen.append(low._scan_arguments(u)["A"]))
    low(u.bfloat16())
    assert torch.equal(seen[0], -m.A_log.exp())
    with torch.autocast("cpu", torch.bfloat16):
        y = m(u)
    assert y.dtype == torch.bfloat16
    assert (y - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"headdim": 7}, "headdim=7 must divide d_ssm=64"),
        ({"ngroups": 3}, "ngroups=3 must divide the 8 heads"),
        ({"d_ssm": 128}, "d_ssm=128"),
        ({"A_init_range": (0, 1)}, "A_init_range"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        layer(**options)


def test_arguments_that_would_be_dropped_are_refused():
    m = layer()
    u = torch.randn(1, 4, 32, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="process_group"):
        Mamba2(32, headdim=8, process_group=object())
    with pytest.raises(ValueError, match="pass cache"):
        m(u, slots=torch.tensor([0]))
    with pytest.raises(ValueError, match="num_tokens is for dense batches"):
        m(u, torch.tensor([0, 4]), m.allocate_cache(1), num_tokens=torch.tensor([4]))
