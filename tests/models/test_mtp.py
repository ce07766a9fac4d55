"""Multi-token prediction: the loss against one written by hand, learning, routers, caches, files."""

import json
import shutil
import warnings
from itertools import pairwise

import pytest
import torch

from tigon.integrations import modelopt
from tigon.models import PRESETS, HybridConfig, HybridLM
from tigon.modules import MTP, RMSNorm
from tigon.modules.quantize import quantize
from tigon.modules.recipe import Recipe

CONFIG = HybridConfig(
    pattern="M*E",
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
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=24,
    moe_latent_size=16,
    mtp_pattern="*E",
    mtp_loss_coef=0.3,
)


def build(**changes):
    torch.manual_seed(0)
    model = HybridLM(CONFIG.replace(**changes), dtype=torch.float64)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, RMSNorm)):
            norm.weight.add_(0.3 * torch.randn_like(norm.weight))
    return model


def tokens(*shape, vocabulary=40):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def labelled(ids):
    """Labels of the next token, with a hole and nothing after a row's last."""
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, 5:7] = -100
    return labels


def by_hand(model, ids, labels, depths=2):
    """nats (depths) summed and counts, of one sequence (l) at a time, a position at a time."""
    d = model.config.hidden_size
    first, last = model.mtp.layers[0], model.mtp.layers[-1]

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    h, sums, counts = model.backbone(ids[None])[0], [], []
    for depth in range(1, depths + 1):
        n = max(len(ids) - depth, 0)
        e = model.backbone.embeddings.weight[ids[depth:]]
        x = torch.cat([norm(e, first.enorm), norm(h[:n], first.hnorm)], -1)
        assert x.shape == (n, 2 * d)
        x = (x @ first.eh_proj.weight.T)[None]
        for layer in model.mtp.layers:
            x = x + layer.mixer(norm(x, layer.norm))
        h = norm(x[0], last.final_layernorm)
        scores = (h @ model.lm_head.weight.T).log_softmax(-1)
        chosen = [(i, labels[i + depth]) for i in range(n) if labels[i + depth] >= 0]
        sums.append(sum((-scores[i, y] for i, y in chosen), torch.zeros((), dtype=h.dtype)))
        counts.append(len(chosen))
    return torch.stack(sums), torch.tensor(counts)


def total_by_hand(model, pieces):
    """Cross entropy and MTP losses (depths) of separate sequences."""
    plain, plain_count, sums, counts = 0.0, 0, 0.0, 0
    for ids, labels in pieces:
        scores = model.logits(model.backbone(ids[None]))[0].log_softmax(-1)
        keep = labels >= 0
        plain = plain - scores[keep].gather(1, labels[keep, None]).sum()
        plain_count += int(keep.sum())
        new, count = by_hand(model, ids, labels)
        sums, counts = sums + new, counts + count
    return plain / plain_count, sums / counts


@pytest.mark.parametrize("packed", [False, True])
def test_the_training_loss_and_its_gradients_are_those_written_by_hand(packed):
    model = build()
    if packed:  # the third sequence is too short for depth 2, the fourth for any
        ids, bounds = tokens(1, 40), [0, 17, 17, 19, 20, 40]
        labels = labelled(ids)
        labels[0, [16, 18, 19]] = -100
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        pieces = [(ids[0, i:j], labels[0, i:j]) for i, j in pairwise(bounds) if i < j]
    else:
        ids, cu_seqlens = tokens(3, 14), None
        labels = labelled(ids)
        pieces = list(zip(ids, labels))
    plain, further = total_by_hand(model, pieces)
    expected = plain + 0.3 * further.mean()
    found = model.losses(ids, labels, cu_seqlens)
    torch.testing.assert_close(found.mtp, further)
    torch.testing.assert_close(found.cross_entropy, plain)
    total = model(ids, cu_seqlens, labels=labels)
    torch.testing.assert_close(total, expected)
    parameters = dict(model.named_parameters())
    for name, got, want in zip(
        parameters,
        torch.autograd.grad(total, list(parameters.values())),
        torch.autograd.grad(expected, list(parameters.values())),
    ):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")
        assert got.abs().max() > 0, name


def test_in_evaluation_and_with_a_cache_the_loss_is_the_cross_entropy_alone():
    model = build()
    ids = tokens(2, 9)
    labels = labelled(ids)
    with_it = model(ids, labels=labels)
    plain = model.losses(ids, labels).cross_entropy
    assert with_it > plain + 0.1
    cached = model(ids, cache=model.allocate_cache(2, 9), labels=labels)
    torch.testing.assert_close(cached, plain)
    torch.testing.assert_close(model.eval()(ids, labels=labels), plain)
    assert model.losses(ids, labels).mtp is None


def test_a_detached_head_leaves_lm_head_and_embeddings_to_the_next_token():
    """What is left: the same gradients as without the losses there, the drafter's and the backbone's otherwise."""
    ids = tokens(2, 12)
    labels = labelled(ids)
    grads = {}
    for name, changes in {
        "both": {},
        "detached": {"mtp_detach_head": True},
        "none": {"mtp_loss_coef": 0.0},
    }.items():
        model = build(**changes)
        model(ids, labels=labels).backward()
        grads[name] = {n: p.grad for n, p in model.named_parameters()}
    head = "lm_head.weight"
    torch.testing.assert_close(grads["detached"][head], grads["none"][head])
    assert not torch.allclose(grads["both"][head], grads["none"][head])
    layer = "backbone.layers.0.mixer.in_proj.weight"
    torch.testing.assert_close(grads["detached"][layer], grads["both"][layer])
    assert not torch.allclose(grads["both"][layer], grads["none"][layer])
    assert grads["detached"]["mtp.layers.0.eh_proj.weight"].abs().max() > 0
    assert grads["none"]["mtp.layers.0.eh_proj.weight"] is None

    model = build(mtp_detach_head=True)
    hidden = model.backbone(ids)
    model.mtp_losses(hidden.detach(), ids, labels).losses.sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("mtp.")}


@torch.no_grad()
def test_shares_of_right_guesses_are_counted_over_labels_only():
    model = build()
    ids = tokens(2, 30)
    labels = labelled(ids)
    hidden = model.backbone(ids)
    found = model.mtp_losses(hidden, ids, labels, depths=3)
    h, hits, counted = hidden, [], []
    for depth in (1, 2, 3):
        h = model.mtp(h[:, : 31 - depth - 1], model.backbone.embeddings(ids[:, depth:]))
        target = labels[:, depth:]
        hits.append((model.logits(h).argmax(-1) == target) & (target >= 0))
        counted.append((target >= 0).sum())
    torch.testing.assert_close(
        found.right, torch.stack([h.sum() / c for h, c in zip(hits, counted)])
    )
    both = hits[0][:, :28] & hits[1]
    seen = (labels[:, 1:29] >= 0) & (labels[:, 2:] >= 0)
    torch.testing.assert_close(found.accepted[1], both.sum() / seen.sum())
    # Labels that are the model's own guesses are all accepted.
    guesses = model.logits(model.mtp(hidden[:, :-1], model.backbone.embeddings(ids[:, 1:])))
    labels = torch.cat([ids[:, 1:2], guesses.argmax(-1)], 1)
    assert model.mtp_losses(hidden, ids, labels).right[0] == 1
    with pytest.raises(ValueError, match="no multi-token prediction"):
        build(mtp_pattern="").mtp_losses(hidden, ids, labels)


def test_padded_tokens_neither_count_nor_reach_an_expert():
    model = build()
    ids, lengths = tokens(2, 12), [12, 7]
    labels = labelled(ids)
    labels[1, 6:] = -100
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    loss, routings = model(ids, labels=labels, mask=mask, return_routing=True)
    plain, further = total_by_hand(model, [(ids[0], labels[0]), (ids[1, :7], labels[1, :7])])
    torch.testing.assert_close(loss, plain + 0.3 * further.mean())
    assert [int(r.counts.sum()) for r in routings] == [2 * 19, 2 * 17, 2 * 15]


def test_routers_of_the_drafter_have_losses_and_their_bias_is_moved():
    model = build(router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    ids = tokens(2, 12)
    labels = labelled(ids)
    total, routings = model(ids, labels=labels, return_routing=True)
    found = model.losses(ids, labels)
    assert len(routings) == 3 and total > found.cross_entropy + 0.3 * found.mtp.mean()
    drafter = model.mtp.layers[1].mixer
    grad = torch.autograd.grad(total, drafter.gate.weight)[0]
    bare = build()
    plain = torch.autograd.grad(bare(ids, labels=labels), bare.mtp.layers[1].mixer.gate.weight)[0]
    assert (grad - plain).abs().max() > 1e-4
    counts = torch.stack([r.counts for r in routings])
    model.update_bias(counts, 0.01)
    own = model.backbone.layers[2].mixer.gate.e_score_correction_bias
    for bias, loads in (
        (own, counts[0]),
        (drafter.gate.e_score_correction_bias, counts[1:].sum(0)),
    ):
        expected = 0.01 * torch.sign(loads.double().mean() - loads)
        torch.testing.assert_close(bias, expected.float())
    before = drafter.gate.e_score_correction_bias.clone()
    model.update_bias(counts[:1])  # the backbone's alone, as evaluation returns them
    assert torch.equal(drafter.gate.e_score_correction_bias, before)
    with pytest.raises(ValueError, match=r"counts has 0 rows, expected 1, or these and 1 a depth"):
        model.update_bias(counts[:0])
    with pytest.raises(ValueError, match=r"counts has 3 rows, expected 1$"):
        build(mtp_pattern="*-").update_bias(counts)
    assert len(model.eval()(ids, labels=labels, return_routing=True)[1]) == 1


@torch.no_grad()
def test_the_drafter_continues_its_cache_as_if_it_saw_everything_at_once():
    model = build()
    ids = tokens(3, 20)
    hidden, embedded = model.backbone(ids), model.backbone.embeddings(ids).roll(-1, 1)
    whole = model.mtp(hidden, embedded)
    cache, slots = model.mtp.allocate_cache(5, 20), torch.tensor([3, 0, 2])
    assert cache.layers[1] is None and cache.layers[0].keys.dtype == torch.float64
    parts, where = [], {"cache": cache, "slots": slots}
    for i, j in pairwise([0, 9, 10, 11, 20]):
        parts.append(model.mtp(hidden[:, i:j], embedded[:, i:j], **where))
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.lengths.tolist() == [20, 0, 20, 20, 0]
    cache.reset()
    packed = [t[:, :9].reshape(1, 27, -1) for t in (hidden, embedded)]
    bounds = torch.tensor([0, 9, 18, 27])
    first = model.mtp(*packed, bounds, cache, slots=slots).view(3, 9, -1)
    torch.testing.assert_close(first, whole[:, :9])
    counts = torch.tensor([4, 1, 3])
    out = model.mtp(hidden[:, 9:13], embedded[:, 9:13], num_tokens=counts, **where)
    for row, n in enumerate(counts.tolist()):
        torch.testing.assert_close(out[row, :n], whole[row, 9 : 9 + n])
    with pytest.raises(ValueError, match="pass cache"):
        model.mtp(hidden, embedded, slots=slots)
    with pytest.raises(ValueError, match="would hold 25 tokens, max_length=20"):
        model.mtp(hidden[:, :12], embedded[:, :12], **where)


def test_wrong_shapes_and_recurrent_drafters_are_refused_by_name():
    model = build()
    h = torch.zeros(1, 4, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"hidden has shape \(1, 4, 16\), expected \(b, l, 32\)"):
        model.mtp(h[..., :16], h)
    with pytest.raises(ValueError, match=r"embeddings has shape \(1, 3, 32\)"):
        model.mtp(h, h[:, 1:])
    with pytest.raises(ValueError, match=r"blocks\[0\] is a Mamba2"):
        MTP(32, [model.backbone.layers[0]])
    with pytest.raises(ValueError, match="blocks is empty"):
        MTP(32, [])


@pytest.mark.parametrize("kind", ["residual_in_fp32", "tie_word_embeddings"])
def test_it_follows_the_config_of_its_backbone(kind):
    torch.manual_seed(0)
    model = HybridLM(CONFIG.replace(**{kind: True}), dtype=torch.bfloat16)
    seen = []
    model.mtp.layers[1].register_forward_hook(lambda _, args, out: seen.append(out[0].dtype))
    ids = tokens(2, 9)
    model(ids, labels=labelled(ids), return_routing=True)[0].backward()
    expected = torch.float32 if kind == "residual_in_fp32" else torch.bfloat16
    assert seen == [expected, expected]
    assert sum("lm_head" in n for n, _ in model.named_parameters()) == (kind[0] == "r")


def test_it_learns_a_pattern_two_tokens_ahead_of_the_next():
    """Sequences x, x+s, x+2s, … mod 20: after two tokens all further ones are known; by chance 5 % are right."""
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(
        pattern="M*-",
        mtp_pattern="*-",
        vocab_size=20,
        hidden_size=48,
        intermediate_size=96,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        mtp_loss_coef=0.3,
    )
    model = HybridLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def sequences(rows, length=16):
        start, step = torch.randint(0, 20, (2, rows, 1))
        return (start + step * torch.arange(length + 1)) % 20

    for _ in range(150):
        ids = sequences(32)
        optimizer.zero_grad()
        model(ids[:, :-1], labels=ids[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        ids = sequences(64)[:, 2:]
        hidden = model.backbone(ids[:, :-1])
        found = model.mtp_losses(hidden, ids[:, :-1], ids[:, 1:])
    assert found.right.min() > 0.6 and found.accepted[1] > 0.5, found


def test_for_one_seed_the_rest_of_the_model_is_the_same_without_it():
    models = []
    for pattern in ("", "*E"):
        torch.manual_seed(0)
        models.append(HybridLM(CONFIG.replace(mtp_pattern=pattern)))
    state = models[1].state_dict()
    assert all(torch.equal(t, state[n]) for n, t in models[0].state_dict().items())
    torch.manual_seed(1)
    models[1].reset_parameters()
    before, after = state["mtp.layers.0.eh_proj.weight"], models[1].mtp.layers[0].eh_proj.weight
    assert after.std().item() == pytest.approx(CONFIG.initializer_range, rel=0.1)
    assert before.data_ptr() == after.data_ptr()


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_checkpoints_hold_it_under_the_names_on_disk_and_give_it_back(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"])
    assert "mtp.layers.1.mixer.experts.5.down_proj.weight" in names
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.1.final_layernorm.weight"} <= names
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["num_nextn_predict_layers"] == 1
    assert settings["mtp_hybrid_override_pattern"] == "*E"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = HybridLM.from_pretrained(tmp_path)
        insisted = HybridLM.from_pretrained(tmp_path, mtp=True)
        without = HybridLM.from_pretrained(tmp_path, mtp=False)
    assert again.config == model.config
    same(again.state_dict(), model.state_dict())
    same(insisted.state_dict(), model.state_dict())
    assert without.mtp is None and without.config == model.config.replace(mtp_pattern="")
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")}
    same(without.state_dict(), rest)


def rewrite(folder, target, change):
    safetensors = pytest.importorskip("safetensors.torch")
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    tensors = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file(change(tensors), target / "model.safetensors")
    return target


def test_a_config_that_names_it_without_its_tensors_loads_without_it(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "whole")
    bare = rewrite(
        tmp_path / "whole",
        tmp_path / "bare",
        lambda t: {k: v for k, v in t.items() if not k.startswith("mtp.")},
    )
    with pytest.warns(UserWarning, match=r"has no mtp\.\* tensors") as seen:
        loaded = HybridLM.from_pretrained(bare)
    assert len(seen) == 1 and loaded.mtp is None and loaded.config.mtp_pattern == ""
    with pytest.raises(ValueError, match="mtp=True asks for them"):
        HybridLM.from_pretrained(bare, mtp=True)
    part = rewrite(
        tmp_path / "whole",
        tmp_path / "part",
        lambda t: {k: v for k, v in t.items() if "mtp.layers.0.hnorm" not in k},
    )
    with pytest.raises(ValueError, match=r"missing: mtp\.layers\.0\.hnorm\.weight"):
        HybridLM.from_pretrained(part)
    odd = rewrite(
        tmp_path / "whole",
        tmp_path / "odd",
        lambda t: t | {"mtp.layers.2.norm.weight": torch.ones(32)},
    )
    with pytest.raises(ValueError, match=r"unknown: mtp\.layers\.2\.norm\.weight"):
        HybridLM.from_pretrained(odd)
    assert HybridLM.from_pretrained(odd, mtp=False).mtp is None


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True], ids=["backbone", "drafter too"])
def test_quantized_checkpoints_give_it_back(whole, tmp_path):
    torch.manual_seed(0)
    model = HybridLM(PRESETS["tiny"].replace(vocab_size=50, mtp_pattern="*E")).eval()
    recipe = Recipe.preset("nemotron-3-super-infer")
    if whole:
        recipe = recipe.replace(rules=(("mtp.*_proj", "fp8"), *recipe.rules))
    report = quantize(model, recipe)
    assert ("mtp.layers.0.eh_proj" in report.replaced) == whole
    model.save_pretrained(tmp_path)
    assert [f for f in modelopt.validate(tmp_path) if f.severity == "error"] == []
    with pytest.warns(UserWarning, match="no input_scale"):
        again = HybridLM.from_pretrained(tmp_path)
    same(again.state_dict(), model.state_dict())
    h, e = torch.randn(2, 2, 9, 128)
    assert torch.equal(again.mtp(h, e), model.mtp(h, e))


@torch.no_grad()
def test_transformers_reads_the_backbone_and_what_it_saves_still_loads(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    model = HybridLM(CONFIG.replace(time_step_min=1e-6, mamba_ssm_cache_dtype="float32")).eval()
    model.save_pretrained(tmp_path / "ours")
    theirs, info = transformers.NemotronHForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(2, 15)
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert theirs.config.num_nextn_predict_layers == 1
    with pytest.warns(UserWarning, match="multi-token prediction"):
        again = HybridLM.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(again(ids), model(ids))
