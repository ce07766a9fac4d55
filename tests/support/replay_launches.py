"""Single launches of the decode kernels with replay in guarded memory, and their checks against the references."""

import torch
from memory import guarded, sliced
from numerics import assert_close_to_oracle, relative_rms
from replay_cases import tree_bits

from tigon.reference.conv1d_replay import conv1d_replay as conv1d_reference
from tigon.reference.ssd_replay import ssd_replay as ssd_reference

E4M3 = torch.float8_e4m3fn


def pool(t: torch.Tensor) -> torch.Tensor:
    """A copy whose slots are strided, with NaN between them."""
    code = t.dtype in (torch.int8, E4M3)
    wide = torch.zeros(t.shape[0], t[0].numel() + 16, dtype=t.dtype)
    wide = wide if code else wide.fill_(float("nan"))
    view = wide[:, : t[0].numel()].unflatten(1, t.shape[1:])
    return view.copy_(t)


def random_tree(m: int, b: int) -> torch.Tensor:
    parents = [-1] + [int(torch.randint(0, i, ())) for i in range(1, m)]
    return tree_bits(parents, b)


def ssd_make(
    io=torch.bfloat16,
    held=torch.float32,
    shape=(16, 32),
    flush=(4, 3),
    heads=(2, 1),
    D="h",
    z=True,
    bias=True,
    softplus=True,
    beside="fp32",
    ragged=False,
    layout="packed",
    stochastic=False,
    form="chain",
    behind=1,
) -> dict:
    """Arguments of one call in guarded memory: rows far from, at and past a write of the state, and padding."""
    (p, n), (h, g), (flush, m) = shape, heads, flush
    small = io if beside == "io" else torch.float32
    b, slots, L = 4, 6, flush + 2 * m - 1

    def normal(*size, dtype=io):
        return torch.randn(*size).to(dtype)

    lay = sliced if layout == "sliced" else lambda t, dims: guarded(t)
    scale, state = None, torch.randn(slots, h, p, n)
    if held in (torch.int8, E4M3):
        scale = pool(torch.rand(slots, h, p) / (30 if held == torch.int8 else 200))
        state = state * (40 if held == torch.int8 else 100)
    length = torch.randint(0, 3 * flush, (slots,)) + 2**33
    pending = (flush - 1 + m) if behind == "all" else min(behind, flush - 1 + m)
    checkpoint = (length - pending).clamp(min=0)
    checkpoint[4] = length[4]
    length[1] = length[1] // flush * flush  # at a boundary
    checkpoint[1] = torch.minimum(checkpoint[1], length[1])
    ring_x, ring_B, ring_dt = (
        normal(slots, L, h, p),
        normal(slots, L, g, n),
        torch.rand(slots, L, h) * 0.3,
    )
    for slot in range(slots):  # places that no call may read
        live = {int(t) % L for t in range(int(checkpoint[slot]), int(length[slot]))}
        for place in set(range(L)) - live:
            ring_x[slot, place] = ring_B[slot, place] = float("nan")
            ring_dt[slot, place] = float("nan")
    return {
        "state": pool(state.to(held)),
        "state_scale": scale,
        "ring_x": pool(ring_x),
        "ring_B": pool(ring_B),
        "ring_dt": pool(ring_dt),
        "checkpoint": checkpoint,
        "length": length,
        "x": lay(normal(b, m, h, p), 2),
        "dt": lay(
            normal(b, m, h, dtype=small) if softplus else torch.rand(b, m, h).to(small) * 0.3, 1
        ),
        "A": guarded(-torch.rand(h).to(small)),
        "B": lay(normal(b, m, g, n), 2),
        "C": lay(normal(b, m, g, n), 2),
        "D": D and guarded(normal(*((h,) if D == "h" else (h, p)), dtype=small)),
        "z": lay(normal(b, m, h, p), 2) if z else None,
        "dt_bias": guarded(torch.rand(h).to(small) - 2) if bias else None,
        "state_indices": torch.tensor([4, -1, 1, 3], dtype=torch.int32),
        "num_tokens": torch.tensor([m, m, m // 2, 0], dtype=torch.int32) if ragged else None,
        "ancestors": random_tree(m, b) if form == "tree" else None,
        "seeds": torch.tensor([5, 6, 2**50, -8]) if stochastic else None,
        "flush": flush,
        "layer": 7,
        "dt_softplus": softplus,
        "dt_min": 0.0,
        "dt_max": 1.0,
    }


# The distance of neighbours of a format, in parts of the largest number of a row.
PLACE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-9,
    torch.int8: 1 / 127,
    E4M3: 2**-3,
}
WRITTEN = ("state", "state_scale", "ring_x", "ring_B", "ring_dt")


def copies(arguments, wide=False):
    """Copies on the CPU with strides and gaps; wide: in fp64, states and their scales as they are."""

    def move(name, t):
        if not isinstance(t, torch.Tensor):
            return t
        base = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        t = base.to("cpu", copy=True).as_strided(t.shape, t.stride(), t.storage_offset())
        keep = name in ("state", "state_scale") or not t.is_floating_point()
        return t if keep or not wide else t.double()

    return {name: move(name, t) for name, t in arguments.items()}


def whole(t):
    size = t.untyped_storage().nbytes() // t.element_size()
    return t.as_strided((size,), (1,), 0).cpu().contiguous().view(torch.uint8)


def decoded(a, slot):
    state = a["state"][slot].cpu()
    scale = a["state_scale"]
    return (
        state.double() if scale is None else state.double() * scale[slot].cpu().double()[..., None]
    )


def ssd_check(before, arguments, y):
    """y and states against the fp64 oracle, rings bit for bit, all else untouched."""
    exact, honest = copies(before, wide=True), copies(before)
    oracle_y, baseline_y = ssd_reference(**exact), ssd_reference(**honest)
    # Where fp32 sums end beside a tie, a state of 8 or 16 bits is a place off: outputs carry that.
    place = PLACE[before["state"].dtype]
    allowed = 2 * relative_rms(baseline_y, oracle_y) + torch.finfo(y.dtype).eps + 0.02 * place
    assert relative_rms(y.cpu(), oracle_y) <= allowed
    assert torch.isfinite(y).all()
    assert (y.cpu()[oracle_y == 0] == 0).all()
    for name in WRITTEN[2:]:
        if name == "ring_dt":
            torch.testing.assert_close(
                arguments[name].cpu(), honest[name], rtol=2e-6, atol=1e-7, equal_nan=True
            )
        else:
            assert torch.equal(whole(arguments[name]), whole(honest[name])), name
    for slot in range(before["state"].shape[0]):
        got, want = decoded(arguments, slot), decoded(honest, slot)
        changed = not torch.equal(want, decoded(before, slot))
        if not changed:
            assert torch.equal(got, want)
            continue
        largest = want.abs().amax(-1, keepdim=True)
        # One place of the format at most, and that seldom: where fp32 sums differ in their last bits.
        assert ((got - want).abs() <= place * largest + 1e-6).all()
        assert ((got - want).abs() > 1e-5 * largest).double().mean() < 0.02
    touched = torch.zeros(before["state"].shape, dtype=torch.bool)
    touched[[slot for slot in before["state_indices"].tolist() if 0 <= slot < len(touched)]] = True
    flags = torch.zeros(
        whole(before["state"]).numel() // before["state"].element_size(), dtype=torch.bool
    )
    flags.as_strided(touched.shape, before["state"].stride())[touched] = True
    flags = flags.repeat_interleave(before["state"].element_size())
    assert (flags | (whole(arguments["state"]) == whole(before["state"]))).all()


def conv_make(
    io=torch.bfloat16,
    width=4,
    extra=0,
    m=3,
    d=40,
    bias=True,
    beside="fp32",
    silu=True,
    ragged=False,
    layout="packed",
    form="chain",
) -> dict:
    """Arguments of one call: windows that begin before position 0, are full, and lie far out; and padding."""
    small = io if beside == "io" else torch.float32
    places = width - 1 + m + extra
    length = torch.tensor([0, 7, 2**33 + 5, 1, 2, 11])
    ring = torch.randn(6, d, places).to(io)
    for slot, held in enumerate(length.tolist()):  # what may not be read
        live = {t % places for t in range(max(0, held - (width - 1)), held)}
        ring[slot, :, [place for place in range(places) if place not in live]] = float("nan")
    x = torch.randn(4, m, d).to(io)
    return {
        "x": sliced(x, 1) if layout == "sliced" else guarded(x),
        "ring": pool(ring),
        "length": length,
        "weight": guarded(torch.randn(d, width).to(small)),
        "bias": guarded(torch.randn(d).to(small)) if bias else None,
        "state_indices": torch.tensor([4, -1, 2, 3], dtype=torch.int32),
        "num_tokens": torch.tensor([m, m, m // 2, 0], dtype=torch.int32) if ragged else None,
        "ancestors": random_tree(m, 4) if form == "tree" else None,
        "silu": silu,
    }


def conv_check(before, arguments, y):
    """y against fp64; the ring bit for bit, gaps included."""
    exact, honest = copies(before, wide=True), copies(before)
    oracle, baseline = conv1d_reference(**exact), conv1d_reference(**honest)
    assert_close_to_oracle("y", y.cpu(), oracle, baseline)
    assert (y.cpu()[oracle == 0] == 0).all()
    assert torch.equal(whole(arguments["ring"]), whole(honest["ring"]))
