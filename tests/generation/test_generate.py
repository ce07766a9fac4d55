"""`generate`: drafts change how fast text comes, never which text; slots, stops, log-probabilities, reports."""

import copy
import itertools

import pytest
import torch

import tigon
from tigon.generation import decoder as decoder_module
from tigon.generation import generate
from tigon.generation.drafter import Drafter
from tigon.generation.loop import _seeds

NEW = 22


def texts(found):
    return [row.tolist() for row in found]


def greedy_by_recomputation(model, prompt, count):
    ids = prompt.clone()
    for _ in range(count):
        ids = torch.cat([ids, model(ids[None])[0, -1].argmax()[None]])
    return ids[prompt.numel() :].tolist()


@torch.no_grad()
def test_greedy_text_is_that_of_full_recomputation(model, prompts):
    expected = [greedy_by_recomputation(model, p, NEW) for p in prompts]
    assert texts(generate(model, prompts, NEW, draft_tokens=0)) == expected


@pytest.mark.parametrize(
    "options",
    [
        dict(draft_tokens=1),
        dict(draft_tokens=3),
        dict(draft_tokens=7),
        dict(draft_tokens=15),
        dict(draft_tokens=4, rollback="snapshot"),
        dict(tree=(3, 2, 1)),
        dict(tree=(2, 2)),
        dict(draft_tokens="auto"),
        dict(draft_tokens=3, max_slots=2),
        dict(draft_tokens=2, max_slots=1, flush=4),
        dict(draft_tokens=3, rule="greedy", temperature=2.0),
        dict(draft_tokens=3, rule="block"),
    ],
    ids=str,
)
def test_greedy_text_does_not_depend_on_drafts_trees_slots_or_rollback(model, prompts, options):
    expected = texts(generate(model, prompts, NEW, draft_tokens=0))
    assert texts(generate(model, prompts, NEW, **options)) == expected


class Told(Drafter):
    """Drafts the text that it is told, wrong at places of a pattern: every accepted count occurs."""

    text: list[int]
    start: int

    def draft(self, slots, count, positions, choose, **options):
        tokens, logits = super().draft(slots, count, positions, choose, **options)
        at = (positions - self.start).tolist()
        for row, first in enumerate(at):
            for i in range(count):
                right = self.text[min(first + i, len(self.text) - 1)]
                wrong = (first * 7 + i * 3) % 11 < 2
                tokens[row, i] = (right + wrong) % 24
        return tokens, logits


@pytest.mark.parametrize("rollback", ["replay", "snapshot"])
@pytest.mark.parametrize("flush", [None, 8])
def test_text_is_the_same_whatever_share_of_drafts_is_accepted(
    model, prompts, monkeypatch, rollback, flush
):
    prompt = prompts[2]
    expected = texts(generate(model, [prompt], 60, draft_tokens=0))[0]
    Told.text, Told.start = expected, prompt.numel()
    monkeypatch.setattr("tigon.generation.loop.Drafter", Told)
    options = {"flush": flush} if rollback == "replay" else {}
    got, report = generate(
        model, [prompt], 60, draft_tokens=5, rollback=rollback, return_report=True, **options
    )
    assert got[0].tolist() == expected
    kept = [n / o for n, o in zip(report.accepted, report.offered)]
    assert 0.3 < kept[0] < 1 and 0 < kept[4] < kept[0]
    assert report.steps < 40


STRICT = dict(rule="strict", temperature=1.0, top_k=12, top_p=0.95)


@pytest.mark.parametrize(
    "options",
    [
        dict(draft_tokens=2),
        dict(draft_tokens=6),
        dict(tree=(2, 2, 2)),
        dict(draft_tokens=3, max_slots=2),
        dict(draft_tokens="auto"),
    ],
    ids=str,
)
def test_strict_text_does_not_depend_on_drafts_or_slots(model, prompts, options):
    expected = texts(generate(model, prompts, NEW, draft_tokens=0, seed=5, **STRICT))
    assert texts(generate(model, prompts, NEW, seed=5, **STRICT, **options)) == expected
    assert texts(generate(model, prompts, NEW, seed=6, draft_tokens=0, **STRICT)) != expected


@pytest.mark.parametrize("rule", ["token", "block", "strict"])
def test_draws_do_not_depend_on_the_order_of_the_batch_or_on_waiting_for_a_slot(
    model, prompts, rule
):
    seeds = torch.arange(5) * 1000 + 17
    options = dict(draft_tokens=3, rule=rule, temperature=1.0)
    expected = texts(generate(model, prompts, NEW, seed=seeds, **options))
    order = [3, 0, 4, 2, 1]
    shuffled = [prompts[i] for i in order]
    got = texts(generate(model, shuffled, NEW, seed=seeds[order], max_slots=2, **options))
    assert got == [expected[i] for i in order]


@pytest.mark.parametrize("rule", ["token", "block", "strict"])
def test_first_tokens_of_many_samples_follow_the_models_distribution(model, prompts, rule):
    """The first two tokens after one prompt in 600 rows: chi-square of the pairs against the model's law."""
    prompt, rows = prompts[1], 600
    got = generate(
        model,
        [prompt] * rows,
        3,
        draft_tokens=2,
        rule=rule,
        temperature=0.7,
        seed=11,
    )
    pairs = torch.stack(got)[:, :2]
    with torch.no_grad():
        first = torch.softmax(model(prompt[None])[0, -1] / 0.7, -1)
        then = torch.cat([prompt.expand(24, -1), torch.arange(24)[:, None]], 1)
        second = torch.softmax(model(then)[:, -1] / 0.7, -1)
    law = (first[:, None] * second).flatten()
    seen = torch.bincount(pairs[:, 0] * 24 + pairs[:, 1], minlength=576).double()
    large = law * rows >= 5
    expected = torch.cat([law[large], law[~large].sum()[None]]) * rows
    counted = torch.cat([seen[large], seen[~large].sum()[None]])
    degrees = expected.numel() - 1
    chi2 = ((counted - expected).square() / expected.clamp(min=1e-9)).sum().item()
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5, (chi2, degrees)


def test_log_probabilities_are_those_of_one_pass_over_everything(model, prompts):
    for options in (dict(draft_tokens=3), dict(tree=(2, 2), rule="strict", temperature=1.0)):
        got, logprobs = generate(model, prompts, 9, logprobs=True, seed=1, **options)
        for prompt, new, found in zip(prompts, got, logprobs):
            with torch.no_grad():
                full = model(torch.cat([prompt, new])[None])[0, prompt.numel() - 1 : -1]
            expected = torch.log_softmax(full, -1).gather(1, new[:, None])[:, 0]
            torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_rows_end_at_stop_ids_and_stop_strings_themselves_included(model, prompts):
    whole = texts(generate(model, prompts, NEW, draft_tokens=3))
    stop = whole[0][4]
    got = texts(generate(model, prompts, NEW, draft_tokens=3, stop_ids=[stop]))
    for row, full in zip(got, whole):
        end = full.index(stop) + 1 if stop in full else NEW
        assert row == full[:end]

    def decode(tokens):
        return "".join(chr(97 + t) for t in tokens)

    text = decode(whole[2])
    got = texts(
        generate(model, prompts, NEW, draft_tokens=3, stop_strings=[text[5:8]], decode=decode)
    )
    for row, full in zip(got, map(decode, whole)):
        end = full.find(text[5:8])
        assert decode(row) == (full if end < 0 else full[: end + 3])


def test_eos_of_the_config_ends_a_row(model, prompts):
    whole = texts(generate(model, prompts, NEW))[3]
    model = copy.copy(model)
    model.config = model.config.replace(eos_token_id=[whole[6], 99])
    row = texts(generate(model, [prompts[3]], NEW))[0]
    assert row == whole[: whole.index(whole[6]) + 1]
    assert texts(generate(model, [prompts[3]], NEW, stop_ids=()))[0] == whole


def test_streamer_sees_every_token_once_and_in_order(model, prompts):
    seen = {i: [] for i in range(5)}
    got = generate(
        model,
        prompts,
        NEW,
        draft_tokens=3,
        max_slots=2,
        streamer=lambda r, new: seen[r].extend(new),
    )
    assert texts(got) == list(seen.values())


def test_report_counts_what_happened(model, prompts):
    got, report = generate(model, prompts, NEW, draft_tokens=3, return_report=True)
    assert report.new_tokens == sum(map(len, texts(got))) == 5 * NEW
    assert report.prompt_tokens == 67
    assert report.offered == [report.rows] * 3
    assert report.accepted == sorted(report.accepted, reverse=True)
    assert report.draft_lengths == {3: report.steps}
    assert {"prefill", "draft", "model", "accept", "commit"} == set(report.parts)
    assert 0 < sum(report.parts.values()) <= report.seconds
    assert "drafts kept by depth" in str(report)


@pytest.mark.parametrize(
    "format, rounding",
    [
        ("float32", "nearest"),
        ("float16", "stochastic"),
        ("int8", "stochastic"),
        ("float8_e4m3fn", "nearest"),
    ],
)
def test_batch_invariant_text_does_not_depend_on_drafts_to_the_last_bit(
    single, prompts, format, rounding
):
    options = dict(ssm_dtype=getattr(torch, format), rounding=rounding, seed=3, logprobs=True)
    with tigon.batch_invariant():
        plain, plain_logs = generate(single, prompts[:3], 20, draft_tokens=0, **options)
        for changes in (dict(draft_tokens=3), dict(draft_tokens=7, max_slots=2)):
            got, logs = generate(single, prompts[:3], 20, **options, **changes)
            assert texts(got) == texts(plain)
            assert all(torch.equal(a, b) for a, b in zip(logs, plain_logs))


@pytest.mark.parametrize("rule", ["token", "block", "strict", "greedy"])
def test_half_precision_models_draft_and_verify_by_every_rule(single, prompts, rule):
    model = copy.deepcopy(single).bfloat16()
    got = generate(model, prompts, 6, draft_tokens=3, rule=rule, temperature=1.0, seed=2)
    assert [row.numel() for row in got] == [6] * 5


def test_settings_may_differ_by_row_in_any_number_format(model, prompts):
    hot = torch.tensor([0.0, 1.0, 0.0, 0.7, 0.0], dtype=torch.float64)
    options = dict(temperature=hot, top_k=torch.tensor([0, 5, 3, 0, 0]), rule="strict", seed=9)
    expected = texts(generate(model, prompts, NEW, draft_tokens=0, **options))
    for way in (dict(draft_tokens=3, max_slots=2), dict(tree=(2, 2))):
        assert texts(generate(model, prompts, NEW, **options, **way)) == expected
    greedy = texts(generate(model, prompts, NEW, draft_tokens=0))
    assert [expected[i] for i in (0, 2, 4)] == [greedy[i] for i in (0, 2, 4)]


def test_a_report_counts_tokens_behind_a_stop_for_nothing(model, prompts):
    prompt = prompts[2]
    got, report = generate(model, [prompt], 3, draft_tokens=6, return_report=True)
    assert report.kept == 2 and report.acceptance_length <= 2


def test_a_model_without_a_drafter_decodes_without_drafts(model, prompts):
    expected = texts(generate(model, prompts, NEW, draft_tokens=0))
    model = copy.deepcopy(model)
    model.mtp = None
    assert texts(generate(model, prompts, NEW)) == expected
    with pytest.raises(ValueError, match="draft_tokens=2, but the model has no MTP head"):
        generate(model, prompts, NEW, draft_tokens=2)


def test_nan_logits_are_an_error_that_names_the_row(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.backbone.embeddings.weight[7] = float("nan")
    bad = torch.tensor([7, 1])
    with pytest.raises(RuntimeError, match="NaN in row 1"):
        generate(model, [torch.tensor([1, 2]), bad], 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=[torch.tensor([])]), "prompt 0 must be a tensor"),
        (dict(max_new_tokens=-1), "max_new_tokens must not be negative"),
        (dict(temperature=-0.5), "temperature must not be negative"),
        (dict(rule="relaxed"), "rule='relaxed', allowed: token, block, strict, greedy"),
        (dict(draft_tokens=16), "draft_tokens=16 must be 0 to 15 or 'auto'"),
        (dict(draft_tokens="many"), "draft_tokens='many' must be"),
        (dict(draft_tokens="auto", seed=1, temperature=1.0), "needs rule 'strict' or 'greedy'"),
        (dict(tree=(2, 2), temperature=1.0), "a tree is verified by rule"),
        (dict(tree=(6, 6)), "at most 32 nodes"),
        (dict(tree=(2, 2), draft_tokens=3), "a tree of depth 2"),
        (dict(stop_strings=["a"]), "stop_strings need decode"),
        (dict(seed=torch.zeros(2)), r"seed has shape \(2,\), expected \(1,\)"),
        (dict(max_slots=-1), "max_slots=-1 must be positive"),
        (dict(max_slots=0), "max_slots=0 must be positive"),
        (dict(tree=(1,) * 20), "is 20 deep, allowed: 15"),
        (dict(tree=(2,), rollback="snapshot"), "a tree needs rollback='replay'"),
        (dict(stop_strings=["a", ""], decode=str), "an empty stop string"),
        (dict(top_k=torch.tensor([1, 2])), r"top_k has shape \(2,\), expected \(1,\) or a number"),
        (dict(prompts=[torch.tensor([0.5])]), "prompt 0 must be a tensor"),
        (dict(rollback="undo"), "rollback must be 'replay', 'snapshot'"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(model, changes, message):
    options = dict(prompts=[torch.tensor([1])], max_new_tokens=3) | changes
    with pytest.raises(ValueError, match=message):
        generate(model, options.pop("prompts"), options.pop("max_new_tokens"), **options)


def test_seeds_of_rows_and_of_calls_differ():
    seen = set()
    for seed, rows in itertools.product((0, 1, 2, 2**40, -1), (4,)):
        seen |= set(_seeds(seed, rows, "cpu").tolist())
    assert len(seen) == 20 and min(seen) >= 0


def test_step_waits_for_nothing(single, prompts, no_host_sync, monkeypatch):
    """Prefill, a chain, a tree and no drafts, with every read of a tensor's value forbidden."""
    from tigon.generation.decoder import Decoder
    from tigon.generation.sampling import Sampling
    from tigon.generation.tree import DraftTree

    tree = DraftTree((2, 2))
    cache = single.allocate_cache(3, 120, rollback="replay", tokens=tree.nodes)
    sampling = Sampling("strict", cache.seeds, 1.0)
    drafter = Drafter(single, 3, 120, 64)
    decoder = Decoder(single, cache, sampling, drafter, logprobs=True)
    ids, slots = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([2, -1])
    with torch.no_grad():
        step = decoder.prefill(torch.tensor([2, 0]), ids, torch.tensor([5, 3]))
        for drafts in (3, 0, 2):
            step = decoder.step(slots, step.tokens[:, 0].clamp(min=0), drafts)
        decoder.tree = tree
        decoder.step(slots, step.tokens[:, 0].clamp(min=0), 2)
    assert decoder_module.MOST_STEPPED >= 32
