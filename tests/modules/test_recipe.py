"""Recipes: the published tables by name, what `quantize` replaces and refuses, and models that run on afterwards."""

import warnings
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

import tigon
from tigon.generation import generate
from tigon.models import PRESETS, HybridLM
from tigon.modules import FP8Linear, NVFP4Linear
from tigon.modules.quantize import calibrate, quantize
from tigon.modules.recipe import FORMATS, KEEP, RECIPES, Recipe, Rule

# Kinds of linear layers of Nemotron 3 Super, by the end of their names on disk, and what each recipe makes of them in
# the middle of the model.
TABLE = {
    #                                     super-train  super-infer   fp8-block    nvfp4-weight-only
    "mixer.in_proj":                     ("nvfp4",     "fp8",        "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.out_proj":                    ("mxfp8",     "fp8",        "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.q_proj":                      (KEEP,        KEEP,         "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.o_proj":                      (KEEP,        KEEP,         "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.fc1_latent_proj":             (KEEP,        KEEP,         "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.fc2_latent_proj":             (KEEP,        KEEP,         "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.experts.17.up_proj":          ("nvfp4",     "nvfp4-mse",  "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.experts.17.down_proj":        ("nvfp4",     "nvfp4-mse",  "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.experts.up_proj":             ("nvfp4",     "nvfp4-mse",  "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.shared_experts.up_proj":      ("nvfp4",     "fp8",        "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.shared_experts.down_proj":    ("nvfp4",     "fp8",        "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.up_proj":                     ("nvfp4",     "nvfp4-mse",  "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.gate_proj":                   ("nvfp4",     "nvfp4-mse",  "fp8-block", "nvfp4-w4a16-mse"),
    "mixer.gate":                        (KEEP,) * 4,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["backbone.layers.40.", "model.layers.40.", "layers.40."])
@pytest.mark.parametrize("leaf", TABLE)
def test_presets_follow_the_published_tables_in_either_layout_of_names(leaf, prefix):
    names = "nemotron-3-super-train", "nemotron-3-super-infer", "fp8-block", "nvfp4-weight-only"
    assert tuple(RECIPES) == names
    chosen = tuple(RECIPES[name].choose(prefix + leaf, 88)[0] for name in names)
    assert chosen == TABLE[leaf]


def test_what_no_recipe_touches_and_the_latent_projections_that_one_does():
    for recipe in RECIPES.values():
        for name in ("lm_head", "mtp.layers.1.mixer.fc1_latent_proj", "mtp.layers.0.eh_proj"):
            assert recipe.choose(name, 88)[0] == KEEP, name
    infer = RECIPES["nemotron-3-super-infer"]
    names = [f"model.layers.{i}.mixer.fc2_latent_proj" for i in range(88)]
    assert [i for i, name in enumerate(names) if infer.choose(name, 88)[0] == "fp8"] == [1, 3, 5]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_leave_the_prediction_block_of_a_model_as_it_is(name):
    config = PRESETS["tiny"].replace(vocab_size=50, mtp_pattern="*E-")
    model = HybridLM(config)
    before = dict(model.mtp.named_parameters())
    report = quantize(model, name)
    assert report.replaced and not [n for n in report.replaced if n.startswith("mtp.")]
    kept = [n for n, why in report.kept.items() if n.startswith("mtp.")]
    assert len(kept) == len([m for m in model.mtp.modules() if isinstance(m, nn.Linear)]) + 2
    assert {report.kept[n] for n in kept} == {"multi-token prediction"}
    after = dict(model.mtp.named_parameters())
    assert all(after[n] is before[n] for n in before)


@pytest.mark.parametrize("layers, high", [(88, 14), (108, 16), (4, 1)])
def test_the_last_layers_train_in_high_precision(layers, high):
    train = RECIPES["nemotron-3-super-train"]
    kept = [
        i for i in range(layers) if train.choose(f"layers.{i}.mixer.in_proj", layers)[0] == KEEP
    ]
    assert kept == list(range(layers - high, layers))
    ends = train.replace(keep_first=2, keep_last=8)
    kept = [i for i in range(62) if ends.choose(f"layers.{i}.mixer.in_proj", 62)[0] == KEEP]
    assert kept == [0, 1, *range(54, 62)]
    assert ends.choose("layers.0.mixer.in_proj", 62)[1] == "among the first 2 of 62 layers"


def _counts(report) -> dict[tuple[str, str], int]:
    """(leaf name, format or why) -> how many."""
    everything = [*report.replaced.items(), *report.kept.items()]
    return Counter((name.rpartition(".")[2], value) for name, value in everything)


def test_a_hybrid_of_published_size_on_the_meta_device():
    model = HybridLM("nemotron-h-8b", device="meta", dtype=torch.bfloat16)
    report = quantize(model, "nemotron-3-super-train")
    kept = "among the last 8 of 52 layers"
    assert _counts(report) == {
        ("in_proj", "nvfp4"): 20,
        ("out_proj", "mxfp8"): 20,
        ("up_proj", "nvfp4"): 20,
        ("down_proj", "nvfp4"): 20,
        ("in_proj", kept): 4,
        ("out_proj", kept): 4,
        ("up_proj", kept): 4,
        ("down_proj", kept): 4,
        **{(f"{p}_proj", "attention"): 4 for p in "qkvo"},
        ("lm_head", "output head"): 1,
    }
    model = HybridLM("nemotron-h-8b", device="meta", dtype=torch.bfloat16)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    linear -= model.lm_head.weight.numel()
    report = quantize(model, "nvfp4-weight-only")
    assert len(report.replaced) == 112 and list(report.kept) == ["lm_head"]
    # 4 bits and a byte for 16, in place of 2 bytes, and one fp32 scale a layer
    assert report.bytes_before - report.bytes_after == linear * 2 - linear * 9 // 16 - 112 * 4
    assert "24 in_proj          nvfp4-w4a16-mse" in str(report)


def test_nemotron_3_super_on_the_meta_device():
    report = quantize(HybridLM("nemotron-3-super", device="meta"), "nemotron-3-super-train")
    assert len(report.replaced) == 34 * 2 + 33 * 2
    assert report.replaced["backbone.layers.3.mixer.shared_experts.down_proj"] == "nvfp4"
    assert report.kept["backbone.layers.3.mixer.fc1_latent_proj"] == "latent projection"
    assert report.kept["backbone.layers.3.mixer.experts.up_proj"].startswith("the recipe has nvfp4")


def test_nemotron_3_super_of_transformers_on_the_meta_device():
    transformers = pytest.importorskip("transformers", minversion="5.23")
    values = PRESETS["nemotron-3-super"].to_dict()
    values = {k: v for k, v in values.items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**values))
    tigon.patch(model)
    report = quantize(model, "nemotron-3-super-train")
    assert len(report.replaced) == 34 * 2 + 33 * 2
    assert report.replaced["model.layers.0.mixer.in_proj"] == "nvfp4"
    assert report.replaced["model.layers.1.mixer.shared_experts.up_proj"] == "nvfp4"
    assert isinstance(model.model.layers[0].mixer.out_proj, FP8Linear)
    assert report.kept["model.layers.87.mixer.shared_experts.up_proj"].startswith(
        "among the last 14"
    )
    stacked = report.kept["model.layers.1.mixer.experts.up_proj"]
    assert stacked == "the recipe has nvfp4, but these experts are one tensor, not layers"


@torch.no_grad()
def test_a_transformers_model_runs_patched_and_quantized():
    transformers = pytest.importorskip("transformers", minversion="5.23")
    config = transformers.NemotronHConfig(
        vocab_size=50, hidden_size=48, layers_block_type=["linear_attention", "mlp", "full_attention", "moe"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, intermediate_size=56, ssm_state_size=8,
        mamba_num_heads=6, mamba_head_dim=8, n_groups=3, n_routed_experts=4, moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16, moe_latent_size=24,
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(config).eval()
    ids = torch.randint(3, 50, (2, 9))
    before = model(ids).logits
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.mixer .*tigon\.patch\(model\)"):
        report = quantize(model, "nvfp4-weight-only")
    assert len(report.replaced) == 2 + 2 + 4 + 2 + 2
    after = model(ids).logits
    assert 0 < (after - before).norm() < 0.3 * before.norm()
    text = model.generate(ids, max_new_tokens=5, do_sample=False)
    tigon.patch(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), text)
    patched = transformers.NemotronHForCausalLM(config)
    tigon.patch(patched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(patched, "nemotron-3-super-train")


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_hybrid_prefills_decodes_and_keeps_its_dtype(recipe):
    config = PRESETS["tiny"].replace(vocab_size=50, mtp_pattern="")
    model = HybridLM(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 50, (2, 20))
    before = model(ids)
    quantize(model, recipe)
    after = model(ids)
    assert 0 < (after - before).norm() < 0.3 * before.norm()
    cache = model.allocate_cache(2, 30)
    dtypes = {t.dtype for layer in cache.layers if layer is not None for t in layer.tensors()}
    assert dtypes == {torch.bfloat16, torch.float32}
    assert [row.numel() for row in generate(model, ids, 4)] == [4, 4]


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
def test_a_row_of_a_quantized_model_does_not_feel_the_others(frozen):
    """And the frozen model gives the training one's bits: what is sampled is what is trained."""
    config = PRESETS["tiny"].replace(vocab_size=50, hidden_size=48)
    model = HybridLM(config)
    twin = HybridLM(config)
    twin.load_state_dict(model.state_dict())
    quantize(model, "fp8-block")
    quantize(twin, "fp8-block", frozen=True)
    ids = torch.randint(0, 50, (3, 20))
    with tigon.batch_invariant():
        whole = (twin if frozen else model)(ids)
        assert torch.equal(model(ids[1:2, :13]), whole[1:2, :13])
        filled = twin(
            ids[:1, :18], cache=twin.allocate_cache(1, 20)
        )  # more tokens than a decode step takes
        assert torch.equal(filled, model(ids[:1, :18]))


@torch.no_grad()
def test_calibration_gives_static_scales_where_a_format_has_them():
    config = PRESETS["tiny"].replace(vocab_size=50, pattern="MM*-", mtp_pattern="")
    model = HybridLM(config).eval()
    batches = torch.randint(0, 50, (3, 2, 16))
    seen = []
    model.backbone.layers[3].mixer.down_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].abs().max())
    )
    with calibrate(model) as amax:
        for ids in batches:
            model(ids)
    name = "backbone.layers.3.mixer.down_proj"
    assert amax[name] == max(seen) and amax[name].dtype == torch.float32
    assert set(amax) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert not model.lm_head._forward_pre_hooks
    before = model(batches[0])
    report = quantize(model, "nemotron-3-super-infer", amax=amax)
    assert report.replaced[name] == "nvfp4-mse, static activation scale"
    assert model.get_submodule(name).input_scale.item() == pytest.approx(max(seen).item() / 2688)
    assert model.backbone.layers[0].mixer.in_proj.input_scale is not None
    assert (model(batches[0]) - before).norm() < 0.3 * before.norm()


@torch.no_grad()
def test_calibration_does_not_wait_for_the_device(no_host_sync):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with calibrate(model) as amax:
        for _ in range(2):
            model(torch.randn(2, 8))
    quantize(model, Recipe((("*", "fp8"),), frozen=True), amax=amax)


def test_first_rule_wins_and_formats_are_what_they_say():
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(len(FORMATS) + 1)])
    rules = [(str(i), name) for i, name in enumerate(FORMATS)]
    report = quantize(model, Recipe((*rules, ("0", KEEP)), frozen=True))
    assert list(report.replaced.values()) == list(FORMATS)
    assert report.kept == {str(len(FORMATS)): "no rule"}
    for layer, (kind, options) in zip(model, FORMATS.values()):
        assert type(layer) is kind and layer.frozen
        assert all(getattr(layer, name) == value for name, value in options.items())


def test_shared_layers_stay_shared_and_shared_weights_are_not_frozen():
    layer = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(16, 16)})
    report = quantize(model, Recipe((("*", "nvfp4"),)))
    assert model["a"] is model["b"] and len(report.replaced) == 3
    tied = HybridLM(PRESETS["tiny"].replace(tie_word_embeddings=True))
    rules = (("lm_head", "nvfp4-w4a16"), ("*.in_proj", "nvfp4-w4a16"))
    report = quantize(tied, Recipe(rules, frozen=True))
    assert report.kept["lm_head"] == "its weight is shared: backbone.embeddings, lm_head"
    assert len(report.replaced) == 2


def test_layers_with_a_forward_of_their_own_are_kept():
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Adapter(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].forward = model[2].forward
    report = quantize(model, Recipe((("*", "fp8"),)))
    assert "Adapter" in report.kept["0"] and "was replaced" in report.kept["2"]
    assert list(report.replaced) == ["1"]


def test_old_weights_are_freed_one_layer_at_a_time(monkeypatch):
    """A model that fills the memory can be quantized in place."""
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    old = [weakref.ref(layer.weight) for layer in model]
    alive, real = [], FP8Linear.from_linear.__func__

    def from_linear(cls, linear, **options):
        alive.append(sum(ref() is not None for ref in old))
        return real(cls, linear, **options)

    monkeypatch.setattr(FP8Linear, "from_linear", classmethod(from_linear))
    quantize(model, Recipe((("*", "fp8"),), frozen=True))
    assert alive == [4, 3, 2, 1]


def test_mistakes_are_refused_by_name_and_change_nothing():
    def model():
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def refuses(match, recipe, target=None, **options):
        target = model() if target is None else target
        kinds = [type(m) for m in target.modules()]
        with pytest.raises(ValueError, match=match):
            quantize(target, recipe() if callable(recipe) else recipe, **options)
        assert [type(m) for m in target.modules()] == kinds

    refuses("unknown recipe 'nvfp5'; known: nemotron-3-super-train", "nvfp5")
    refuses("format 'int4' is unknown; known: keep, nvfp4", lambda: Recipe((("*", "int4"),)))
    refuses("'nvfp4-w4a16' needs frozen=True", lambda: Recipe((("*", "nvfp4-w4a16"),)))
    refuses("keep_last=1.5 is neither", lambda: Recipe((), keep_last=1.5))
    refuses("no layer of the model matches 'q_proj'", Recipe((("0", "fp8"), ("q_proj", "fp8"))))
    refuses("quantizes no layer", Recipe((Rule("q", "fp8", optional=True),)))
    refuses("quantizes no layer", "fp8-block")
    refuses("no layer of the model matches", Recipe((("*", "fp8"),)), nn.Linear(4, 4))
    refuses("need layers named", Recipe((("0", "fp8"),), keep_last=1))
    everything = Recipe((("*", "fp8"),))
    refuses("amax of no layer of the model: x", everything, frozen=True, amax={"x": torch.ones(())})
    refuses("this recipe trains", everything, amax={"0": torch.ones(())})
    twice = model()
    quantize(twice, everything)
    refuses("quantized already: 0", everything, twice)


def test_recipes_are_reached_from_the_top():
    assert tigon.quantize is quantize and tigon.Recipe is Recipe and tigon.calibrate is calibrate
    assert Recipe.preset("fp8-block") is RECIPES["fp8-block"]
    assert {kind for kind, _ in FORMATS.values()} == {FP8Linear, NVFP4Linear}
