"""Recipes: which Linear layer of a model gets which format, as data, and `quantize`, which carries one out.

    tigon.quantize(model, "nemotron-3-super-train")     layers that train on quantized operands
    tigon.quantize(model, "nvfp4-weight-only")          frozen layers: the weights become codes now

Rules are read in order and the first whose pattern matches a layer's name decides; a layer that none matches is kept.
Names are those of `model.named_modules()`, of HybridLM (`backbone.layers.0.mixer.in_proj`) and of transformers'
NemotronH (`model.layers.0.mixer.in_proj`) alike. Presets also name what only models with LatentMoE layers have.

Sources: "Nemotron 3" (arXiv 2512.20856) and "Nemotron 3 Super" (2604.12374): the recipes of training and of the
released checkpoint; "Jet-RL" (2601.14243): FP8 blocks for training and rollout alike.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from tigon.modules.fp8_linear import FP8Linear
from tigon.modules.linear import Linear
from tigon.modules.nvfp4_linear import NVFP4Linear
from tigon.modules.quantized_linear import QuantizedLinear

KEEP = "keep"
FORMATS: dict[str, tuple[type[QuantizedLinear], dict]] = {
    "nvfp4": (NVFP4Linear, {}),
    "nvfp4-mse": (NVFP4Linear, {"four_over_six": "mse"}),
    "nvfp4-row": (NVFP4Linear, {"row_scaled": True}),
    "nvfp4-w4a16": (NVFP4Linear, {"activation": "bf16"}),
    "nvfp4-w4a16-mse": (NVFP4Linear, {"activation": "bf16", "four_over_six": "mse"}),
    "nvfp4-w4a8": (NVFP4Linear, {"activation": "fp8"}),
    "fp8": (FP8Linear, {"scaling": "tensor"}),
    "fp8-row": (FP8Linear, {"scaling": "row"}),
    "fp8-block": (FP8Linear, {"scaling": "block"}),
    "mxfp8": (FP8Linear, {"scaling": "mxfp8"}),
}


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` (as in a shell, case counts) get `format`, or are kept ("keep").

    why: told by the report of what is kept. optional: the model may have no such layer.
    """

    pattern: str
    format: str
    why: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Recipe:
    """Rules in order, and the ends of the model that they do not reach; `Recipe.preset(name)` for a published one.

    Args:
        rules: `Rule`s, or (pattern, format) pairs.
        frozen: inference: weights become codes when the recipe is applied. Else layers train.
        keep_first, keep_last: layers kept at the ends: a number (int), or a share of the layers (float), rounded up.

    Raises:
        ValueError: an unknown format, one that needs frozen=True, a share outside [0, 1], by name.
    """

    rules: tuple[Rule, ...]
    frozen: bool = False
    keep_first: int | float = 0
    keep_last: int | float = 0

    def __post_init__(self):
        rules = tuple(r if isinstance(r, Rule) else Rule(*r) for r in self.rules)
        object.__setattr__(self, "rules", rules)
        for rule in rules:
            if rule.format != KEEP and rule.format not in FORMATS:
                known = ", ".join([KEEP, *FORMATS])
                raise ValueError(f"Recipe: format {rule.format!r} is unknown; known: {known}")
            if "-w4a" in rule.format and not self.frozen:
                raise ValueError(f"Recipe: format {rule.format!r} needs frozen=True")
        for name in ("keep_first", "keep_last"):
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"Recipe: {name}={value} is neither a number nor a share")

    def choose(self, name: str, layers: int) -> tuple[str, str]:
        """(format, why) of a layer by its name, in a model of so many layers. A pure function of the name."""
        rule = self._rule(name)
        if rule is None:
            return KEEP, "no rule"
        index, first, last = _layer(name), self._ends("first", layers), self._ends("last", layers)
        if rule.format != KEEP and index is not None:
            if index < first:
                return KEEP, f"among the first {first} of {layers} layers"
            if index >= layers - last:
                return KEEP, f"among the last {last} of {layers} layers"
        return rule.format, rule.why or f"rule {rule.pattern!r}"

    def _rule(self, name: str) -> Rule | None:
        return next((r for r in self.rules if fnmatchcase(name, r.pattern)), None)

    def _ends(self, which: str, layers: int) -> int:
        value = getattr(self, f"keep_{which}")
        return math.ceil(value * layers) if isinstance(value, float) else value

    def replace(self, **changes) -> "Recipe":
        """A copy with some fields changed."""
        return replace(self, **changes)

    @staticmethod
    def preset(name: str) -> "Recipe":
        """One of `RECIPES`; ValueError with the known names."""
        if name not in RECIPES:
            raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
        return RECIPES[name]


def _keep(why: str, *patterns: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, KEEP, why, optional=True) for pattern in patterns)


def _all(format: str, *patterns: str) -> tuple[Rule, ...]:
    return tuple(Rule(pattern, format, optional=True) for pattern in patterns)


_ALWAYS_KEPT = (
    *_keep("output head", "*lm_head"),
    *_keep("multi-token prediction", "mtp.*", "*.mtp.*"),
    *_keep("router", "*.gate"),
)
_MAMBA = ("*.mixer.in_proj", "*.mixer.out_proj")
_MLP = ("*.up_proj", "*.down_proj", "*.gate_proj")  # dense, of experts and of shared experts
_ATTENTION, _LATENT = "*.[qkvo]_proj", "*.fc[12]_latent_proj"
_SENSITIVE = (*_keep("attention", _ATTENTION), *_keep("latent projection", _LATENT))

RECIPES = {
    # 14 of Super's 88 layers and 16 of Ultra's 108 stay in high precision at the end: "15 %". out_proj: in NVFP4 up to
    # 40 % of its values became zero.
    "nemotron-3-super-train": Recipe(
        (
            *_ALWAYS_KEPT,
            *_SENSITIVE,
            *_all("mxfp8", "*.mixer.out_proj"),
            *_all("nvfp4", "*.mixer.in_proj", *_MLP),
        ),
        keep_last=0.148,
    ),
    # NVIDIA searched a scale a weight block for the least squared error; here it is the better of two.
    "nemotron-3-super-infer": Recipe(
        (
            *_ALWAYS_KEPT,
            *_all("fp8", "*layers.[135].mixer.fc[12]_latent_proj", "*.shared_experts.*", *_MAMBA),
            *_SENSITIVE,
            *_all("nvfp4-mse", *_MLP),
        ),
        frozen=True,
    ),
    "fp8-block": Recipe(
        (*_ALWAYS_KEPT, *_all("fp8-block", *_MAMBA, *_MLP, _ATTENTION, _LATENT)),
    ),
    "nvfp4-weight-only": Recipe(
        (*_ALWAYS_KEPT, *_all("nvfp4-w4a16-mse", *_MAMBA, *_MLP, _ATTENTION, _LATENT)),
        frozen=True,
    ),
}


@dataclass
class QuantizeReport:
    """What `quantize` did. replaced: name -> format; kept: name -> why. Bytes of all parameters and buffers."""

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.replaced)} layers quantized, {len(self.kept)} kept; "
            f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after"
        ]
        for names, what in ((self.replaced, "{0}"), (self.kept, "kept, {0}")):
            counts = Counter((value, name.rpartition(".")[2]) for name, value in names.items())
            lines += [f"  {n:5} {leaf:16} {what.format(v)}" for (v, leaf), n in counts.items()]
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    recipe: Recipe | str,
    *,
    frozen: bool | None = None,
    amax: dict[str, Tensor] | None = None,
) -> QuantizeReport:
    """Replace Linear layers of `model`, in place, by the formats of `recipe`.

    Args:
        model: any model whose layers are torch's or Tigon's Linear; before `fully_shard` and `torch.compile`.
        recipe: a `Recipe`, or the name of one in `tigon.modules.recipe.RECIPES`.
        frozen: override the recipe's: True quantizes the weights now, for inference.
        amax: of `calibrate`: frozen layers whose format can get static activation scales; the others find theirs
            at each call.

    Returns:
        QuantizeReport: what became what, what was kept and why, bytes before and after.

    Raises:
        ValueError: an unknown recipe, a pattern that matches no layer, layers that are quantized or sharded already, an
            amax of no layer of the model, a recipe that leaves nothing quantized, by name. The model is then unchanged.

    Warns where mixers of transformers or mamba_ssm would train on `out_proj.weight` instead of calling the layer.
    """
    recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
    recipe = recipe if frozen is None else recipe.replace(frozen=frozen)
    amax = amax or {}
    linears, stacked = _linears(model), _stacked(model)
    _check_patterns(recipe, [*linears, *stacked])
    layers = _count_layers(model, recipe)
    report, chosen = QuantizeReport(bytes_before=_bytes(model)), {}
    shared = _shared(model) if recipe.frozen else {}
    for name in [*linears, *stacked]:
        format, why = recipe.choose(name, layers)
        if format != KEEP and name in linears:
            obstacle = _obstacle(linears[name], shared)
        elif format != KEEP:
            obstacle = f"the recipe has {format}, but these experts are one tensor, not layers"
        else:
            obstacle = why
        if obstacle is None:
            chosen[name] = format
        else:
            report.kept[name] = obstacle
    _check_chosen(linears, chosen, recipe, amax)
    made: dict[int, QuantizedLinear] = {}  # a layer may have several names
    for name, format in chosen.items():
        old = linears[name]
        if id(old) not in made:
            kind, options = FORMATS[format]
            made[id(old)] = kind.from_linear(old, **options, frozen=recipe.frozen)
        static = name in amax and made[id(old)].set_input_amax(amax[name])
        model.set_submodule(name, made[id(old)])
        report.replaced[name] = f"{format}, static activation scale" if static else format
    report.bytes_after = _bytes(model)
    _warn_of_readers(model)
    return report


@contextmanager
def calibrate(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, record the largest magnitude that each Linear layer of `model` is given.

    Yields a dict name -> fp32 (), filled as the model runs on whatever batches the caller feeds it, for
    `quantize(model, recipe, amax=...)`. Nothing waits for the device.
    """
    found: dict[str, Tensor] = {}

    def record(name: str):
        def hook(module, args):
            x = args[0].detach()
            if x.numel():
                new = x.abs().amax().float()
                found[name] = torch.maximum(found[name], new) if name in found else new

        return hook

    handles = [m.register_forward_pre_hook(record(name)) for name, m in _linears(model).items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _layer(name: str) -> int | None:
    """The index of the layer that a module is in; None outside the stack, and in prediction heads."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(match[1]) if match and not re.search(r"(?:^|\.)mtp\.", name) else None


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: m for name, m in modules if isinstance(m, nn.Linear)}


def _stacked(model: nn.Module) -> list[str]:
    """Expert weights (e,n,k) that are Parameters rather than layers, as transformers 5 has them."""
    return [n for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in f".{n}"]


def _bytes(model: nn.Module) -> int:
    """Of every parameter and buffer, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def _check_patterns(recipe: Recipe, names: list[str]) -> None:
    idle = [
        r.pattern
        for r in recipe.rules
        if not r.optional and not any(fnmatchcase(name, r.pattern) for name in names)
    ]
    if idle:
        raise ValueError(f"quantize: no layer of the model matches {', '.join(map(repr, idle))}")


def _count_layers(model: nn.Module, recipe: Recipe) -> int:
    layers = 1 + max(
        (i for n, _ in model.named_modules() if (i := _layer(f"{n}.")) is not None), default=-1
    )
    if not layers and (recipe.keep_first or recipe.keep_last):
        raise ValueError("quantize: keep_first and keep_last need layers named 'layers.0.…'")
    return layers


def _shared(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> the modules that own it, where several do."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            owners.setdefault(id(p), []).append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def _obstacle(layer: nn.Linear, shared: dict[int, list[str]]) -> str | None:
    """Why a layer must stay as it is, if it must."""
    kind = type(layer)
    if not isinstance(layer, QuantizedLinear) and kind not in (nn.Linear, Linear):
        return f"it is a {kind.__qualname__}, whose forward is its own"
    if id(layer.weight) in shared:
        return f"its weight is shared: {', '.join(shared[id(layer.weight)])}"
    return None


def _check_chosen(
    linears: dict[str, nn.Linear], chosen: dict[str, str], recipe: Recipe, amax: dict
) -> None:
    if not chosen:
        raise ValueError("quantize: the recipe quantizes no layer of the model")
    twice = [n for n in chosen if isinstance(linears[n], QuantizedLinear)]
    if twice:
        raise ValueError(f"quantize: quantized already: {', '.join(twice)}")
    sharded = [n for n in chosen if hasattr(linears[n].weight, "placements")]
    if sharded:
        raise ValueError(f"quantize before fully_shard; sharded: {', '.join(sharded)}")
    strangers = sorted(set(amax) - set(linears))
    if strangers:
        raise ValueError(f"quantize: amax of no layer of the model: {', '.join(strangers)}")
    if amax and not recipe.frozen:
        raise ValueError("quantize: amax gives static scales to frozen layers; this recipe trains")


def _warn_of_readers(model: nn.Module) -> None:
    """Mixers whose fused training path multiplies out_proj.weight by themselves pass a quantized layer by."""
    for name, module in model.named_modules():
        own = [module.__dict__.get(slot) for slot in ("forward", "_old_forward")]
        if (
            type(module).__module__.startswith(("transformers.", "mamba_ssm."))
            and isinstance(getattr(module, "out_proj", None), QuantizedLinear)
            and hasattr(module, "conv1d")
            and not any(isinstance(forward, partial) for forward in own)
        ):
            warnings.warn(
                f"quantize: {name} ({type(module).__name__}) may read out_proj.weight in training on a GPU and pass "
                "the quantized layer by: call tigon.patch(model) for transformers, use_mem_eff_path=False for mamba_ssm",
                stacklevel=3,
            )
            return
