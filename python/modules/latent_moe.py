"""A mixture of experts that may work in a latent space narrower than the model: LatentMoE.

    s = sigmoid(W_g x) in fp32;   e_1, ..., e_k = top k of s + b;   w_j = scale s_{e_j} / (sum_j s_{e_j} + eps)
    z = W_1 x;   out = W_2 (sum_j w_j D_{e_j} act(U_{e_j} z)) + shared(x)

x (...,d), z (t,l), U (e,m,l), D (e,l,m). The router and the shared expert see the full width. Without a latent width,
z = x and there is neither W_1 nor W_2: an ordinary mixture. The bias b chooses and does nothing else; `update_bias`
moves it towards experts that are chosen too rarely.

Sources: "Nemotron 3" (arXiv 2512.20856), section 2.2, and "LatentMoE" (2601.18089); Wang et al. 2024,
"Auxiliary-Loss-Free Load Balancing" (2408.15664).
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from tigon.modules.experts import Experts
from tigon.modules.linear import Linear, linear
from tigon.modules.mlp import MLP, GatedMLP
from tigon.ops import Routing, moe_route


class Router(nn.Module):
    """x (t,d) -> logits (t,e) in fp32 (fp64 for fp64), whatever the dtypes and autocast.

    weight (e,d). e_score_correction_bias (e), a buffer that stays fp32 when the model is cast; whoever chooses adds it
    to the scores.
    """

    def __init__(self, d_model: int, experts: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_model, device=device, dtype=dtype))
        nn.init.uniform_(self.weight, -(d_model**-0.5), d_model**-0.5)
        bias = torch.zeros(experts, dtype=torch.float32, device=device)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(dtype), self.weight.to(dtype))

    def _apply(self, fn, recurse=True):
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype.itemsize < exact.dtype.itemsize:
            self.e_score_correction_bias = exact.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, experts={self.weight.shape[0]}"


class LatentMoE(nn.Module):
    """x (..., d_model) -> (..., d_model) through k of e experts a token, and a shared one.

    Args:
        d_model: width (d). latent: width that the experts work in (l); None: d_model, without projections.
        experts (e), expert_width (m), top_k (k): how many, of which width, how many a token.
        shared_width: of the shared expert, which every token passes; None for none.
        scale: of the routing weights. groups, top_groups, normalize, score: as in `tigon.moe_route`.
        activation: "relu2", or "swiglu" with gates in the experts and in the shared one.
        bias: whether the latent projections and the shared expert have one. Experts have none.
        scale_placement: "weights", or "output": the routed sum is multiplied, before W_2.
        weight_placement, save: as in `tigon.moe_experts`.
        aux, z_loss: what the returned `Routing` sums up for losses: scores by "sequence", over the "batch", or none.

    Parameters, as in transformers' NemotronH: gate.weight (e,d), gate.e_score_correction_bias (e) fp32 (a buffer),
    experts.up_proj (e,m,l) (gated: experts.gate_up_proj (e,2m,l), gate rows first), experts.down_proj (e,l,m),
    fc1_latent_proj.weight (l,d), fc2_latent_proj.weight (d,l), shared_experts.up_proj.weight, .down_proj.weight (gated:
    and .gate_proj.weight). `load_state_dict` also takes an expert's tensors under names of their own
    (experts.0.up_proj.weight, ...). Expert weights with a fp32 `main_grad` have their gradients added to it.

    Raises:
        ValueError: sizes that do not fit each other, by name.
    """

    def __init__(
        self,
        d_model: int,
        latent: int | None,
        experts: int,
        expert_width: int,
        top_k: int,
        shared_width: int | None,
        *,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        normalize: bool = True,
        score: Literal["sigmoid", "softmax"] = "sigmoid",
        activation: Literal["relu2", "swiglu"] = "relu2",
        bias: bool = False,
        scale_placement: Literal["weights", "output"] = "weights",
        weight_placement: Literal["after_down", "before_down"] = "after_down",
        save: Literal["hidden", "relu", "nothing"] = "hidden",
        aux: Literal["sequence", "batch"] | None = None,
        z_loss: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if groups < 1 or experts % groups or not 1 <= top_groups <= groups:
            raise ValueError(
                f"LatentMoE: groups={groups} must divide experts={experts}, and top_groups={top_groups} lie in 1 to it"
            )
        if not 1 <= top_k <= experts // groups * top_groups:
            raise ValueError(
                f"LatentMoE: top_k={top_k} must lie in 1 to the {experts // groups * top_groups} experts to choose from"
            )
        self.aux, self.top_k = aux, top_k
        self.choice = {
            "top_k": top_k,
            "scale": scale,
            "score": score,
            "normalize": normalize,
            "groups": groups,
            "top_groups": top_groups,
            "scale_placement": scale_placement,
            "z_loss": z_loss,
        }
        factory = {"device": device, "dtype": dtype}
        width = latent or d_model
        self.gate = Router(d_model, experts, **factory)
        self.experts = Experts(
            *(experts, width, expert_width, activation, weight_placement, save), **factory
        )
        if latent is not None:
            self.fc1_latent_proj = Linear(d_model, latent, bias=bias, **factory)
            self.fc2_latent_proj = Linear(latent, d_model, bias=bias, **factory)
        self.latent = latent
        self.shared_experts = None
        if shared_width:
            shared = GatedMLP if activation == "swiglu" else MLP
            self.shared_experts = shared(d_model, shared_width, bias=bias, **factory)

    def route(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Routing:
        """The routing of x (...,d): dense rows (b,l,d) or, with cu_seqlens (s+1), packed ones are its sequences.

        mask: like x without its width; False at padding, which no expert sees and no loss counts.
        """
        rows = x.reshape(-1, x.shape[-1])
        if self.aux == "sequence" and cu_seqlens is None:
            cu_seqlens = _row_bounds(x)
        return moe_route(
            self.gate(rows),
            self.gate.e_score_correction_bias,
            aux=self.aux,
            cu_seqlens=cu_seqlens if self.aux == "sequence" else None,
            mask=None if mask is None else mask.reshape(-1),
            **self.choice,
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Arguments as in `route`; with return_routing (y, Routing), for `router_losses` and `update_bias`."""
        routing = self.route(x, mask, cu_seqlens)
        z = x.reshape(-1, x.shape[-1])
        z = z if self.latent is None else self.fc1_latent_proj(z)
        y = self.experts(z, routing)
        if routing.output_scale != 1:
            y = y * routing.output_scale
        y = y if self.latent is None else self.fc2_latent_proj(y)
        y = y.view(x.shape)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return (y, routing) if return_routing else y

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float = 1e-3, group=None) -> None:
        """b += rate sign(mean(counts) - counts): once a step, after the optimizer.

        counts: (e) integers, `Routing.counts`, added up over the micro-batches of the step.
        group: processes whose counts are added first (data parallel), e.g. torch.distributed.group.WORLD; None: none.
        """
        counts = total_counts(counts, group)
        bias = self.gate.e_score_correction_bias
        # In integers: e mean(counts) is their sum.
        bias += rate * torch.sign(counts.sum() - counts.shape[0] * counts).to(bias.dtype)


def total_counts(counts: Tensor, group=None) -> Tensor:
    """int64 counts, added up over a process group."""
    counts = counts.to(torch.int64, copy=True)
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return counts


def router_losses(routings: Iterable[Routing], aux: float = 0.0, z: float = 0.0) -> Tensor | float:
    """sum over layers of aux * load-balancing loss + z * z loss, of routings that have the sums; 0.0 for no layers.

    The z loss is the mean of logsumexp(logits)^2 over tokens that are not masked.
    """
    loss = 0.0
    for routing in routings:
        if aux:
            loss = loss + aux * routing.aux_loss()
        if z:
            if routing.z_sum is None:
                raise ValueError("router_losses: route with z_loss=True")
            tokens = (routing.counts.sum() / routing.top_k).clamp(min=1)
            loss = loss + z * routing.z_sum / tokens
    return loss


def _row_bounds(x: Tensor) -> Tensor:
    """Bounds of the rows of x (...,l,d) when they are packed."""
    rows = max(math.prod(x.shape[:-2]), 1)  # no rows: one empty sequence
    bounds = torch.arange(rows + 1, dtype=torch.int32, device=x.device) * x.shape[-2]
    return bounds.clamp(max=math.prod(x.shape[:-1]))
