"""Tensors in guarded memory: NaN (or a canary) lies around them, so that a read out of bounds shows."""

import torch
from torch import Tensor


def guarded(t: Tensor | None, margin: int = 64) -> Tensor | None:
    """A copy of `t` that lies in a larger buffer of NaN: a kernel that reads beside it gets NaN.

    Integer tensors are surrounded by large numbers, masks by True.
    """
    if t is None:
        return None
    if t.is_floating_point():
        poison = float("nan")
    else:
        poison = t.dtype == torch.bool or min(2**30, torch.iinfo(t.dtype).max)
    buffer = torch.full((t.numel() + 2 * margin,), poison, dtype=t.dtype, device=t.device)
    copy = buffer[margin : margin + t.numel()].view(t.shape)
    copy.copy_(t)
    return copy.requires_grad_(t.requires_grad)


def sliced(t: Tensor, dims: int) -> Tensor:
    """A copy of `t` as a slice of a wider buffer of NaN: its last `dims` dimensions are contiguous, the ones before are
    strided, as slices of one projection are."""
    inner = t.shape[t.dim() - dims :]
    width = inner.numel()
    buffer = torch.full(
        (*t.shape[: t.dim() - dims], width + 7), float("nan"), dtype=t.dtype, device=t.device
    )
    view = buffer[..., 3 : 3 + width].unflatten(-1, inner)
    view.copy_(t)
    return view
