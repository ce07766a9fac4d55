"""Tigon's ops inside other packages: one file for each, imported only when it is needed.

`patch` and `unpatch` change a model that is already built; `tigon.integrations.mamba_ssm` offers that package's
functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from tigon.integrations.report import PatchReport
    from tigon.models.reduction_schedule import ReductionSchedule
    from tigon.modules import TokenReducer

# Package that defines a model's modules -> the adapter that patches them.
_ADAPTERS = {"transformers": "tigon.integrations.transformers"}

__all__ = ["patch", "register_experts", "unpatch"]


def patch(
    model: nn.Module, reduction: TokenReducer | ReductionSchedule | None = None
) -> PatchReport:
    """Make a model use Tigon's ops, in place: this instance only, on CPU and GPU, in training and generation.

    Of transformers: Mamba-2 mixers, expert layers and norms of NemotronH and Mamba2 models, alone or inside another
    module.
    Parameters, `state_dict`, `save_pretrained`, hooks, copying and pickling are untouched; a copy of a patched model is
    patched. Patching twice is the same as once.

    One result differs on purpose: transformers applies a finite `time_step_limit` in prefill but not in its
    one-token decode step; Tigon applies it in both, so decode continues what prefill computed. NemotronH always has
    such a limit: its `time_step_min`.

    Args:
        model: an `nn.Module` that holds supported modules, of one package.
        reduction: for a NemotronH, how `model(ids, reducible=mask)` drops tokens between its layers: a
            `tigon.modules.TokenReducer` or the `ReductionSchedule` of one. mask (b,l) bool, or a `Reducible`; rows must
            have equally many tokens to drop and no padding. Logits are of the tokens that the last layer has, so no
            labels. The cache then holds each layer's own tokens: its `kept_tokens` (`KeptTokens`) says which, and its
            `get_seq_length()` counts those of the first attention layer. `model.generate(ids, reducible=mask)` works.
            Calls without a mask are as ever.

    Returns:
        What was patched, by kind of module; `print` it.

    Raises:
        ValueError: nothing in the model is supported; or a module has an option that Tigon's ops lack, or a
            `forward` of its own that would be lost. Nothing is patched then.
    """
    return _adapter(model).patch(model, reduction)


def unpatch(model: nn.Module) -> PatchReport:
    """Undo `patch`, exactly. Returns what was restored; a model that is not patched is left alone."""
    return _adapter(model).unpatch(model)


def register_experts() -> None:
    """Let any model of transformers with fitting experts use Tigon's: `model.set_experts_implementation("tigon")`.

    Fitting are stacked experts without biases, ReLU² or SwiGLU; calling others raises ValueError by name.

    Raises:
        ImportError: transformers is not installed, or has no interface for experts.
    """
    import_module("tigon.integrations.transformers_moe").register_experts()


def _adapter(model: nn.Module):
    """The adapter for the package that the model's modules come from."""
    packages = {base.__module__.split(".")[0] for m in model.modules() for base in type(m).__mro__}
    for package in _ADAPTERS:
        if package in packages:
            return import_module(_ADAPTERS[package])
    raise ValueError(
        f"tigon.patch: {type(model).__name__} holds no module of {' or '.join(_ADAPTERS)}; supported are "
        "NemotronH and Mamba2 models of transformers (tigon.models and tigon.modules use Tigon's ops already)"
    )
