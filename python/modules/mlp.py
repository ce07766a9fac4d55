"""Dense MLPs: Nemotron's without a gate, and the gated one of other models.

MLP        y = relu(x U^T)^2 D^T                    So et al. 2021, "Primer" (arXiv 2109.08668)
GatedMLP   y = (silu(x G^T) (x U^T)) D^T            Shazeer 2020, "GLU Variants" (2002.05202)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tigon.modules.linear import Linear
from tigon.ops.dispatch import is_batch_invariant


def silu(t: Tensor) -> Tensor:
    """t / (1 + exp(-t)). torch's own gives the last elements of a run other bits than the rest (see
    `tigon.reference.elementwise`), so it is left out in batch-invariant mode."""
    return t / (1 + torch.exp(-t)) if is_batch_invariant() else F.silu(t)


class MLP(nn.Module):
    """x (..., d) -> (..., d) through `intermediate_size` ReLU² units.

    Args:
        d_model, intermediate_size: widths. up_proj.weight (intermediate_size, d), down_proj.weight its transpose.
        bias: whether both products have one.
    """

    def __init__(
        self,
        d_model: int,
        intermediate_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.up_proj = Linear(d_model, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.down_proj = Linear(intermediate_size, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class GatedMLP(MLP):
    """x (..., d) -> (..., d) through `intermediate_size` SwiGLU units. Arguments and names as in `MLP`, and
    gate_proj.weight, shaped like up_proj's."""

    def __init__(
        self,
        d_model: int,
        intermediate_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(d_model, intermediate_size, bias, device, dtype)
        self.gate_proj = Linear(d_model, intermediate_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
