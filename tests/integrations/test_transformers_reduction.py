"""tigon.patch(model, reduction=…): NemotronH with tokens dropped, against its own blocks on the kept lists."""

import copy
import pickle

import pytest
import torch

import tigon
from tests.integrations.test_transformers import VOCAB, nemotron
from tigon.models.reduction_schedule import ReductionSchedule
from tigon.modules import Reducible, TokenReducer

LINEAR = ReductionSchedule("linear", final=0.2)
REDUCERS = {
    "both": LINEAR,
    "attention": TokenReducer(LINEAR, scores="attention"),
    "decay": TokenReducer(LINEAR, decay=True, queries="last"),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def prompts(rows=1):
    ids = torch.randint(0, VOCAB, (rows, 40))
    mask = torch.zeros(rows, 40, dtype=torch.bool)
    for r in range(rows):
        mask[r, 3 + r : 30 + r] = True
    return ids, mask


def pair(reducer=LINEAR, **changes):
    layers = [
        "linear_attention",
        "full_attention",
        "moe",
        "linear_attention",
        "full_attention",
        "linear_attention",
    ]
    model = nemotron(layers_block_type=layers, **changes).eval()
    patched = copy.deepcopy(model)
    tigon.patch(patched, reduction=reducer)
    return model, patched


def run_on(model, ids, kept):
    """Logits of transformers' own blocks, each on its own tokens of one sequence ids (l)."""
    h, before = model.model.embeddings(ids), list(range(len(ids)))
    for block, now in zip(model.model.layers, kept, strict=True):
        h = block(
            h[[before.index(i) for i in now.tolist()]][None], attention_mask=causal(block, len(now))
        )[0]
        before = now.tolist()
    return model.lm_head(model.model.norm_f(h))


def causal(block, n):
    if block.block_type != "full_attention":
        return None
    return torch.full((n, n), -torch.inf).triu(1)[None, None]


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", REDUCERS)
def test_prefill_and_decode_equal_the_blocks_run_on_the_recorded_lists(name, kernel):
    model, patched = pair(REDUCERS[name])
    for m in (model, patched):
        m.set_attn_implementation(kernel)
    ids, mask = prompts(2)
    out = patched(ids, reducible=mask, use_cache=True)
    cache, kept = out.past_key_values, out.past_key_values.kept_tokens
    new = torch.randint(0, VOCAB, (2, 7))
    decoded = [
        patched(piece, past_key_values=cache, use_cache=True).logits
        for piece in new.split([1, 1, 4, 1], 1)
    ]
    assert out.logits.shape[1] < 20
    for r in range(2):
        lists = [kept.of(l, r) for l in range(6)]
        torch.testing.assert_close(out.logits[r], run_on(model, ids[r], lists), **CLOSE)
        lists = [torch.cat([now.long(), torch.arange(40, 47)]) for now in lists]
        expected = run_on(model, torch.cat([ids[r], new[r]]), lists)[-7:]
        torch.testing.assert_close(torch.cat(decoded, 1)[r], expected, **CLOSE)
    held = [cache.layers[l].get_seq_length() for l in (1, 4)]
    assert held == [kept.counts[l][0] + 7 for l in (1, 4)] and held[0] > held[1]


@torch.no_grad()
def test_it_chooses_what_hybridlm_chooses_on_the_same_weights(tmp_path):
    model, patched = pair()
    model.save_pretrained(tmp_path)
    ours = tigon.models.HybridLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids, mask = prompts()
    out = patched(ids, reducible=mask, use_cache=True)
    logits, kept = ours(ids, reduction=LINEAR, reducible=mask, return_plan=True)
    for a, b in zip(kept.index, out.past_key_values.kept_tokens.index, strict=True):
        assert a.tolist() == b.tolist()
    torch.testing.assert_close(logits, out.logits, **CLOSE)


@torch.no_grad()
def test_keep_all_and_calls_without_a_mask_are_the_patched_model_bit_for_bit():
    model, patched = pair(ReductionSchedule("linear", final=1.0))
    plain = copy.deepcopy(model)
    tigon.patch(plain)
    ids, mask = prompts(2)
    expected = plain(ids, use_cache=True)
    for out in (patched(ids, reducible=mask, use_cache=True), patched(ids, use_cache=True)):
        assert torch.equal(out.logits, expected.logits)
    step = patched(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    wanted = plain(ids[:, :1], past_key_values=expected.past_key_values, use_cache=True)
    assert torch.equal(step.logits, wanted.logits)


@torch.no_grad()
def test_generate_hands_the_mask_to_the_prompt_alone():
    _, patched = pair()
    ids, mask = prompts()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)
    found = patched.generate(ids, reducible=mask, **options)
    out = patched(ids, reducible=mask, use_cache=True)
    for token in found[0, 40:]:
        assert int(out.logits[0, -1].argmax()) == token
        out = patched(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)


def test_patched_reduction_copies_pickles_and_comes_off():
    model, patched = pair()
    ids, mask = prompts()
    expected = patched(ids, reducible=mask).logits
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert torch.equal(other(ids, reducible=mask).logits, expected)
        assert other.model.forward.args[0] is other.model
    expected.sum().backward()
    assert patched.model.embeddings.weight.grad.any()
    tigon.patch(patched)  # without a reduction: none
    assert "forward" not in patched.model.__dict__ and "forward" not in patched.__dict__
    tigon.patch(patched, LINEAR)
    report = tigon.unpatch(patched)
    assert "NemotronHModel" in str(report) and "forward" not in patched.model.__dict__
    assert "forward" not in patched.__dict__
    assert torch.equal(patched(ids).logits, model(ids).logits)


@torch.no_grad()
def test_what_a_dense_cache_cannot_hold_is_refused_by_name():
    _, patched = pair()
    ids, mask = prompts(2)
    for match, options in (
        (
            "equally many tokens",
            {"reducible": mask & (torch.arange(40) < torch.tensor([[20], [25]]))},
        ),
        ("reducible has shape", {"reducible": mask[:, :9]}),
        ("padded", {"reducible": mask, "attention_mask": mask.long()}),
        ("labels", {"reducible": mask, "labels": ids}),
    ):
        with pytest.raises(ValueError, match=match):
            patched(ids, **options)
    alone = Reducible.of(mask[:1])
    assert patched(ids[:1], reducible=alone).logits.shape[1] < 40
    from tests.integrations.test_transformers import mamba2

    with pytest.raises(ValueError, match="needs a NemotronH"):
        tigon.patch(mamba2(), reduction=LINEAR)
    with pytest.raises(TypeError, match="schedule"):
        tigon.patch(pair()[0], reduction=0.25)
