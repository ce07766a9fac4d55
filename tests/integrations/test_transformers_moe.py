"""transformers' expert layers on Tigon's ops: NemotronH patched, and the experts of other models by name."""

import copy
import pickle

import pytest
import torch

import tigon

transformers = pytest.importorskip("transformers", minversion="5.23")

ATOL = 1e-4
VOCAB = 61
VARIANTS = {
    "latent": {"moe_latent_size": 16},
    "full width": {},
    "groups": {"moe_latent_size": 16, "n_group": 4, "topk_group": 2},
    "weights as they are": {"norm_topk_prob": False, "mlp_bias": True},
}


def eager(config, kind):
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.dim() > 1 or "e_score" in name:
                t.add_(0.2 * torch.randn_like(t))
    return model.eval()


def nemotron(**changes):
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "layers_block_type": ["moe", "full_attention", "moe"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "routed_scaling_factor": 2.5,
    }
    config = transformers.NemotronHConfig(**(config | changes))
    return eager(config, transformers.NemotronHForCausalLM)


def gated(name):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_experts_per_tok": 3,
        "pad_token_id": 0,
    }
    if name == "mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=8)
        return eager(config, transformers.MixtralForCausalLM)
    config = transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=24, num_experts=8)
    return eager(config, transformers.Qwen3MoeForCausalLM)


MODELS = {
    "nemotron": nemotron,
    "mixtral": lambda: gated("mixtral"),
    "qwen3": lambda: gated("qwen3"),
}


def tokens(b=2, l=21):
    return torch.randint(3, VOCAB, (b, l), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def twins(request):
    """(model, patched copy)."""
    model = nemotron(**request.param)
    patched = copy.deepcopy(model)
    report = tigon.patch(patched)
    assert report.counts["NemotronHMoE"] == report.counts["NemotronHExperts"] == 2
    return model, patched


def assert_same_training(model, other):
    ids, losses = tokens(), []
    for m in (model, other):
        m.train()
        losses.append(m(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.grad.abs().max() > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_patched_layers_give_the_unpatched_logits_and_continuations(twins):
    model, patched = twins
    ids = tokens()
    want = model(ids).logits
    assert want.abs().max() > 1
    torch.testing.assert_close(patched(ids).logits, want, rtol=0, atol=ATOL)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(patched.generate(ids, **options), model.generate(ids, **options))


def test_patched_layers_give_the_unpatched_gradients(twins):
    assert_same_training(*twins)


@torch.no_grad()
def test_unpatching_restores_the_layers_exactly():
    model = nemotron()
    before, want = {n: dict(m.__dict__) for n, m in model.named_modules()}, model(tokens()).logits
    tigon.patch(model)
    tigon.unpatch(model)
    for name, m in model.named_modules():
        assert m.__dict__.keys() == before[name].keys(), name
    assert torch.equal(model(tokens()).logits, want)


@torch.no_grad()
def test_copies_are_patched_on_their_own_weights_and_hooks_of_the_parts_fire():
    model = nemotron()
    tigon.patch(model)
    want = model(tokens()).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens()).logits, want)
        other.model.layers[0].mixer.experts.down_proj.zero_()
        assert not torch.equal(other(tokens()).logits, want)
    fired = []
    mixer = model.model.layers[0].mixer
    for part in (mixer.gate, mixer.experts, mixer.fc1_latent_proj, mixer.shared_experts):
        part.register_forward_hook(lambda m, args, out: fired.append(type(m).__name__))
    out = model(tokens(), output_router_logits=True)
    assert fired == ["NemotronHTopkRouter", "Identity", "NemotronHExperts", "NemotronHMLP"]
    assert [tuple(logits.shape) for logits in out.router_logits] == [(42, 12)] * 2


@torch.no_grad()
def test_a_patched_layer_never_waits_for_the_device(no_host_sync):
    model = nemotron(**VARIANTS["groups"])
    tigon.patch(model)
    model.model.layers[0].mixer(torch.randn(2, 9, 32))


def test_a_compiled_patched_layer_is_one_graph(twins):
    _, patched = twins
    mixer, x = patched.model.layers[0].mixer, torch.randn(2, 9, 32)
    want = mixer(x)
    grads = torch.autograd.grad(want.square().sum(), list(mixer.parameters()))
    torch._dynamo.reset()
    got = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, want)
    again = torch.autograd.grad(got.square().sum(), list(mixer.parameters()))
    torch.testing.assert_close(again, grads)


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_the_unpatched_layer():
    model = nemotron(**VARIANTS["latent"])
    ids = tokens()
    want = model(ids).logits
    model.to(torch.bfloat16)
    before = (model(ids).logits - want).square().mean()
    tigon.patch(model)
    after = (model(ids).logits - want).square().mean()
    assert after <= 2 * before, f"{after:.2g} against {before:.2g}"


@pytest.mark.parametrize("name", MODELS)
def test_experts_by_name_give_the_eager_logits_and_gradients(name):
    tigon.register_experts()
    tigon.register_experts()
    model = MODELS[name]()
    other = copy.deepcopy(model)
    other.set_experts_implementation("tigon")
    assert other.config._experts_implementation == "tigon"
    with torch.no_grad():
        torch.testing.assert_close(
            other(tokens()).logits, model(tokens()).logits, rtol=0, atol=ATOL
        )
    assert_same_training(model, other)
    other.set_experts_implementation("eager")
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_experts_by_name_compute_and_not_the_eager_ones(monkeypatch):
    from tigon.integrations import transformers_moe

    tigon.register_experts()
    model = MODELS["qwen3"]()
    model.set_experts_implementation("tigon")
    calls = []
    real = transformers_moe.moe_experts
    monkeypatch.setattr(
        transformers_moe, "moe_experts", lambda *a, **k: calls.append(k) or real(*a, **k)
    )
    model(tokens())
    assert [call["activation"] for call in calls] == ["swiglu"] * 2


@torch.no_grad()
def test_choices_past_the_last_expert_are_skipped():
    tigon.register_experts()
    model = MODELS["mixtral"]()
    experts = model.model.layers[0].mlp.experts
    x, weights = torch.randn(5, 32), torch.rand(5, 3)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(5)])
    skipped = torch.rand(5, 3) < 0.4
    want = experts(x, index, weights * ~skipped)
    model.set_experts_implementation("tigon")
    got = experts(x, torch.where(skipped, 8, index), weights)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_experts_that_do_not_fit_are_refused_by_name():
    tigon.register_experts()
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 4,
    }
    model = eager(transformers.GptOssConfig(**sizes), transformers.GptOssForCausalLM)
    model.set_experts_implementation("tigon")
    with pytest.raises(ValueError, match="'tigon': GptOssExperts has biases"):
        model(tokens())
    gelu = transformers.MixtralConfig(**sizes, hidden_act="gelu")
    model = eager(gelu, transformers.MixtralForCausalLM)
    model.set_experts_implementation("tigon")
    with pytest.raises(ValueError, match="MixtralExperts has activation GELU"):
        model(tokens())
    silu = nemotron(mlp_hidden_act="silu")
    before = [dict(m.__dict__) for m in silu.modules()]
    with pytest.raises(ValueError, match=r"mixer\.experts .* has activation SiLU"):
        tigon.patch(silu)
    assert [m.__dict__.keys() for m in silu.modules()] == [d.keys() for d in before]
