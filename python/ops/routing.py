"""What `moe_route` returns: which experts a token goes to, and the same choices in the order of the experts."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """k choices for each of t tokens among e experts. Choice c = token k + j.

    indices: (t,k) int32 experts, best first; one of e or more is a skipped choice. weights: (t,k) fp32.
    counts: (e) int32 choices an expert. offsets: (e+1) int32, where an expert's rows begin in expert order.
    order: (t k) int32, the choice at each place of expert order (within an expert by token), -1 past offsets[e].
    inverse: (t k) int32, the place of each choice, -1 for a skipped one.
    score_sums: (s,e) fp32, normalized scores summed over each sequence's tokens, and aux_counts: (s,e) int32, how many
    of them would choose an expert without the bias; None unless asked for. z_sum: () fp32, the sum over tokens of
    logsumexp(logits)^2, or None.
    output_scale: what the routed output is still to be multiplied with (scale_placement="output"), else 1.
    """

    TENSORS: ClassVar = (
        "indices", "weights", "counts", "offsets", "order", "inverse", "score_sums", "aux_counts", "z_sum",
    )  # fmt: skip

    indices: Tensor
    weights: Tensor
    counts: Tensor
    offsets: Tensor
    order: Tensor
    inverse: Tensor
    score_sums: Tensor | None = None
    aux_counts: Tensor | None = None
    z_sum: Tensor | None = None
    output_scale: float = 1.0

    @property
    def tokens(self) -> int:
        return self.indices.shape[0]

    @property
    def top_k(self) -> int:
        return self.indices.shape[1]

    @property
    def experts(self) -> int:
        return self.counts.shape[0]

    def aux_loss(self) -> Tensor:
        """The load-balancing loss e / (k n^2) sum_e P_e n_e of each sequence (or of the batch), averaged; multiply with
        your coefficient. P are score_sums, n_e aux_counts; n, the sequence's tokens, is their sum over e, over k.

        Source: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), section 2.2; Megatron-LM's aux loss.
        """
        if self.score_sums is None:
            raise ValueError("aux_loss: route with aux='sequence' or aux='batch'")
        counts = self.aux_counts.to(torch.float32)
        n = counts.sum(-1).clamp(min=1) / self.top_k
        loss = self.experts / (self.top_k * n.square()) * (self.score_sums * counts).sum(-1)
        return loss.mean()

    def z_loss(self, tokens: int | None = None) -> Tensor:
        """mean over tokens of logsumexp(logits)^2; multiply with your coefficient.

        tokens: how many there are, if some are masked. Source: Zoph et al. 2022, "ST-MoE" (arXiv 2202.08906), eq. 5.
        """
        if self.z_sum is None:
            raise ValueError("z_loss: route with z_loss=True")
        return self.z_sum / max(self.tokens if tokens is None else tokens, 1)


def _flatten(routing: Routing) -> tuple[list, tuple]:
    static = {
        f.name: getattr(routing, f.name) for f in fields(routing) if f.name not in Routing.TENSORS
    }
    return [getattr(routing, name) for name in Routing.TENSORS], tuple(static.items())


def _unflatten(tensors, static) -> Routing:
    return Routing(**dict(zip(Routing.TENSORS, tensors, strict=True)), **dict(static))


pytree.register_pytree_node(Routing, _flatten, _unflatten, serialized_type_name="tigon.Routing")
