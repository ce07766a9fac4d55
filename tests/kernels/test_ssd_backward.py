"""SSD backward kernels: every gradient against autograd through the fp64 recurrence.

Inputs lie in guarded memory (NaN around them), outputs and workspaces start as NaN. Chunks are cut to 16 tokens, so
that short sequences cross chunks, windows and walks.
"""

import pytest
import torch
from memory import guarded, sliced
from numerics import assert_close_to_oracle, relative_rms
from options import case_id, pairwise

from tigon.kernels.launch import SweepConfig
from tigon.kernels.ssd_backward import ssd_backward
from tigon.reference import ssd as reference

GRADIENTS = ("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial")
SUMS = ("dA", "dD", "ddt_bias")
LAYOUTS = {  # b, l, cu_seqlens, state_positions
    "dense": (2, 21, None, None),
    "packed": (1, 43, [0, 0, 5, 38, 38, 43], None),
    "positions": (1, 35, [0, 0, 17, 35], [17, 0, 20, 35, 20]),
    "dense-positions": (1, 21, None, [16, 21]),
}
CHUNKS = {
    "one walk": SweepConfig(q=16, heads=4, block_p=64, programs=1),
    "walks, parts, tiles": SweepConfig(q=16, heads=1, block_p=16, programs=64, nq=True),
}
CUT = CHUNKS["walks, parts, tiles"]
CASES = pairwise(
    layout=list(LAYOUTS),
    chunks=list(CHUNKS),
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    pn=[(16, 16), (17, 3), (3, 33)],
    D=["h", "hp", None],
    z=[True, False],
    bias=[True, False],
    initial=[True, False],
    dfinal=[True, False],
    softplus=[True, False],
    strided=[True, False],
)


@pytest.fixture
def poisoned(monkeypatch):
    """What the launcher allocates without filling starts as NaN."""
    empty = torch.empty

    def nan(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", nan)


def make(layout, pn, dtype, device, D="h", z=False, bias=True, initial=True, dfinal=True, softplus=True,
         strided=False, h=2, g=1, dt_scale=0.5):  # fmt: skip
    """Arguments of ssd_backward up to chunk_size."""
    b, l, cu, positions = LAYOUTS[layout]
    p, n = pn
    sequences = b if cu is None else len(cu) - 1

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, device=device).to(dtype)

    def io(*shape, inner=2):
        t = draw(*shape, dtype=dtype)
        return sliced(t, inner) if strided else guarded(t)

    given = (
        guarded(draw(b, l, h, p, dtype=dtype)),
        guarded(draw(sequences, h, p, n)) if dfinal else None,
        None if positions is None else guarded(draw(len(positions), h, p, n)),
        io(b, l, h, p),
        io(b, l, h, inner=1).mul_(dt_scale),
        -guarded(torch.rand(h, device=device) * 2),
        io(b, l, g, n),
        io(b, l, g, n),
        {"h": guarded(draw(h)), "hp": guarded(draw(h, p)), None: None}[D],
        io(b, l, h, p) if z else None,
        guarded(draw(h) * 0.1) if bias else None,
        guarded(draw(sequences, h, p, n)) if initial else None,
        None if cu is None else guarded(torch.tensor(cu, dtype=torch.int32, device=device)),
        None if positions is None else guarded(torch.tensor(positions, device=device)),
    )
    return (*given, softplus, 0.02, 0.9)


def oracle(dy, dfinal, dstates, *given):
    """Gradients by autograd through the fp64 recurrence, in the order of GRADIENTS."""
    inputs = [
        t.double().detach().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t
        for t in given
    ]
    outputs = reference.ssd_recurrence(*inputs)
    pairs = [(o, g.double()) for o, g in zip(outputs, (dy, dfinal, dstates)) if g is not None]
    leaves = [t for t in inputs if torch.is_tensor(t) and t.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True
    )
    found = {id(t): torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads)}
    x, dt, A, B, C, D, z, bias, initial = inputs[:9]
    return [None if t is None else found[id(t)] for t in (x, dt, A, B, C, D, z, bias, initial)]


def baselines(args, exact, monkeypatch):
    """The reference with operands rounded, in the kernels' chunks.

    A sum over all tokens is a handful of numbers, whose error is a matter of luck: it gets the worse of two chunkings.
    """
    found = []
    for chunk in (16, 8):
        monkeypatch.setattr(reference, "CHUNK", chunk)  # states are rounded at the ends of chunks
        found.append(reference.ssd_backward(*args, round_operands=True))
    return [
        max(pair, key=lambda t: relative_rms(t, e)) if name in SUMS and e is not None else pair[0]
        for name, e, pair in zip(GRADIENTS, exact, zip(*found))
    ]


def check(args, config, monkeypatch):
    inputs = dict(zip(GRADIENTS, args[3:12]))
    wanted = oracle(*args)
    found = ssd_backward(*args, config=config)
    for name, got, exact, base in zip(
        GRADIENTS, found, wanted, baselines(args, wanted, monkeypatch)
    ):
        if exact is None:
            assert got is None, name
            continue
        assert got.dtype == inputs[name].dtype, name
        assert_close_to_oracle(name, got, exact, base)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_gradient_matches_the_recurrence(case, device, poisoned, monkeypatch):
    options = dict(case)
    config = CHUNKS[options.pop("chunks")]
    check(make(**options, device=device), config, monkeypatch)


@pytest.mark.parametrize("config", CHUNKS.values(), ids=CHUNKS)
def test_heads_of_a_group_are_all_summed_into_dB_and_dC(config, device, poisoned, monkeypatch):
    check(make("dense", (16, 16), torch.float32, device, h=6, g=2), config, monkeypatch)


def test_strong_decay_keeps_small_gradients(device, poisoned):
    """A dt' reaches -50 a token: forms that subtract cumulative sums lose all digits of ddt and dA here."""
    args = list(make("dense", (16, 16), torch.float32, device, softplus=False, bias=False))
    args[4].abs_().add_(0.3)
    args[5] *= 30
    found = ssd_backward(*args, config=CUT)
    for name, got, exact in zip(GRADIENTS, found, oracle(*args)):
        if exact is not None:
            assert relative_rms(got, exact) < 2e-5, name


def test_positive_A_grows(device, poisoned, monkeypatch):
    args = list(make("dense", (16, 16), torch.float32, device))
    args[5] = -args[5] * 0.1
    check(args, CUT, monkeypatch)


def test_repeat_is_bit_identical(device):
    args = make("packed", (17, 3), torch.bfloat16, device, z=True)
    first, second = (ssd_backward(*args, config=CUT) for _ in range(2))
    for name, a, b in zip(GRADIENTS, first, second):
        assert a is None or torch.equal(a, b), name


def test_no_tokens_pass_dfinal_through(device):
    args = list(make("dense", (3, 3), torch.float32, device))
    for i in (0, 3, 4, 6, 7):
        args[i] = args[i][:, :0]
    got = dict(zip(GRADIENTS, ssd_backward(*args)))
    assert torch.equal(got["dinitial"], args[1])
    assert got["dx"].shape == args[3].shape and not got["dA"].any() and not got["dD"].any()


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_an_empty_input_has_empty_gradients(size, device):
    sizes = {"b": 1, "l": 4, "h": 2, size: 0}
    shape = tuple(sizes.values())
    x, dt = torch.randn(*shape, 16, device=device), torch.randn(*shape, device=device)
    A, B = torch.randn(sizes["h"], device=device), torch.randn(*shape[:2], 1, 16, device=device)
    args = (x, None, None, x, dt, A, B, B, A, x, A, None, None, None, True, 0.0, 1.0)
    dx, ddt, dA, dB, dC, dD, dz, dbias, _ = ssd_backward(*args)
    assert dx.shape == dz.shape == x.shape and ddt.shape == dt.shape
    assert dB.shape == dC.shape == B.shape
    for grad in (dA, dB, dC, dD, dbias):
        assert not grad.any()


def test_offsets_of_dt_past_two_to_the_31(device):
    """dt with its heads 2^30 elements apart. Half the buffer lies before it: what would wrap stays inside."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 9 GB of device memory")
    args = list(make("dense", (3, 3), torch.float16, device, h=3))
    near = args[4][:1].contiguous()
    for i in (0, 1, 3, 6, 7, 11):
        args[i] = args[i][:1]
    far = torch.empty(2**32 + 21, dtype=torch.float16, device=device)
    args[4] = far.as_strided((1, 21, 3), (0, 1, 2**30), 2**31)
    args[4].copy_(near)
    found = ssd_backward(*args, config=CUT)
    args[4] = near
    for got, want in zip(found, ssd_backward(*args, config=CUT)):
        assert got is None or torch.equal(got, want)


def test_offsets_of_batch_rows_past_two_to_the_31(device):
    """Batch rows of x 2^31 elements apart in memory that is reserved but not touched."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 5 GB of device memory")
    args = list(make("dense", (16, 16), torch.float16, device, h=1))
    near, apart = args[3].contiguous(), 2**31 + 64
    far = torch.empty(apart + 21 * 16, dtype=torch.float16, device=device)
    args[3] = far.as_strided((2, 21, 1, 16), (apart, 16, 16, 1))
    args[3].copy_(near)
    found = ssd_backward(*args, config=CUT)
    args[3] = near
    for got, want in zip(found, ssd_backward(*args, config=CUT)):
        assert got is None or torch.equal(got, want)


def test_nan_in_one_sequence_stays_there(device):
    """Sequences of a packed batch share walks; a NaN must not leak from one to the next."""
    args = list(make("packed", (16, 16), torch.float32, device))
    args[3][0, 10] = float("nan")  # sequence 2 is tokens 5 to 38
    dx, ddt = ssd_backward(*args, config=CUT)[:2]
    for grad in (dx, ddt):
        assert torch.isfinite(grad[:, :5]).all() and torch.isfinite(grad[:, 38:]).all()
    assert torch.isnan(ddt[:, 5:38]).any()
