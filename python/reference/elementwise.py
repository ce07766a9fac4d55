"""SiLU and softplus with the same bits wherever an element lies.

torch's own (`F.silu`, `F.softplus`, `torch.sigmoid`) compute the last elements of a run with another exp than the
others, so a value's last bit depends on the tensor's length, its strides and the number of threads; torch.exp and
torch.log1p do not do that. A row's result may not depend on what else is in the batch, hence these.
"""

import torch
from torch import Tensor


def silu(t: Tensor) -> Tensor:
    """t / (1 + exp(-t)). Not for autograd."""
    e = torch.neg(t).exp_().add_(1)
    return torch.div(t, e, out=e)


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp(t)); t itself above 20. Differentiable."""
    return torch.where(t > 20, t, torch.log1p(torch.exp(t.clamp(max=20))))
