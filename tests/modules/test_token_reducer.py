"""What `TokenReducer` chooses, against full attention weights and sorting; its counts, and what it refuses."""

import pytest
import torch

from tests.models.test_token_reduction import CONFIG, PLANS, ROWS, build
from tests.support.reduced_oracle import choose
from tigon.models.reduction_schedule import ReductionSchedule
from tigon.modules import KeptTokens, Reducible, TokenReducer
from tigon.modules.reducible import places

MEANS = {name: PLANS[name] for name in ("linear", "fastv", "pyramid", "held")} | {
    "decay": TokenReducer(ReductionSchedule("linear", final=0.2), decay=True),
    "ssm": TokenReducer(ReductionSchedule("linear", final=0.2), scores="ssm"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("row", [0, 1, 3])
def test_the_kept_tokens_are_those_with_the_largest_full_weights(name, row):
    model, reducer = build(), MEANS[name]
    ids, mask = ROWS[row]
    _, kept = model(ids[None], reduction=reducer, reducible=mask[None], return_plan=True)
    options = {"scored": reducer.scored, "last": reducer.queries == "last"}
    wanted = choose(model, ids, mask, [n for (n,) in kept.counts], decay=reducer.decay, **options)
    for l, now in enumerate(wanted):
        assert kept.of(l).tolist() == now.tolist()


@torch.no_grad()
@pytest.mark.parametrize("scores", ["both", "attention"])
def test_proxies_ask_of_what_stands_behind_them_in_this_call_and_in_a_later_one(scores):
    model, reducer = build(), TokenReducer(ReductionSchedule("linear", final=0.2), scores)
    (a, flags), (b, more) = ROWS[0], ROWS[1]
    packed, mask = torch.cat([a, b])[None], torch.cat([flags, more])[None]
    asks = torch.zeros_like(mask)
    asks[0, :4], asks[0, 60:62] = True, True
    run = {"cu_seqlens": torch.tensor([0, 60, 107]), "reduction": reducer, "return_plan": True}
    inside = Reducible.of(mask, run["cu_seqlens"], queries=asks)
    _, kept = model(packed, reducible=inside, **run)
    for r, (ids, here, count) in enumerate(((a, flags, 4), (b, more, 2))):
        counts = [n[r] for n in kept.counts]
        wanted = choose(model, ids, here, counts, reducer.scored, asks=torch.arange(count))
        for l, now in enumerate(wanted):
            assert kept.of(l, r).tolist() == now.tolist()
    later = Reducible.of(mask, run["cu_seqlens"], asked_by=kept)
    for _ in range(2):  # a chunk of a chunk's queries
        _, again = model(packed, reducible=later, **run)
        assert all(map(torch.equal, kept.index, again.index))
        later = Reducible.of(mask, run["cu_seqlens"], asked_by=again)
    _, causal = model(packed, reducible=mask, **run)
    assert not torch.equal(causal.index[-1], kept.index[-1])


def test_layers_without_scores_pass_the_last_choice_on():
    def counts(scores):
        reducer = TokenReducer(ReductionSchedule("linear", final=0.2), scores)
        return [n for (n,) in reducer.counts("MM-*EM*M", [100], [10])]

    for scores, first in (("both", 1), ("ssm", 1), ("attention", 4)):
        found = counts(scores)
        assert found[first - 1] == 110 > found[first]
        assert found[3] == found[2] and found[5] == found[4]  # behind an MLP, behind a mixture
    assert (
        counts("attention")[6] < counts("attention")[5]
    )  # a Mamba layer holds the attention's scores


def test_a_budget_is_met_with_the_layers_that_score():
    schedule = ReductionSchedule("stages", stages=8, average=0.6)
    for scores in ("both", "attention"):
        plan = TokenReducer(schedule, scores).plan("MM-*EM*MM*MM")
        assert plan.average == pytest.approx(0.6, abs=1e-6)
    with pytest.raises(ValueError, match="average can be"):
        TokenReducer(ReductionSchedule("fastv", average=0.2), "attention").plan("MM-*EM*M")


def test_a_plan_counts_flops_of_what_layers_run_on():
    reducer = TokenReducer(ReductionSchedule("linear", final=0.2, multiple=8))
    plan = reducer.plan(CONFIG, visual=100, text=10)
    tokens = [n for (n,) in reducer.counts(CONFIG.pattern, [100], [10])]
    assert [layer.tokens for layer in plan.layers] == tokens
    assert plan.flops < plan.full_flops


def test_a_prompt_is_read_once_and_whole():
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 2:5], mask[1, 1:4] = True, True
    found = Reducible.of(mask, num_tokens=torch.tensor([10, 6]))
    assert (found.text, found.visual, found.queries) == ((7, 3), (3, 3), (5, 2))
    assert found.spans == ((0, 10), (10, 16)) and found.lengths == (10, 6)
    assert found.alive.tolist() == [True] * 16 + [False] * 4
    packed = Reducible.of(mask.view(1, -1), torch.tensor([0, 8, 20]))
    assert (packed.text, packed.visual, packed.queries) == ((5, 9), (3, 3), (3, 6))
    assert packed.alive is None and packed.packed
    keep = torch.zeros_like(mask)
    keep[0, 2] = True
    left = Reducible.of(mask, keep=keep)
    assert (left.text, left.visual) == ((7, 7), (1, 0))
    assert places(left.alive, 15).tolist() == left.alive.nonzero().flatten().tolist()


@pytest.mark.parametrize("name", ["scores", "queries", "head_reduce", "query_reduce"])
def test_options_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"TokenReducer: {name}='most' is not one of"):
        TokenReducer(ReductionSchedule("linear"), **{name: "most"})
    with pytest.raises(TypeError, match="schedule"):
        TokenReducer("linear")


def test_masks_that_do_not_fit_are_refused_by_name():
    mask = torch.zeros(2, 10, dtype=torch.bool)
    ends_in_one = mask.clone()
    ends_in_one[1, 5:] = True
    for match, args, options in (
        ("bool", (mask.int(),), {}),
        ("bool", (mask[0],), {}),
        ("cu_seqlens needs", (mask, torch.tensor([0, 10])), {}),
        ("num_tokens has 3", (mask, None, [1, 2, 3]), {}),
        ("dense batches", (mask[:1], [0, 10], [10]), {}),
        ("keep must be", (mask,), {"keep": mask[:1]}),
        ("exclude each other", (mask,), {"queries": mask, "asked_by": KeptTokens((), (), ())}),
        ("asked_by must be of a call", (mask,), {"asked_by": KeptTokens((), (), ())}),
        ("queries must be", (mask,), {"queries": mask.int()}),
        ("sequence 1 has no text behind", (ends_in_one,), {}),
    ):
        with pytest.raises(ValueError, match=f"reducible: .*{match}"):
            Reducible.of(*args, **options)
