"""E layers: transformers' NemotronH with routed experts as the second opinion, both kinds of file, losses, balance."""

import copy
import json
import shutil

import pytest
import torch

from tigon.generation import generate
from tigon.models import HybridConfig, HybridLM
from tigon.modules import router_losses

transformers = pytest.importorskip("transformers", minversion="5")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "hybrid_override_pattern": "ME*E",
    "vocab_size": 90,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "time_step_min": 1e-6,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
}
VARIANTS = {
    "latent": {"moe_latent_size": 16},
    "full width": {},
    "groups": {"moe_latent_size": 16, "n_group": 4, "topk_group": 2},
    "biases, weights as they are": {
        "moe_latent_size": 16,
        "mlp_bias": True,
        "norm_topk_prob": False,
    },
}


def theirs(**options):
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(**SIZES, **options)
    config._experts_implementation = "eager"
    model = transformers.NemotronHForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.2 if p.dim() > 1 else 0.05) * torch.randn_like(p))
        for name, bias in model.named_buffers():
            if "e_score" in name:
                bias.copy_(0.3 * torch.randn_like(bias))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    model = theirs(**VARIANTS["latent"])
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request, tmp_path):
    """(their model, ours read from their files)."""
    model = theirs(**request.param)
    model.save_pretrained(tmp_path / "theirs")
    return model, HybridLM.from_pretrained(tmp_path / "theirs")


def tokens(*shape):
    return torch.randint(0, 90, shape, generator=torch.Generator().manual_seed(1))


def own(name):
    return name.replace("model.", "backbone.")


@torch.no_grad()
def test_logits_of_their_checkpoint_equal_theirs_in_prefill_and_decode(pair):
    model, ours = pair
    ids = tokens(2, 30)
    want = model(ids).logits
    assert want.abs().max() > 1
    torch.testing.assert_close(ours(ids), want, rtol=0, atol=1e-4)
    cache = ours.allocate_cache(2, 30)
    assert cache.layers[1] is None and cache.layers[3] is None
    steps = [ours(piece, cache=cache) for piece in ids.split([20, 1, 1, 8], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=0, atol=1e-4)


@torch.no_grad()
def test_greedy_continuations_equal_theirs(pair):
    model, ours = pair
    ids = tokens(1, 9)
    want = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 9:]
    assert torch.equal(generate(ours, [ids[0]], 12, stop_ids=())[0], want)


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(draft_tokens=4), dict(tree=(2, 2, 1))], ids=str)
def test_greedy_continuations_with_drafts_equal_theirs(pair, options):
    """Their weights; a drafter of random ones, which guesses now and then."""
    model, ours = pair
    ids = tokens(2, 9)
    theirs = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)
    mask = torch.ones_like(ids)  # else they hide tokens that look like padding
    want = model.generate(ids, attention_mask=mask, **theirs)[:, 9:]
    ours = copy.copy(ours)
    ours.mtp = HybridLM(ours.config.replace(mtp_pattern="*E")).mtp
    got = generate(ours, ids, 24, stop_ids=(), **options)
    assert torch.equal(torch.stack(got), want)


def test_gradients_equal_theirs(pair):
    model, ours = pair
    ids = tokens(2, 25)
    model(ids, labels=ids).loss.backward()
    ours(ids[:, :-1], labels=ids[:, 1:]).backward()
    grads = {own(n): p.grad for n, p in model.named_parameters()}
    for name, p in ours.named_parameters():
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=3e-6, msg=name)


@torch.no_grad()
def test_what_is_saved_is_read_by_transformers_bit_for_bit(pair, tmp_path):
    model, ours = pair
    ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert "backbone.layers.1.mixer.experts.11.down_proj.weight" in index["weight_map"]
    again, info = transformers.NemotronHForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, got), want in zip(again.state_dict().items(), model.state_dict().values()):
        assert torch.equal(got, want), name


def rewrite(folder, target, change):
    """A copy of a checkpoint whose tensors went through `change(dict)`."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    safetensors_torch.save_file(change(tensors) or tensors, target / "model.safetensors")
    return target


def test_stacked_experts_are_read_like_single_ones(saved, tmp_path):
    model, folder = saved
    stacked = rewrite(folder, tmp_path / "stacked", lambda _: dict(model.state_dict()))
    want, got = (HybridLM.from_pretrained(f).state_dict() for f in (folder, stacked))
    assert want["backbone.layers.1.mixer.experts.up_proj"].shape == (12, 24, 16)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in got)


def test_experts_that_are_missing_are_named_one_by_one_or_all_together(saved, tmp_path):
    def spoil(t):
        for j in range(12):
            del t[f"{stem}3.mixer.experts.{j}.up_proj.weight"]
        del t[f"{stem}1.mixer.experts.5.down_proj.weight"]
        t[f"{stem}1.mixer.experts.12.down_proj.weight"] = torch.ones(16, 24)
        t[f"{stem}1.mixer.experts.2.down_proj.weight"] = torch.ones(16, 23)

    names = safetensors_torch.load_file(saved[1] / "model.safetensors")
    stem = next(n for n in names if "experts.0." in n).split("1.mixer")[0]
    with pytest.raises(ValueError) as error:
        HybridLM.from_pretrained(rewrite(saved[1], tmp_path / "spoiled", spoil))
    text = str(error.value)
    assert "unknown: " in text and "experts.12.down_proj.weight;" in text
    missing = text.partition("missing: ")[2].partition(";")[0].split(", ")
    assert missing == [
        "backbone.layers.1.mixer.experts.5.down_proj.weight",
        "backbone.layers.3.mixer.experts.up_proj",
    ]
    assert "experts.2.down_proj.weight has shape (16, 23), expected (16, 24)" in text


def test_a_bf16_checkpoint_keeps_the_router_bias_in_fp32(saved, tmp_path):
    model, folder = saved
    exact = model.model.layers[1].mixer.gate.e_score_correction_bias
    ours = HybridLM.from_pretrained(folder, dtype=torch.bfloat16)
    gate = ours.backbone.layers[1].mixer.gate
    assert (
        gate.weight.dtype == ours.backbone.layers[1].mixer.experts.up_proj.dtype == torch.bfloat16
    )
    assert torch.equal(gate.e_score_correction_bias, exact)
    ours.save_pretrained(tmp_path / "bf16")
    again = HybridLM.from_pretrained(tmp_path / "bf16").backbone.layers[1].mixer.gate
    assert torch.equal(again.e_score_correction_bias, exact)
    half = rewrite(folder, tmp_path / "half", lambda t: {k: v.bfloat16() for k, v in t.items()})
    bias = HybridLM.from_pretrained(half).backbone.layers[1].mixer.gate.e_score_correction_bias
    assert torch.equal(bias, exact.bfloat16().float()) and bias.dtype == torch.float32


def small(**changes):
    names = {k: v for k, v in SIZES.items() if k != "hybrid_override_pattern"}
    torch.manual_seed(0)
    config = HybridConfig(pattern="ME*E", **names, moe_latent_size=16, initializer_range=0.2)
    return HybridLM(config.replace(**changes), dtype=torch.float64)


def test_training_adds_the_router_losses_of_the_config_and_evaluation_does_not():
    model = small(router_aux_loss_coef=0.3, router_z_loss_coef=0.02)
    ids, labels = tokens(3, 20), tokens(3, 20)
    loss, routings = model(ids, labels=labels, return_routing=True)
    assert len(routings) == 2 and routings[0].score_sums.shape == (3, 12)
    bare = model.eval()(ids, labels=labels)
    torch.testing.assert_close(loss - bare, router_losses(routings, 0.3, 0.02))
    expected = sum(0.3 * r.aux_loss() + 0.02 * r.z_loss() for r in routings)
    torch.testing.assert_close(loss - bare, expected)
    assert expected > 0.1
    packed = model.train()(
        ids.flatten()[None], torch.tensor([0, 20, 40, 60]), labels=labels.flatten()[None]
    )
    torch.testing.assert_close(packed, loss)


def test_padding_is_seen_by_no_expert_and_no_loss():
    model = small(router_aux_loss_coef=0.3, router_z_loss_coef=0.02)
    ids, labels = tokens(2, 20), tokens(2, 20)
    mask = torch.arange(20) < torch.tensor([20, 13])[:, None]
    labels[~mask] = -100
    loss, routings = model(ids, labels=labels, mask=mask, return_routing=True)
    assert [int(r.counts.sum()) for r in routings] == [33 * 3] * 2
    bounds = torch.tensor([0, 20, 33])
    packed = model(ids[mask][None], bounds, labels=labels[mask][None])
    torch.testing.assert_close(loss, packed)
    cache = model.eval().allocate_cache(2, 20)
    _, routings = model(ids, cache=cache, num_tokens=torch.tensor([20, 13]), return_routing=True)
    assert [int(r.counts.sum()) for r in routings] == [33 * 3] * 2


def test_update_bias_evens_the_load_of_every_layer():
    model = small().eval()
    ids = tokens(8, 60)

    def counts():
        with torch.no_grad():
            return torch.stack([r.counts for r in model(ids, return_routing=True)[1]])

    before = counts()
    for _ in range(60):
        model.update_bias(counts(), rate=2e-3)
    after = counts()
    assert (before.amax(1) > 1.2 * 120).all() and (after.amax(1) < 1.1 * 120).all()
    biases = [model.backbone.layers[i].mixer.gate.e_score_correction_bias for i in (1, 3)]
    assert not torch.equal(*biases)
    with pytest.raises(ValueError):
        model.update_bias(counts()[:1])


def test_a_compiled_model_is_one_graph_with_the_same_loss_and_gradients():
    model = small(router_aux_loss_coef=0.3).float()
    ids, labels = tokens(2, 20), tokens(2, 20)
    want = model(ids, labels=labels)
    grads = torch.autograd.grad(want, list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=labels)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(torch.autograd.grad(loss, list(model.parameters())), grads):
        torch.testing.assert_close(got, expected)
