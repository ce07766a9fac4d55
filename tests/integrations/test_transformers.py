"""tigon.patch on transformers' NemotronH and Mamba2: same logits, caches, gradients; nothing else touched."""

import copy
import io
import pickle

import pytest
import torch

import tigon

transformers = pytest.importorskip("transformers", minversion="5.23")

ATOL = 1e-4
VOCAB = 61


def nemotron(**changes):
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "layers_block_type": [
            "linear_attention",
            "mlp",
            "full_attention",
            "linear_attention",
            "moe",
        ],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
        "ssm_state_size": 8,
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "n_groups": 3,
        "chunk_size": 8,
        "time_step_min": 1e-9,  # else the decode step differs, on purpose
        "time_step_floor": 0.05,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "initializer_range": 0.2,
    }
    config = transformers.NemotronHConfig(**(config | changes))
    return shake(transformers.NemotronHForCausalLM(config))


def mamba2(**changes):
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_heads": 6,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 3,
        "num_hidden_layers": 2,
        "chunk_size": 8,
        "initializer_range": 0.2,
    }
    return shake(transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**(config | changes))))


def shake(model):
    """Every parameter random: none may be left out of the maths."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("D", "dt_bias", "norm.weight", "norm_f.weight", "conv1d.bias")):
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


MODELS = {"nemotron_h": nemotron, "mamba2": mamba2}
CACHE = {"nemotron_h": "past_key_values", "mamba2": "cache_params"}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def twins(kind, **changes):
    """(model, patched copy)."""
    model = MODELS[kind](**changes)
    other = copy.deepcopy(model)
    tigon.patch(other)
    return model, other


def tokens(b=2, l=21):
    return torch.randint(3, VOCAB, (b, l))


def run(kind, model, ids, cache=None, **kwargs):
    out = model(ids, use_cache=True, **{CACHE[kind]: cache}, **kwargs)
    return out.logits, getattr(out, CACHE[kind])


@pytest.mark.parametrize("length", [1, 2, 8, 21])
@torch.no_grad()
def test_prefill_and_every_decode_step_give_the_unpatched_logits(kind, length):
    model, patched = twins(kind)
    ids = tokens(l=length + 5)
    past = [None, None]
    for piece in (ids[:, :length], *ids[:, length:].split(1, 1)):
        results = [run(kind, m, piece, c) for m, c in zip((model, patched), past)]
        (want, past[0]), (got, past[1]) = results
        torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    for a, b in zip(past[0].layers, past[1].layers):
        if hasattr(a, "conv_states"):
            torch.testing.assert_close(b.conv_states[0], a.conv_states[0], rtol=0, atol=ATOL)
            torch.testing.assert_close(
                b.recurrent_states[0], a.recurrent_states[0], rtol=0, atol=ATOL
            )


@torch.no_grad()
def test_several_tokens_continue_a_cache_with_padding_inside(kind):
    model, patched = twins(kind)
    ids = tokens(l=20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 10:12] = 0
    results = []
    for m in (model, patched):
        first, cache = run(kind, m, ids[:, :9], attention_mask=mask[:, :9])
        second, cache = run(kind, m, ids[:, 9:], cache, attention_mask=mask)
        results.append(torch.cat([first, second], 1)[mask.bool()])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("how", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generate_writes_the_same_text_from_left_padded_prompts(kind, how):
    model, patched = twins(kind)
    ids = tokens(b=3, l=9)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 4, 7)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    texts = [
        m.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **how
        )
        for m in (model, patched)
    ]
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_left_padded_row_decodes_like_the_row_alone(kind):
    _, patched = twins(kind)
    row = tokens(b=1, l=6)
    padded = torch.cat([torch.zeros(1, 4, dtype=row.dtype), row], 1)
    mask = (torch.arange(10) >= 4).long()[None]
    alone, cache = run(kind, patched, row)
    beside, cache2 = run(kind, patched, padded, attention_mask=mask)
    torch.testing.assert_close(beside[:, 4:], alone, rtol=0, atol=ATOL)
    step = tokens(b=1, l=1)
    more = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], 1)
    want = run(kind, patched, step, cache)[0]
    got = run(kind, patched, step, cache2, attention_mask=more)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)


@torch.no_grad()
def test_a_cache_filled_by_either_model_continues_in_the_other(kind):
    model, patched = twins(kind)
    ids = tokens(l=12)
    for first, second in ((model, patched), (patched, model)):
        want = run(kind, model, ids)[0][:, 10:]
        _, cache = run(kind, first, ids[:, :10])
        steps = [run(kind, second, ids[:, i : i + 1], cache)[0] for i in (10, 11)]
        torch.testing.assert_close(torch.cat(steps, 1), want, rtol=0, atol=ATOL)


@torch.no_grad()
def test_states_of_any_stride_are_updated_in_place(kind):
    _, patched = twins(kind)
    ids = tokens(l=6)
    want = run(kind, patched, ids)[0][:, 4:]
    _, cache = run(kind, patched, ids[:, :4])
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            for i, t in states.items():
                states[i] = t.transpose(1, 2).contiguous().transpose(1, 2)
    steps = [run(kind, patched, ids[:, i : i + 1], cache)[0] for i in (4, 5)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=0, atol=ATOL)


@torch.no_grad()
def test_recording_the_past_keeps_and_crops_the_same_convolution_inputs(kind):
    model, patched = twins(kind)
    ids = tokens(l=14)
    pair = []
    for m in (model, patched):
        logits, cache = run(kind, m, ids[:, :8])
        cache.activate_past_recording()
        seen = [logits]
        for piece in (ids[:, 8:11], ids[:, 11:12]):
            seen.append(run(kind, m, piece, cache)[0])
        mixers = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
        assert [layer.conv_states[0].shape[-1] for layer in mixers] == [4 + 3 + 1] * len(mixers)
        for layer in mixers:
            layer.crop(-2)
            layer.record_past = False
        # One token on the cropped, strided windows: the convolution must see them and shift them.
        kept = [layer.conv_states[0].clone() for layer in mixers]
        seen.append(run(kind, m, ids[:, 12:13], cache)[0])
        pair.append((torch.cat(seen, 1), kept, [layer.conv_states[0] for layer in mixers]))
    (want, kept, after), (got, kept2, after2) = pair
    torch.testing.assert_close(got, want, rtol=0, atol=ATOL)
    torch.testing.assert_close((kept2, after2), (kept, after), rtol=0, atol=ATOL)
    assert not torch.equal(kept[0], after[0])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_training_gives_the_unpatched_loss_and_gradients(kind, checkpointing):
    model, patched = twins(kind)
    ids = tokens()
    losses = []
    for m in (model, patched):
        m.train()
        if checkpointing and m is patched:
            m.gradient_checkpointing_enable({"use_reentrant": False})
        loss = m(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0])
    for (name, p), q in zip(model.named_parameters(), patched.parameters()):
        if p.grad is None:
            assert q.grad is None, name
            continue
        assert p.grad.abs().max() > 0 or "e_score" in name, f"{name} has no gradient to compare"
        torch.testing.assert_close(
            q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_decode_step_can_be_differentiated(kind):
    _, patched = twins(kind)
    ids = tokens(l=7)
    whole = patched(ids).logits[:, -1].square().sum()
    whole.backward()
    want = {n: p.grad.clone() for n, p in patched.named_parameters() if p.grad is not None}
    patched.zero_grad()
    _, cache = run(kind, patched, ids[:, :4])
    for i in (4, 5, 6):
        logits, cache = run(kind, patched, ids[:, i : i + 1], cache)
    logits[:, -1].square().sum().backward()
    mixer = [n for n in want if "conv1d" in n or "dt_bias" in n or "norm_f" in n or "D" in n]
    assert mixer
    for name, p in patched.named_parameters():
        if "norm_f" in name or "lm_head" in name:
            torch.testing.assert_close(p.grad, want[name], rtol=1e-3, atol=1e-4)
        elif name in mixer:
            assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("nemotron_h", {"time_step_min": 0.8}), ("mamba2", {"time_step_limit": (0.05, 0.6)})],
    ids=["nemotron_h", "mamba2"],
)
@torch.no_grad()
def test_decode_applies_the_time_step_limit_that_prefill_applies(kind, limit):
    model, patched = twins(kind, **limit)
    ids = tokens(l=10)
    want = run(kind, model, ids)[0]
    steps = {}
    for name, m in (("model", model), ("patched", patched)):
        logits, cache = run(kind, m, ids[:, :6])
        torch.testing.assert_close(logits, want[:, :6], rtol=0, atol=ATOL)
        steps[name] = torch.cat(
            [run(kind, m, ids[:, i : i + 1], cache)[0] for i in range(6, 10)], 1
        )
    torch.testing.assert_close(steps["patched"], want[:, 6:], rtol=0, atol=ATOL)
    assert (steps["model"] - want[:, 6:]).abs().max() > 10 * ATOL, "the limit does not bite here"


@pytest.mark.parametrize("bounds", ["seq_idx", "cu_seqlens", "cu_seq_lens_q"])
def test_packed_rows_keep_sequences_apart(bounds):
    mixer = nemotron().model.layers[0].mixer
    holder = torch.nn.ModuleList([mixer])
    tigon.patch(holder)
    lengths = [5, 1, 9]
    x = torch.randn(1, sum(lengths), 24)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    given = ids if bounds == "seq_idx" else torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    got = mixer(x, **{bounds: given})
    want = torch.cat([mixer(piece) for piece in x.split(lengths, 1)], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    if bounds == "seq_idx":
        rows = mixer(x.view(3, 5, 24), seq_idx=torch.tensor([[0] * 5, [0, 0, 1, 1, 1], [2] * 5]))
        want = [x[:, :5], x[:, 5:7], x[:, 7:10], x[:, 10:]]
        want = torch.cat([mixer(piece) for piece in want], 1).view(3, 5, 24)
        torch.testing.assert_close(rows, want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be combined with a cache"):
        mixer(x, transformers.DynamicCache(config=mixer.config), **{bounds: given})


@torch.no_grad()
def test_a_patched_mixer_never_waits_for_the_device(no_host_sync):
    model = nemotron()
    tigon.patch(model)
    mixer, norm = model.model.layers[0].mixer, model.model.layers[0].norm
    cache = transformers.DynamicCache(config=model.config)
    mask = torch.ones(2, 9)
    mixer(norm(torch.randn(2, 9, 24)), cache, mask)
    mixer(norm(torch.randn(2, 1, 24)), cache)
    mixer(norm(torch.randn(2, 5, 24)), cache)
    mixer(torch.randn(1, 9, 24), cu_seqlens=torch.tensor([0, 4, 9]))


@torch.no_grad()
def test_compiled_forward_is_one_graph_with_the_same_logits(kind):
    changes = {"layers_block_type": ["linear_attention", "full_attention", "moe"]}
    _, patched = twins(kind, **(changes if kind == "nemotron_h" else {"num_hidden_layers": 1}))
    ids = tokens()
    want = patched(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, want, rtol=0, atol=ATOL)


@torch.no_grad()
def test_compiled_decode_step_updates_the_cache():
    _, patched = twins("mamba2", num_hidden_layers=1)
    ids = tokens(l=12)
    want = patched(ids).logits[:, 9:]
    _, cache = run("mamba2", patched, ids[:, :9])
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    steps = [run("mamba2", compiled, ids[:, i : i + 1], cache)[0] for i in range(9, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_stays_as_near_to_fp32_as_the_unpatched_model(kind, dtype):
    changes = {"layers_block_type": ["linear_attention", "full_attention", "linear_attention"]}
    model = MODELS[kind](**(changes if kind == "nemotron_h" else {}))
    ids = tokens()
    want = model(ids).logits
    model.to(dtype)
    before = (model(ids).logits - want).square().mean()
    tigon.patch(model)
    logits, cache = run(kind, model, ids[:, :-1])
    last, _ = run(kind, model, ids[:, -1:], cache)
    after = (torch.cat([logits, last], 1) - want).square().mean()
    assert after <= 4 * before, f"{after:.2g} against {before:.2g}"


@torch.no_grad()
def test_unpatch_restores_the_model_exactly(kind):
    model = MODELS[kind]()
    ids = tokens()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    want = model(ids).logits
    report = tigon.patch(model)
    assert report.counts == tigon.unpatch(model).counts
    for name, m in model.named_modules():
        assert m.__dict__.keys() == before[name].keys(), name
    assert torch.equal(model(ids).logits, want)
    assert tigon.unpatch(model).already == report.total


def test_patch_reports_kinds_and_twice_is_once(kind):
    model = MODELS[kind]()
    first = tigon.patch(model)
    second = tigon.patch(model)
    names = {
        "nemotron_h": {
            "NemotronHMamba2Mixer": 2,
            "NemotronHRMSNorm": 6,
            "NemotronHRMSNormGated": 2,
            "NemotronHMoE": 1,
            "NemotronHTopkRouter": 1,
            "NemotronHExperts": 1,
        },
        "mamba2": {"Mamba2Mixer": 2, "Mamba2RMSNorm": 3, "MambaRMSNormGated": 2},
    }
    assert first.counts == second.counts == names[kind]
    assert (first.already, second.already) == (0, first.total)
    assert "already" in str(second)
    assert all(type(m).__name__ in str(first) for m in model.modules() if "forward" in vars(m))
    assert tigon.unpatch(model).already == 0
    assert not any("forward" in vars(m) for m in model.modules())


@torch.no_grad()
def test_other_models_and_saved_files_are_untouched(kind, tmp_path):
    model, patched = twins(kind)
    assert not any("forward" in vars(m) for m in model.modules())
    assert patched.state_dict().keys() == model.state_dict().keys()
    patched.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any("forward" in vars(m) for m in loaded.modules())
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_copies_and_pickles_are_patched_on_their_own_weights(kind):
    _, patched = twins(kind)
    ids = tokens()
    want = patched(ids).logits
    buffer = io.BytesIO()
    torch.save(patched, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(patched),
        pickle.loads(pickle.dumps(patched)),
        torch.load(buffer, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(ids).logits, want)
        for p in other.parameters():
            p.zero_()
        assert not torch.equal(other(ids).logits, want), (
            "the copy computes with the original's weights"
        )
    assert torch.equal(patched(ids).logits, want)


@torch.no_grad()
def test_hooks_of_accelerate_still_fire_and_survive_unpatching(kind):
    """accelerate keeps the forward that it wraps in `_old_forward`; a stand-in, as it is not installed."""
    model = MODELS[kind]()
    mixer = next(m for m in model.modules() if type(m).__name__.endswith("Mamba2Mixer"))
    fired = []

    class Hook:
        def pre_forward(self, module):
            fired.append("in")

        def post_forward(self, module, output):
            fired.append("out")

    mixer.conv1d._hf_hook = Hook()
    mixer._old_forward = mixer.forward
    mixer.forward = lambda *args, **kwargs: (
        fired.append("mixer"),
        mixer._old_forward(*args, **kwargs),
    )[1]
    wrapper = mixer.forward
    want = model(tokens(l=3)).logits.shape
    seen, fired[:] = list(fired), []
    tigon.patch(model)
    assert mixer.forward is wrapper
    assert model(tokens(l=3)).logits.shape == want
    assert fired == seen == ["mixer", "in", "out"]
    tigon.unpatch(model)
    assert mixer.forward is wrapper
    assert mixer._old_forward.__func__ is type(mixer).forward


def test_what_cannot_be_patched_is_refused_by_name_and_left_alone():
    with pytest.raises(ValueError, match="NemotronH and Mamba2 models of transformers"):
        tigon.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="NemotronH"):
        config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=4, vocab_size=7)
        tigon.patch(transformers.GPT2LMHeadModel(config))
    cases = {
        "activation 'gelu'": mamba2(hidden_act="gelu"),
        "conv_kernel 9": mamba2(conv_kernel=9),
        "size of 257": mamba2(state_size=257),
    }
    with pytest.MonkeyPatch.context() as old:
        old.delattr(transformers.Cache, "is_recording_past")
        with pytest.raises(ValueError, match="pip install -U transformers"):
            tigon.patch(mamba2())
    own = mamba2()
    own.backbone.layers[1].norm.forward = lambda x: x
    cases["layers.1.norm .* forward of its own"] = own
    for message, model in cases.items():
        before = [dict(m.__dict__) for m in model.modules()]
        with pytest.raises(ValueError, match=message):
            tigon.patch(model)
        assert [m.__dict__.keys() for m in model.modules()] == [d.keys() for d in before]
