"""HybridLM's paths against each other: packed, cached, ragged, forked; mixed precision; the decode loop."""

from itertools import pairwise

import pytest
import torch

from tigon.generation import generate
from tigon.models import PRESETS, HybridConfig, HybridLM

CONFIG = HybridConfig(
    pattern="M-*M",
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
    initializer_range=0.2,
    mamba_ssm_cache_dtype="float64",
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HybridLM(CONFIG, dtype=torch.float64)


def tokens(*shape):
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1))


def test_packed_sequences_equal_separate_ones_in_logits_and_gradients(model):
    ids, bounds = tokens(1, 50), [0, 13, 14, 50]
    packed = model(ids, torch.tensor(bounds))
    separate = torch.cat([model(ids[:, i:j]) for i, j in pairwise(bounds)], 1)
    torch.testing.assert_close(packed, separate)
    weight = torch.randn_like(packed)
    for got, expected in zip(
        torch.autograd.grad((packed * weight).sum(), list(model.parameters())),
        torch.autograd.grad((separate * weight).sum(), list(model.parameters())),
    ):
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_decode_and_chunked_prefill_equal_full_recomputation(model):
    ids = tokens(2, 60)
    cache = model.allocate_cache(2, 60)
    pieces = [model(piece, cache=cache) for piece in ids.split([21, 1, 1, 9, 27, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids))
    assert cache.lengths.tolist() == [60, 60]


@torch.no_grad()
def test_packed_prompts_then_ragged_decode_in_slots_equal_full_recomputation(model):
    ids = tokens(3, 40)
    cache, slots = model.allocate_cache(5, 40), torch.tensor([3, 0, 2])
    lengths = [7, 20, 1]
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths)])[None]
    model(packed, torch.tensor([0, 7, 27, 28]), cache, slots=slots)
    assert cache.lengths.tolist() == [20, 0, 1, 7, 0]
    full = model(ids)
    seen = torch.tensor(lengths)
    for counts in ([3, 1, 2], [18, 0, 5]):  # decode ops, then the scan
        counts = torch.tensor(counts)
        step = torch.stack(
            [row[n : n + 18] if n + 18 <= 40 else row[-18:] for row, n in zip(ids, seen)]
        )
        width = int(counts.max())
        logits = model(step[:, :width], cache=cache, slots=slots, num_tokens=counts)
        for r, n in enumerate(counts.tolist()):
            torch.testing.assert_close(logits[r, :n], full[r, seen[r] : seen[r] + n])
        seen += counts


@torch.no_grad()
def test_a_forked_slot_continues_like_its_source_and_a_reset_one_starts_anew(model):
    ids = tokens(1, 30)
    cache = model.allocate_cache(4, 40)
    model(ids[:, :20], cache=cache, slots=torch.tensor([2]))
    cache.fork(2, torch.tensor([0, 3]))
    chosen = cache.select(torch.tensor([3, 0]))
    expected = model(ids)[:, 20:]
    rest = ids[:, 20:].expand(2, -1)
    torch.testing.assert_close(model(rest, cache=chosen), expected.expand(2, -1, -1))
    torch.testing.assert_close(model(rest[:1], cache=cache, slots=torch.tensor([2])), expected)
    cache.reset(torch.tensor([0]))
    assert cache.lengths.tolist() == [0, 0, 30, 20]
    torch.testing.assert_close(model(ids, cache=cache), model(ids))
    cache.reset()
    torch.testing.assert_close(model(ids, cache=cache), model(ids))
    assert cache.lengths.tolist() == [30, 0, 0, 0]


@torch.no_grad()
def test_a_full_cache_and_wrong_slots_are_refused_before_anything_is_written(model):
    cache = model.allocate_cache(2, 10)
    model(tokens(2, 8), cache=cache)
    with pytest.raises(ValueError, match="would hold 11 tokens, max_length=10"):
        model(tokens(2, 3), cache=cache)
    assert cache.lengths.tolist() == [8, 8]
    model(tokens(2, 3), cache=cache, num_tokens=torch.tensor([2, 1]))
    with pytest.raises(ValueError, match="3 rows for 2 slots"):
        model(tokens(3, 1), cache=cache)
    with pytest.raises(ValueError, match=r"slots has shape \(1,\), expected \(2,\)"):
        model(tokens(2, 1), cache=cache, slots=torch.tensor([0]))
    with pytest.raises(ValueError, match="pass cache"):
        model(tokens(2, 1), slots=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\)"):
        model(tokens(3))


def test_labels_give_the_mean_cross_entropy_of_what_counts(model):
    ids = tokens(2, 12)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    nats = -model(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean()
    torch.testing.assert_close(model(ids, labels=labels), nats)


def test_residuals_stay_fp32_in_a_bf16_model_if_the_config_says_so():
    torch.manual_seed(0)
    seen = []
    for fp32 in (False, True):
        model = HybridLM(CONFIG.replace(residual_in_fp32=fp32), dtype=torch.bfloat16)
        model.backbone.layers[-1].register_forward_hook(lambda _, args, out: seen.append(out.dtype))
        assert model(tokens(1, 9)).dtype == torch.float32
    assert seen == [torch.bfloat16, torch.float32]


@torch.no_grad()
def test_generate_draws_what_the_model_says_for_prompts_of_different_lengths(model):
    prompts = [tokens(9), tokens(4)]
    out = generate(model, prompts, 6)
    for prompt, new in zip(prompts, out):
        ids = torch.cat([prompt, new])[None]
        assert torch.equal(model(ids).argmax(-1)[0, len(prompt) - 1 : -1], new)
    drawn = [
        torch.stack(generate(model, prompts, 20, temperature=1.0, seed=seed, stop_ids=()))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_model_is_the_same_for_the_same_seed():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(HybridLM(PRESETS["tiny"]))
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models)))
