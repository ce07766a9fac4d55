"""The segment table: which stretch of the token stream one program owns.

A *segment* is a run of consecutive tokens of one sequence. Segments never cross a sequence boundary nor a
requested state position, and each sequence starts its own grid: segment k of a sequence covers its tokens
``[k * size, (k + 1) * size)`` unless a requested position cuts it short. States handed from segment to
segment are therefore exactly the states that callers may ask for: at sequence ends and at requested
positions.

The table is computed with tensor operations on the device of ``cu_seqlens`` and has a length that the host
knows beforehand, so nothing waits for the device:

    segments = ceil(l / size) + sequences + positions      (the last ones may be empty)

All tensors are int64 of length ``segments`` unless said.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentTable:
    """start, end: tokens [start, end) in packed coordinates. sequence: its sequence; unused rows at the end
    are empty and name the sequence number ``sequences``, a dummy one past the last. first: 1 where the segment is
    the first of its sequence (its entry state is the initial state), else 0. offset (sequences + 1): row of
    each sequence's first segment. at_position (i): row of the segment that ends at each requested position;
    -1 where the position is 0 (the state there is the first sequence's initial state)."""

    start: Tensor
    end: Tensor
    sequence: Tensor
    first: Tensor
    offset: Tensor
    at_position: Tensor


def segment_count(length: int, size: int, sequences: int, positions: int = 0) -> int:
    """Rows of the table for a packed stream of `length` tokens: an upper bound that needs no device value."""
    return -(-length // size) + sequences + positions


def segment_table(
    cu_seqlens: Tensor, length: int, size: int, positions: Tensor | None = None
) -> SegmentTable:
    """Cut a packed stream into segments of at most `size` tokens.

    cu_seqlens (s+1) int32/int64 starts with 0, ascends and ends with `length`; positions (i) int64 are
    token counts in packed coordinates, in any order. Values out of range are clamped so that no segment leaves
    [0, length).
    """
    cu = cu_seqlens.to(torch.int64).clamp(0, length)
    sequences = cu.numel() - 1
    wanted = 0 if positions is None else positions.numel()
    rows = segment_count(length, size, sequences, wanted)

    # Pieces: the stream cut at sequence boundaries and at requested positions. Equal cuts make empty pieces.
    cuts = (
        cu
        if not wanted
        else torch.cat([cu, positions.to(torch.int64).clamp(0, length)]).sort().values
    )
    piece_start, piece_end = cuts[:-1], cuts[1:]
    # A piece lies in the last sequence that starts at or before it; empty pieces own no segment.
    piece_sequence = (
        torch.searchsorted(cu, piece_start, right=True).sub(1).clamp(0, max(sequences - 1, 0))
    )
    # A piece keeps its sequence's grid: its first segment ends at the next multiple of `size` counted from
    # the sequence's start, so that a cut adds one boundary and moves none.
    origin = cu[piece_sequence]
    grid_first = (piece_start - origin) // size
    grid_last = (piece_end - origin + size - 1) // size
    count = torch.where(piece_end > piece_start, grid_last - grid_first, 0)
    stop = count.cumsum(0)

    row = torch.arange(rows, device=cu.device)
    piece = torch.searchsorted(stop, row, right=True)
    used = piece < piece_start.numel()
    piece = piece.clamp(max=piece_start.numel() - 1)
    cell = grid_first[piece] + row - (stop[piece] - count[piece])
    start = torch.maximum(origin[piece] + cell * size, piece_start[piece])
    end = torch.minimum(origin[piece] + (cell + 1) * size, piece_end[piece])
    start = torch.where(used, start, length)
    end = torch.where(used, end, length)
    sequence = torch.where(used, piece_sequence[piece], sequences)
    first = used & (start == origin[piece])
    offset = torch.searchsorted(sequence, torch.arange(sequences + 1, device=cu.device))
    if wanted:
        position = positions.to(torch.int64).clamp(0, length)
        ends = torch.where(used, end, length + 1)  # ascending over the used rows
        at_position = torch.where(position > 0, torch.searchsorted(ends, position), -1)
    else:
        at_position = torch.empty(0, dtype=torch.int64, device=cu.device)
    return SegmentTable(start, end, sequence, first.to(torch.int64), offset, at_position)
