"""Calls of the two decode kernels in guarded memory, and their check against the fp64 references."""

import torch
from memory import guarded, sliced
from numerics import assert_close_to_oracle

from tigon.reference.conv1d import conv1d_update as conv1d_reference
from tigon.reference.ssd import ssd_update as ssd_reference

INF = float("inf")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def moved(arguments: dict, device, dtype=None) -> dict:
    """The tensors on `device` with all strides and guards kept; or as fp64 copies."""

    def move(t):
        if not isinstance(t, torch.Tensor):
            return t
        if dtype:
            return t.to(dtype) if t.is_floating_point() else t.clone()
        base = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        return base.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())

    return {name: move(value) for name, value in arguments.items()}


def whole(t):
    """The bits of the tensor's whole memory, guards and gaps included."""
    flat = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return flat.clone().view(torch.int16 if t.element_size() == 2 else torch.int32)


def ssd_make(
    io, held, shape, m, heads, D, z, bias, softplus, limit, beside, ragged, slots, layout, b=3
):
    """Arguments of one call, by name. The state is a strided pool in guarded memory."""
    (p, n), (h, g) = shape, heads
    small = io if beside == "io" else torch.float32

    def normal(*size, dtype=io):
        return torch.randn(*size).to(dtype)

    lay = sliced if layout == "sliced" else lambda t, dims: guarded(t)
    pool = guarded(normal(5, h * p * n + 16, dtype=held))
    pool[:, h * p * n :] = float("nan")
    return {
        "state": pool[:, : h * p * n].unflatten(1, (h, p, n)),
        "x": lay(normal(b, m, h, p), 2),
        "dt": lay(normal(b, m, h, dtype=small) if softplus else torch.rand(b, m, h).to(small), 1),
        "A": guarded(-torch.rand(h).to(small) * 4),
        "B": lay(normal(b, m, g, n), 2),
        "C": lay(normal(b, m, g, n), 2),
        "D": D and guarded(normal(*((h,) if D == "h" else (h, p)), dtype=small)),
        "z": lay(normal(b, m, h, p), 2) if z else None,
        "dt_bias": guarded(torch.rand(h).to(small)) if bias else None,
        "state_indices": guarded(torch.tensor([4, -1, 1], dtype=torch.int32)[:b])
        if slots
        else None,
        "num_tokens": guarded(torch.tensor([m, m, m // 2], dtype=torch.int32)[:b])
        if ragged
        else None,
        "dt_softplus": softplus,
        "dt_min": limit[0],
        "dt_max": limit[1],
    }


def ssd_plain(**changes) -> dict:
    """A common case with some options changed."""
    case = dict(
        io=torch.bfloat16,
        held=torch.float32,
        shape=(64, 128),
        m=2,
        heads=(2, 1),
        D="h",
        z=True,
        bias=True,
        softplus=True,
        limit=(0.0, INF),
        beside="fp32",
        ragged=False,
        slots=None,
        layout="packed",
    )
    return ssd_make(**(case | changes))


def ssd_check(arguments: dict, y: torch.Tensor, before: dict) -> None:
    """y and the state against the oracle; what no token touches bit for bit."""
    exact = moved(before, "cpu", torch.float64)
    honest = moved(before, "cpu")
    oracle = ssd_reference(**exact)
    baseline = ssd_reference(**honest)
    assert_close_to_oracle("y", y.cpu(), oracle, baseline)
    state = arguments["state"].cpu()
    assert_close_to_oracle("state", state, exact["state"], honest["state"])
    padding = oracle == 0
    assert (y.cpu()[padding] == 0).all()

    b, m = before["x"].shape[:2]
    index, count = before["state_indices"], before["num_tokens"]
    index = range(b) if index is None else index.tolist()
    count = [m] * b if count is None else count.tolist()
    touched = torch.zeros_like(before["state"], dtype=torch.bool)
    for slot, tokens in zip(index, count):
        if 0 <= slot < len(touched) and tokens:
            touched[slot] = True
    flags = torch.zeros(whole(before["state"]).shape, dtype=torch.bool)
    flags.as_strided(touched.shape, before["state"].stride(), before["state"].storage_offset())[
        touched
    ] = True
    same = whole(arguments["state"]).cpu() == whole(before["state"])
    assert (same | flags).all(), "memory outside the rows' slots changed"


def conv1d_make(
    io, held, width, extra, m, d, bias, beside, silu, ragged, slots, layout, channels_last
):
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


def conv1d_plain(**changes) -> dict:
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
    return conv1d_make(**(case | changes))


def conv1d_check(arguments: dict, y: torch.Tensor, before: dict) -> None:
    exact, honest = moved(before, "cpu", torch.float64), moved(before, "cpu")
    oracle, baseline = conv1d_reference(**exact), conv1d_reference(**honest)
    assert_close_to_oracle("y", y.cpu(), oracle, baseline)
    # Inputs are moved and rounded once, never computed: every bit must be the reference's, guards included.
    state, expected = arguments["conv_state"], honest["conv_state"]
    size = state.untyped_storage().nbytes() // state.element_size()
    bits = torch.int16 if state.element_size() == 2 else torch.int32
    for got, want in [(state, expected)]:
        got = got.as_strided((size,), (1,), 0).cpu().view(bits)
        assert torch.equal(got, want.as_strided((size,), (1,), 0).view(bits))
