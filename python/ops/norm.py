"""RMSNorm and gated RMSNorm.

With u = x silu(z) (gate first) or u = x, and r = (mean(u^2 over the group) + eps)^(-1/2):

    y = u r weight                 norm_before_gate=False, or no z
    y = x r weight silu(z)         norm_before_gate=True

Sources: Zhang and Sennrich 2019 (arXiv 1910.07467); Dao and Gu 2024 (2405.21060), section 7, for the norm before the
output projection, and mamba_ssm's RMSNormGated for both orders.
"""

import torch
from torch import Tensor

from tigon.ops.checks import Check, activation_dtypes, beside_dtypes
from tigon.ops.dispatch import call, inner, run
from tigon.ops.library import differentiable, once_differentiable, register

_ARGUMENTS = "Tensor x, Tensor? z, Tensor weight, float eps, int group_size, bool norm_before_gate"


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _norm(x, *rest):
    return run("gated_rms_norm", x, x, *rest)


def _norm_fake(x, *rest):
    return _like(x)


def _norm_backward(dy, x, *rest):
    dx, dz, dweight = run("gated_rms_norm_backward", x, dy, x, *rest)
    return dx, x.new_empty(0) if dz is None else dz, dweight


def _norm_backward_fake(dy, x, z, weight, *rest):
    return _like(x), x.new_empty(0) if z is None else _like(z), _like(weight)


def _norm_setup(ctx, inputs, output):
    x, z, weight, *ctx.rest = inputs
    ctx.save_for_backward(x, z, weight)


def _norm_autograd(ctx, dy):
    x, z, weight = ctx.saved_tensors
    grads = torch.ops.tigon.gated_rms_norm_backward(inner("dy", dy, 1), x, z, weight, *ctx.rest)
    return grads[0], None if z is None else grads[1], grads[2], None, None, None


register(f"gated_rms_norm({_ARGUMENTS}) -> Tensor", _norm, _norm_fake, autocast=("x", "z"))
register(
    f"gated_rms_norm_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _norm_backward,
    _norm_backward_fake,
)
differentiable("gated_rms_norm", _norm_autograd, _norm_setup)
once_differentiable("gated_rms_norm_backward")


def _checked(op, x, z, weight, eps, group_size) -> tuple[Check, int]:
    check = Check(op)
    if isinstance(x, Tensor) and x.dim() == 0:
        check.fail("x has shape (), expected (..., d)")
    rows = " ".join(f"t{i}" for i in range(x.dim() - 1)) if isinstance(x, Tensor) else ""
    check.tensor("x", x, f"{rows} d".strip())
    check.tensor("z", z, f"{rows} d".strip(), dtypes=activation_dtypes(x), optional=True)
    check.tensor("weight", weight, "d", dtypes=beside_dtypes(x))
    d = x.shape[-1]
    size = d if group_size is None else group_size
    check.require(size > 0 and d % size == 0, f"group_size={size} must divide d={d}")
    check.require(eps >= 0, f"eps must not be negative, got {eps}")
    return check, size


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMSNorm with a SiLU gate (formula at the top of the module), as Mamba-2 layers use it.

    Args:
        x, z: (..., d) of one dtype: fp32, bf16 or fp16 (fp64 on the reference).
        weight: (d), x's dtype or fp32.
        eps: added to the mean square.
        group_size: channels normalized together; d if None. mamba_ssm and Nemotron-H use d_inner / n_groups.
        norm_before_gate: whether the gate is applied after the norm.

    Returns:
        y like x.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.
    """
    _, size = _checked("gated_rms_norm", x, z, weight, eps, group_size)
    if z is None:
        raise TypeError("gated_rms_norm: z must be a Tensor, got NoneType; rms_norm has no gate")
    return _call("gated_rms_norm", x, z, weight, eps, size, norm_before_gate)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """y = x (mean(x^2) + eps)^(-1/2) weight over the last dimension.

    Args:
        x: (..., d) fp32, bf16 or fp16 (fp64 on the reference). weight: (d), x's dtype or fp32.
        eps: added to the mean square.

    Returns:
        y like x.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or range, by name.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
    """
    _, size = _checked("rms_norm", x, None, weight, eps, None)
    return _call("rms_norm", x, None, weight, eps, size, False)


def _call(op, x, z, weight, eps, size, norm_before_gate):
    args = (
        inner("x", x, 1),
        inner("z", z, 1),
        inner("weight", weight, 1),
        float(eps),
        size,
        norm_before_gate,
    )
    sizes = {"t": x.numel() // max(x.shape[-1], 1), "d": x.shape[-1], "group_size": size}
    return call(op, x, args, sizes | {"itemsize": x.element_size()}, registered="gated_rms_norm")
