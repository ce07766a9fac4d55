"""Selection and compaction on the reference: the rule sequence by sequence, order, gradients, odd numbers, errors."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tigon
from tigon.reference.select_tokens import kept_of_sequence

NAN, INF = float("nan"), float("inf")
SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 1e-42, INF, -INF, NAN])
SEQUENCE = st.tuples(
    st.lists(st.tuples(SCORES, st.booleans()), max_size=12), st.integers(-1, 14)
)  # ((score, protected), keep)


@given(st.lists(SEQUENCE, min_size=1, max_size=4), st.sampled_from([1, 2, 5]), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_sequence_keeps_what_the_rule_says(sequences, multiple, padding):
    scores = [[s for s, _ in tokens] for tokens, _ in sequences]
    protected = [[p for _, p in tokens] for tokens, _ in sequences]
    keep = [k for _, k in sequences]
    bounds = torch.tensor([0, *torch.tensor([len(s) for s in scores]).cumsum(0).tolist()])
    flat = torch.tensor([*chain(*scores)] + [9.0] * padding)
    guard = torch.tensor([*chain(*protected)] + [True] * padding, dtype=torch.bool)
    selection = tigon.select_tokens(
        flat, torch.tensor(keep), cu_seqlens=bounds, protected=guard, multiple=multiple, capacity=60
    )
    want, ends = [], [0]
    for i, start in enumerate(bounds[:-1].tolist()):
        rows = kept_of_sequence(scores[i], protected[i], keep[i], multiple)
        want += [start + r for r in rows]
        ends.append(len(want))
    assert selection.index.tolist() == want + [-1] * (60 - len(want))
    assert selection.cu_kept.tolist() == ends
    places = {row: place for place, row in enumerate(want)}
    assert selection.inverse.tolist() == [places.get(i, -1) for i in range(len(flat))]
    assert {t.dtype for t in vars(selection).values()} == {torch.int32}


def whole(t, keep, capacity=None, **options):
    bounds = torch.tensor([0, t], dtype=torch.int32)
    scores = options.pop("scores", torch.randn(t))
    return tigon.select_tokens(
        scores, torch.tensor([keep]), cu_seqlens=bounds, capacity=capacity or t, **options
    )


def test_ties_go_to_the_lower_index_and_nan_comes_last():
    scores = torch.tensor([NAN, 1.0, 0.0, -0.0, 1.0, -INF])
    assert whole(6, 3, scores=scores).index.tolist() == [1, 2, 4, -1, -1, -1]
    assert whole(6, 5, scores=scores).index.tolist()[:5] == [
        0,
        1,
        2,
        3,
        4,
    ]  # NaN is -inf, lower index
    assert whole(6, 4, scores=-scores).index.tolist()[:4] == [1, 2, 3, 5]


def test_protected_tokens_stay_and_count():
    protected = torch.tensor([True, False, False, True, False])
    scores = torch.tensor([-9.0, 1, 2, NAN, 3])
    assert whole(5, 3, scores=scores, protected=protected).index.tolist() == [0, 3, 4, -1, -1]
    assert whole(5, 1, scores=scores, protected=protected).index.tolist()[:2] == [0, 3]
    assert whole(5, 1, scores=scores, protected=protected, multiple=3).cu_kept.tolist() == [0, 3]


def test_a_sequences_choice_does_not_depend_on_its_batch_mates():
    lengths, keep = [30, 1, 500, 17], [11, 1, 123, 5]
    parts = [torch.randn(n).mul(3).round() for n in lengths]
    alone = [whole(n, k, scores=s).index for n, k, s in zip(lengths, keep, parts)]
    for which in ([0, 1, 2, 3], [3, 2], [2, 1, 2]):
        bounds = torch.tensor([0, *torch.tensor([lengths[i] for i in which]).cumsum(0).tolist()])
        got = tigon.select_tokens(
            torch.cat([parts[i] for i in which]),
            torch.tensor([keep[i] for i in which]),
            cu_seqlens=bounds,
            capacity=600,
        )
        for place, i in enumerate(which):
            rows = got.index[got.cu_kept[place] : got.cu_kept[place + 1]]
            assert torch.equal(rows - bounds[place], alone[i][: keep[i]])


def test_a_capacity_that_is_too_small_is_refused_where_it_shows(monkeypatch):
    with pytest.raises(ValueError, match="capacity=4 is too small: 5 tokens stay"):
        whole(8, 5, capacity=4)
    monkeypatch.setenv("TIGON_CHECK", "0")
    got = whole(8, 5, capacity=4, scores=torch.arange(8.0))
    assert got.index.tolist() == [3, 4, 5, 6] and got.cu_kept.tolist() == [0, 4]
    assert got.inverse.tolist() == [-1, -1, -1, 0, 1, 2, 3, -1]


def test_progressive_rounds_read_nothing_back(no_host_sync):
    """The second choice works on the first one's capacity, whose real length only the device knows."""
    first = whole(20, 9, capacity=12, scores=torch.arange(20.0))
    (scores,) = tigon.compact_tokens((torch.arange(20.0),), first)
    second = tigon.select_tokens(scores, torch.tensor([4]), cu_seqlens=first.cu_kept, capacity=6)
    (positions,) = tigon.compact_tokens((torch.arange(20),), first, fill=-7)
    (positions,) = tigon.compact_tokens((positions,), second, fill=-7)
    assert torch.equal(positions, torch.tensor([16, 17, 18, 19, -7, -7]))


def test_keeping_all_is_the_identity():
    x, slots = torch.randn(7, 3), torch.arange(7)
    selection = whole(7, 7)
    moved, moved_slots = tigon.compact_tokens((x,), selection, slot_map=slots)
    assert torch.equal(moved, x) and torch.equal(moved_slots, slots)
    assert moved.data_ptr() != x.data_ptr()
    assert torch.equal(selection.index, selection.inverse)


def test_rows_of_every_dtype_move_and_the_rest_is_fill():
    selection = whole(6, 3, capacity=5, scores=torch.tensor([5.0, 0, 4, 0, 3, 0]))
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = [torch.arange(24).view(6, 2, 2).to(d) for d in dtypes]
    tensors[0] = torch.randn(6, 9)[:, 2:4]  # strided rows
    *moved, slots = tigon.compact_tokens(
        tensors, selection, slot_map=torch.arange(6, dtype=torch.int32), fill=1
    )
    for before, after in zip(tensors, moved, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after[:3], before[[0, 2, 4]]) and (after[3:] == 1).all()
    assert slots.tolist() == [0, 2, 4, -1, -1]


def test_gradients_scatter_back_and_dropped_rows_get_zeros():
    selection = whole(6, 3, capacity=5, scores=torch.tensor([5.0, 0, 4, 0, 3, 0]))
    x, y = (torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (3, 1))

    def loss(x, y):
        a, positions, b = tigon.compact_tokens((x, torch.arange(6), y), selection, fill=2)
        return a.square().sum() + (a[:, :1] * b).sum() + positions.sum()

    assert torch.autograd.gradcheck(loss, (x, y))
    dx, dy = torch.autograd.grad(loss(x, y), (x, y))
    assert not dx[[1, 3, 5]].any() and not dy[[1, 3, 5]].any() and dx[[0, 2, 4]].all()
    alone = torch.autograd.grad(
        tigon.compact_tokens((x, y), selection)[1].sum(), (x, y), allow_unused=True
    )
    assert alone[0] is None and alone[1].flatten().tolist() == [1, 0, 1, 0, 1, 0]
    (g,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        g.sum().backward()


def step(scores, x, keep, cu):
    selection = tigon.select_tokens(scores, keep, cu_seqlens=cu, capacity=5)
    moved, positions = tigon.compact_tokens((x, torch.arange(9)), selection)
    return selection.index, selection.cu_kept, positions, moved


ARGS = (torch.arange(9.0), torch.randn(9, 2), torch.tensor([2, 1]), torch.tensor([0, 5, 9]))


def test_nothing_waits_for_the_device(no_host_sync):
    scores, x, keep, cu = ARGS
    step(scores, x.clone().requires_grad_(), keep, cu)[-1].sum().backward()


def test_follows_the_law_of_registered_ops():
    scores, x, keep, cu = ARGS
    torch.library.opcheck(torch.ops.tigon.select_tokens, (scores, keep, cu, None, 2, 6))
    s = tigon.select_tokens(scores, keep, cu_seqlens=cu, capacity=5)
    moving = ([x.clone().requires_grad_(), torch.arange(9)], s.index, s.inverse, [0.0, -1.0])
    torch.library.opcheck(torch.ops.tigon.compact_tokens, moving)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(compiled(*ARGS), step(*ARGS), strict=True):
        assert torch.equal(a, b)


WRONG = [
    (dict(multiple=0), "multiple=0 must be 1 or more"),
    (dict(capacity=-1), "capacity=-1 must lie in 0"),
    (dict(cu_seqlens=torch.tensor([0, 9])), "cu_seqlens has 2 bounds, keep's s=2 needs 3"),
    (dict(cu_seqlens=torch.tensor([0, 5, 10])), "end at t=9 or before, got [0, 5, 10]"),
    (dict(protected=torch.ones(8, dtype=torch.bool)), "protected has shape (8,), expected (t) with t=9"),
]  # fmt: skip


@pytest.mark.parametrize("changed, message", WRONG, ids=lambda v: str(v)[:30])
def test_wrong_arguments_of_select_tokens_are_named(changed, message):
    given = dict(cu_seqlens=torch.tensor([0, 5, 9]), capacity=9)
    with pytest.raises(ValueError) as caught:
        tigon.select_tokens(torch.randn(9), torch.tensor([2, 1]), **(given | changed))
    assert message in str(caught.value)


def test_wrong_arguments_of_compact_tokens_are_named():
    selection = whole(6, 3)
    with pytest.raises(ValueError, match=r"tensors\[1\] has shape \(5, 2\), expected"):
        tigon.compact_tokens((torch.randn(6), torch.randn(5, 2)), selection)
    with pytest.raises(ValueError, match="tensors is empty"):
        tigon.compact_tokens((), selection)
    with pytest.raises(TypeError, match="selection must be a Selection"):
        tigon.compact_tokens((torch.randn(6),), (1, 2))
    with pytest.raises(TypeError, match="slot_map has dtype float32, allowed: int32, int64"):
        tigon.compact_tokens((torch.randn(6),), selection, slot_map=torch.randn(6))
