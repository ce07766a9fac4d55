"""Undoing tokens: whatever was drafted, rejected, reset, copied or preempted, a slot holds what its tokens say."""

import random

import pytest
import torch

import tigon
from tigon.generation.tree import DraftTree
from tigon.modules.mamba_cache import MambaCache

VOCAB = 24


def states(model, cache, slot):
    """Each Mamba layer's window and state of a slot, whatever the cache's design."""
    found = []
    for block, layer in zip(model.backbone.layers, cache.layers):
        if isinstance(layer, MambaCache):
            conv, ssm = layer.read(torch.tensor([slot]), 1, block.mixer._decay())
            found += [conv[0], ssm[0]]
    return found


def feed(model, cache, ids, slot=0, **options):
    return model(ids[None], cache=cache, slots=torch.tensor([slot]), **options)[0]


@torch.no_grad()
@pytest.mark.parametrize("rollback", ["replay", "snapshot"])
@pytest.mark.parametrize("prompt", [1, 6, 37])
@pytest.mark.parametrize("kept", range(6))
def test_after_every_accepted_count_state_and_window_equal_the_sequential_run(
    model, rollback, prompt, kept
):
    draw = torch.Generator().manual_seed(kept)
    start, drafts = (torch.randint(0, VOCAB, (n,), generator=draw) for n in (prompt, 5))
    flush = {"flush": 8} if rollback == "replay" else {}
    cache = model.allocate_cache(2, 140, rollback=rollback, tokens=5, **flush)
    plain = model.allocate_cache(2, 140)
    for _ in range(3):  # the second and third time at other places of the ring
        feed(model, cache, start, 1)
        feed(model, plain, start, 1)
        logits = feed(model, cache, drafts, 1, commit=False)
        cache.commit(torch.tensor([1]), torch.tensor([kept]))
        for token, row in zip(drafts[:kept], logits):
            torch.testing.assert_close(feed(model, plain, token[None], 1)[0], row)
        assert cache.lengths.tolist() == plain.lengths.tolist()
        for got, expected in zip(states(model, cache, 1), states(model, plain, 1), strict=True):
            torch.testing.assert_close(got, expected)
    assert not any(t.any() for t in states(model, cache, 0))


class Fuzz:
    """Random calls on a few slots beside the text that each slot should hold."""

    def __init__(self, model, seed, **options):
        self.model, self.random = model, random.Random(seed)
        self.slots = 4
        self.options = dict(tokens=7) | options
        self.cache = model.allocate_cache(self.slots, 400, **self.options)
        self.text = [[] for _ in range(self.slots)]
        self.parked, self.calls = [], 0

    def draw(self, n):
        return [self.random.randrange(VOCAB) for _ in range(n)]

    def check(self, slot, logits):
        self.calls += 1
        full = self.model(torch.tensor([self.text[slot]]))[0, -1]
        torch.testing.assert_close(logits, full, msg=lambda m: f"slot {slot}: {m}")

    def prefill(self):
        """Prompts into slots that are used again."""
        slots = self.random.sample(range(self.slots), 2)
        self.cache.reset(torch.tensor(slots))
        for slot in slots:
            self.text[slot] = []
        new = [self.draw(self.random.randint(1, 40)) for _ in slots]
        self.run(slots, new, [len(n) for n in new], commit=True)

    def run(self, slots, new, counts, commit):
        width = max(map(len, new)) + self.random.randrange(2)
        if not commit:
            width = min(width, self.options["tokens"])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in new])
        padded = self.random.random() < 0.5
        where = torch.tensor(slots + [-1] * padded)
        ids = torch.cat([ids, ids[:1]]) if padded else ids
        num = torch.tensor([len(row) for row in new] + [1] * padded)
        logits = self.model(ids, cache=self.cache, slots=where, num_tokens=num, commit=commit)
        if not commit:
            self.cache.commit(where, torch.tensor(counts + [1] * padded))
        for i, slot in enumerate(slots):
            self.text[slot] += new[i][: counts[i]]
            if counts[i]:
                self.check(slot, logits[i, counts[i] - 1])

    def decode(self):
        """Several tokens a row of which some stay, or one that stays: drafted and undrafted steps in turn."""
        slots = [s for s in range(self.slots) if self.text[s] and self.random.random() < 0.7]
        if not slots:
            return
        most = self.random.choice([1, 1, self.options["tokens"]])
        new = [self.draw(self.random.randint(1, most)) for _ in slots]
        counts = [self.random.randint(0, len(n)) for n in new]
        self.run(slots, new, counts, commit=False)

    def tree(self):
        """A tree whose accepted path is any of its ways."""
        slot = self.random.randrange(self.slots)
        if not self.text[slot] or self.options["rollback"] != "replay":
            return
        tree = DraftTree((2, 2))
        ids = torch.tensor([self.draw(tree.nodes)])
        bits, where = tree.bits[None], torch.tensor([slot])
        logits = self.model(ids, cache=self.cache, slots=where, commit=False, ancestors=bits)
        leaf = self.random.randrange(tree.nodes)
        way = [j for j in range(tree.nodes) if tree.bits[leaf] >> j & 1]
        path = torch.full((1, tree.depth), -1, dtype=torch.int32)
        path[0, : len(way) - 1] = torch.tensor(way[1:])
        self.cache.commit(where, torch.tensor([len(way)]), path)
        self.text[slot] += ids[0, way].tolist()
        self.check(slot, logits[0, leaf])

    def fork(self):
        source, *targets = self.random.sample(range(self.slots), 3)
        self.cache.fork(source, torch.tensor(targets))
        for t in targets:
            self.text[t] = list(self.text[source])

    def preempt(self):
        """A slot leaves with all it holds, and comes back elsewhere when others have used its place."""
        if self.parked:
            cache, text = self.parked.pop()
            target = self.random.randrange(self.slots)
            self.cache.copy(torch.tensor([0]), torch.tensor([target]), cache)
            self.text[target] = text
        else:
            slot = self.random.randrange(self.slots)
            self.parked.append((self.cache.select(torch.tensor([slot])), list(self.text[slot])))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        dict(rollback="replay", flush=8),
        dict(rollback="replay"),
        dict(rollback="replay", flush=7),
        dict(rollback="snapshot"),
    ],
    ids=str,
)
def test_any_history_of_slots_gives_the_logits_of_its_text(model, options):
    fuzz = Fuzz(model, seed=1, **options)
    for _ in range(90):
        actions = ["decode"] * 16 + ["prefill", "tree", "fork", "preempt"] * 2
        getattr(fuzz, fuzz.random.choice(actions))()
    assert sum(map(len, fuzz.text)) > 80 and fuzz.calls > 80


@torch.no_grad()
@pytest.mark.parametrize("format", ["float32", "float16", "int8"])
def test_two_histories_with_other_drafts_leave_the_same_state_bits(single, format):
    """Stochastic rounding included: a state's random bits belong to the request and the position."""
    draw = torch.Generator().manual_seed(5)
    text = torch.randint(0, VOCAB, (70,), generator=draw)
    found = []
    for seed, width in ((0, 1), (1, 4), (2, 6)):
        found.append(left_by_history(single, text, format, random.Random(seed), width))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def left_by_history(model, text, format, pick, width):
    """The first layer's state after 61 tokens, of which all but one came with `width` drafts a call."""
    with tigon.batch_invariant():
        cache = model.allocate_cache(
            3, 200, rollback="replay", tokens=6, flush=8, ssm_dtype=getattr(torch, format),
            rounding="stochastic",
        )  # fmt: skip
        slot = pick.randrange(3)
        cache.seeds[slot] = 1234
        feed(model, cache, text[:10], slot)
        done = 10
        while done < 60:
            right = min(pick.randint(1, width), 60 - done)
            new = torch.cat([text[done : done + right], torch.randint(0, VOCAB, (width - right,))])
            feed(model, cache, new, slot, commit=False)
            cache.commit(torch.tensor([slot]), torch.tensor([right]))
            done += right
        feed(model, cache, text[60:61], slot)
        layer = cache.layers[0]
        kept = [layer.ssm[slot], cache.cursor.checkpoint[slot]]
        return kept + ([layer.scale[slot]] if layer.scale is not None else [])


def test_bytes_of_a_request_by_design(single):
    sizes = {}
    for rollback in (None, "replay", "snapshot"):
        options = {} if rollback is None else {"rollback": rollback, "tokens": 4}
        cache = single.allocate_cache(1, 10, **options)
        sizes[rollback] = cache.nbytes(MambaCache)
    state = 2 * 4 * 8 * 8 * 8  # two layers of fp32 states
    assert sizes["snapshot"] - sizes[None] > 4 * state
    ring = 16 + 2 * 4 - 1
    assert sizes["replay"] == state + 2 * 4 * (ring * (8 * 8 + 2 * 8 + 8) + 7 * (64 + 32))


@torch.no_grad()
@pytest.mark.parametrize("rollback", ["replay", "snapshot"])
def test_a_preempted_sequence_goes_on_in_a_fresh_cache(model, rollback):
    text = torch.arange(30) % VOCAB
    options = dict(rollback=rollback, tokens=4)
    cache = model.allocate_cache(2, 60, **options)
    feed(model, cache, text[:20], 1)
    feed(model, cache, text[20:23], 1, commit=False)
    cache.commit(torch.tensor([1]), torch.tensor([2]))
    parked, fresh = cache.select(torch.tensor([1])), model.allocate_cache(3, 60, **options)
    fresh.copy(torch.tensor([0]), torch.tensor([2]), parked)
    torch.testing.assert_close(feed(model, fresh, text[22:26], 2), model(text[None, :26])[0, 22:])
    with pytest.raises(ValueError, match="allocated alike"):
        model.allocate_cache(3, 61, **options).copy(torch.tensor([0]), torch.tensor([2]), parked)


@torch.no_grad()
def test_attention_alone_counts_what_a_call_had_and_no_more(model):
    config = model.config.replace(pattern="*-", mtp_pattern="")
    model = type(model)(config, dtype=torch.float64)
    text = torch.arange(12) % VOCAB
    cache = model.allocate_cache(1, 20)
    feed(model, cache, text[:5], commit=False)
    cache.commit(torch.tensor([0]), torch.tensor([9]))  # of 5
    assert cache.lengths.tolist() == [5]
    torch.testing.assert_close(feed(model, cache, text[5:]), model(text[None])[0, 5:])


@torch.no_grad()
def test_calls_that_cannot_be_undone_are_refused(model):
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="commit=False needs a cache with rollback"):
        model(ids, cache=model.allocate_cache(1, 10), commit=False)
    cache = model.allocate_cache(1, 30, rollback="replay", tokens=2)
    with pytest.raises(ValueError, match="at most 2 tokens a row, dense; got 3"):
        model(ids, cache=cache, commit=False)
    with pytest.raises(ValueError, match="rollback='replay'"):
        snapshots = model.allocate_cache(1, 10, rollback="snapshot", tokens=3)
        bits = torch.ones(1, 3, dtype=torch.int32)
        model(ids, cache=snapshots, commit=False, ancestors=bits)
    with pytest.raises(ValueError, match="pass cache"):
        model(ids, commit=False)
    with pytest.raises(ValueError, match="pass commit=False"):
        model(ids, cache=cache, ancestors=torch.ones(1, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match="unexpected arguments: depth"):
        model(ids, depth=1)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="under torch"):
        model(ids[:, :2], cache=cache)
