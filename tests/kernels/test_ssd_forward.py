"""The SSD forward kernels: in Triton's interpreter on a CPU, natively where there is a GPU."""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from memory import guarded, sliced
from numerics import assert_close_to_oracle
from options import case_id, pairwise

from tigon.kernels import launch
from tigon.kernels import ssd_forward as kernels
from tigon.kernels.ssd_common import decay, decay_limit, is_aligned, rows_of
from tigon.kernels.ssd_forward import ssd_forward
from tigon.reference.ssd import ssd_forward as reference
from tigon.reference.ssd import ssd_recurrence

INF = float("inf")
TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
PACKED = [
    0,
    0,
    3,
    19,
    19,
    51,
    56,
]  # empty sequences at the start and in the middle, lengths around q = 16
POSITIONS = [
    0,
    56,
    3,
    10,
    35,
    35,
    19,
]  # 0, ends of sequences, a duplicate, and the middle of a chunk


def make(
    device, b=1, l=40, h=2, p=16, g=1, n=16, D="h", z=False, bias=True, initial=False,
    cu=None, positions=None, dtype=torch.float32, beside=torch.float32,
):  # fmt: skip
    """Inputs of one call by argument name."""

    def draw(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).to(device)

    sequences = b if cu is None else len(cu) - 1
    return {
        "x": draw(b, l, h, p),
        "dt": draw(b, l, h, dtype=beside),
        "A": -torch.rand(h, dtype=torch.float64).add(0.1).to(beside).to(device),
        "B": draw(b, l, g, n, scale=n**-0.5),
        "C": draw(b, l, g, n),
        "D": None if D is None else draw(*((h,) if D == "h" else (h, p)), dtype=beside),
        "z": draw(b, l, h, p) if z else None,
        "dt_bias": draw(h, dtype=beside) if bias else None,
        "initial_states": draw(sequences, h, p, n, dtype=beside) if initial else None,
        "cu_seqlens": None if cu is None else torch.tensor(cu, dtype=torch.int32, device=device),
        "state_positions": None if positions is None else torch.tensor(positions, device=device),
    }


def tiles(p, n, segment=4096, **kw):
    """The smallest tiles: the interpreter's time is proportional to them."""
    block_n = launch.power_of_two(n)
    config = launch.ScanConfig(16, block_n, 16, 4, precision="ieee", segment=segment, **kw)
    return {"walk": config, "segment_states": config}


def scan(inputs, softplus=True, limit=(0.0, INF), configs=None, **kw):
    """All outputs of the kernels."""
    if configs is None:
        configs = tiles(inputs["x"].shape[-1], inputs["B"].shape[-1], **kw)
    return ssd_forward(*inputs.values(), softplus, *limit, configs=configs)


def check(inputs, outputs, softplus=True, limit=(0.0, INF)):
    """Every output against the fp64 recurrence, by the numerics contract."""
    cpu = {k: None if t is None else t.cpu() for k, t in inputs.items()}
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in cpu.values()]
    oracle = ssd_recurrence(*wide, softplus, *limit)
    baseline = reference(*cpu.values(), softplus, *limit, round_operands=True)
    for name, got, want, base in zip(("y", "final", "states"), outputs, oracle, baseline):
        assert_close_to_oracle(name, got.cpu(), want, base)


CASES = pairwise(
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    D=[None, "h", "hp"],
    shape=[(1, 40, 2, 1, 16, 16), (2, 17, 4, 2, 3, 17), (1, 16, 3, 1, 24, 40), (2, 33, 2, 2, 16, 32)],
    z=[False, True],
    bias=[False, True],
    initial=[False, True],
    softplus=[True, False],
    limit=[(0.0, INF), (0.05, 1.5)],
    beside=["fp32", "io"],
    segment=[4096, 16, 32],
    path=["pointers", "transposed", "mix_first", "descriptors"],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_dense_batches_match_the_recurrence(case, device):
    b, l, h, g, p, n = case["shape"]
    dtype = case["dtype"]
    inputs = make(
        device, b, l, h, p, g, n, case["D"], case["z"], case["bias"], case["initial"],
        dtype=dtype, beside=dtype if case["beside"] == "io" else torch.float32,
    )  # fmt: skip
    if not case["softplus"]:
        inputs["dt"] = inputs["dt"].abs()
        if case["bias"]:
            inputs["dt_bias"] = inputs["dt_bias"].abs()
    path = {
        "np": case["path"] == "transposed",
        "mix_first": case["path"] == "mix_first",
        "tma": case["path"] == "descriptors" and p == 16,
    }
    options = {"softplus": case["softplus"], "limit": case["limit"]}
    check(inputs, scan(inputs, segment=case["segment"], **path, **options), **options)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("segment", [4096, 32, 16])
@pytest.mark.parametrize("initial", [False, True])
def test_packed_sequences_and_states_at_positions(segment, initial, tma, device):
    inputs = make(device, l=56, initial=initial, cu=PACKED, positions=POSITIONS, g=2)
    check(inputs, scan(inputs, segment=segment, tma=tma))


@pytest.mark.parametrize("positions", [[5, 40], [], [40, 0, 0]])
def test_states_at_positions_of_one_sequence(positions, device):
    inputs = make(device, positions=positions, initial=True)
    check(inputs, scan(inputs, segment=16))


def test_packed_sequences_that_need_one_segment_each(device):
    inputs = make(device, l=56, cu=PACKED, initial=True, dtype=torch.bfloat16)
    check(inputs, scan(inputs, segment=64))


def test_chunks_around_their_edges(device):
    for l in (1, 15, 16, 17, 32):
        inputs = make(device, l=l, h=1)
        check(inputs, scan(inputs))


def test_no_tokens_keep_the_initial_state(device):
    for kw in ({"b": 2}, {"cu": [0, 0, 0]}, {"cu": [0, 0], "positions": [0]}):
        inputs = make(device, l=0, initial=True, **kw)
        y, final, states = scan(inputs)
        assert y.numel() == 0
        assert torch.equal(final, inputs["initial_states"])
        assert torch.equal(states, inputs["initial_states"][: states.shape[0]])


def test_outputs_share_no_memory(device):
    """An op's outputs may not alias one another: not even the empty place of states that nobody asked for."""
    outputs = scan(make(device))
    assert not any(t._is_view() for t in outputs) and outputs[2].numel() == 0


@pytest.mark.parametrize("kw", [{"b": 0}, {"h": 0}])
def test_an_empty_batch_launches_nothing(kw, device):
    y, final, _ = scan(make(device, **kw))
    assert y.numel() == final.numel() == 0


@pytest.mark.parametrize("tma", [False, True])
def test_slices_of_one_projection_in_poisoned_memory(tma, device, monkeypatch):
    """No copy is made, nothing outside is read, and every output element is written."""
    inputs = make(device, b=2, l=19, h=2, p=24, n=24, z=True, dtype=torch.bfloat16)
    expected = scan(inputs)
    empty = torch.empty
    monkeypatch.setattr(
        kernels.torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(float("nan"))
    )
    if tma:  # rows start on 16 bytes, NaN lies between them
        inputs |= {k: aligned_slice(inputs[k]) for k in ("x", "B", "C", "z")}
        assert is_aligned(*(inputs[k] for k in ("x", "B", "C", "z")))
    else:
        inputs |= {k: sliced(inputs[k], 2) for k in ("x", "B", "C", "z")}
        assert not is_aligned(inputs["x"])
    inputs["dt"] = sliced(inputs["dt"].transpose(0, 2), 1).transpose(0, 2)
    inputs |= {k: guarded(inputs[k]) for k in ("A", "D", "dt_bias")}
    for k in ("x", "B", "C", "z"):
        assert rows_of(inputs[k]) is inputs[k]
    for got, want in zip(scan(inputs, tma=tma), expected):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "bounds", [[32, 35, 16, 7, 10], [15, 14, 24, -2, 21], [2**30, 3, 99, -7, 5]]
)
def test_wrong_bounds_never_leave_the_buffers(bounds, device, monkeypatch):
    """Nobody looks at the values of cu_seqlens on a GPU. What a launcher allocates lies between NaN."""
    empty, whole, margin = torch.empty, [], 2048  # more than the states of all heads

    def between_nan(shape, dtype, device):
        size = math.prod(shape)
        whole.append(empty(size + 2 * margin, dtype=dtype, device=device).fill_(float("nan")))
        return whole[-1][margin : margin + size].zero_().view(shape)

    def allocate(shape, *, dtype, device):
        make = between_nan if dtype.is_floating_point else empty
        return make(shape, dtype=dtype, device=device)

    inputs = make(device, cu=[0, 10, 20, 30, 40], initial=True)
    inputs["cu_seqlens"].copy_(torch.tensor(bounds))
    monkeypatch.setattr(kernels.torch, "empty", allocate)
    outputs = scan(inputs, segment=16)
    monkeypatch.undo()
    assert all(t.isfinite().all() for t in outputs)
    assert all(t[:margin].isnan().all() and t[-margin:].isnan().all() for t in whole)


def aligned_slice(t):
    """`t` (b,l,h,p) with each token's row in a wider one of NaN, starting on 16 bytes; p is padded the same way."""
    b, l, h, p = t.shape
    wide = torch.full((b, l + 1, h * p + 32), float("nan"), dtype=t.dtype, device=t.device)
    view = wide[:, :l, 8 : 8 + h * p].unflatten(-1, (h, p))
    view.copy_(t)
    return view


def test_a_nan_stays_in_its_sequence(device):
    inputs = make(device, l=56, cu=PACKED, h=1)
    clean = scan(inputs, segment=16)
    for name in ("x", "dt", "B", "C"):
        dirty = {k: None if t is None else t.clone() for k, t in inputs.items()}
        dirty[name][:, 19:51] = float("nan")
        y, final, _ = scan(dirty, segment=16)
        assert y[:, 19:51].isnan().all()
        outside = torch.tensor([*range(19), *range(51, 56)], device=y.device)
        assert torch.equal(y[:, outside], clean[0][:, outside])
        assert final[4].isnan().all() == (name != "C")
        others = [0, 1, 2, 3, 5]
        assert torch.equal(final[others], clean[1][others])


def test_a_nan_in_A_or_its_bias_reaches_the_outputs(device):
    for name in ("A", "dt_bias"):
        inputs = make(device, h=2)
        inputs[name][0] = float("nan")
        y, final, _ = scan(inputs)
        assert y[:, 1:, 0].isnan().all() and final[:, 0].isnan().all()
        assert y[:, :, 1].isfinite().all() and final[:, 1].isfinite().all()


def test_decays_that_underflow_give_finite_outputs(device):
    inputs = make(device, l=35)
    inputs["A"] *= 1e4
    inputs["dt"] += 10
    check(inputs, scan(inputs, segment=16))


def test_a_positive_A_grows(device):
    inputs = make(device, l=20, h=1)
    inputs["A"] = -inputs["A"]
    inputs["dt"] -= 2
    y, final, _ = scan(inputs)
    wide = [None if t is None else t.double().cpu() for t in inputs.values()]
    for got, want in zip((y, final), ssd_recurrence(*wide, True)):
        assert torch.allclose(got.cpu().double(), want, rtol=1e-4, atol=1e-5)


def test_very_small_steps_keep_their_digits(device):
    """softplus(-12) is 6e-6: log(1 + e^v) in fp32 would be off by a percent."""
    inputs = make(device, D=None, bias=False)
    inputs["dt"] -= 12
    check(inputs, scan(inputs))


def test_repeats_are_bit_identical(device):
    inputs = make(device, l=56, h=1, cu=PACKED, positions=POSITIONS, dtype=torch.bfloat16)
    for first, second in zip(scan(inputs, segment=16), scan(inputs, segment=16)):
        assert torch.equal(first, second)


def test_one_segment_size_makes_a_row_independent_of_its_mates(device):
    inputs = make(device, b=3, l=33, h=1, initial=True)
    alone = {k: t[1:2] if t is not None and t.shape[:1] == (3,) else t for k, t in inputs.items()}
    for whole, row in zip(scan(inputs, segment=16), scan(alone, segment=16)):
        assert torch.equal(whole[1:2], row)


def test_the_shipped_tables_give_the_same_answer(device):
    """Through launch.plan, as the op calls it; the tables of the interpreter's stand-in have tiles of 64."""
    inputs = make(device, l=70, h=1, p=64, n=40, dtype=torch.bfloat16)
    check(inputs, ssd_forward(*inputs.values(), True, 0.0, INF))


@pytest.mark.parametrize("tma", [False, True])
def test_wide_states_are_walked_in_tiles_of_n(tma, device):
    inputs = make(device, l=40, h=1, n=40, D="hp", z=True, initial=True, positions=[20, 40])
    config = replace(tiles(16, 16, segment=32)["walk"], tma=tma)
    check(inputs, scan(inputs, configs={"walk": config, "segment_states": config}))


def test_offsets_past_two_to_the_31(device):
    """Batch rows 2^31 elements apart in memory that is reserved but not touched."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 5 GB of device memory")
    apart = 2**31 + 64
    near = make(device, b=2, l=18, h=1, p=16, n=16, dtype=torch.float16)
    far = torch.empty(apart + 18 * 16, dtype=torch.float16, device=device)
    x = far.as_strided((2, 18, 1, 16), (apart, 16, 16, 1))
    x.copy_(near["x"])
    for tma in (False, True):
        for got, want in zip(scan(near | {"x": x}, tma=tma), scan(near, tma=tma)):
            assert torch.equal(got, want)


def test_offsets_past_two_to_the_31_within_a_sequence(device):
    """Tokens 2^23 elements apart, the most that `rows_of` leaves alone."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 5 GB of device memory")
    near = make(device, l=260, h=1, dtype=torch.float16)
    far = torch.empty(260 << 23, dtype=torch.float16, device=device)
    x = far.as_strided((1, 260, 1, 16), (0, 1 << 23, 16, 1))
    x.copy_(near["x"])
    assert rows_of(x) is x
    for got, want in zip(scan(near | {"x": x}), scan(near)):
        assert torch.equal(got, want)


@triton.jit
def _decays(out, exponents, A):
    at = tl.arange(0, 4)
    tl.store(out + at, decay(tl.load(exponents + at), decay_limit(tl.load(A))))


@pytest.mark.parametrize(
    ("A", "expected"), [(-1.0, [1.0, 1.0, 0.5]), (0.0, [1.0, 1.0, 0.5]), (1.0, [2.0, 1.0, 0.5])]
)
def test_a_decay_never_grows_unless_A_is_positive(A, expected, device):
    exponents = torch.tensor([1.0, 0.0, -1.0, float("nan")], device=device)
    out = torch.empty(4, device=device)
    _decays[(1,)](out, exponents, torch.tensor([A], device=device))
    assert out[:3].tolist() == expected and out[3].isnan()


def test_tokens_too_far_apart_for_32_bits_are_copied(device):
    t = torch.empty(1, dtype=torch.float16, device=device).expand(1, 2, 1, 1)
    assert rows_of(t.as_strided((1, 2, 1, 1), (0, 0, 1, 1))).stride(1) == 0
    meta = torch.empty_strided((1, 2, 1, 1), (1 << 26, 1 << 25, 1, 1), device="meta")
    assert rows_of(meta).stride(1) == 1


def test_batch_invariant_plans_do_not_depend_on_the_call():
    shapes = [{"b": b, "l": l} for b in (1, 64) for l in (100, 100_000)]
    common = {"h": 128, "p": 64, "n": 128, "itemsize": 2, "batch_invariant": True}
    assert len({launch.plan("ssd_scan", 90, **common, **s)["walk"] for s in shapes}) == 1


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_width_has_a_plan(arch, itemsize):
    for p in (1, 3, 64, 80, 256):
        for n in (1, 17, 96, 128, 256):
            config = launch.plan("ssd_scan", arch, b=1, l=4096, h=8, p=p, n=n, itemsize=itemsize)[
                "walk"
            ]
            assert config.block_n >= min(n, 128) and config.block_p * config.block_n <= 8192
            assert config.segment % 64 == 0 and config.tma == (arch >= 90)
            assert hash(config) == hash(replace(config))


def test_segments_fill_the_chip_but_no_further():
    def split(b, l):
        sizes = {"b": b, "l": l, "h": 128, "p": 64, "n": 128, "itemsize": 2}
        return -(-l // launch.plan("ssd_scan", 90, **sizes)["walk"].segment)

    assert split(8, 8192) == 1  # 1024 walks on 264 places
    assert split(1, 8192) == 2  # 128 walks
    assert split(1, 128) == 1  # too short to cut
