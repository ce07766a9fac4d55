"""Token score kernels against dense fp64 weights: both layers, reductions, ragged lists, tiles that are not full.

Inputs lie in guarded memory (NaN around them), outputs and workspaces start as NaN. Tiles are small, so that a sequence
has several of keys and of queries, and its keys several splits.
"""

from dataclasses import replace

import pytest
import torch
from memory import guarded, sliced
from numerics import assert_close_to_oracle
from options import case_id, pairwise
from score_cases import (
    LENGTHS,
    attention_oracle,
    bounds,
    ragged_lists,
    ssd_oracle,
)

import tigon
from tigon.kernels import launch, launch_tokens
from tigon.kernels import token_scores as kernels
from tigon.kernels.launch import plan
from tigon.reference import token_scores as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a launcher allocates without filling starts as NaN."""
    empty = torch.empty

    def filled(*args, **options):
        t = empty(*args, **options)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def small_tiles(monkeypatch):
    def small(op, *args, **sizes):
        configs = plan(op, *args, **sizes)
        return {
            name: replace(config, tokens=16)
            if name == "elapsed"
            else replace(config, queries=16, keys=16)
            for name, config in configs.items()
        }

    monkeypatch.setattr(kernels, "plan", small)
    monkeypatch.setattr(kernels, "SPLIT", 32)


def moved(lists, device):
    return [guarded(t).to(device) for t in lists]


def packed_bounds(case, *lengths):
    """cu_queries and cu_keys stay where there are several sequences; without, all bounds are None."""
    return None if case["kind"] == "one" else [bounds(n) for n in lengths]


ATTENTION = pairwise(
    kind=["one", "several"],
    heads=[(4, 4), (6, 2), (3, 1)],
    dim=[16, 20, 5],
    queries=[1, 5, 20],
    causal=[True, False],
    head_reduce=["mean", "max"],
    query_reduce=["mean", "max"],
    lse=[False, True],
    earlier=[0, 9],
    dtype=[F32, BF16, F16],
    invariant=[False, True],
)


@pytest.mark.parametrize("case", ATTENTION, ids=case_id)
def test_attention_scores_match_the_oracle(case, device, small_tiles):
    lengths_q = LENGTHS[case["kind"]]
    lengths_k = [n + case["earlier"] for n in lengths_q]
    (hq, hkv), dim = case["heads"], case["dim"]
    q = sliced(torch.randn(sum(lengths_q), hq, dim).to(case["dtype"]), 2).to(device)
    k = guarded(torch.randn(sum(lengths_k), hkv, dim).to(case["dtype"])).to(device)
    rows, cu_rows, *_ = ragged_lists(lengths_q, case["queries"])
    _, _, keys, cu_keys = ragged_lists(lengths_k, 1)
    lists = (rows, cu_rows, keys, cu_keys)
    options = (case["causal"], case["head_reduce"], case["query_reduce"])
    lse = None
    if case["lse"]:
        lse = row_lse(q.cpu(), k.cpu(), rows, lengths_q, lengths_k, case["causal"]).float()
        lse = guarded(lse).to(device)
    cu = [None] * 4
    if case["kind"] != "one":
        cu = moved((cu_rows, cu_keys, bounds(lengths_q), bounds(lengths_k)), device)
    args = (q, k, lse, *moved((rows, keys.long()), device), *cu, 0.3, *options)
    got = kernels.attention_token_scores(*args, case["invariant"]).cpu()
    oracle = attention_oracle(q.cpu(), k.cpu(), lists, lengths_q, lengths_k, 0.3, *options)
    baseline = reference.attention_token_scores(
        *(t.cpu() if torch.is_tensor(t) else t for t in args), case["invariant"]
    )
    # Exponents are products of a few units times log2(e): one rounding of them is not in the reference's sums.
    assert_close_to_oracle("scores", got, oracle, baseline + 1e-6 * oracle.abs().max())


def row_lse(q, k, rows, lengths_q, lengths_k, causal, scale=0.3):
    """(hq,tq) fp64, NaN in the rows that do not ask."""
    hq, rep = q.shape[1], q.shape[1] // k.shape[1]
    lse = torch.full((hq, len(q)), torch.nan, dtype=torch.float64)
    starts_q, starts_k = bounds(lengths_q), bounds(lengths_k)
    for i in range(len(lengths_q)):
        a, b, c, d = (*starts_q[i : i + 2], *starts_k[i : i + 2])
        z = torch.einsum("qhd,khd->hqk", q[a:b].double(), k[c:d].double().repeat_interleave(rep, 1))
        if causal:
            seen = torch.ones(z.shape[1:]).tril(d - c - b + a).bool()
            z = z.masked_fill(~seen, -torch.inf)
        asked = rows[(rows >= a) & (rows < b)].long()
        lse[:, asked] = (scale * z).logsumexp(-1)[:, asked - a]
    return lse


SSD = pairwise(
    kind=["one", "several"],
    heads=[(4, 4), (6, 2), (20, 1)],
    n=[16, 20, 5],
    queries=[1, 6, 20],
    decay=[False, True],
    head_reduce=["mean", "max"],
    query_reduce=["mean", "max"],
    dtype=[F32, BF16, F16],
    dt_layout=["packed", "by head"],
    beside=[F32, None],
)


@pytest.mark.parametrize("case", SSD, ids=case_id)
def test_ssd_scores_match_the_oracle(case, device, small_tiles):
    lengths, (h, g), dtype = LENGTHS[case["kind"]], case["heads"], case["dtype"]
    t = sum(lengths)
    C = sliced(torch.randn(t, g, case["n"]).to(dtype), 2).to(device)
    B = guarded(torch.randn(t, g, case["n"]).to(dtype)).to(device)
    dt = guarded(torch.rand(t, h).mul(0.2).to(case["beside"] or dtype)).to(device)
    dt = dt if case["dt_layout"] == "packed" else dt.T.contiguous().T
    A = guarded((-torch.rand(h) - 0.1).to(case["beside"] or dtype)).to(device)
    lists = ragged_lists(lengths, case["queries"])
    rows, cu_rows, keys, cu_keys = lists
    cu = [None] * 3
    if case["kind"] != "one":
        cu = moved((cu_rows, cu_keys, bounds(lengths, torch.int64)), device)
    options = (case["decay"], case["head_reduce"], case["query_reduce"])
    args = (C, B, dt, A if case["decay"] else None, *moved((rows, keys), device), *cu, *options)
    got = kernels.ssd_token_scores(*args, False).cpu()
    oracle = ssd_oracle(*(v.cpu() for v in (C, B, dt, A)), lists, lengths, *options)
    baseline = reference.ssd_token_scores(*(v.cpu() if torch.is_tensor(v) else v for v in args))
    assert_close_to_oracle("scores", got, oracle, baseline + 1e-6 * oracle.abs().max())


def test_the_shipped_tables_with_more_keys_than_a_tile(device):
    q, k = (torch.randn(150, n, 32, device=device).to(F16) for n in (4, 2))
    rows, keys = torch.arange(144, 150, device=device), torch.arange(150, device=device)
    args = (q, k, None, rows, keys, None, None, None, None, 0.2, True, "mean", "mean")
    got = kernels.attention_token_scores(*args, False)
    torch.testing.assert_close(got, reference.attention_token_scores(*args), rtol=1e-4, atol=1e-7)
    dt = torch.rand(150, 8, device=device)
    args = (q[:, :2].contiguous(), k, dt, None, rows, keys, None, None, None, False, "max", "max")
    got = kernels.ssd_token_scores(*args, False)
    torch.testing.assert_close(got, reference.ssd_token_scores(*args), rtol=1e-4, atol=1e-7)


def batch(which, draw, device):
    """Scores of the sequences `which`, by sequence, of both kernels in batch-invariant mode."""
    x = {name: torch.cat([draw[i][name] for i in which]).to(device) for name in draw[0]}
    sizes = [len(draw[i]["q"]) for i in which]
    every = bounds(sizes).to(device)
    rows, cu_rows, *_ = (t.to(device) for t in ragged_lists(sizes, 3))
    keys = torch.arange(sum(sizes), device=device)
    A = -torch.linspace(0.1, 1, 4, device=device)
    a = kernels.attention_token_scores(
        x["q"], x["k"], None, rows, keys, cu_rows, every, every, every, 0.4, True, "mean", "mean", True
    )  # fmt: skip
    b = kernels.ssd_token_scores(
        x["C"], x["k"], x["dt"], A, rows, keys, cu_rows, every, every, True, "mean", "mean", True
    )
    return a.split(sizes), b.split(sizes)


def test_a_sequences_scores_have_the_same_bits_in_any_batch(device, small_tiles):
    draw = [
        dict(q=torch.randn(n, 4, 8), k=torch.randn(n, 2, 8), C=torch.randn(n, 2, 8), dt=torch.rand(n, 4))
        for n in (34, 9, 1)
    ]  # fmt: skip
    alone = [batch([i], draw, device) for i in range(3)]
    for which in ([2, 1, 0],):
        for kind, parts in enumerate(batch(which, draw, device)):
            for place, i in enumerate(which):
                assert torch.equal(parts[place], alone[i][kind][0]), (which, kind)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_a_nan_stays_in_its_sequence(device, small_tiles, reduce):
    q = torch.randn(20, 2, 8, device=device)
    cu = torch.tensor([0, 10, 20], device=device)
    rows, ends = torch.tensor([9, 19], device=device), torch.tensor([0, 1, 2], device=device)
    keys = torch.arange(20, device=device)
    for which in (0, 1):
        given = [q.clone(), torch.randn(20, 2, 8, device=device)]
        given[which][9] = torch.nan
        got = kernels.attention_token_scores(
            *given, None, rows, keys, ends, cu, cu, cu, 0.4, True, reduce, reduce, False
        )
        assert got[:10].isnan().all() and got[10:].isfinite().all()
    given[0][9] = torch.nan
    got = kernels.ssd_token_scores(
        *given, torch.rand(20, 4, device=device), None, rows, keys, ends, cu, cu, False, reduce, reduce, False
    )  # fmt: skip
    assert got[:10].isnan().all() and got[10:].isfinite().all()


def test_lists_with_padding_and_bad_indices_reach_no_foreign_memory(device, small_tiles):
    """Indices are clamped, bounds too; what lies past the last bound scores 0."""
    q, k = (guarded(torch.randn(8, 1, 8)).to(device) for _ in range(2))
    rows = torch.tensor([7, 99, -5], device=device)
    keys = torch.tensor([-3, 2, 10**9, 4], device=device)
    cu, ends = torch.tensor([0, 3], device=device), torch.tensor([0, 99], device=device)
    args = (rows, keys, cu, cu, ends, ends, 0.4, True, "mean", "mean", False)
    got = kernels.attention_token_scores(q, k, None, *args)
    assert got.isfinite().all() and got[3] == 0
    dt = guarded(torch.rand(8, 2)).to(device)
    got = kernels.ssd_token_scores(q, k, dt, None, *args[:5], False, "mean", "mean", False)
    assert got.isfinite().all() and got[3] == 0


def test_the_sum_of_dt_keeps_its_digits(device, monkeypatch):
    """After 12,000 steps an fp32 sum would be off by more than a hundredth of what lies between neighbours."""
    t = 12_000
    dt = torch.rand(t, 1, device=device).mul(0.1)
    C = torch.ones(t, 1, 4, device=device)
    rows, keys = torch.tensor([t - 1], device=device), torch.arange(t - 40, t, device=device)
    A = torch.tensor([-16.0], device=device)
    args = (C, C, dt, A, rows, keys, None, None, None, True, "mean", "mean")
    got = kernels.ssd_token_scores(*args, False)
    wide = [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in args]
    want = reference.ssd_token_scores(*wide).float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_addresses_are_64_bit(device, small_tiles):
    """Rows lie 2^30 elements apart; the buffers are allocated but hardly touched."""
    far = 2**30
    buffer = torch.zeros(1, dtype=F16, device=device).new_empty(0)
    storage = torch.UntypedStorage(2 * (2 * far + 64), device=device)
    q = buffer.set_(storage, 0, (3, 2, 8), (far, 8, 1))
    q.copy_(torch.randn(3, 2, 8))
    rows = keys = torch.arange(3, device=device)
    rest = (None, rows, keys, None, None, None, None, 0.4, True, "mean", "mean", False)
    near = q.contiguous()
    got = kernels.attention_token_scores(q, q, *rest)
    assert torch.equal(got, kernels.attention_token_scores(near, near, *rest))
    dt = torch.rand(3, 4, device=device)
    rest = (dt, None, rows, keys, None, None, None, False, "mean", "mean", False)
    assert torch.equal(
        kernels.ssd_token_scores(q, q, *rest), kernels.ssd_token_scores(near, near, *rest)
    )


def test_public_functions_on_the_kernel_backend(device):
    q, k = (torch.randn(40, 2, 8, device=device) for _ in range(2))
    lists = dict(
        query_index=torch.tensor([19, 38, 39], device=device), key_index=torch.arange(40, device=device),
        cu_queries=torch.tensor([0, 1, 3], device=device), cu_keys=torch.tensor([0, 20, 40], device=device),
    )  # fmt: skip
    dt, A = torch.rand(40, 4, device=device), -torch.rand(4, device=device)
    results = {}
    for backend in ("kernel", "reference"):
        with tigon.backend(backend):
            cu = lists["cu_keys"]
            results[backend] = (
                tigon.attention_token_scores(q, k, cu_seqlens_q=cu, **lists),
                tigon.ssd_token_scores(q, k, dt, A, cu_seqlens=cu, decay=True, **lists),
            )
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_the_launch_table_covers_every_size(arch):
    for nq, width, itemsize in ((1, 4, 4), (64, 128, 2), (5000, 256, 2), (20, 256, 4)):
        for invariant in (False, True):
            tiles = launch_tokens.score_tiles(arch, nq, width, itemsize, invariant)
            assert tiles.queries >= 16 and launch_tokens.SPLIT % tiles.keys == 0
            assert (
                tiles == launch_tokens.score_tiles(arch, nq + 1000, width, itemsize, True)
                or not invariant
            )
    sizes = dict(nq=64, hq=32, hkv=8, dim=128, itemsize=2)
    assert set(launch.plan("attention_token_scores", arch, **sizes)) == {
        "row_sums",
        "attention_scores",
    }
