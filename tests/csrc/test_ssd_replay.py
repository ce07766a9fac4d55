"""csrc/ssd_replay.cu and csrc/conv1d_replay.cu: the law, bit for bit across histories, and against the references."""

import pytest
import torch
from decode_cases import moved
from options import case_id, pairwise
from replay_cases import Decoder, conv_oracle, oracle, sequences, tree_bits
from replay_launches import conv_check, conv_make, ssd_check, ssd_make

import tigon
from tigon import native
from tigon.reference.ssd import ssd_update as plain_reference

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


@pytest.mark.parametrize("case_", SSD, ids=case_id)
def test_values_and_untouched_memory(kernels, case_):
    before = ssd_make(**case_)
    arguments = moved(before, kernels)
    ssd_check(before, arguments, native.ssd_replay(**arguments))


CONV = pairwise(
    io=FLOATS,
    width=[4, 2, 3, 5, 6, 7, 8],
    extra=[0, 1, 9],
    m=[1, 4, 32, 3],
    d=[3, 96, 130],
    bias=[True, False],
    beside=["fp32", "io"],
    silu=[True, False],
    ragged=[False, True],
    layout=["sliced", "packed"],
    form=["chain", "tree"],
)


@pytest.mark.parametrize("case_", CONV, ids=case_id)
def test_convolution_values_and_untouched_memory(kernels, case_):
    before = conv_make(**case_)
    arguments = moved(before, kernels)
    conv_check(before, arguments, native.conv1d_replay(**arguments))


@pytest.mark.parametrize("cursor", [(-5, -9), (2**40, -(2**40)), (3, 2**40), (2**62, 0)])
def test_a_broken_cursor_reads_and_writes_within_the_slot(kernels, cursor):
    """Whatever checkpoint and length hold, no address leaves the rings: NaN lies around them."""
    before = ssd_make(flush=(8, 4))
    live = before["state_indices"].tolist()
    for name in ("ring_x", "ring_B", "ring_dt"):
        before[name].nan_to_num_(0.5)
    for name, value in zip(("length", "checkpoint"), cursor, strict=True):
        before[name][:] = value
    arguments = moved(before, kernels)
    y = native.ssd_replay(**arguments)
    assert torch.isfinite(y).all()
    for name in ("state", "ring_x", "ring_B", "ring_dt"):
        held = arguments[name]
        assert torch.isfinite(held.float()).all()
        for slot in set(range(held.shape[0])) - set(live):
            assert torch.equal(held[slot].cpu(), before[name][slot])
    conv = moved(conv_make(m=3, extra=0), kernels)
    conv["length"][:] = cursor[0]
    conv["ring"].nan_to_num_(0.5)
    assert torch.isfinite(native.conv1d_replay(**conv)).all()


@pytest.mark.parametrize("slot", [-1, -(2**31), 6, 2**31 - 1])
def test_slot_outside_the_pool_writes_zeros_and_touches_nothing(kernels, slot):
    before = ssd_make(held=torch.int8, behind="all")
    before["state_indices"] = torch.tensor([2, slot, 0, 3], dtype=torch.int32)
    arguments = moved(before, kernels)
    y = native.ssd_replay(**arguments)
    assert (y[1] == 0).all()
    ssd_check(before, arguments, y)
    before = conv_make()
    before["state_indices"] = torch.tensor([2, slot, 0, 3], dtype=torch.int32)
    arguments = moved(before, kernels)
    conv_check(before, arguments, native.conv1d_replay(**arguments))


def test_offsets_past_two_to_the_31_elements(kernels):
    """Slots half of int32's address range apart, in memory that is hardly touched."""
    far = 2**31 + 64
    before = ssd_make(
        io=torch.bfloat16,
        held=torch.bfloat16,
        shape=(8, 16),
        heads=(1, 1),
        flush=(4, 2),
        behind="all",
    )
    before["state_indices"] = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    arguments = moved(before, kernels)
    memory = torch.empty(far + 4096, dtype=torch.bfloat16, device=kernels)
    start = 0
    for name in ("state", "ring_x", "ring_B"):
        t = arguments[name][:2]
        arguments[name] = memory[start:].as_strided(t.shape, (far, *t.stride()[1:])).copy_(t)
        start += -(-2 * t[0].numel() // 8) * 8
    y = native.ssd_replay(**arguments)
    near = moved(before, kernels)
    assert torch.equal(y, native.ssd_replay(**near))
    for name in ("state", "ring_x", "ring_B"):
        assert torch.equal(arguments[name].nan_to_num(7), near[name][:2].nan_to_num(7))


@pytest.mark.parametrize("held", STATES[:3])
def test_alignment_does_not_change_a_bit(kernels, held):
    aligned = moved(ssd_make(held=held, stochastic=True, behind="all"), kernels)
    shifted = dict(aligned)
    for name in ("state", "ring_B", "B", "C"):
        t = aligned[name]
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        shifted[name] = memory[1:].view(t.shape).copy_(t)
        assert shifted[name].data_ptr() % 16
    for name in ("ring_x", "ring_dt"):
        shifted[name] = aligned[name].clone()
    assert torch.equal(native.ssd_replay(**aligned), native.ssd_replay(**shifted))
    assert torch.equal(aligned["state"], shifted["state"])


def test_nan_of_a_token_reaches_later_tokens_of_its_row_only(kernels):
    before = ssd_make(flush=(8, 4), behind=1)
    clean, dirty = moved(before, kernels), moved(before, kernels)
    for name in ("x", "B", "dt"):
        dirty[name][0, 2] = float("nan")
    y, expected = native.ssd_replay(**dirty), native.ssd_replay(**clean)
    assert torch.equal(y[0, :2], expected[0, :2]) and y[0, 2:].isnan().all()
    assert torch.equal(y[1:], expected[1:])
    assert torch.equal(dirty["state"].nan_to_num(7), clean["state"].nan_to_num(7))


def test_a_node_of_nan_harms_its_descendants_only(kernels):
    before = ssd_make(flush=(8, 5), behind=1, form="tree")
    before["ancestors"] = tree_bits([-1, 0, 0, 1, 2], 4)
    clean, dirty = moved(before, kernels), moved(before, kernels)
    dirty["x"][0, 1] = float("nan")
    y, expected = native.ssd_replay(**dirty), native.ssd_replay(**clean)
    assert torch.equal(y[0, [0, 2, 4]], expected[0, [0, 2, 4]])
    assert y[0, 1].isnan().all() and y[0, 3].isnan().all()


NARROW = [torch.bfloat16, torch.float16, torch.int8, E4M3]


def products(held, shape, stochastic, device):
    """A call of ssd_update whose states are single products, the same fp32 numbers everywhere: of magnitudes from
    the smallest subnormal of fp16 to its largest number, with zeros, infinities and NaN among them."""
    p, n = shape
    h, b = 3, 4
    x = torch.randn(b, 1, h, p) * torch.exp2(torch.randint(-26, 14, (b, 1, h, p)))
    B = torch.randn(b, 1, 1, n) * torch.exp2(torch.randint(-2, 3, (b, 1, 1, n)))
    x[0, 0, 0, 0], x[0, 0, 1, 1], x[1, 0, 0, 0] = 0.0, float("nan"), float("inf")
    x[2, 0, 0, 0], x[2, 0, 1, 0] = 2**-130, 1e5
    B += B.sign() * 2**-6  # so that no product underflows
    scaled = held in (torch.int8, E4M3)
    arguments = {
        "state": torch.zeros(b, h, p, n, dtype=held),
        "x": x,
        "dt": torch.ones(b, 1, h),
        "A": torch.zeros(h),
        "B": B,
        "C": torch.ones(b, 1, 1, n),
        **dict.fromkeys(("D", "z", "dt_bias", "state_indices", "num_tokens")),
        "dt_softplus": False,
        "dt_min": 0.0,
        "dt_max": float("inf"),
        "state_scale": torch.zeros(b, h, p) if scaled else None,
        "seeds": torch.tensor([1, 2**63 - 1, -1, 2**32]) if stochastic else None,
        "positions": torch.tensor([0, 2**40, 5, 2**32 - 1]) if stochastic else None,
        "layer": 2**24 - 1,
    }
    return arguments, moved(arguments, device)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("shape", [(7, 64), (5, 17), (4, 3), (3, 40)])
@pytest.mark.parametrize("held", NARROW)
def test_equal_numbers_are_rounded_to_equal_bytes_by_kernel_and_reference(
    kernels, held, shape, stochastic
):
    """Vectors and single elements, random words that begin within and between elements of a lane."""
    expected, arguments = products(held, shape, stochastic, kernels)
    plain_reference(**expected)
    native.ssd_update(**arguments)
    for name in ("state", "state_scale"):
        if expected[name] is None:
            continue
        got, want = (t[name].cpu() for t in (arguments, expected))
        if want.is_floating_point() and want.element_size() > 1:
            assert torch.equal(got.isnan(), want.isnan())
            got, want = got.nan_to_num(7), want.nan_to_num(7)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
