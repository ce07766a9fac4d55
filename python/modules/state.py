"""What a layer remembers between calls, by slot: one slot holds one sequence.

A call names its slots with `slots` (r) int64, one for each row of a dense batch or each sequence of a packed one;
None means slot i for row i, and a negative slot is padding: nothing of it is read into a real row or written.
Which tokens are real is said by `num_tokens` (r) for dense batches, padded on the right, by `cu_seqlens` for packed
ones.
Nothing here waits for the device.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tigon.ops.checks import readable


def read_slots(state: Tensor, slots: Tensor | None, rows: int) -> Tensor:
    """state (slots, ...) -> (rows, ...); a view where slots is None. A padding row reads slot 0."""
    return state[:rows] if slots is None else state[slots.clamp(min=0)]


def write_slots(state: Tensor, new: Tensor, slots: Tensor | None) -> None:
    """state[slots] = new, in place and without gradients; padding rows write nothing."""
    new = new.detach()
    if slots is None:
        state[: new.shape[0]] = new
        return
    # A padding row repeats the write of the first live one; with none live, slot 0 gets back what it has.
    live = slots >= 0
    anchor = live.to(torch.uint8).argmax(0, keepdim=True)
    row = torch.where(live, torch.arange(slots.numel(), device=slots.device), anchor)
    index = slots[row].clamp(min=0)
    kept = live[row].view(-1, *[1] * (state.dim() - 1))
    state.index_copy_(0, index, torch.where(kept, new[row].to(state.dtype), state[index]))


def check_feed(name: str, cu_seqlens, cache, slots, num_tokens) -> None:
    """Refuse arguments of a layer's forward that contradict each other."""
    if cache is None and (slots is not None or num_tokens is not None):
        raise ValueError(
            f"{name}: slots and num_tokens say which part of a cache is meant; pass cache"
        )
    if cu_seqlens is not None and num_tokens is not None:
        raise ValueError(f"{name}: num_tokens is for dense batches; cu_seqlens already says it")


@dataclass
class Lengths:
    """Tokens that each slot has seen: `tensor` (slots) int64 on the device, and `bound`, an int that none of
    them exceeds: the host's knowledge, so that attention reads only so many keys without asking the device."""

    tensor: Tensor
    capacity: int
    bound: int = 0

    def added(
        self, rows: int, length: int, num_tokens: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """Real tokens of each row of a call: (rows) int64."""
        if cu_seqlens is not None:
            return cu_seqlens.to(torch.int64).diff()
        if num_tokens is not None:
            return num_tokens.to(torch.int64).clamp(0, length)
        return torch.full((rows,), length, device=self.tensor.device)

    def advance(self, slots: Tensor | None, added: Tensor, longest: int) -> None:
        """Count `added` (rows) tokens, none more than `longest`, after all layers have seen them."""
        new = (read_slots(self.tensor, slots, added.shape[0]) + added).clamp(max=self.capacity)
        write_slots(self.tensor, new, slots)
        self.bound = min(self.capacity, self.bound + longest)

    def check_room(self, slots: Tensor | None, added: Tensor, longest: int) -> None:
        """Raise where a slot would overflow, if the host may look; kernels drop what does not fit."""
        if self.bound + longest <= self.capacity or not readable(self.tensor):
            return
        total = read_slots(self.tensor, slots, added.shape[0]) + added
        if slots is not None:
            total = torch.where(slots >= 0, total, 0)
        if total.numel() and int(total.max()) > self.capacity:
            raise ValueError(
                f"cache: a slot would hold {int(total.max())} tokens, max_length={self.capacity}"
            )


@dataclass
class KVCache:
    """keys, values (slots, capacity+1, hkv, dim); `lengths` may be shared by layers. The last column is a dummy:
    tokens of padding slots, and those that do not fit, are written there and never read."""

    keys: Tensor
    values: Tensor
    lengths: Lengths = field(repr=False)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values)

    def places(
        self,
        rows: int,
        length: int,
        slots: Tensor | None,
        cu_seqlens: Tensor | None,
        first: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(row, slot, position) of every token of a call, each (b, length).

        first: tokens that were written behind the slots' own and not counted.

        row: of a dense batch, or the sequence of a packed one (then b = 1). position: `capacity` in padding slots and
        where a slot is full. Tokens past a row's num_tokens have places like the others: nobody sees them there,
        and the next real tokens overwrite them.
        """
        device = self.keys.device
        token = torch.arange(length, device=device)
        if slots is None:
            slots = torch.arange(rows, device=device)
        before = read_slots(self.lengths.tensor, slots, rows)
        if cu_seqlens is None:
            row = torch.arange(rows, device=device)[:, None].expand(-1, length)
            position = before[:, None] + first + token
        else:
            bounds = cu_seqlens.to(torch.int64)
            row = torch.searchsorted(bounds, token, right=True).sub_(1).clamp_(0, rows - 1)[None]
            position = before[row] + token - bounds[row]
        capacity = self.lengths.capacity
        position = torch.where(slots[row] >= 0, position, capacity).clamp(max=capacity)
        return row, slots[row].clamp(min=0), position

    def append(self, k: Tensor, v: Tensor, slot: Tensor, position: Tensor) -> None:
        """Write k, v (b,l,hkv,dim) at the places of their tokens."""
        self.keys[slot, position] = k.to(self.keys.dtype)
        self.values[slot, position] = v.to(self.values.dtype)

    def keep_path(self, slots: Tensor | None, path: Tensor, num_new: Tensor) -> None:
        """Before `lengths` advance: of a tree's nodes, written one after the other, move the accepted ones together.

        path (b,j): node of new token i + 1; num_new (b): new tokens of a row, node 0 among them.
        """
        rows, count = path.shape
        if not count:
            return
        if slots is None:
            slots = torch.arange(rows, device=path.device)
        before = read_slots(self.lengths.tensor, slots, rows)[:, None]
        token = torch.arange(1, count + 1, device=path.device)
        moves = (token < num_new[:, None]) & (slots[:, None] >= 0)
        capacity = self.lengths.capacity
        source = (before + path.clamp(min=0)).clamp(max=capacity)
        target = torch.where(moves, before + token, capacity).clamp(max=capacity)
        slot = slots.clamp(min=0)[:, None].expand(-1, count)
        for tensor in self.tensors():
            tensor[slot, target] = tensor[slot, source]
