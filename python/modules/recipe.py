"""Recipes: which Linear layer of a model gets which format, as data. `tigon.quantize` carries one out.

Rules are read in order and the first whose pattern matches a layer's name decides; a layer that none matches is kept.
Names are those of `model.named_modules()`, of HybridLM (`backbone.layers.0.mixer.in_proj`) and of transformers'
NemotronH (`model.layers.0.mixer.in_proj`) alike. Presets also name what only models with LatentMoE layers have.

Sources: "Nemotron 3" (arXiv 2512.20856) and "Nemotron 3 Super" (2604.12374): the recipes of training and of the
released checkpoint; "Jet-RL" (2601.14243): FP8 blocks for training and rollout alike.
"""

import math
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from tigon.modules.fp8_linear import FP8Linear
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
        index, first, last = (
            layer_index(name),
            self._ends("first", layers),
            self._ends("last", layers),
        )
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
_MLP = (
    "*.up_proj",
    "*.down_proj",
    "*.gate_proj",
    "*.gate_up_proj",
)  # dense, of experts and of shared experts
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


def layer_index(name: str) -> int | None:
    """The index of the layer that a module is in; None outside the stack, and in prediction heads."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(match[1]) if match and not re.search(r"(?:^|\.)mtp\.", name) else None
