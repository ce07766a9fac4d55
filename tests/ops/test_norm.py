"""rms_norm and gated_rms_norm on the reference backend."""

import pytest
import torch
import torch.nn.functional as F
from memory import sliced
from options import case_id, pairwise

import tigon


def oracle(x, z, weight, eps, group, before):
    """The formula, group by group."""
    parts = []
    for i in range(0, x.shape[-1], group):
        u = x[..., i : i + group]
        gate = None if z is None else F.silu(z[..., i : i + group])
        if gate is not None and not before:
            u = u * gate
        y = F.rms_norm(u, (group,), weight[i : i + group], eps)
        parts.append(y * gate if gate is not None and before else y)
    return torch.cat(parts, -1)


CASES = pairwise(
    gated=[True, False], before=[True, False], group=[12, 4, 3], shape=[(2, 5), (7,), (), (0,)]
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_gradients_equal_the_formula(case):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, z, weight = draw(*case["shape"], 12), draw(*case["shape"], 12), draw(12)
    if case["gated"]:
        got = tigon.gated_rms_norm(
            x, z, weight, eps=1e-3, group_size=case["group"], norm_before_gate=case["before"]
        )
        want = oracle(x, z, weight, 1e-3, case["group"], case["before"])
        leaves = (x, z, weight)
    else:
        got, leaves = tigon.rms_norm(x, weight, eps=1e-3), (x, weight)
        want = oracle(x, None, weight, 1e-3, 12, False)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(want)
    for a, e in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    x, z, weight = (torch.randn(5, 32).to(dtype) for _ in range(3))
    want = oracle(x.double(), z.double(), weight[0].double(), 1e-5, 8, False)
    got = tigon.gated_rms_norm(x, z, weight[0], group_size=8)
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_slices_are_taken_without_a_copy():
    x, z, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    assert tigon.explain("gated_rms_norm", sliced(x, 1), sliced(z, 1), weight).copies == ()
    torch.testing.assert_close(
        tigon.gated_rms_norm(sliced(x, 1), sliced(z, 1), weight), tigon.gated_rms_norm(x, z, weight)
    )


@pytest.mark.usefixtures("no_host_sync")
def test_nothing_waits_for_the_device():
    x = torch.randn(4, 8, requires_grad=True)
    tigon.gated_rms_norm(x, torch.randn(4, 8), torch.randn(8), group_size=2).sum().backward()


def test_opcheck():
    t = lambda *shape: torch.randn(*shape, requires_grad=True)  # noqa: E731
    op = torch.ops.tigon.gated_rms_norm.default
    torch.library.opcheck(op, (t(3, 8), t(3, 8), t(8), 1e-5, 4, False))
    torch.library.opcheck(op, (t(3, 8), None, t(8), 1e-5, 8, False))


def test_bad_input_is_refused_by_name():
    x, weight = torch.zeros(3, 8), torch.zeros(8)
    for args, kw, error, message in (
        ((x, x, weight), {"group_size": 3}, ValueError, "group_size=3 must divide d=8"),
        ((x, x[:2], weight), {}, ValueError, "z has shape"),
        ((x, None, weight), {}, TypeError, "rms_norm has no gate"),
        ((x, x.half(), weight), {}, TypeError, "z has dtype float16"),
        ((x, x, weight[:4]), {}, ValueError, "weight has shape"),
        ((x, x, weight), {"eps": -1.0}, ValueError, "eps must not be negative"),
        ((x[0, 0], x, weight), {}, ValueError, r"expected \(\.\.\., d\)"),
    ):
        with pytest.raises(error, match=f"gated_rms_norm: .*{message}"):
            tigon.gated_rms_norm(*args, **kw)
    with pytest.raises(TypeError, match="rms_norm: x must be a Tensor"):
        tigon.rms_norm([1.0], weight)
