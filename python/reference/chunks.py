"""How the chunked scan cuts its tokens: what a chunk reads and writes, and how states pass from chunk to chunk.

`Dense` and `Packed` answer the same questions, for a batch of equal sequences and for one packed stream:

    take, put                          a chunk's tokens of a tensor (b,l,...)
    enter, leave                       the state before and after a chunk
    leave_backward, enter_backward     the same for gradients, right to left
"""

import torch
from torch import Tensor

from tigon.segments import segment_table


class Dense:
    """Chunks of a dense batch: slices, no copies."""

    def __init__(self, x: Tensor, size: int):
        self.batch, self.length = x.shape[:2]
        self.size = size
        self.rows = -(-self.length // size)
        self.sequences = self.batch

    def take(self, t: Tensor, c: int) -> Tensor:
        return t[:, c * self.size : (c + 1) * self.size]

    def mask_dt(self, dt: Tensor, c: int) -> Tensor:
        return dt

    def put(self, out: Tensor, c: int, value: Tensor) -> None:
        out[:, c * self.size : (c + 1) * self.size] = value

    def buffer(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def trim(self, out: Tensor) -> Tensor:
        return out

    def enter(self, S: Tensor, initial: Tensor, c: int) -> Tensor:
        return initial if c == 0 else S

    def leave(self, S: Tensor, c: int, final: Tensor, states: Tensor) -> None:
        if c == self.rows - 1:
            final.copy_(S)

    def leave_backward(self, dS: Tensor, c: int, dfinal: Tensor, dstates: Tensor) -> Tensor:
        return dfinal if c == self.rows - 1 else dS

    def enter_backward(self, dS: Tensor, c: int, dinitial: Tensor) -> None:
        if c == 0:
            dinitial.copy_(dS)


class Packed:
    """Chunks of a packed batch (b = 1): rows of the segment table, gathered; nothing waits for the device.

    Index `length` is a dummy token and index `sequences` a dummy sequence: places for what must not be kept.
    """

    def __init__(self, x: Tensor, size: int, cu_seqlens: Tensor, positions: Tensor | None):
        self.length = x.shape[1]
        self.sequences = cu_seqlens.numel() - 1
        table = segment_table(cu_seqlens, self.length, size, positions)
        self.rows = table.start.numel() if self.length else 0
        tokens = table.start[:, None] + torch.arange(size, device=x.device)
        self.valid = tokens < table.end[:, None]
        self.index = torch.where(self.valid, tokens, self.length)
        self.source = self.index.clamp(max=max(self.length - 1, 0))
        self.sequence = table.sequence
        self.first = table.first.bool()
        self.last = torch.ones_like(self.first)
        self.last[:-1] = table.sequence[1:] != table.sequence[:-1]
        # Several requested positions may fall on one segment end: `slot` is one of them for each segment,
        # or the dummy past the end; `slot_of` sends each position to that one. Position 0 has its own row.
        wanted = table.at_position
        self.slot = torch.full((self.rows + 1,), wanted.numel(), device=x.device)
        at = torch.where(wanted >= 0, wanted, self.rows)
        order = torch.arange(wanted.numel(), device=x.device)
        self.slot.scatter_reduce_(0, at, order, "amin")
        self.slot_of = self.slot[at]
        self.slot[self.rows] = wanted.numel()
        self.at_zero = wanted < 0

    def take(self, t: Tensor, c: int) -> Tensor:
        # Zeros past the chunk's end: whatever stands there, another sequence's NaN too, is not this one's.
        valid = self.valid[c].view(-1, *[1] * (t.dim() - 2))
        return torch.where(valid, t[:, self.source[c]], 0)

    def mask_dt(self, dt: Tensor, c: int) -> Tensor:
        return torch.where(self.valid[c][:, None], dt, 0)  # dt' = 0: no decay, no input

    def put(self, out: Tensor, c: int, value: Tensor) -> None:
        out.index_copy_(1, self.index[c], value.to(out.dtype))

    def buffer(self, like: Tensor) -> Tensor:
        shape = (1, self.length + 1, *like.shape[2:])
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def trim(self, out: Tensor) -> Tensor:
        return out[:, : self.length]

    def enter(self, S: Tensor, initial: Tensor, c: int) -> Tensor:
        return torch.where(self.first[c], initial[self.sequence[c]], S)

    def leave(self, S: Tensor, c: int, final: Tensor, states: Tensor) -> None:
        final.index_copy_(0, self.sequence[c : c + 1], S)  # the last segment's state stays
        states.index_copy_(0, self.slot[c : c + 1], S)

    def leave_backward(self, dS: Tensor, c: int, dfinal: Tensor, dstates: Tensor) -> Tensor:
        return torch.where(self.last[c], dfinal[self.sequence[c]], dS) + dstates[self.slot[c]]

    def enter_backward(self, dS: Tensor, c: int, dinitial: Tensor) -> None:
        row = torch.where(self.first[c], self.sequence[c], self.sequences)
        dinitial.index_copy_(0, row[None], dS)


def cut_chunks(
    x: Tensor, cu_seqlens: Tensor | None, state_positions: Tensor | None, size: int
) -> "Dense | Packed":
    """Chunks of at most `size` tokens of x (b,l,...); requested positions cut a dense row as bounds do."""
    if cu_seqlens is None and state_positions is None:
        return Dense(x, size)
    if cu_seqlens is None:
        cu_seqlens = one_sequence(x)
    return Packed(x, size, cu_seqlens, state_positions)


def one_sequence(x: Tensor) -> Tensor:
    """cu_seqlens of one sequence, without a copy from the host."""
    return torch.arange(2, device=x.device) * x.shape[1]
