"""Which rows of an expert a program of the grouped kernels takes, found on the device.

Rows lie in expert order: expert i, of the `experts` that are here, has rows offsets[i] to offsets[i+1]; `order` names
the choice at each. Grids are as large as the sizes allow; a program without rows leaves at once. Three ways:

    tiles      a list (bound, 2) of (expert, first row) by `list_tiles`, padded with expert -1; one tile a program
    indices    few choices among many experts: one program a choice, which takes the expert's rows if it is the first of
               them, and leaves otherwise
    neither    one program an expert, which takes all its rows
"""

import triton
import triton.language as tl


def tile_bound(rows: int, experts: int, block: int) -> int:
    """The most tiles that `rows` rows can need: each expert that has rows leaves one of them unfilled at most."""
    return rows // block + min(experts, rows)


@triton.jit
def list_tiles(
    offsets_ptr, tiles_ptr, experts, bound,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program an expert writes its tiles, and a share of the padding. EXPERTS: a power of two that covers them."""
    expert = tl.program_id(0)
    i = tl.arange(0, EXPERTS)
    begin = tl.load(offsets_ptr + i, mask=i < experts, other=0)
    count = tl.load(offsets_ptr + i + 1, mask=i < experts, other=0) - begin
    count = count // ROWS + (count % ROWS != 0).to(tl.int32)
    total = tl.sum(count, 0)
    start = tl.sum(tl.where(i < expert, count, 0), 0)
    own = tl.sum(tl.where(i == expert, count, 0), 0)
    row = tl.sum(tl.where(i == expert, begin, 0), 0)
    lane = tl.arange(0, BLOCK)
    for done in range(0, own, BLOCK):
        tile = done + lane
        at = tiles_ptr + 2 * (start + tile)
        tl.store(at, expert + lane * 0, mask=tile < own)
        tl.store(at + 1, row + tile * ROWS, mask=tile < own)
    for done in range(total + expert * BLOCK, bound, experts * BLOCK):
        tl.store(tiles_ptr + 2 * (done + lane), -1 - lane * 0, mask=done + lane < bound)


@triton.jit
def find_rows(
    item, tiles_ptr, indices_ptr, order_ptr, offsets_ptr, first, experts, ROWS: tl.constexpr
):
    """(expert, row, end), int64: this program's rows are row to end - 1 of an expert, counted from `first`."""
    if tiles_ptr is not None:
        expert = tl.load(tiles_ptr + 2 * item)
        here = expert >= 0
        row = tl.load(tiles_ptr + (2 * item + 1), mask=here, other=0).to(tl.int64)
        end = tl.load(offsets_ptr + (expert.to(tl.int64) + 1), mask=here, other=0)
        end = tl.minimum(end.to(tl.int64), row + ROWS)
    else:
        expert = item
        here = item < experts
        if indices_ptr is not None:
            expert = tl.load(indices_ptr + item).to(tl.int64) - first
            here = (expert >= 0) & (expert < experts)
        row = tl.load(offsets_ptr + expert, mask=here, other=0).to(tl.int64)
        end = tl.load(offsets_ptr + (expert + 1), mask=here, other=0).to(tl.int64)
        if indices_ptr is not None:
            leader = tl.load(order_ptr + row, mask=here & (row < end), other=-1)
            end = tl.where(leader == item, end, row)
    return expert.to(tl.int64), row, end


@triton.jit
def tile_rows(row, end, ROWS: tl.constexpr):
    """(rows, rows that may be read, mask) of the tile at `row`: past the end, the last row is read again."""
    rows = row + tl.arange(0, ROWS)
    return rows, tl.minimum(rows, end - 1), rows < end


@triton.jit
def local_places(offsets_ptr, experts):
    """(begin, end) of the rows that are here, in expert order."""
    return tl.load(offsets_ptr), tl.load(offsets_ptr + tl.cast(experts, tl.int64))
