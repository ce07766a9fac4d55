"""transformers' NemotronH and Mamba2 on Tigon's ops, written for the cache contract of transformers 5.23.

A patched module is the same object with an instance attribute `forward`, a `functools.partial` of a function
below: it pickles, copies with its module, and `unpatch` finds it without a list.

    mixer   in_proj -> [z, x|B|C, dt] -> causal convolution -> SSD scan or decode step -> gated norm -> out_proj
    cache   conv_states (b, channels, conv_kernel): last inputs of the convolution; recurrent_states (b,h,p,n)

The contract, as the original mixer keeps it: one new token on a layer with a past updates both states in place,
unless the cache records the past (then the convolution's inputs are appended for `Cache.crop` to cut);
anything else goes through `update_conv_state` and `update_recurrent_state`, and several new tokens continue the
states. Padded tokens (mask 0) are zeroed before in_proj and after the convolution.

Where it differs: `time_step_limit` also holds in the decode step. Packed rows (`seq_idx`, or `cu_seqlens` /
`cu_seq_lens_q` with batch 1) are kept apart without mamba-ssm; not together with a cache. Expert layers are in
transformers_moe.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from tigon import ops
from tigon.integrations.packing import Packing, from_bounds, from_ids
from tigon.integrations.report import PatchReport
from tigon.integrations.transformers_moe import (
    experts_forward,
    fault_of,
    moe_forward,
    router_forward,
)
from tigon.integrations.transformers_reduction import reduced_lm_forward, reduced_model_forward
from tigon.modules.token_reducer import as_reducer
from tigon.ops.conv1d import MAX_WIDTH
from tigon.ops.ssd import MAX_DIM


def _fires_conv_hooks(forward: Callable) -> Callable:
    """accelerate moves weights in hooks of the module that owns them; the mixer reads conv1d's without calling it."""

    @wraps(forward)
    def wrapped(self, *args, **kwargs):
        hook = getattr(self.conv1d, "_hf_hook", None)
        if hook is None:
            return forward(self, *args, **kwargs)
        hook.pre_forward(self.conv1d)
        out = forward(self, *args, **kwargs)
        hook.post_forward(self.conv1d, ())
        return out

    return wrapped


@_fires_conv_hooks
def mixer_forward(
    self: nn.Module,
    hidden_states: Tensor,
    cache_params: Any | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """hidden_states (b,l,d) -> (b,l,d). attention_mask (b,l), 0 at padding, or None."""
    packing = _packing(hidden_states, cache_params, kwargs)
    projected = self.in_proj(_zero_padding(hidden_states, attention_mask))
    z, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
    # The decode ops have no gradient; whoever differentiates through a cache gets the ops that do.
    step = projected.shape[1] == 1 and not (torch.is_grad_enabled() and projected.requires_grad)
    past, state = _past(self, cache_params)

    xBC = _zero_padding(_convolve(self, xBC, cache_params, past, step, packing), attention_mask)
    y = _scan(self, xBC, dt, cache_params, state, step, packing, kwargs.get("watch"))
    return self.out_proj(self.norm(y, z).to(hidden_states.dtype))


def _zero_padding(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else (t * mask[:, :, None]).to(t.dtype)


def _past(self: nn.Module, cache: Any | None) -> tuple[Tensor | None, Tensor | None]:
    """This layer's (conv_states, recurrent_states), None before its first tokens."""
    if cache is None:
        return None, None
    conv = cache.get_conv_state(self.layer_idx, state_idx=0)
    return conv, cache.get_recurrent_state(self.layer_idx, state_idx=0)


def _packing(x: Tensor, cache: Any | None, kwargs: dict[str, Any]) -> Packing | None:
    """How packed rows are to be kept apart: bounds if they were passed, else ids."""
    bounds = kwargs.get("cu_seqlens")
    bounds = kwargs.get("cu_seq_lens_q") if bounds is None else bounds
    ids = kwargs.get("seq_idx")
    if bounds is None and ids is None:
        return None
    if cache is not None:
        raise ValueError("packed rows (seq_idx, cu_seqlens) cannot be combined with a cache")
    if ids is not None and (bounds is None or x.shape[0] > 1):
        return from_ids(ids)
    if x.shape[0] > 1:
        raise ValueError(f"cu_seqlens needs batch 1, got batch {x.shape[0]}; pass seq_idx")
    return from_bounds(bounds)


def _convolve(self, xBC, cache, past, step, packing) -> Tensor:
    weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
    if packing is not None:
        cu_seqlens = packing.cu_seqlens
        return ops.causal_conv1d(packing.tokens(xBC), weight, bias, cu_seqlens=cu_seqlens).view_as(
            xBC
        )
    if past is not None and step and not cache.is_recording_past(self.layer_idx):
        window = past.contiguous()  # a window cut by Cache.crop is strided
        y = ops.causal_conv1d_update(xBC, window, weight, bias)
        if window is not past:
            past.copy_(window)
        return y
    initial = None
    if past is not None and weight.shape[1] > 1:
        # A copy: update_conv_state writes into `past`. While the past is recorded it may be shorter than a window.
        initial = past[..., 1 - weight.shape[1] :].to(xBC.dtype, copy=True)
        initial = nn.functional.pad(initial, (weight.shape[1] - 1 - initial.shape[-1], 0))
    if cache is not None:
        cache.update_conv_state(
            xBC.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
        )
    return ops.causal_conv1d(xBC, weight, bias, initial_state=initial)


def _scan(self, xBC, dt, cache, state, step, packing, watch=None) -> Tensor:
    """(b, l, channels), (b,l,h) -> (b, l, h p)."""
    bc = self.n_groups * self.ssm_state_size
    x, B, C = xBC.split([self.intermediate_size, bc, bc], -1)
    x = x.unflatten(-1, (self.num_heads, self.head_dim))
    B, C = (t.unflatten(-1, (self.n_groups, self.ssm_state_size)) for t in (B, C))
    if watch is not None:
        wide = torch.promote_types(dt.dtype, torch.float32)
        sizes = nn.functional.softplus(dt.to(wide) + self.dt_bias.to(wide))
        watch(C, B, sizes.clamp(*self.time_step_limit))
    A = -torch.exp(self.A_log.float())
    options = {"D": self.D, "dt_bias": self.dt_bias, "dt_softplus": True}
    options["dt_limit"] = tuple(self.time_step_limit)
    if state is not None and step:
        held = state.contiguous()  # itself, unless someone permuted it: the op updates dense states
        y = ops.ssd_update(held, x, dt, A, B, C, **options)
        if held is not state:
            state.copy_(held)
    elif packing is not None:
        x, dt, B, C = (packing.tokens(t) for t in (x, dt, B, C))
        y = ops.ssd_scan(x, dt, A, B, C, cu_seqlens=packing.cu_seqlens, **options)
        y = packing.rows(y, xBC[..., : self.intermediate_size].unflatten(-1, x.shape[2:]))
    elif cache is None:
        y = ops.ssd_scan(x, dt, A, B, C, **options)
    else:
        if state is not None and torch.is_grad_enabled():
            state = state.clone()  # saved for backward, and overwritten below
        y, final = ops.ssd_scan(
            *(x, dt, A, B, C), initial_states=state, return_final_states=True, **options
        )
        cache.update_recurrent_state(final, layer_idx=self.layer_idx)
    return y.flatten(-2)


def gated_norm_forward(self: nn.Module, hidden_states: Tensor, gate: Tensor | None = None):
    """norm(x silu(gate)) weight, over groups of `group_size` channels (all of them in versions without it)."""
    if gate is None:
        return type(self).forward(self, hidden_states)
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
    size = getattr(self, "group_size", None)
    return ops.gated_rms_norm(
        x, gate.to(x.dtype), self.weight.to(x.dtype), eps=self.variance_epsilon, group_size=size
    )


def promoting_norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """Mamba2RMSNorm: norm(x) weight, in the wider dtype of the two."""
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
    return ops.rms_norm(x, self.weight.to(x.dtype), eps=self.variance_epsilon)


def norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """NemotronHRMSNorm: norm(x) weight, in x's dtype."""
    weight = self.weight if self.weight.dtype == hidden_states.dtype else self.weight.float()
    return ops.rms_norm(hidden_states, weight, eps=self.variance_epsilon)


_FORWARDS = {
    ("mamba2", "Mamba2Mixer"): mixer_forward,
    ("mamba2", "MambaRMSNormGated"): gated_norm_forward,
    ("mamba2", "Mamba2RMSNorm"): promoting_norm_forward,
    ("nemotron_h", "NemotronHMamba2Mixer"): mixer_forward,
    ("nemotron_h", "NemotronHRMSNormGated"): gated_norm_forward,
    ("nemotron_h", "NemotronHRMSNorm"): norm_forward,
    ("nemotron_h", "NemotronHMoE"): moe_forward,
    ("nemotron_h", "NemotronHTopkRouter"): router_forward,
    ("nemotron_h", "NemotronHExperts"): experts_forward,
}
_KINDS = {
    (f"transformers.models.{model}.modeling_{model}", name): forward
    for (model, name), forward in _FORWARDS.items()
}
_OURS = frozenset(_FORWARDS.values()) | {reduced_model_forward, reduced_lm_forward}
_NEMOTRON_H = "transformers.models.nemotron_h.modeling_nemotron_h"
_STACK = (_NEMOTRON_H, "NemotronHModel")  # and the model around it: patched for a reduction alone
_LM = (_NEMOTRON_H, "NemotronHForCausalLM")
_LAYERS = (mixer_forward, moe_forward)  # one of which a model has if it is worth patching


def patch(model: nn.Module, reduction=None) -> PatchReport:
    """See `tigon.patch`."""
    stacks = [m for m in model.modules() if _is_stack(m)]
    if reduction is not None:
        reduction = as_reducer(reduction)
        if not stacks:
            raise ValueError(
                f"tigon.patch: reduction needs a NemotronH, got {type(model).__name__}"
            )
    found = [(name, m, kind) for name, m in model.named_modules() if (kind := _kind(m))]
    if not any(_KINDS[kind] in _LAYERS for _, _, kind in found):
        raise ValueError(
            f"tigon.patch: {type(model).__name__} has no Mamba-2 or expert layer that Tigon knows; supported are "
            "NemotronH and Mamba2 models of transformers itself (not remote code)"
        )
    _check_version()
    for name, module, kind in found:
        _check(name, module, kind)
    for stack in stacks if reduction is not None else ():
        _check_own(type(stack).__name__, stack)
    already = 0
    for _, module, kind in found:
        slot = _slot(module)
        already += _is_ours(module.__dict__.get(slot))
        module.__dict__[slot] = partial(_KINDS[kind], module)
    counts = Counter(kind[1] for _, _, kind in found)
    for stack in stacks:
        already += _restore(stack) and reduction is not None
        if reduction is not None:
            is_lm = _LM in _names(stack)
            forward = reduced_lm_forward if is_lm else reduced_model_forward
            options = {} if is_lm else {"reducer": reduction}
            stack.__dict__[_slot(stack)] = partial(forward, stack, **options)
            counts[type(stack).__name__] += 1
    return PatchReport(dict(counts), already)


def unpatch(model: nn.Module) -> PatchReport:
    """See `tigon.unpatch`."""
    counts, already = Counter(), 0
    for module in model.modules():
        if _is_stack(module):
            counts[type(module).__name__] += _restore(module)
        if (kind := _kind(module)) is None:
            continue
        counts[kind[1]] += 1
        already += not _restore(module)
    return PatchReport({name: n for name, n in counts.items() if n}, already)


def _is_stack(module: nn.Module) -> bool:
    return not {_STACK, _LM}.isdisjoint(_names(module))


def _restore(module: nn.Module) -> bool:
    """Give a module its own forward back; whether it had one of ours."""
    slot = _slot(module)
    if not _is_ours(module.__dict__.get(slot)):
        return False
    if slot == "forward":
        del module.__dict__[slot]
    else:
        module.__dict__[slot] = type(module).forward.__get__(module)
    return True


def _names(module: nn.Module) -> list[tuple[str, str]]:
    return [(base.__module__, base.__name__) for base in type(module).__mro__]


def _kind(module: nn.Module) -> tuple[str, str] | None:
    """(Python module, class) of the supported class that this is an instance of: FSDP and others subclass it."""
    return next((name for name in _names(module) if name in _KINDS), None)


def _slot(module: nn.Module) -> str:
    """Where a module's forward lies: accelerate's hooks keep the one that they wrap in `_old_forward`."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func in _OURS


def _check_version() -> None:
    import transformers

    if not hasattr(transformers.Cache, "is_recording_past"):
        raise ValueError(
            f"tigon.patch: transformers {transformers.__version__} has another cache than the one of 5.23 that "
            "the patched mixers use: pip install -U transformers"
        )


def _check_own(name: str, module: nn.Module) -> None:
    own = module.__dict__.get(_slot(module))
    is_original = getattr(own, "__func__", None) is type(module).forward
    if not (own is None or _is_ours(own) or is_original):
        raise ValueError(f"tigon.patch: {name} has a forward of its own already")


def _check(name: str, module: nn.Module, kind: tuple[str, str]) -> None:
    """Refuse, before anything is changed, what Tigon's ops lack or what patching would lose."""

    def require(holds: bool, what: str | None) -> None:
        if not holds:
            raise ValueError(f"tigon.patch: {name} ({kind[1]}) {what}")

    _check_own(f"{name} ({kind[1]})", module)
    fault = fault_of(module) if _KINDS[kind] in (router_forward, experts_forward) else None
    require(fault is None, fault)
    if _KINDS[kind] is not mixer_forward:
        return
    require(
        module.activation in ("silu", "swish"), f"has activation {module.activation!r}, not 'silu'"
    )
    require(
        module.conv_kernel_size <= MAX_WIDTH,
        f"has conv_kernel {module.conv_kernel_size}, at most {MAX_WIDTH} is supported",
    )
    size = max(module.head_dim, module.ssm_state_size)
    require(size <= MAX_DIM, f"has a head or state size of {size}, at most {MAX_DIM} is supported")
