"""tigon.integrations.mamba_ssm: upstream's names and signatures, packed batches, refusals.

Oracles: Tigon's own fp64 recurrence, a sequence at a time; and, where installed, the pure-torch references of the
packages themselves. `make env` builds those without CUDA into a folder of their own:

    export MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE
    export CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE
    pip install --no-build-isolation --no-deps --target .venv/peers mamba-ssm causal-conv1d
"""

import importlib
import inspect
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tigon.integrations import mamba_ssm as ours
from tigon.integrations.packing import from_ids

INF = float("inf")
LIMIT = (0.2, 1.5)
H, P, G, N = 6, 5, 3, 4
# Runs of ids, b = 2: ids that start above 0, come back, and padding in front, between and behind.
IDS = torch.tensor([[4, 4, 4, 7, 4, 4, -1, 2, 2, 2, 2], [-1, -1, 0, 0, 0, 0, 0, 1, -1, -2, -2]])
RUNS = [(0, 0, 3), (0, 3, 4), (0, 4, 6), (0, 7, 11), (1, 2, 7), (1, 7, 8)]
FIRST, LAST = (0, 4), (3, 5)  # of each row, in RUNS


PEERS = Path(sys.prefix) / "peers"  # where `make env` puts the two packages


LEFT = {}  # modules of the two packages, kept between tests: their ops can be registered once only


@pytest.fixture
def upstream():
    """Imports a module of mamba_ssm or causal_conv1d, with stand-ins for the CUDA extensions that they ask for.

    After the test nothing of them is to be found: transformers looks for these packages and would take them.
    """
    before = set(sys.modules)
    sys.modules.update(LEFT)
    for stub in {"selective_scan_cuda", "causal_conv1d_cuda"} - set(sys.modules):
        sys.modules[stub] = types.ModuleType(stub)
    sys.path.append(str(PEERS))

    def find(name):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(
                f"{name}: {error}; the top of this file says how to install it without a GPU"
            )

    yield find
    sys.path.remove(str(PEERS))
    for module in set(sys.modules) - before:
        if module.startswith(("mamba_ssm", "causal_conv1d", "selective_scan_cuda")):
            LEFT[module] = sys.modules.pop(module)


def inputs(b=2, l=11, dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return {
        "x": draw(b, l, H, P),
        "dt": draw(b, l, H),
        "A": (-torch.rand(H, dtype=dtype)).requires_grad_(),
        "B": draw(b, l, G, N),
        "C": draw(b, l, G, N),
        "D": draw(H, P),
        "z": draw(b, l, H, P),
        "dt_bias": draw(H),
    }


def scan(t, **kwargs):
    options = {"chunk_size": 4, "dt_softplus": True, "dt_limit": LIMIT}
    return ours.mamba_chunk_scan_combined(**t, **(options | kwargs))


def cut(t, row, start, end):
    """The inputs of one run, as a batch of one."""
    return {
        k: v if k in ("A", "D", "dt_bias") else v[row : row + 1, start:end] for k, v in t.items()
    }


def run_by_run(t, initial=None):
    """(y, end state of each run), scanning every run by itself; zeros at padding."""
    y, ends = torch.zeros_like(t["x"]), []
    for i, (row, start, end) in enumerate(RUNS):
        entry = initial[row : row + 1] if initial is not None and i in FIRST else None
        piece, state = scan(cut(t, row, start, end), initial_states=entry, return_final_states=True)
        index = (torch.tensor([row]), torch.arange(start, end))
        y = y.index_put((index[0][:, None], index[1][None]), piece)
        ends.append(state)
    return y, torch.cat(ends)


def compare(got, want, leaves, atol=1e-9):
    """Values, and gradients of a random projection of them."""
    weights = [torch.randn_like(w) for w in want]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=atol)
    grads = [
        torch.autograd.grad(
            sum((o * k).sum() for o, k in zip(outs, weights)), leaves, allow_unused=True
        )
        for outs in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("max_sequences", [None, 12], ids=["counted", "bounded"])
@pytest.mark.parametrize("initial", [False, True])
def test_seq_idx_scans_every_run_by_itself(initial, max_sequences):
    t = inputs()
    entry = torch.randn(2, H, P, N, dtype=torch.float64).requires_grad_() if initial else None
    y, final = scan(
        t, seq_idx=IDS, initial_states=entry, return_final_states=True, max_sequences=max_sequences
    )
    want, ends = run_by_run(t, entry)
    leaves = [*t.values(), *([entry] if initial else [])]
    compare((y, final), (want, ends[list(LAST)]), leaves)


def test_a_row_of_padding_keeps_its_initial_state():
    t = inputs()
    ids = IDS.clone()
    ids[1] = -3
    entry = torch.randn(2, H, P, N, dtype=torch.float64)
    y, final = scan(t, seq_idx=ids, initial_states=entry, return_final_states=True)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert torch.equal(final[1], entry[1])
    assert torch.equal(
        scan(t, seq_idx=ids, return_final_states=True)[1][1], torch.zeros_like(entry[1])
    )


@pytest.mark.parametrize("count", [9, 10])
def test_too_small_a_bound_on_sequences_gives_nan_not_a_wrong_answer(count):
    t = inputs()  # 5 + 5 runs, padding included
    y, final = scan(t, seq_idx=IDS, max_sequences=count, return_final_states=True)
    assert bool(y.isnan().all()) == (count < 10)
    conv = ours.causal_conv1d_fn(
        t["x"].flatten(2).transpose(1, 2),
        torch.randn(H * P, 3).double(),
        None,
        IDS,
        max_sequences=count,
    )
    assert bool(conv.isnan().all()) == (count < 10)


def test_bounded_packing_waits_for_nothing(no_host_sync):
    t = {k: v.detach() for k, v in inputs().items()}
    scan(t, seq_idx=IDS, max_sequences=12, return_final_states=True)
    bounds = torch.tensor([0, 3, 4, 11])
    row = {k: v if v.dim() < 3 else v[:1] for k, v in t.items()}
    scan(row, cu_seqlens=bounds, return_varlen_states=True)
    scan(row, cu_seqlens=bounds, seq_idx=IDS[:1])


def test_ids_are_counted_once_until_they_change():
    ids = IDS.clone()
    first = from_ids(ids)
    assert from_ids(ids) is first
    assert first.cu_seqlens.tolist() == [0, 3, 4, 6, 7, 11, 13, 18, 19, 20, 22]
    ids[0, 0] = 5
    assert from_ids(ids).cu_seqlens.tolist()[:3] == [0, 1, 3]


def test_cu_seqlens_keeps_sequences_apart_and_returns_their_states():
    t = inputs(b=1)
    bounds = [0, 3, 3, 9, 11]
    cu = torch.tensor(bounds, dtype=torch.int32)
    each = torch.randn(4, H, P, N, dtype=torch.float64).requires_grad_()
    parts, ends = [], []
    for i, (start, end) in enumerate(pairwise(bounds)):
        y, s = scan(cut(t, 0, start, end), initial_states=each[i : i + 1], return_final_states=True)
        parts.append(y)
        ends.append(s)
    want = (torch.cat(parts, 1), ends[-1], torch.cat(ends))
    got = scan(
        t, cu_seqlens=cu, initial_states=each, return_final_states=True, return_varlen_states=True
    )
    compare(got, want, [*t.values(), each])
    ids = torch.tensor([[0] * 3 + [2] * 6 + [3] * 2])
    assert torch.equal(scan(t, cu_seqlens=cu, seq_idx=ids), scan(t, cu_seqlens=cu))
    first = scan(t, cu_seqlens=cu, initial_states=each[:1], return_varlen_states=True)[1]
    alone = scan(t, cu_seqlens=cu, return_varlen_states=True)[1]
    torch.testing.assert_close(first[0], want[2][0])
    assert torch.equal(first[2:], alone[2:])


def test_state_dtype_is_that_of_returned_states():
    t = {k: v.detach().bfloat16() for k, v in inputs(b=1).items()}
    cu = torch.tensor([0, 4, 11])
    options = {"cu_seqlens": cu, "return_final_states": True, "return_varlen_states": True}
    for asked, dtype in ((None, torch.float32), (torch.float16, torch.float16)):
        y, *states = scan(t, state_dtype=asked, **options)
        assert [s.dtype for s in states] == [dtype, dtype]
        assert y.dtype == torch.bfloat16


def layer(d_other=0, dtype=torch.float64):
    dim, width = H * P, 4
    channels = 2 * d_other + 2 * dim + 2 * G * N + H

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return {
        "zxbcdt": draw(2, 11, channels),
        "conv1d_weight": draw(dim + 2 * G * N, width),
        "conv1d_bias": draw(dim + 2 * G * N),
        "dt_bias": draw(H),
        "A": (-torch.rand(H, dtype=dtype)).requires_grad_(),
        "D": draw(H),
        "rmsnorm_weight": draw(dim),
        "outproj_weight": draw(7, d_other + dim),
        "outproj_bias": draw(7),
    }


def split_by_hand(t, norm_before_gate, d_other=0, initial=None):
    """The layer from its parts, in the order of mamba_ssm's mamba_split_conv1d_scan_combined."""
    dim = H * P
    side, z, xBC, dt = t["zxbcdt"].split([2 * d_other, dim, dim + 2 * G * N, H], -1)
    xBC = F.conv1d(
        F.pad(xBC.transpose(1, 2), (3, 0)),
        t["conv1d_weight"][:, None],
        t["conv1d_bias"],
        groups=xBC.shape[-1],
    )
    x, B, C = F.silu(xBC).transpose(1, 2).split([dim, G * N, G * N], -1)
    y, final = ours.mamba_chunk_scan_combined(
        x.unflatten(-1, (H, P)),
        dt,
        t["A"],
        B.unflatten(-1, (G, N)),
        C.unflatten(-1, (G, N)),
        4,
        D=t["D"],
        z=z.unflatten(-1, (H, P)) if t.get("rmsnorm_weight") is None else None,
        dt_bias=t["dt_bias"],
        dt_softplus=True,
        dt_limit=LIMIT,
        initial_states=initial,
        return_final_states=True,
    )
    y = y.flatten(2)
    if t.get("rmsnorm_weight") is not None:
        u = y if norm_before_gate else y * F.silu(z)
        u = u.unflatten(-1, (G, -1))
        u = (u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).flatten(2) * t[
            "rmsnorm_weight"
        ]
        y = u * F.silu(z) if norm_before_gate else u
    gate, value = side.chunk(2, -1)
    y = torch.cat([F.silu(gate) * value, y], -1)
    if t.get("outproj_weight") is not None:
        y = F.linear(y, t["outproj_weight"], t["outproj_bias"])
    return y, final


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("d_other", [0, 3])
@pytest.mark.parametrize("parts", ["all", "no projection", "no norm"])
def test_split_layer_equals_its_parts(parts, d_other, norm_before_gate):
    t = layer(d_other)
    dropped = {"all": (), "no projection": ("outproj_",), "no norm": ("rmsnorm_", "outproj_")}[
        parts
    ]
    t = {k: v for k, v in t.items() if not (dropped and k.startswith(dropped))}
    entry = torch.randn(2, H, P, N, dtype=torch.float64).requires_grad_()
    options = {"chunk_size": 4, "headdim": P, "ngroups": G, "dt_limit": LIMIT}
    got = ours.mamba_split_conv1d_scan_combined(
        **t,
        **options,
        norm_before_gate=norm_before_gate,
        initial_states=entry,
        return_final_states=True,
    )
    compare(got, split_by_hand(t, norm_before_gate, d_other, entry), [*t.values(), entry])


def test_split_layer_keeps_sequences_apart_in_convolution_and_scan():
    t = layer()
    options = {"chunk_size": 4, "headdim": P, "ngroups": G, "return_final_states": True}
    y, final = ours.mamba_split_conv1d_scan_combined(**t, **options, seq_idx=IDS)
    for i, (row, start, end) in enumerate(RUNS):
        piece = t | {"zxbcdt": t["zxbcdt"][row : row + 1, start:end]}
        want, state = ours.mamba_split_conv1d_scan_combined(**piece, **options)
        torch.testing.assert_close(y[row : row + 1, start:end], want)
        if i in LAST:
            torch.testing.assert_close(final[row : row + 1], state)
    one = t | {"zxbcdt": t["zxbcdt"][:1]}
    cu = torch.tensor([0, 3, 4, 6, 7, 11])
    packed = ours.mamba_split_conv1d_scan_combined(**one, **options, cu_seqlens=cu)[0]
    real = IDS[0] >= 0
    torch.testing.assert_close(packed[:, real], y[:1, real])


def step_inputs(dtype=torch.float32, b=3, slots=3):
    t = {k: v.detach() for k, v in inputs(b, 1, dtype).items()}
    return {
        "state": torch.randn(slots, H, P, N, dtype=dtype),
        "x": t["x"][:, 0],
        "dt": t["dt"][:, 0, :, None].expand(-1, -1, P),
        "A": t["A"][:, None, None].expand(-1, P, N),
        "B": t["B"][:, 0],
        "C": t["C"][:, 0],
        "D": t["D"],
        "z": t["z"][:, 0],
        "dt_bias": t["dt_bias"][:, None].expand(-1, P),
        "dt_softplus": True,
    }


@pytest.mark.parametrize("dropped", [(), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("limit", [(0.0, INF), LIMIT])
def test_decode_step_continues_the_scan(limit, dropped):
    t = {k: v for k, v in step_inputs(torch.float64).items() if k not in dropped}
    before = t["state"].clone()
    y = ours.selective_state_update(**t, dt_limit=limit)
    bias = t.get("dt_bias")
    want, state = ours.mamba_chunk_scan_combined(
        *(
            t["x"][:, None],
            t["dt"][:, None, :, 0],
            t["A"][:, 0, 0],
            t["B"][:, None],
            t["C"][:, None],
            4,
        ),
        D=t.get("D"),
        z=t["z"][:, None] if "z" in t else None,
        dt_bias=None if bias is None else bias[:, 0],
        initial_states=before,
        dt_softplus=True,
        dt_limit=limit,
        return_final_states=True,
    )
    torch.testing.assert_close(y, want[:, 0])
    torch.testing.assert_close(t["state"], state)


def test_decode_step_uses_slots_and_leaves_padding_alone():
    t = step_inputs(slots=5)
    before = t["state"].clone()
    slots = torch.tensor([3, -1, 0], dtype=torch.int32)
    y = ours.selective_state_update(**t, state_batch_indices=slots)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert torch.equal(t["state"][[1, 2, 4]], before[[1, 2, 4]])
    dense = t | {"state": before[[3, 1, 0]]}
    want = ours.selective_state_update(**dense)
    torch.testing.assert_close(y[[0, 2]], want[[0, 2]])
    torch.testing.assert_close(t["state"][[3, 0]], dense["state"][[0, 2]])


@pytest.mark.parametrize("name", ["dt", "A", "dt_bias"])
def test_untied_arguments_of_mamba1_are_refused_by_name(name):
    t = step_inputs()
    t[name] = t[name].contiguous()
    with pytest.raises(NotImplementedError, match=rf"{name} is not tied"):
        ours.selective_state_update(**t)
    with pytest.raises(ValueError, match=rf"{name} has shape"):
        ours.selective_state_update(**(t | {name: t[name][..., :1]}))


def test_forms_that_do_not_exist_here_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="only the heads form"):
        ours.selective_state_update(torch.zeros(2, 8, 4), *[None] * 5)
    x, w = torch.randn(2, 6), torch.randn(6, 3)
    with pytest.raises(NotImplementedError, match="cache_seqlens"):
        ours.causal_conv1d_update(x, torch.zeros(2, 6, 3), w, cache_seqlens=torch.zeros(2))
    t = inputs()
    row = {k: v if v.dim() < 3 else v[:1] for k, v in t.items()}
    cu = torch.tensor([0, 3, 11])
    bad = {
        "return_varlen_states needs cu_seqlens": lambda: scan(t, return_varlen_states=True),
        "cu_seqlens needs batch 1": lambda: scan(t, cu_seqlens=cu),
        "seq_idx has shape": lambda: scan(t, seq_idx=IDS[:, :5]),
        "disagree": lambda: scan(row, cu_seqlens=cu, seq_idx=IDS[:1]),
        "max_sequences must be": lambda: scan(t, seq_idx=IDS, max_sequences=0),
        "headdim is needed": lambda: ours.mamba_split_conv1d_scan_combined(**layer(), chunk_size=4),
        "not those of": lambda: ours.mamba_split_conv1d_scan_combined(
            **layer(), chunk_size=4, headdim=P, ngroups=5
        ),
        "without outproj_weight": lambda: ours.mamba_split_conv1d_scan_combined(
            **(layer() | {"outproj_weight": None}), chunk_size=4, headdim=P, ngroups=G
        ),
        "B has dtype": lambda: scan(t | {"B": t["B"].float()}),
    }
    for message, call in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            call()


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
def test_convolution_takes_channels_before_tokens_and_hands_states_on(layout):
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    if layout == "channel-last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    w, b = torch.randn(6, 3).double(), torch.randn(6).double()
    want = F.silu(F.conv1d(F.pad(x, (2, 0)), w[:, None], b, groups=6))
    torch.testing.assert_close(ours.causal_conv1d_fn(x, w, b, activation="silu"), want)
    out = torch.zeros(2, 6, 2, dtype=torch.float64)
    first, state = ours.causal_conv1d_fn(
        x[..., :5], w, b, return_final_states=True, final_states_out=out, activation="silu"
    )
    assert state is out and torch.equal(out, x[..., 3:5])
    second = ours.causal_conv1d_fn(x[..., 5:7], w, b, initial_states=out, activation="swish")
    torch.testing.assert_close(torch.cat([first, second], 2), want[..., :7])
    # mamba_ssm's cache is channel-last and a column wider than needed.
    window = torch.zeros(2, 3, 6, dtype=torch.float64).transpose(1, 2)
    window[..., 1:] = x[..., 5:7]
    steps = [ours.causal_conv1d_update(x[..., 7], window, w, b, "silu")[..., None]]
    steps.append(ours.causal_conv1d_update(x[..., 8:], window, w, b, "silu"))
    torch.testing.assert_close(torch.cat(steps, 2), want[..., 7:])
    assert torch.equal(window, x[..., 6:])


def test_convolution_with_ids_restarts_and_zeroes_padding():
    x = torch.randn(2, 6, 11, dtype=torch.float64).requires_grad_()
    w = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    entry = torch.randn(2, 6, 2, dtype=torch.float64).requires_grad_()
    y, final = ours.causal_conv1d_fn(
        x, w, None, IDS, initial_states=entry, return_final_states=True, activation="silu"
    )
    want, ends = torch.zeros_like(x), []
    for i, (row, start, end) in enumerate(RUNS):
        initial = entry[row : row + 1] if i in FIRST else None
        piece, state = ours.causal_conv1d_fn(
            x[row : row + 1, :, start:end], w, None, None, initial, True, activation="silu"
        )
        index = torch.arange(start, end)
        want = want.index_put(
            (torch.tensor([row])[:, None], torch.arange(6)[:, None], index), piece[0]
        )
        ends.append(state)
    compare((y, final), (want, torch.cat([ends[i] for i in LAST])), [x, w, entry])


def test_decode_windows_of_packed_sequences():
    x = torch.randn(9, 4)
    got = ours.causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9]), 3)
    want = torch.zeros(3, 4, 3)
    want[0, :, 1:] = x[:2].T
    want[2] = x[6:].T
    assert torch.equal(got, want)
    assert torch.equal(
        ours.causal_conv1d_varlen_states(x[:0], torch.tensor([0, 0]), 2), torch.zeros(1, 4, 2)
    )


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_gated_norm_equals_its_formula(gate, bias, group_size, norm_before_gate):
    x, z = torch.randn(2, 3, 12).double(), torch.randn(2, 3, 12).double()
    w, b = torch.randn(12).double(), torch.randn(12).double() if bias else None
    u = x * F.silu(z) if gate and not norm_before_gate else x
    u = u.unflatten(-1, (-1, group_size or 12))
    want = (u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).flatten(-2) * w
    want = want if b is None else want + b
    want = want * F.silu(z) if gate and norm_before_gate else want
    got = ours.rmsnorm_fn(
        x, w, b, z if gate else None, group_size=group_size, norm_before_gate=norm_before_gate
    )
    torch.testing.assert_close(got, want)


def test_norm_module_has_upstreams_defaults_and_state_dict():
    norm = ours.RMSNorm(8)
    assert list(norm.state_dict()) == ["weight"] and norm.bias is None
    assert (norm.eps, norm.group_size, norm.norm_before_gate) == (1e-5, None, True)
    x, z = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(norm(x, z), F.rms_norm(x, (8,), eps=1e-5) * F.silu(z))
    norm.load_state_dict({"weight": torch.full((8,), 2.0)})
    torch.testing.assert_close(norm(x), 2 * F.rms_norm(x, (8,), eps=1e-5))


UPSTREAM = {
    "mamba_ssm.ops.triton.ssd_combined": (
        "mamba_chunk_scan_combined",
        "mamba_split_conv1d_scan_combined",
    ),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.triton.layernorm_gated": ("rmsnorm_fn", "RMSNorm"),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states",),
}


@pytest.mark.parametrize("module", UPSTREAM)
def test_signatures_are_upstreams(module, upstream):
    theirs = upstream(module)
    for name in UPSTREAM[module]:
        want = inspect.signature(getattr(theirs, name)).parameters.values()
        got = inspect.signature(getattr(ours, name)).parameters.values()
        positional = [(p.name, p.default) for p in got if p.kind is not p.KEYWORD_ONLY]
        extra = [("state_dtype", None)] if ("state_dtype", None) in positional else []
        assert positional in (
            [(p.name, p.default) for p in want],
            [(p.name, p.default) for p in want] + extra,
        )


@pytest.mark.parametrize("limit", [(0.0, INF), LIMIT])
def test_scan_agrees_with_mamba_ssm(limit, monkeypatch, upstream):
    theirs = upstream("mamba_ssm.ops.triton.ssd_combined")
    selective = upstream("mamba_ssm.ops.selective_scan_interface")
    monkeypatch.setattr(selective, "selective_scan_fn", selective.selective_scan_ref)
    t = {k: v.detach().requires_grad_() for k, v in inputs(dtype=torch.float32).items()}
    want = theirs.ssd_selective_scan(**t, dt_softplus=True, dt_limit=limit)
    compare((scan(t, dt_limit=limit),), (want,), list(t.values()), atol=2e-4)


def test_layer_agrees_with_mamba_ssm(monkeypatch, upstream):
    theirs = upstream("mamba_ssm.ops.triton.ssd_combined")
    selective = upstream("mamba_ssm.ops.selective_scan_interface")
    norms = upstream("mamba_ssm.ops.triton.layernorm_gated")
    conv = upstream("causal_conv1d.causal_conv1d_interface")
    monkeypatch.setattr(selective, "selective_scan_fn", selective.selective_scan_ref)
    monkeypatch.setattr(theirs, "causal_conv1d_fn", conv.causal_conv1d_ref)
    monkeypatch.setattr(theirs, "rmsnorm_fn", norms.rms_norm_ref)
    t = layer(dtype=torch.float32)
    # Its reference normalizes over all channels whatever the groups: one group agrees.
    t["zxbcdt"] = torch.randn(2, 11, 2 * H * P + 2 * N + H).requires_grad_()
    t["conv1d_weight"], t["conv1d_bias"] = (
        t[k][: H * P + 2 * N].detach().requires_grad_() for k in ("conv1d_weight", "conv1d_bias")
    )
    options = {
        "chunk_size": 4,
        "headdim": P,
        "ngroups": 1,
        "dt_limit": LIMIT,
        "norm_before_gate": False,
    }
    want = theirs.mamba_split_conv1d_scan_ref(**t, **options)
    got = ours.mamba_split_conv1d_scan_combined(**t, **options)
    compare((got,), (want,), list(t.values()), atol=5e-4)


def test_decode_step_agrees_with_mamba_ssm(upstream):
    theirs = upstream("mamba_ssm.ops.triton.selective_state_update")
    t, other = step_inputs(), None
    other = t | {"state": t["state"].clone()}
    want = theirs.selective_state_update_ref(**other)
    torch.testing.assert_close(ours.selective_state_update(**t), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t["state"], other["state"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_convolution_agrees_with_causal_conv1d(ids, initial, upstream):
    theirs = upstream("causal_conv1d.causal_conv1d_interface")
    x, w, b = torch.randn(2, 6, 11), torch.randn(6, 3), torch.randn(6)
    # A run here, an equal id within a window there: the same where an id does not come back so soon.
    seq_idx = torch.where(IDS == 7, 9, IDS).index_fill(1, torch.tensor([4, 5]), 8) if ids else None
    entry = torch.randn(2, 6, 2) if initial and not ids else None
    want = theirs.causal_conv1d_ref(x, w, b, entry, seq_idx=seq_idx, activation="silu")
    got = ours.causal_conv1d_fn(x, w, b, seq_idx, entry, activation="silu")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_convolution_step_agrees_with_causal_conv1d(upstream):
    theirs = upstream("causal_conv1d.causal_conv1d_interface")
    varlen = upstream("causal_conv1d.causal_conv1d_varlen")
    x, w, b, state = torch.randn(2, 6, 3), torch.randn(6, 3), torch.randn(6), torch.randn(2, 6, 4)
    other = state.clone()
    want = theirs.causal_conv1d_update_ref(x, other, w, b, activation="silu")
    torch.testing.assert_close(
        ours.causal_conv1d_update(x, state, w, b, "silu"), want, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(state, other)
    packed, cu = torch.randn(9, 4), torch.tensor([0, 2, 9])
    want = varlen.causal_conv1d_varlen_states_ref(packed, cu, 3)
    assert torch.equal(ours.causal_conv1d_varlen_states(packed, cu, 3), want)
