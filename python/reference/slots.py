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


class Rows:
    """Which slot each row of a call means, and which of its m tokens are real; nothing here waits for the device.

    index (b): the slot, clamped into the pool. live (b): the row has a slot. count (b): its real tokens.
    Without state_indices and num_tokens every row and token is real, and live and count are None.
    """

    def __init__(
        self,
        batch: int,
        m: int,
        slots: int,
        state_indices: Tensor | None,
        num_tokens: Tensor | None,
        device: torch.device,
    ):
        self.batch, self.m, self.device = batch, m, device
        self.in_order = state_indices is None
        self.live = self.count = None
        self.index = (
            torch.arange(batch, device=device) if self.in_order else state_indices.to(torch.int64)
        )
        if self.in_order and num_tokens is None:
            return
        self.live = (self.index >= 0) & (self.index < slots)
        self.index = self.index.clamp(0, slots - 1)
        self.count = (
            torch.full_like(self.index, m) if num_tokens is None else num_tokens.to(torch.int64)
        )
        self.count = torch.where(self.live, self.count, 0).clamp(0, m)

    def real(self) -> Tensor | None:
        """(b,m): the row's tokens that are real; None if all are."""
        if self.count is None:
            return None
        return torch.arange(self.m, device=self.device) < self.count[:, None]


def write_rings(
    rings: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    slot: Tensor,
    place: Tensor,
    real: Tensor | None,
) -> None:
    """ring[slot[r], place[r,j]] = value[r,j] where real (b,m), or everywhere: rings (slots, L, ...), values
    (b,m,...)."""
    slot = slot[:, None]
    if real is not None and real.numel():
        # As in write_slots: what is not real repeats the first real token's write; with none real, one writes back.
        slot, place, real = slot.expand_as(place).flatten(), place.flatten(), real.flatten()
        anchor = real.to(torch.uint8).argmax(0, keepdim=True)
        token = torch.where(real, torch.arange(real.numel(), device=real.device), anchor)
        slot, place, some = slot[token], place[token], real[anchor]
        values = tuple(
            torch.where(
                some.view(-1, *[1] * (ring.dim() - 2)),
                value.flatten(0, 1)[token].to(ring.dtype),
                ring[slot[:1], place[:1]],
            )
            for ring, value in zip(rings, values, strict=True)
        )
    for ring, value in zip(rings, values, strict=True):
        ring.index_put_((slot, place), value.to(ring.dtype))
