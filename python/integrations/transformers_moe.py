"""Mixtures of experts of transformers 5.23 on Tigon's ops: NemotronH's layers, and experts of any model that fit.

    tigon.patch(model)                                  NemotronH: router, experts and the layer around them
    tigon.register_experts()                            once; then, for any model of transformers:
    model.set_experts_implementation("tigon")           experts alone, choices made by the model's own router

Experts fit that are stacked (e, rows, width) without transposition and bias, and are relu(U x)^2, or silu(gate) up with
the gate rows first; others raise, by name. An index of `num_experts` or more is a skipped choice, as everywhere in
transformers.
"""

import torch
from torch import Tensor, nn

from tigon.modules.linear import linear
from tigon.ops import Routing, moe_experts, moe_route, moe_sort
from tigon.ops.moe import MAX_EXPERTS, MAX_K

NAME = "tigon"
_ACTIVATIONS = {False: ("ReLUSquaredActivation",), True: ("SiLUActivation", "SiLU")}  # by gate


def register_experts() -> None:
    """Make "tigon" a name for `model.set_experts_implementation` and `from_pretrained(experts_implementation=...)` of
    transformers. Calling it twice is the same as once.

    Raises:
        ImportError: transformers is not installed, or has no interface for experts (5.0 has).
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def router_forward(self: nn.Module, hidden_states: Tensor, with_routing: bool = False):
    """(logits (t,e) fp32, weights (t,k) fp32, indices (t,k) int64), and the Routing if asked for; without autocast."""
    rows = hidden_states.reshape(-1, self.hidden_dim)
    with torch.autocast(rows.device.type, enabled=False):
        logits = linear(rows.float(), self.weight.float())
    routing = moe_route(
        logits,
        self.e_score_correction_bias.float(),
        top_k=self.top_k,
        scale=self.routed_scaling_factor,
        normalize=self.norm_topk_prob,
        groups=self.num_group,
        top_groups=self.topk_group,
    )
    out = logits, routing.weights, routing.indices.long()
    return (*out, routing) if with_routing else out


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    routing: Routing | None = None,
) -> Tensor:
    """hidden_states (t,l), top_k_index and top_k_weights (t,k) -> (t,l). routing: of these choices, if it is known."""
    fault = _misfit(self)
    if fault is not None:
        raise ValueError(f"experts_implementation='{NAME}': {type(self).__name__} {fault}")
    if routing is None:
        weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
        routing = moe_sort(top_k_index, weights, experts=self.down_proj.shape[0])
    return moe_experts(
        hidden_states,
        self.gate_up_proj if self.has_gate else self.up_proj,
        self.down_proj,
        routing,
        activation="swiglu" if self.has_gate else "relu2",
    )


def moe_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """NemotronHMoE: (..., d) -> (..., d). Its parts are called as modules, so that their hooks fire."""
    *_, routing = self.gate(hidden_states, with_routing=True)
    x = self.fc1_latent_proj(hidden_states.reshape(-1, hidden_states.shape[-1]))
    y = self.experts(x, routing.indices, routing.weights, routing=routing)
    return self.fc2_latent_proj(y).view(hidden_states.shape) + self.shared_experts(hidden_states)


def _misfit(experts: nn.Module) -> str | None:
    """What about a module with transformers' experts interface Tigon does not compute."""
    gated, activation = experts.has_gate, type(getattr(experts, "act_fn", None)).__name__
    faults = {
        "has biases": experts.has_bias,
        "has transposed weights": experts.is_transposed,
        "has gate and up rows interleaved": gated and not experts.is_concatenated,
        "has a norm behind each expert": getattr(experts, "has_post_expert_norm", False),
        "has a gate of its own": gated and experts._apply_gate.__name__ != "_default_apply_gate",
        f"has activation {activation}": activation not in _ACTIVATIONS[gated],
    }
    return next((fault for fault, holds in faults.items() if holds), None)


def fault_of(module: nn.Module) -> str | None:
    """Why a router or experts of NemotronH cannot be patched."""
    if hasattr(module, "act_fn"):
        return _misfit(module)
    if hasattr(module, "top_k") and (module.top_k > MAX_K or module.num_experts > MAX_EXPERTS):
        return f"chooses {module.top_k} of {module.num_experts}, at most {MAX_K} of {MAX_EXPERTS}"
    return None
