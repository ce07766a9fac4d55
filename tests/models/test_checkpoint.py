"""Checkpoints: transformers' NemotronH as the second opinion, both ways, and what is wrong with a file."""

import json
import shutil

import pytest
import torch

from tigon.models import HybridConfig, HybridLM

transformers = pytest.importorskip("transformers", minversion="5")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 100,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
    # Their prefill clamps step sizes here, their decode does not; ours does both. Low, so that decode can be compared.
    "time_step_min": 1e-6,
}
VARIANTS = {
    "plain": {"hybrid_override_pattern": "M-*M-"},
    "biases": {"hybrid_override_pattern": "M*-", "use_bias": True, "mlp_bias": True},
    "no conv bias": {"hybrid_override_pattern": "MM*", "use_conv_bias": False, "conv_kernel": 2},
}


def theirs(**options):
    torch.manual_seed(0)
    model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**SIZES, **options))
    with torch.no_grad():
        for p in (
            model.parameters()
        ):  # away from the small initial values, where every model says the same
            p.add_(0.15 * torch.randn_like(p)) if p.dim() > 1 else p.add_(
                0.05 * torch.randn_like(p)
            )
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    model = theirs(**VARIANTS["plain"])
    model.save_pretrained(folder)
    return model, folder


def close(got, expected):
    assert expected.abs().max() > 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_of_their_checkpoint_and_of_ours_equal_theirs_in_prefill_and_decode(
    options, tmp_path
):
    model = theirs(**options)
    model.save_pretrained(tmp_path / "theirs")
    ours = HybridLM.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 100, (2, 40))
    with torch.no_grad():
        expected = model(ids).logits
        close(ours(ids), expected)
        past, cache = None, ours.allocate_cache(2, 40)
        for piece in (ids[:, :30], *ids[:, 30:].split(1, 1)):
            out = model(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            close(ours(piece, cache=cache), out.logits)
        ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
        again, info = transformers.NemotronHForCausalLM.from_pretrained(
            tmp_path / "ours", output_loading_info=True
        )
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(ids).logits, expected)


def test_prefill_clamps_step_sizes_where_theirs_does():
    model = theirs(hybrid_override_pattern="M*M")
    model.config.time_step_min = 0.05
    for layer in model.model.layers[::2]:
        layer.mixer.time_step_limit = (0.05, float("inf"))
    config = HybridConfig.from_dict(model.config.to_dict())
    ours = HybridLM(config)
    ours.load_state_dict(
        {k.replace("model.", "backbone."): v for k, v in model.state_dict().items()}
    )
    free = HybridLM(config.replace(time_step_min=1e-6))
    free.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 100, (2, 40))
    with torch.no_grad():
        expected = model(ids).logits
        close(ours(ids), expected)
        assert (free(ids) - expected).abs().max() > 0.01


def test_gradients_equal_theirs(saved):
    model, folder = saved
    ours = HybridLM.from_pretrained(folder)
    ids = torch.randint(0, 100, (2, 33))
    labels = ids.clone()
    labels[0, 5:9] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    model.zero_grad()
    model(ids, labels=labels).loss.backward()
    ours(ids, labels=shifted).backward()
    grads = {n.replace("model.", "backbone."): p.grad for n, p in model.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=2e-6, msg=name)
    model.zero_grad()


def rewrite(folder, target, change):
    """A copy of a checkpoint whose tensors went through `change(dict)`."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    safetensors_torch.save_file(change(tensors) or tensors, target / "model.safetensors")
    return target


def test_names_on_disk_of_every_age_are_read(saved, tmp_path):
    _, folder = saved
    expected = HybridLM.from_pretrained(folder).state_dict()

    def new(name):
        return name.replace("backbone.", "model.")

    def old(name):
        return name.replace("model.", "backbone.").replace("embeddings", "embedding")

    for i, rename in enumerate((new, old)):
        copy = rewrite(
            folder, tmp_path / str(i), lambda t, f=rename: {f(k): v for k, v in t.items()}
        )
        got = HybridLM.from_pretrained(copy).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], expected[k]) for k in got)


def test_unknown_missing_and_misshapen_tensors_are_named_together(saved, tmp_path):
    def spoil(t):
        del t["lm_head.weight"]
        t["backbone.layers.9.norm.weight"] = torch.ones(3)
        t["backbone.norm_f.weight"] = torch.ones(7)

    copy = rewrite(saved[1], tmp_path / "spoiled", spoil)
    with pytest.raises(ValueError) as error:
        HybridLM.from_pretrained(copy)
    text = str(error.value)
    assert "unknown: backbone.layers.9.norm.weight" in text
    assert "missing: lm_head.weight;" in text
    assert "backbone.norm_f.weight has shape (7,), expected (48,)" in text


def test_mtp_tensors_are_left_out_with_a_warning(saved, tmp_path):
    copy = rewrite(
        saved[1], tmp_path / "mtp", lambda t: t | {"mtp.layers.0.norm.weight": torch.ones(3)}
    )
    with pytest.warns(UserWarning, match=r"1 tensors .*mtp"):
        HybridLM.from_pretrained(copy)


def test_files_that_are_not_there_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        HybridLM.from_pretrained(tmp_path)
    model = HybridLM.from_pretrained(saved[1])
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    (tmp_path / "model-00002-of-00010.safetensors").unlink(missing_ok=True)
    gone = sorted(tmp_path.glob("model-00003*"))[0]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        HybridLM.from_pretrained(tmp_path)


def test_shards_keep_to_their_size_and_are_read_one_at_a_time(saved, tmp_path, monkeypatch):
    import safetensors

    model = HybridLM.from_pretrained(saved[1])
    model.save_pretrained(tmp_path, max_shard_size=40_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == {f.name for f in files}
    largest = max(p.numel() * 4 for p in model.parameters())
    assert all(f.stat().st_size < max(40_000, largest) + 4096 for f in files)

    open_now, peak = [], []
    real = safetensors.safe_open

    class Counted:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            open_now.append(self)
            peak.append(len(open_now))
            return self.file.__enter__()

        def __exit__(self, *error):
            open_now.remove(self)
            return self.file.__exit__(*error)

    monkeypatch.setattr(safetensors, "safe_open", Counted)
    again = HybridLM.from_pretrained(tmp_path)
    assert max(peak) == 1
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters()))
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_tied_embeddings_are_one_tensor_after_loading(tmp_path):
    config = HybridConfig(pattern="M-", tie_word_embeddings=True, **SIZES)
    model = HybridLM(config)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    model.save_pretrained(tmp_path / "tied")
    again = HybridLM.from_pretrained(tmp_path / "tied", dtype=torch.bfloat16)
    assert again.lm_head.weight is again.backbone.embeddings.weight
    assert again.lm_head.weight.dtype == torch.bfloat16
    copy = rewrite(
        tmp_path / "tied",
        tmp_path / "short",
        lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"},
    )
    assert torch.equal(HybridLM.from_pretrained(copy).lm_head.weight, model.lm_head.weight)
    copy = rewrite(
        tmp_path / "tied",
        tmp_path / "other",
        lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1},
    )
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        HybridLM.from_pretrained(copy)


def test_loaded_parameters_keep_their_mark_against_weight_decay(saved):
    model = HybridLM.from_pretrained(saved[1])
    marked = {n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert {n.rpartition(".")[2] for n in marked} == {"A_log", "D", "dt_bias"}
