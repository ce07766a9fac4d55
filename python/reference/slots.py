"""Slot-indexed states that are updated in place."""

import torch
from torch import Tensor


def write_slots(state: Tensor, new: Tensor, index: Tensor, live: Tensor) -> None:
    """state[index[r]] = new[r] for live rows r, without waiting for the device.

    Rows that are not live repeat the write of the first live one; with none live, row 0 writes back what it read.
    """
    anchor = live.to(torch.uint8).argmax(0, keepdim=True)
    row = torch.where(live, torch.arange(index.numel(), device=index.device), anchor)
    state.index_copy_(0, index[row].clamp(0, state.shape[0] - 1), new[row].to(state.dtype))
