"""RMSNorm with an optional SiLU gate, over groups of channels, in plain PyTorch.

With u = x silu(z) (gate first) or u = x, and r = (mean(u^2 over the group) + eps)^(-1/2):

    y = u r weight                 norm_before_gate=False, or no z
    y = x r weight silu(z)         norm_before_gate=True

x, z, y: (..., d); weight (d); groups are group_size neighbouring channels (d if None). Computed in fp32 (fp64 for
fp64 inputs), input dtype out. Sources: Zhang and Sennrich 2019 (RMSNorm); Dao and Gu 2024, section 7 (gate).
"""

import torch
from torch import Tensor

from tigon.reference.elementwise import silu


def _prepare(x, z, weight, group_size):
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = (x.shape[-1] // group_size, group_size)
    x = x.to(acc).unflatten(-1, groups)
    z = None if z is None else z.to(acc).unflatten(-1, groups)
    return x, z, weight.to(acc).unflatten(-1, groups)


def _inverse_rms(u: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)


def rms_statistics(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """r of each group, (..., groups): what `norm_forward` with the same arguments multiplies u with."""
    x, z, _ = _prepare(x, z, weight, group_size)
    u = x if z is None or norm_before_gate else x * silu(z)
    return _inverse_rms(u, eps).squeeze(-1)


def norm_forward(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """y like x."""
    dtype = x.dtype
    x, z, weight = _prepare(x, z, weight, group_size)
    gate = None if z is None else silu(z)
    u = x if z is None or norm_before_gate else x * gate
    y = u * _inverse_rms(u, eps) * weight
    if z is not None and norm_before_gate:
        y = y * gate
    return y.flatten(-2).to(dtype)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, dz, dweight), each in its input's dtype.

    With g the gradient of u r (that is dy weight, times silu(z) if the gate comes last):
    du = r (g - u r^2 mean(g u)).
    """
    x_dtype, weight_dtype = x.dtype, weight.dtype
    z_dtype = None if z is None else z.dtype
    x, z, weight = _prepare(x, z, weight, group_size)
    dy = dy.to(x.dtype).unflatten(-1, x.shape[-2:])
    gated_first = z is not None and not norm_before_gate
    gated_last = z is not None and norm_before_gate
    if z is not None:
        sig = torch.sigmoid(z)
        gate, slope = z * sig, sig * (1 + z * (1 - sig))
    u = x * gate if gated_first else x
    r = _inverse_rms(u, eps)
    normed = u * r
    outer = dy * gate if gated_last else dy
    g = outer * weight
    du = r * (g - normed * (g * normed).mean(-1, keepdim=True))
    dweight = (outer * normed).reshape(-1, weight.numel()).sum(0)
    dz = None
    if gated_last:
        dz = dy * normed * weight * slope
    if gated_first:
        dz = du * x * slope
        du = du * gate
    return (
        du.flatten(-2).to(x_dtype),
        None if dz is None else dz.flatten(-2).to(z_dtype),
        dweight.to(weight_dtype),
    )
