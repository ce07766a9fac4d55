"""A reduced HybridLM against the model run layer by layer on the recorded kept lists; decode, drafts, training."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import tigon
from tests.support.reduced_oracle import run_on, with_more
from tigon.generation import generate
from tigon.generation.decoder import Decoder
from tigon.generation.drafter import Drafter
from tigon.generation.sampling import Sampling
from tigon.models import HybridConfig, HybridLM
from tigon.models.reduction_schedule import ReductionSchedule
from tigon.modules import KVCache, Reducible, TokenReducer

CONFIG = HybridConfig(
    pattern="MM-*EM*M",
    vocab_size=40,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    moe_latent_size=16,
    initializer_range=0.2,
    mamba_ssm_cache_dtype="float64",
)
LINEAR = ReductionSchedule("linear", final=0.2)
PLANS = {
    "linear": TokenReducer(LINEAR),
    "fastv": TokenReducer(ReductionSchedule("fastv"), queries="last"),
    "pyramid": TokenReducer(ReductionSchedule("pyramid"), queries="last"),
    "held": TokenReducer(LINEAR, scores="attention"),
    "ssm": TokenReducer(LINEAR, scores="ssm", decay=True, head_reduce="max"),
    "average": TokenReducer(ReductionSchedule("stages", stages=8, average=0.4), query_reduce="max"),
}


def build(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return HybridLM(replace(CONFIG, **changes), dtype=dtype)


@pytest.fixture
def model():
    return build()


def prompt(length, start, end, seed=1):
    """(ids (l), mask (l)): text, visual tokens from `start` to `end`, text."""
    ids = torch.randint(0, 40, (length,), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(length)
    return ids, (place >= start) & (place < end)


def batch(*rows):
    """ids, mask (b,l) padded on the right, and the lengths."""
    padded = (torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in zip(*rows))
    return *padded, torch.tensor([ids.shape[0] for ids, _ in rows])


ROWS = [prompt(60, 5, 50), prompt(47, 3, 40, 2), prompt(9, 0, 0, 3), prompt(71, 0, 69, 4)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["power", "linear", "cosine", "stages", "fastv", "pyramid"])
@pytest.mark.parametrize("packed", [False, True])
def test_keep_all_equals_the_unreduced_model_bit_for_bit(kind, packed):
    model = build(torch.float32)
    ids, mask, _ = batch(ROWS[0], prompt(60, 9, 40, 7))
    bounds = None
    if packed:
        ids, mask, bounds = ids.reshape(1, -1), mask.reshape(1, -1), torch.tensor([0, 55, 120])
    full, part = model.allocate_cache(2, 130), model.allocate_cache(2, 130)
    expected = model(ids, bounds, full)
    all_of_them = ReductionSchedule(kind, final=1.0)
    got, kept = model(ids, bounds, part, reduction=all_of_them, reducible=mask, return_plan=True)
    assert torch.equal(got.view_as(expected), expected)
    assert torch.equal(kept.index[-1], torch.arange(120))
    for a, b in zip(full.layers, part.layers):
        assert a is None or all(map(torch.equal, a.tensors(), b.tensors()))
    assert torch.equal(full.lengths, part.lengths)


@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("layout", ["one", "equal", "ragged", "packed"])
def test_a_reduced_run_equals_the_layers_run_on_the_recorded_lists(model, name, layout):
    rows = {"one": ROWS[:1], "equal": [ROWS[0], prompt(60, 9, 54, 7)]}.get(layout, ROWS)
    ids, mask, lengths = batch(*rows)
    where = {}
    if layout == "packed":
        ids, mask = (torch.cat(side)[None] for side in zip(*rows))
        where = {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}
    elif layout == "ragged":
        where = {"num_tokens": lengths, "cache": model.allocate_cache(len(rows), 80)}
    got, kept = model(ids, reduction=PLANS[name], reducible=mask, return_plan=True, **where)
    start = kept.bounds()
    for r, (row, flags) in enumerate(rows):
        lists = [kept.of(l, r) for l in range(8)]
        torch.testing.assert_close(got[0, start[r] : start[r + 1]], run_on(model, row, lists))
        assert all(set(b.tolist()) <= set(a.tolist()) for a, b in pairwise(lists))
        text = set((~flags).nonzero().flatten().tolist())
        assert text <= set(lists[-1].tolist())
        assert len(lists[-1]) < len(row) or not flags.any()
        wanted = PLANS[name].plan(CONFIG.pattern, visual=int(flags.sum()))
        shares = PLANS[name].schedule.kept(wanted.shares, int(flags.sum()))
        assert [len(i) - len(text) for i in lists] == shares


@torch.no_grad()
@pytest.mark.parametrize("rollback", [None, "replay", "snapshot"])
def test_decode_after_a_reduced_prefill_equals_the_layers_run_on_the_lists(model, rollback):
    ids, mask, lengths = batch(*ROWS)
    options = {} if rollback is None else {"rollback": rollback, "tokens": 4}
    cache = model.allocate_cache(6, 100, **options)
    slots = torch.tensor([4, 0, 5, 2])
    got, kept = model(
        *(ids, None, cache), slots=slots, num_tokens=lengths, reduction=LINEAR, reducible=mask,
        return_plan=True,
    )  # fmt: skip
    assert cache.lengths[slots].tolist() == lengths.tolist()
    new = torch.randint(0, 40, (4, 14), generator=torch.Generator().manual_seed(9))
    pieces = []
    for piece in new.split([1, 3, 1, 1, 8], 1):  # by decode ops, and 8 in replay by the scan
        pieces.append(model(piece, cache=cache, slots=slots))
    decoded = torch.cat(pieces, 1)
    for r, (row, _) in enumerate(ROWS):
        lists = with_more([kept.of(l, r) for l in range(8)], len(row), 14)
        expected = run_on(model, torch.cat([row, new[r]]), lists)
        torch.testing.assert_close(decoded[r], expected[-14:])
        torch.testing.assert_close(got[0, kept.bounds()[r]], expected[0])
    held = [
        layer.lengths.tensor[slots].tolist() for layer in cache.layers if isinstance(layer, KVCache)
    ]
    assert held == [[n + 14 for n in kept.counts[l]] for l in (3, 6)]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_so_few_kept_tokens_that_they_could_be_decoded_ones_are_still_a_prompt(model, rows):
    ids, mask = (t.expand(rows, -1) for t in prompt(40, 2, 36))
    cache = model.allocate_cache(rows, 60, rollback="replay", tokens=16)
    run = {"reduction": LINEAR, "reducible": mask, "return_plan": True}
    _, kept = model(ids, None, cache, **run)
    assert kept.counts[-1] == (13,) * rows
    new = torch.randint(0, 40, (rows, 3))
    decoded = torch.cat([model(t, cache=cache) for t in new.split(1, 1)], 1)
    for r in range(rows):
        lists = with_more([kept.of(l, r) for l in range(8)], 40, 3)
        expected = run_on(model, torch.cat([ids[r], new[r]]), lists)[-3:]
        torch.testing.assert_close(decoded[r], expected)


@torch.no_grad()
def test_the_drafter_reads_the_kept_tokens_and_what_follows_them():
    model = build(mtp_pattern="*E")
    ids, mask, lengths = batch(*ROWS)
    cache, drafter = model.allocate_cache(4, 90), Drafter(model, 4, 90, 16)
    decoder = Decoder(model, cache, Sampling("greedy", cache.seeds), drafter)
    reducible = Reducible.of(mask, num_tokens=lengths)
    reducer = TokenReducer(LINEAR)
    step = decoder.prefill(torch.arange(4), ids, lengths, reducer, reducible)
    for r, (row, flags) in enumerate(ROWS):
        hidden, kept = model.backbone(
            row[None], reduction=LINEAR, reducible=flags[None], return_plan=True
        )
        following = torch.cat([row[kept.of(-1)][1:], step.tokens[r, :1]])
        out = model.mtp(hidden, model.backbone.embeddings(following)[None])
        torch.testing.assert_close(drafter.last[r], out[0, -1])
    assert drafter.cache.lengths.tolist() == list(
        reducer.counts(CONFIG.pattern, [45, 37, 0, 69], [15, 10, 9, 2])[-1]
    )


@torch.no_grad()
def test_rejected_tokens_leave_every_layer_as_it_was(model):
    ids, mask = (t[None] for t in ROWS[0])
    cache = model.allocate_cache(1, 100, rollback="replay", tokens=5)
    _, kept = model(ids, None, cache, reduction=LINEAR, reducible=mask, return_plan=True)
    new = torch.randint(0, 40, (1, 12), generator=torch.Generator().manual_seed(5))
    slots, text = torch.tensor([0]), ids[0]
    for accepted in (2, 0, 5, 1):
        drafts = new[:, :5].roll(accepted, 1)
        logits = model(drafts, cache=cache, slots=slots, commit=False)
        lists = with_more([kept.of(l) for l in range(8)], 60, len(text) - 60 + 5)
        expected = run_on(model, torch.cat([text, drafts[0]]), lists)[-5:]
        torch.testing.assert_close(logits[0], expected)
        cache.commit(slots, torch.tensor([accepted]))
        text = torch.cat([text, drafts[0, :accepted]])
    assert cache.lengths.tolist() == [68]


@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
def test_a_choice_does_not_depend_on_batch_mates(model, name):
    run = {"reduction": PLANS[name], "return_plan": True}
    packed, mask = (torch.cat(side)[None] for side in zip(*ROWS))
    bounds = torch.tensor([0, 60, 107, 116, 187])
    _, together = model(packed, bounds, reducible=mask, **run)
    for r, (row, flags) in enumerate(ROWS):
        _, alone = model(row[None], reducible=flags[None], **run)
        for l in range(8):
            assert torch.equal(alone.of(l), together.of(l, r))


@torch.no_grad()
def test_in_batch_invariant_mode_mates_do_not_change_a_bit():
    model = build(torch.float32, pattern="M-*M")
    packed, mask = (torch.cat(side)[None] for side in zip(*ROWS[:3]))
    run = {"reduction": LINEAR, "return_plan": True}
    with tigon.batch_invariant():
        together, kept = model(packed, torch.tensor([0, 60, 107, 116]), reducible=mask, **run)
        for (row, flags), (start, end) in zip(ROWS, pairwise(kept.bounds())):
            alone, _ = model(row[None], reducible=flags[None], **run)
            assert torch.equal(alone[0], together[0, start:end])


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_those_through_the_gathers(training):
    model = build().train(training)
    packed, mask = (torch.cat(side)[None] for side in zip(*ROWS))
    bounds = torch.tensor([0, 60, 107, 116, 187])
    labels = torch.where(mask, -100, packed.roll(-1, 1))
    labels[0, bounds[1:] - 1] = -100
    loss = model(packed, bounds, labels=labels, reduction=LINEAR, reducible=mask)
    got = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    _, kept = model(packed, bounds, reduction=LINEAR, reducible=mask, return_plan=True)
    logits = torch.cat(
        [run_on(model, row, [kept.of(l, r) for l in range(8)]) for r, (row, _) in enumerate(ROWS)]
    )
    expected = torch.nn.functional.cross_entropy(
        logits, labels[0, kept.index[-1]], ignore_index=-100
    )
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        got, torch.autograd.grad(expected, list(model.parameters()), materialize_grads=True)
    ):
        torch.testing.assert_close(a, b)
    assert sum(bool(g.any()) for g in got) > 30


def test_the_drafter_and_the_router_learn_under_reduction():
    model = build(mtp_pattern="*E", router_aux_loss_coef=0.01).train()
    ids, mask = (t[None] for t in ROWS[0])
    found = model.losses(ids, ids.roll(-1, 1), reduction=LINEAR, reducible=mask)
    found.total.backward()
    assert (
        found.mtp is not None and len(found.routings) == 3
    )  # one, and the drafter's at both depths
    assert all(
        p.grad is not None and p.grad.any() for p in model.mtp.parameters() if p.requires_grad
    )


@torch.no_grad()
def test_drafts_after_a_reduced_prefill_change_no_token():
    model = build(mtp_pattern="*E")
    prompts, masks = [row for row, _ in ROWS], [flags for _, flags in ROWS]
    run = {"reduction": LINEAR, "reducible": masks, "stop_ids": ()}
    plain = generate(model, prompts, 12, draft_tokens=0, **run)
    for options in (
        {"draft_tokens": 3},
        {"draft_tokens": 2, "max_slots": 2, "rollback": "snapshot"},
        {"tree": (2, 2)},
    ):
        drafted, report = generate(model, prompts, 12, return_report=True, **options, **run)
        assert all(map(torch.equal, plain, drafted))
        assert report.new_tokens == 48
    for r, (row, flags) in enumerate(ROWS):
        cache = model.allocate_cache(1, 100)
        logits = model(row[None], None, cache, reduction=LINEAR, reducible=flags[None])
        for token in plain[r]:
            assert int(logits[0, -1].argmax()) == token
            logits = model(token.view(1, 1), cache=cache)
    full = generate(model, prompts, 12, draft_tokens=0, stop_ids=())
    assert any(not torch.equal(a, b) for a, b in zip(plain, full))


@torch.no_grad()
def test_generate_gives_attention_layers_room_for_what_they_hold(model, monkeypatch):
    rooms = []
    allocate = type(model).allocate_cache

    def spy(self, *args, **options):
        rooms.append(allocate(self, *args, **options))
        return rooms[-1]

    monkeypatch.setattr(type(model), "allocate_cache", spy)
    generate(model, [ROWS[0][0]], 10, reduction=LINEAR, reducible=[ROWS[0][1]], stop_ids=())
    counts = TokenReducer(LINEAR).counts(CONFIG.pattern, [45], [15])
    held = [layer.lengths.capacity for layer in rooms[0].layers if isinstance(layer, KVCache)]
    assert held == [counts[3][0] + 11, counts[6][0] + 11]


@torch.no_grad()
def test_copied_selected_and_reset_slots_carry_their_own_lengths(model):
    ids, mask, lengths = batch(*ROWS[:2])
    cache = model.allocate_cache(3, 100)
    model(ids, None, cache, num_tokens=lengths, reduction=LINEAR, reducible=mask)
    token = torch.tensor([[7]])

    def after(cache, slot):
        return model(token, cache=cache.select(torch.tensor([slot])))

    first, second = after(cache, 0), after(cache, 1)
    cache.fork(0, torch.tensor([2]))
    torch.testing.assert_close(after(cache, 2), first)
    cache.reset(torch.tensor([0]))
    torch.testing.assert_close(after(cache, 1), second)
    torch.testing.assert_close(after(cache, 2), first)
    fresh = model(ROWS[0][0][None], cache=cache, slots=torch.tensor([0]))
    torch.testing.assert_close(fresh, model(ROWS[0][0][None]))


@torch.no_grad()
def test_a_chunk_reduced_by_a_proxy_and_the_question_behind_it(model):
    """An instruction, a video in three chunks, then the question: each call's lists, run in one pass."""
    ids, mask = prompt(120, 6, 110)
    reducer, cache = TokenReducer(LINEAR), model.allocate_cache(1, 120)
    lists, logits = [[] for _ in range(8)], []
    asks = torch.zeros(1, 50, dtype=torch.bool)
    asks[:, :6] = True
    first = Reducible.of(mask[None, :50], queries=asks)
    kept = None
    for start, end in ((0, 50), (50, 80), (80, 120)):
        here = mask[None, start:end]
        reducible = first if not start else here
        if end == 80:  # nobody in this chunk could ask
            reducible = Reducible.of(here, asked_by=kept)
        out, kept = model(
            *(ids[None, start:end], None, cache),
            reduction=reducer,
            reducible=reducible,
            return_plan=True,
        )
        for l in range(8):
            lists[l].append(kept.of(l) + start)
        logits.append(out[0])
    lists = [torch.cat(parts) for parts in lists]
    assert len(lists[-1]) < 45
    torch.testing.assert_close(torch.cat(logits), run_on(model, ids, lists))


@torch.no_grad()
def test_a_mask_before_layer_0_and_the_layers_own_choice_compose(model):
    ids, mask, lengths = batch(*ROWS)
    left = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    reducible = Reducible.of(mask, num_tokens=lengths, keep=left)
    cache = model.allocate_cache(4, 80)
    got, kept = model(ids, None, cache, reduction=LINEAR, reducible=reducible, return_plan=True)
    bounds = kept.bounds()
    for r, (row, flags) in enumerate(ROWS):
        lists = [kept.of(l, r) for l in range(8)]
        first = (~flags | left[r, : len(row)]).nonzero().flatten()
        assert torch.equal(lists[0], first)
        torch.testing.assert_close(got[0, bounds[r] : bounds[r + 1]], run_on(model, row, lists))
    assert cache.lengths.tolist() == lengths.tolist()


@torch.no_grad()
def test_a_reduced_prefill_waits_for_nothing(no_host_sync):
    model = build(pattern="M-*M*")  # mixtures wait for the CPU's expert loops
    ids, mask, _ = batch(ROWS[0], prompt(60, 9, 54, 7))
    cache = model.allocate_cache(2, 80, rollback="replay", tokens=3)
    # As `Reducible.of` reads it, written down: reading is forbidden here.
    prepared = Reducible(mask.flatten(), ((0, 60), (60, 120)), (15, 15), (45, 45), (10, 6))
    half = ReductionSchedule(
        "linear", final=0.5
    )  # rows that short would be packed, which a CPU unpacks
    got, kept = model(ids, None, cache, reduction=half, reducible=prepared, return_plan=True)
    assert got.shape[1] == 76 and kept.counts[-1] == (38, 38)


def test_what_cannot_be_is_refused_by_name(model):
    ids, mask = (t[None] for t in ROWS[0])
    run = {"reduction": LINEAR}

    def refuses(match, *args, error=ValueError, **options):
        with pytest.raises(error, match=match):
            model(*args, **options)

    refuses("reducible has shape", ids, reducible=mask[:, :5], **run)
    refuses("reduction needs reducible", ids, error=TypeError, **run)
    refuses("pass reduction", ids, reducible=mask)
    refuses("pass queries", ids[:, :50], reducible=mask[:, :50], **run)
    refuses("must be a \\(b, l\\) bool", ids, reducible=mask.int(), **run)
    refuses("schedule must be", ids, error=TypeError, reducible=mask, reduction=0.5)
    refuses("mask", ids, reducible=mask, mask=mask, **run)
    refuses("commit", ids, reducible=mask, cache=model.allocate_cache(1, 60), commit=False, **run)
    refuses("slots", ids, reducible=mask, slots=torch.tensor([0]), **run)
    refuses("would hold 60 tokens", ids, reducible=mask, cache=model.allocate_cache(1, 59), **run)
    short = model.allocate_cache(1, 60, attention_lengths=(30, 60))
    with torch.no_grad():
        refuses("max_length=30", ids, reducible=mask, cache=short, **run)
    with pytest.raises(ValueError, match="2 attention layers"):
        model.allocate_cache(1, 60, attention_lengths=(30,))
    asks = TokenReducer(LINEAR, decay=True)
    proxy = Reducible.of(mask, queries=~mask)
    refuses("decay=True", ids, reducible=proxy, reduction=asks)
    with pytest.raises(ValueError, match="come together"):
        generate(model, [ids[0]], 1, reduction=LINEAR)
    with pytest.raises(ValueError, match="reducible of prompt 0"):
        generate(model, [ids[0]], 1, reducible=[mask[0, :3]], **run)
