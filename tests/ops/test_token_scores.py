"""Token scores on the reference: dense fp64 weights, reductions, ragged batches, odd numbers, errors."""

import itertools

import pytest
import torch
from options import case_id, pairwise
from score_cases import LENGTHS, attention_oracle, bounds, ragged_lists, ssd_oracle

import tigon

F64 = torch.float64

CASES = pairwise(
    kind=["one", "several", "long"],
    heads=[(4, 4), (6, 2), (3, 1)],
    dim=[16, 7],
    queries=[1, 5, 40],
    causal=[True, False],
    head_reduce=["mean", "max"],
    query_reduce=["mean", "max"],
    lse=[False, True],
    earlier=[0, 9],  # keys in front of the first query, as a cache has them
    dtype=[torch.float32, F64, torch.bfloat16],
)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_attention_scores_are_those_of_the_dense_softmax(case):
    lengths_q = LENGTHS[case["kind"]]
    lengths_k = [n + case["earlier"] for n in lengths_q]
    (hq, hkv), dim = case["heads"], case["dim"]
    q = torch.randn(sum(lengths_q), hq, dim).to(case["dtype"])
    k = torch.randn(sum(lengths_k), hkv, dim).to(case["dtype"])
    rows, cu_rows, *_ = ragged_lists(lengths_q, case["queries"])
    _, _, keys, cu_keys = ragged_lists(lengths_k, 1)
    lists = (rows, cu_rows, keys, cu_keys)
    options = {name: case[name] for name in ("causal", "head_reduce", "query_reduce")}
    lse = None
    if case["lse"]:
        lse = torch.full(
            (hq, len(q)), torch.nan, dtype=F64
        )  # rows that do not ask are not looked at
        for i, (a, b) in enumerate(zip(bounds(lengths_q), bounds(lengths_q)[1:])):
            keys_of = k[bounds(lengths_k)[i] : bounds(lengths_k)[i + 1]].double()
            z = torch.einsum(
                "qhd,khd->hqk", q[a:b].double(), keys_of.repeat_interleave(hq // hkv, 1)
            )
            if case["causal"]:
                z = z.masked_fill(
                    ~torch.ones(z.shape[1:]).tril(len(keys_of) - b + a).bool(), -torch.inf
                )
            asked = rows[(rows >= a) & (rows < b)].long()
            lse[:, asked] = (0.3 * z).logsumexp(-1)[:, asked - a]
        lse = lse if case["dtype"] == F64 else lse.float()
    packed = dict(cu_queries=cu_rows, cu_keys=cu_keys)
    packed |= dict(cu_seqlens_q=bounds(lengths_q), cu_seqlens_k=bounds(lengths_k, torch.int64))
    if case["kind"] == "one":
        packed = {}
    got = tigon.attention_token_scores(
        q, k, lse, query_index=rows, key_index=keys, scale=0.3, **packed, **options
    )
    want = attention_oracle(q, k, lists, lengths_q, lengths_k, 0.3, *options.values())
    assert got.dtype == (F64 if case["dtype"] == F64 else torch.float32)
    tolerance = 1e-12 if case["dtype"] == F64 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 1e-2)


SSD = pairwise(
    kind=["one", "several", "long"],
    heads=[(4, 4), (6, 2), (8, 1)],
    n=[16, 5],
    queries=[1, 6, 40],
    decay=[False, True],
    head_reduce=["mean", "max"],
    query_reduce=["mean", "max"],
    dtype=[torch.float32, F64, torch.bfloat16],
)


@pytest.mark.parametrize("case", SSD, ids=case_id)
def test_ssd_scores_are_those_of_the_whole_hidden_attention(case):
    lengths, (h, g) = LENGTHS[case["kind"]], case["heads"]
    t = sum(lengths)
    C, B = (torch.randn(t, g, case["n"]).to(case["dtype"]) for _ in range(2))
    dt = torch.rand(t, h).mul(0.2).to(case["dtype"])
    A = -torch.rand(h).to(case["dtype"]) - 0.1
    lists = ragged_lists(lengths, case["queries"])
    rows, cu_rows, keys, cu_keys = lists
    packed = dict(cu_queries=cu_rows, cu_keys=cu_keys, cu_seqlens=bounds(lengths))
    if case["kind"] == "one":
        packed = {}
    options = {name: case[name] for name in ("decay", "head_reduce", "query_reduce")}
    got = tigon.ssd_token_scores(C, B, dt, A, query_index=rows, key_index=keys, **packed, **options)
    want = ssd_oracle(C, B, dt, A, lists, lengths, *options.values())
    tolerance = 1e-11 if case["dtype"] == F64 else 2e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 1e-2)


def both(lengths, queries=4, h=4, g=2, decay=True):
    """Functions of a list of sequences to their scores, of both ops, and the inputs by sequence."""
    draw = [
        dict(q=torch.randn(n, h, 8), k=torch.randn(n, g, 8), C=torch.randn(n, g, 6), B=torch.randn(n, g, 6),
             dt=torch.rand(n, h)) for n in lengths
    ]  # fmt: skip
    A = -torch.rand(h)

    def scores(which):
        x = {name: torch.cat([draw[i][name] for i in which]) for name in draw[0]}
        sizes = [lengths[i] for i in which]
        every = bounds(sizes)
        rows = torch.cat(
            [torch.arange(max(b - queries, a), b) for a, b in itertools.pairwise(every)]
        ).int()
        lists = dict(query_index=rows, key_index=torch.arange(sum(sizes)), cu_keys=every)
        lists["cu_queries"] = bounds([min(queries, n) for n in sizes])
        return (
            tigon.attention_token_scores(x["q"], x["k"], cu_seqlens_q=every, **lists).split(sizes),
            tigon.ssd_token_scores(
                x["C"], x["B"], x["dt"], A, cu_seqlens=every, decay=decay, **lists
            ).split(sizes),
        )

    return scores


def test_a_sequences_scores_have_the_same_bits_in_any_batch_where_that_is_asked():
    scores = both([70, 600, 1, 33])
    with tigon.batch_invariant():
        alone = [scores([i]) for i in range(4)]
        for which in ([0, 1, 2, 3], [3, 1, 0], [2, 2, 1]):
            for op, parts in enumerate(scores(which)):
                for place, i in enumerate(which):
                    assert torch.equal(parts[place], alone[i][op][0]), (which, op)


def test_a_nan_stays_in_its_sequence():
    q, k = torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    cu, rows = torch.tensor([0, 10, 20]), torch.tensor([9, 19])
    lists = dict(query_index=rows, key_index=torch.arange(20), cu_queries=torch.tensor([0, 1, 2]))
    for t in (q, k):
        before, t[9] = t[9].clone(), torch.nan
        s = tigon.attention_token_scores(q, k, **lists, cu_keys=cu, cu_seqlens_q=cu)
        assert s[:10].isnan().all() and s[10:].isfinite().all()
        t[9] = before
    q[9] = torch.nan
    for reduce in ("mean", "max"):
        s = tigon.ssd_token_scores(
            q, k, torch.rand(20, 4), **lists, cu_keys=cu, cu_seqlens=cu, head_reduce=reduce
        )
        assert s[:10].isnan().all() and s[10:].isfinite().all()


def test_padding_of_the_lists_scores_nothing():
    """As lists of a capacity, whose real length only the device knows."""
    scores = tigon.ssd_token_scores(
        torch.randn(8, 1, 4), torch.randn(8, 1, 4), torch.rand(8, 2), query_index=torch.tensor([7, 0, 0]),
        key_index=torch.tensor([1, 2, 0, 0]), cu_queries=torch.tensor([0, 1]), cu_keys=torch.tensor([0, 2]),
        cu_seqlens=torch.tensor([0, 8]),
    )  # fmt: skip
    assert (scores[:2] > 0).all() and not scores[2:].any()


@pytest.mark.parametrize("nq, nk", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_ask_or_nothing_to_score(nq, nk):
    q, k = torch.randn(6, 2, 4), torch.randn(6, 2, 4)
    lists = dict(query_index=torch.arange(nq), key_index=torch.arange(nk))
    assert tigon.attention_token_scores(q, k, **lists).tolist() == [0.0] * nk
    assert tigon.ssd_token_scores(q, k, torch.rand(6, 2), **lists).tolist() == [0.0] * nk
    none = torch.empty(0, 2, 4)
    lists = dict(query_index=torch.arange(0), key_index=torch.arange(0))
    assert tigon.attention_token_scores(none, none, **lists).shape == (0,)


def call_attention(q, k, **more):
    cu, ends = torch.tensor([0, 5, 9]), torch.tensor([0, 1, 3])
    return tigon.attention_token_scores(
        q, k, query_index=torch.tensor([4, 7, 8]), key_index=torch.arange(9), cu_queries=ends, cu_keys=cu,
        cu_seqlens_q=cu, **more,
    )  # fmt: skip


def call_ssd(C, B, **more):
    cu, ends = torch.tensor([0, 5, 9]), torch.tensor([0, 1, 3])
    return tigon.ssd_token_scores(
        C, B, torch.rand(9, 4), -torch.rand(4), query_index=torch.tensor([4, 7, 8]), key_index=torch.arange(9),
        cu_queries=ends, cu_keys=cu, cu_seqlens=cu, decay=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("call", [call_attention, call_ssd])
def test_nothing_waits_for_the_device(call, no_host_sync):
    call(torch.randn(9, 2, 4), torch.randn(9, 2, 4))


@pytest.mark.parametrize("call", [call_attention, call_ssd])
def test_meta_and_compiled_calls(call):
    q, k = torch.randn(9, 2, 4), torch.randn(9, 2, 4)
    torch.manual_seed(0)
    want = call(q, k)
    torch.manual_seed(0)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(q, k), want)


def test_follows_the_law_of_registered_ops():
    q, rows, keys = torch.randn(9, 2, 4), torch.tensor([4, 8]), torch.arange(9)
    rest = (rows, keys, None, None, None, None, 0.5, True, "mean", "max")
    torch.library.opcheck(torch.ops.tigon.attention_token_scores, (q, q.clone(), None, *rest))
    rest = (rows, keys, None, None, None, True, "max", "mean")
    args = (q, q.clone(), torch.rand(9, 4), -torch.rand(4), *rest)
    torch.library.opcheck(torch.ops.tigon.ssd_token_scores, args)


def test_scores_have_no_gradient():
    q = torch.randn(9, 2, 4, requires_grad=True)
    assert not call_attention(q, q).requires_grad and not call_ssd(q, q).requires_grad


WRONG = [
    (dict(k=torch.zeros(9, 3, 4)), "hkv=3 must divide hq=2"),
    (dict(query_index=torch.tensor([9])), "query_index must lie in [0, 8], got values from 9 to 9"),
    (dict(key_index=torch.tensor([-1])), "key_index must lie in [0, 8], got values from -1 to -1"),
    (dict(lse=torch.zeros(2, 8)), "lse has shape (2, 8), expected (hq, tq)"),
    (dict(head_reduce="sum"), "head_reduce='sum' is not one of 'mean', 'max'"),
    (dict(query_reduce="sum"), "query_reduce='sum' is not one of 'mean', 'max'"),
    (dict(cu_queries=torch.tensor([0, 1])), "cu_queries and cu_keys come together"),
    (dict(cu_seqlens_k=torch.tensor([0, 9])), "cu_seqlens_k comes with cu_seqlens_q"),
    (dict(cu_seqlens_q=torch.tensor([0, 12])), "cu_seqlens_q must start at 0, never fall and end at tq=9"),
]  # fmt: skip


@pytest.mark.parametrize("changed, message", WRONG, ids=lambda v: str(v)[:30])
def test_wrong_arguments_are_named(changed, message):
    given = dict(k=torch.randn(9, 2, 4), query_index=torch.tensor([8]), key_index=torch.arange(9))
    with pytest.raises(ValueError) as caught:
        tigon.attention_token_scores(torch.randn(9, 2, 4), **(given | changed))
    assert message in str(caught.value)


def test_wrong_arguments_of_ssd_scores_are_named():
    lists = dict(query_index=torch.tensor([8]), key_index=torch.arange(9))
    C = torch.randn(9, 2, 4)
    with pytest.raises(ValueError, match="decay=True needs A"):
        tigon.ssd_token_scores(C, C, torch.rand(9, 4), decay=True, **lists)
    with pytest.raises(ValueError, match="g=2 must divide h=3"):
        tigon.ssd_token_scores(C, C, torch.rand(9, 3), **lists)
    with pytest.raises(ValueError, match="n=300 is not supported, 1 to 256 are"):
        wide = torch.randn(9, 2, 300)
        tigon.ssd_token_scores(wide, wide, torch.rand(9, 4), **lists)
