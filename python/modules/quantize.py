"""`quantize`: a recipe carried out on a model; `calibrate`: the largest activations, for static scales.

    tigon.quantize(model, "nemotron-3-super-train")     layers that train on quantized operands
    tigon.quantize(model, "nvfp4-weight-only")          frozen layers: the weights become codes now

All is planned before anything is replaced, so a refused recipe leaves the model as it was.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from tigon.modules.linear import Linear
from tigon.modules.quantized_linear import QuantizedLinear
from tigon.modules.recipe import FORMATS, KEEP, Recipe, layer_index


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
    """Replace Linear layers of `model`, in place, by the formats of `recipe`. Hooks of replaced layers go with them.

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
    for names in _by_layer(linears, chosen):
        format = chosen[names[0]]
        kind, options = FORMATS[format]
        new = kind.from_linear(linears[names[0]], **options, frozen=recipe.frozen)
        static = names[0] in amax and new.set_input_amax(amax[names[0]])
        for name in names:
            model.set_submodule(name, new)
            report.replaced[name] = f"{format}, static activation scale" if static else format
            del linears[name]  # the old weights are freed one layer at a time
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
        def hook(module, args, kwargs):
            x = (*args, *kwargs.values())[0].detach()
            if x.numel():
                new = x.abs().amax().float()
                found[name] = torch.maximum(found[name], new) if name in found else new

        return hook

    handles = [
        m.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, m in _linears(model).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: m for name, m in modules if name and isinstance(m, nn.Linear)}


def _stacked(model: nn.Module) -> list[str]:
    """Expert weights (e,n,k) that are Parameters rather than layers, as transformers 5 has them."""
    return [n for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in f".{n}"]


def _bytes(model: nn.Module) -> int:
    """Of every parameter and buffer, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def _by_layer(linears: dict[str, nn.Linear], chosen: dict[str, str]) -> list[list[str]]:
    """The chosen names, those of one and the same layer together."""
    names: dict[int, list[str]] = {}
    for name in chosen:
        names.setdefault(id(linears[name]), []).append(name)
    return list(names.values())


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
        (i for n, _ in model.named_modules() if (i := layer_index(f"{n}.")) is not None), default=-1
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
    if "forward" in layer.__dict__:
        return "its forward was replaced, as accelerate's hooks do"
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
                "the quantized layer by: call tigon.patch(model), or for mamba_ssm set use_mem_eff_path=False",
                stacklevel=3,
            )
            return
