"""RMSNorm and the gated RMSNorm of Mamba-2 layers, as modules over `tigon.rms_norm` and `tigon.gated_rms_norm`."""

import torch
from torch import Tensor, nn

from tigon.ops import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """y = x (mean(x^2) + eps)^(-1/2) weight over the last dimension.

    Args:
        d: size of the last dimension; weight (d), ones at first.
        eps: added to the mean square.
    """

    def __init__(
        self,
        d: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels with a SiLU gate, before or after the norm.

        y = norm(x silu(z)) weight      norm_before_gate=False (Mamba2 layers)
        y = norm(x) weight silu(z)      norm_before_gate=True

    Args:
        d: size of the last dimension; weight (d), ones at first.
        eps: added to the mean square.
        group_size: channels normalized together; d if None.
        norm_before_gate: mamba_ssm's RMSNormGated has True as its default, its Mamba2 layer False as here.
    """

    def __init__(
        self,
        d: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if group_size is not None and (group_size <= 0 or d % group_size):
            raise ValueError(f"GatedRMSNorm: group_size={group_size} must divide d={d}")
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z (..., d) -> y like x."""
        return gated_rms_norm(
            x,
            z,
            self.weight,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )
