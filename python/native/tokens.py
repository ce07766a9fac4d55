"""Launchers of token reduction: csrc/select_tokens.cu and csrc/gather_rows.cu.

Arguments and results are those of the functions of the same names in tigon.reference.select_tokens, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import TYPE_CHECKING

from tigon.native.arguments import ceil_div, pointer
from tigon.native.loader import MAX_BLOCKS, Launch, run
from tigon.native.quantize import allocate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# struct SelectThreshold and PlaceTokens in csrc/select_tokens.cu.
SELECT_THRESHOLD = struct.Struct("=6Q6i")
PLACE_TOKENS = struct.Struct("=8Q6i")
# struct GatherRows in csrc/gather_rows.cu: 8 of two pointers, three numbers and two ints; the index; two ints.
TENSORS = 8
GATHER_ITEM = "2Q3q2i"
GATHER_ROWS = struct.Struct("=" + GATHER_ITEM * TENSORS + "Q2i")

CHUNK = 1024  # tokens a block places
DIGITS = 2048  # of a round of counting
LONGEST = 2**31 - 2**12  # tokens: what a thread reaches past the end is counted in 32 bits
THREADS = 256


@functools.lru_cache(maxsize=1024)
def plan_select_tokens(t: int, s: int) -> tuple[Launch, Launch]:
    """The launches of ``select_threshold`` (a block a sequence, a thread four tokens of a mean one) and
    ``place_tokens`` (a block a chunk of 1,024 tokens). No bit depends on them."""
    blocks = t // CHUNK + s + 1
    if t > LONGEST or blocks > MAX_BLOCKS:
        raise ValueError(f"select_tokens: {t} tokens of {s} sequences are over {LONGEST}")
    threads = 1 << max(1, ceil_div(t, 4 * s) - 1).bit_length()
    threads = min(1024, max(128, threads))
    shared = 4 * (DIGITS + 32 + 2)
    return (
        Launch("select_tokens.cu", "tigon::select_threshold", (s, 1), threads, shared),
        Launch("select_tokens.cu", "tigon::place_tokens", (blocks, 1), THREADS, 4 * THREADS // 32),
    )


def lanes_of(row_bytes: int, unit: int) -> int:
    """Threads of a row in gather_rows.cu: a power of two, four accesses each up to a block's width."""
    return min(THREADS, 1 << (ceil_div(max(1, row_bytes // unit), 4) - 1).bit_length())


@functools.lru_cache(maxsize=1024)
def plan_gather_rows(rows: int, shapes: tuple[tuple[int, int], ...]) -> Launch:
    """The launch of ``gather_rows`` for tensors of (bytes a row, bytes an access)."""
    blocks = max(ceil_div(rows, THREADS // lanes_of(*shape)) for shape in shapes)
    if blocks > MAX_BLOCKS:
        raise ValueError(f"compact_tokens: {rows} rows are over the size of a grid")
    return Launch("gather_rows.cu", "tigon::gather_rows", (blocks, len(shapes)), THREADS, 0)


def _explain_select(**sizes: int) -> dict[str, Launch]:
    threshold, place = plan_select_tokens(sizes["t"], sizes["s"])
    return {"select_threshold": threshold, "place_tokens": place}


def _explain_gather(**sizes: int) -> dict[str, Launch]:
    """As if all tensors had rows of the widest one, aligned."""
    unit = next(u for u in (16, 8, 4, 2, 1) if sizes["bytes"] % u == 0)
    shapes = ((sizes["bytes"], unit),) * min(TENSORS, sizes["tensors"])
    return {"gather_rows": plan_gather_rows(sizes["capacity"], shapes)}


PLANS = {"select_tokens": _explain_select, "compact_tokens": _explain_gather}


def select_tokens(
    scores: Tensor,
    keep: Tensor,
    cu_seqlens: Tensor,
    protected: Tensor | None,
    multiple: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(index (capacity), cu_kept (s+1), inverse (t)) int32, as the reference says it. scores (t) fp32; keep (s),
    cu_seqlens (s+1) int32 or int64; all with stride 1. Raises ValueError for more tokens than are counted in 32 bits,
    RuntimeError where no kernel can be reached or launched."""
    import torch

    t, s, device = scores.shape[0], keep.shape[0], scores.device
    threshold, place = plan_select_tokens(t, s)
    index, cu_kept, inverse = (allocate((n,), torch.int32, device) for n in (capacity, s + 1, t))
    chosen = allocate((s, 4), torch.int32, device)
    counts = allocate((place.grid[0], 2), torch.int32, device)
    wide = cu_seqlens.element_size() == 8
    arguments = SELECT_THRESHOLD.pack(
        scores.data_ptr(),
        pointer(protected),
        keep.data_ptr(),
        cu_seqlens.data_ptr(),
        chosen.data_ptr(),
        counts.data_ptr(),
        t,
        s,
        multiple,
        keep.element_size() == 8,
        wide,
        0,
    )
    run(threshold, device, arguments)
    arguments = PLACE_TOKENS.pack(
        scores.data_ptr(),
        pointer(protected),
        cu_seqlens.data_ptr(),
        chosen.data_ptr(),
        counts.data_ptr(),
        index.data_ptr() if capacity else 0,
        cu_kept.data_ptr(),
        inverse.data_ptr() if t else 0,
        t,
        s,
        capacity,
        wide,
        place.grid[0],
        0,
    )
    run(place, device, arguments)
    return index, cu_kept, inverse


@functools.lru_cache(maxsize=256)
def fill_pattern(fill: float, dtype: torch.dtype) -> int:
    """Eight bytes of `fill` in this format, as a signed number."""
    import torch

    one = torch.full((), fill, dtype=dtype)
    content = ctypes.string_at(one.data_ptr(), one.element_size())
    return struct.unpack("=q", content * (8 // len(content)))[0]


def gather_rows(tensors: list[Tensor], index: Tensor, fills: list[float]) -> list[Tensor]:
    """Row index[i] of each tensor (t,…), its fill where index[i] names none. index int32 with stride 1; rows
    contiguous, strided at will, of elements of 1, 2, 4 or 8 bytes. Raises as select_tokens."""
    rows, out = index.shape[0], []
    for t in tensors:
        out.append(allocate((rows, *t.shape[1:]), t.dtype, t.device))
    waiting = [i for i, t in enumerate(out) if t.numel()]
    while waiting:
        some, waiting = waiting[:TENSORS], waiting[TENSORS:]
        shapes, fields = [], []
        for i in some:
            source, target = tensors[i], out[i]
            row_bytes = target[0].numel() * target.element_size()
            stride = source.stride(0) * source.element_size()
            aligned = source.data_ptr() | target.data_ptr() | row_bytes | stride
            unit = min(16, aligned & -aligned)
            shapes.append((row_bytes, unit))
            fields += (source.data_ptr(), target.data_ptr(), stride, row_bytes)
            fields += (fill_pattern(fills[i], source.dtype), unit, lanes_of(row_bytes, unit))
        fields += [0] * (7 * (TENSORS - len(some)))
        arguments = GATHER_ROWS.pack(*fields, index.data_ptr(), rows, tensors[some[0]].shape[0])
        run(plan_gather_rows(rows, tuple(shapes)), index.device, arguments)
    return out
