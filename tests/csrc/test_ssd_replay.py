"""csrc/ssd_replay.cu and csrc/conv1d_replay.cu: the law, bit for bit across histories, and against the references."""

import pytest
import torch
from memory import guarded, sliced
from numerics import relative_rms
from options import case_id, pairwise
from replay_cases import Decoder, conv_oracle, oracle, sequences, tree_bits

import tigon
from tigon import native
from tigon.reference.ssd_replay import ssd_replay as ssd_reference

E4M3 = torch.float8_e4m3fn
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STATES = [*FLOATS, torch.int8, E4M3]
DRAFTED = [(4, 2), (4, 4), (1, 1), (3, 1), (4, 3), (2, 1), (4, 1), (4, 4), (1, 1)]  # 18 tokens


@pytest.fixture(autouse=True)
def on_kernels(kernels):
    with tigon.backend("kernel"):
        yield


def decode(device, rows, slots, history, seqs, **options):
    seeds = torch.tensor([9, 2**40 + 1, -5])[rows]
    decoder = Decoder(seqs.rows(rows), slots, flush=4, seeds=seeds, device=device, **options)
    ys, vs = decoder.run(history)
    decoder.step(1, 1)  # folds what is due
    return ys, vs, decoder


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("held", STATES)
def test_bits_do_not_depend_on_grouping_drafts_slots_or_batch_mates(kernels, held, stochastic):
    io = {torch.float32: torch.float32, torch.int8: torch.float16}.get(held, torch.bfloat16)
    seqs = sequences(b=3, dtype=io, h=2, g=1, p=6, n=16)
    options = {"state": held, "stochastic": stochastic}
    ys, vs, plain = decode(kernels, [0, 1, 2], [0, 1, 2], [(1, 1)] * 18, seqs, **options)
    for rows, slots, history in (([0, 1, 2], [5, 1, 3], DRAFTED), ([2], [4], [(3, 3)] * 6)):
        other_ys, other_vs, decoder = decode(kernels, rows, slots, history, seqs, **options)
        for i, row in enumerate(rows):
            assert torch.equal(ys[row], other_ys[i]) and torch.equal(vs[row], other_vs[i])
            mine, theirs = plain.state[row], decoder.state[slots[i]]
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
            if plain.scale is not None:
                assert torch.equal(plain.scale[row], decoder.scale[slots[i]])
    if stochastic and held != torch.float32:
        near = decode(kernels, [0, 1, 2], [0, 1, 2], [(1, 1)] * 18, seqs, state=held)[2]
        assert not torch.equal(near.state.view(torch.uint8), plain.state.view(torch.uint8))


@pytest.mark.parametrize("accepted", range(5))
def test_every_accepted_count_follows_the_law(kernels, accepted):
    """In fp32 against the fp64 recurrence, from every distance to the next write of the state."""
    for before in range(4):
        decoder = Decoder(sequences(dtype=torch.float32), [2, 0], flush=4, device=kernels)
        ys, vs = decoder.run([(1, 1)] * before + [(4, accepted), (4, 2), (1, 1), (4, 4)])
        for row, (y, v, done) in enumerate(zip(ys, vs, decoder.done, strict=True)):
            expected, state, _ = oracle(decoder, row, done)
            kw = dict(rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(y.cpu().double(), expected, **kw)
            torch.testing.assert_close(decoder.current()[row].cpu().double(), state, **kw)
            torch.testing.assert_close(v.cpu().double(), conv_oracle(decoder.seqs, row, done), **kw)


SSD = pairwise(
    io=FLOATS,
    held=STATES,
    shape=[(64, 128), (80, 96), (17, 3), (5, 256), (3, 17), (40, 16), (7, 40)],
    flush=[(4, 4), (16, 5), (32, 32), (1, 1), (8, 1), (20, 18)],
    heads=[(4, 2), (3, 3), (2, 1)],
    D=[None, "h", "hp"],
    z=[True, False],
    bias=[True, False],
    softplus=[True, False],
    beside=["fp32", "io"],
    ragged=[False, True],
    layout=["sliced", "packed"],
    stochastic=[False, True],
    form=["chain", "tree"],
    behind=[0, 1, "all"],
)


def case(
    io,
    held,
    shape,
    flush,
    heads,
    D,
    z,
    bias,
    softplus,
    beside,
    ragged,
    layout,
    stochastic,
    form,
    behind,
):
    """Arguments of one call in guarded memory: rows far from, at and past a write of the state, and padding."""
    (p, n), (h, g), (flush, m) = shape, heads, flush
    small = io if beside == "io" else torch.float32
    b, slots, L = 4, 6, flush + 2 * m - 1

    def normal(*size, dtype=io):
        return torch.randn(*size).to(dtype)

    def pool(t):
        """Slots strided, with NaN between."""
        if t.dtype in (torch.int8, E4M3):
            wide = torch.zeros(t.shape[0], t[0].numel() + 16, dtype=t.dtype)
        else:
            wide = torch.full((t.shape[0], t[0].numel() + 16), float("nan"), dtype=t.dtype)
        view = wide[:, : t[0].numel()].unflatten(1, t.shape[1:])
        view.copy_(t)
        return view

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
    parents = [-1] + [int(torch.randint(0, i, ())) for i in range(1, m)]
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
        "ancestors": tree_bits(parents, b) if form == "tree" else None,
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


def moved(arguments, device, wide=False):
    """Copies with strides and gaps; wide: in fp64 where that is an activation."""

    def move(name, t):
        if not isinstance(t, torch.Tensor):
            return t
        base = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        t = base.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())
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


def check(before, arguments, y):
    """y and states against the fp64 oracle, rings bit for bit, all else untouched."""
    exact, honest = moved(before, "cpu", wide=True), moved(before, "cpu")
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
    touched[[slot for slot in before["state_indices"].tolist() if slot >= 0]] = True
    flags = torch.zeros(
        whole(before["state"]).numel() // before["state"].element_size(), dtype=torch.bool
    )
    flags.as_strided(touched.shape, before["state"].stride())[touched] = True
    flags = flags.repeat_interleave(before["state"].element_size())
    assert (flags | (whole(arguments["state"]) == whole(before["state"]))).all()


@pytest.mark.parametrize("case_", SSD, ids=case_id)
def test_values_and_untouched_memory(kernels, case_):
    before = case(**case_)
    arguments = moved(before, kernels)
    check(before, arguments, native.ssd_replay(**arguments))
