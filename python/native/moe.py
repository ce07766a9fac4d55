"""Launchers of routing: csrc/moe_route.cu, moe_sort.cu, moe_sums.cu and moe_route_backward.cu.

Arguments and results are those of the functions of the same names in tigon.reference.moe. Choices, counts and their
order are integers and the reference's wherever no two scores lie within their rounding. Nothing is read back to the
host, and no result depends on the order in which blocks run.
"""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

from tigon.native.arguments import ceil_div, packed, pointer
from tigon.native.loader import Launch, run
from tigon.native.quantize import allocate

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# struct MoeRoute in csrc/moe_route.cu: 13 pointers, a stride, 8 ints, 2 floats.
MOE_ROUTE = struct.Struct("=13Qq8i2f")
# struct MoeHistogram, MoeCount and MoeSort in csrc/moe_sort.cu.
MOE_HISTOGRAM = struct.Struct("=2Q4i")
MOE_COUNT = struct.Struct("=4Q2i")
MOE_SORT = struct.Struct("=6Q4i")
# struct MoeSums and MoeJoin in csrc/moe_sums.cu.
MOE_SUMS = struct.Struct("=7Qq6i")
MOE_JOIN = struct.Struct("=5Q6i")
# struct MoeRouteBackward in csrc/moe_route_backward.cu: 9 pointers, a stride, 7 ints, 2 floats, padding.
MOE_ROUTE_BACKWARD = struct.Struct("=9Qq7i2fi")

LONGEST = 2**31 - 2**23  # tokens: they are 32-bit, offsets are not
CHUNKS = 1024  # at most
ITEMS = (4, 8, 16, 32)  # scores a lane in registers
CHOSEN = 64 * 12  # struct Chosen of common/select.cuh
ROW_WORDS = 12288  # of a block's rows in shared memory
SUM_COLUMNS, JOIN_COLUMNS = 128, 32  # experts a block of moe_sums, of moe_join and moe_count


def _round_up(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


def chunk_of(t: int, warps: int) -> int:
    """Tokens a block routes: all of them where a warp has four at most, else 32 or what makes 1,024 blocks."""
    if t <= 4 * warps:
        return max(t, 1)
    return 32 * ceil_div(ceil_div(t, CHUNKS), 32)


@functools.lru_cache(maxsize=1024)
def plan_route(t: int, e: int, groups: int = 1) -> tuple[Launch, int]:
    """The launch of ``moe_route``, a warp a token and up to 16 warps, and the tokens a block has.

    Rows that do not lie in registers take shared memory, which then limits the warps.
    """
    if t > LONGEST:
        raise ValueError(f"moe_route: {t} tokens are over {LONGEST}")
    items = next((n for n in ITEMS if e <= 32 * n), 0) if groups == 1 else 0
    warps, row = min(16, max(t, 4)), 0
    if items == 0:
        row = _round_up(e, 32) + (_round_up(groups, 32) if groups > 1 else 0)
        warps = min(warps, max(1, ROW_WORDS // row))
    chunk = chunk_of(t, warps)
    # struct RouteMemory: histogram, bits, bias, choices, a word a warp, rows.
    words = 2 * _round_up(e + 1, 4) + (32 * items or _round_up(e, 32)) + 32 + warps * row
    shared = 4 * words + warps * CHOSEN
    grid = (ceil_div(t, chunk), 1)
    return Launch("moe_route.cu", f"tigon::moe_route<{items}>", grid, 32 * warps, shared), chunk


def plan_histogram(chunks: int, e: int) -> Launch:
    """The launch of ``moe_histogram``: a block a chunk of choices."""
    return Launch("moe_sort.cu", "tigon::moe_histogram", (chunks, 1), 256, 4 * e)


def plan_count(e: int) -> Launch:
    """The launch of ``moe_count``: 16 threads share an expert's column of the histogram."""
    return Launch("moe_sort.cu", "tigon::moe_count", (ceil_div(e, 32), 1), 512, 4 * 512)


def plan_sort(chunks: int, e: int) -> Launch:
    """The launch of ``moe_sort``: a block a chunk of tokens."""
    return Launch("moe_sort.cu", "tigon::moe_sort", (chunks, 1), 256, 4 * (2 * e + 1 + 8))


def plan_sums(chunks: int, e: int) -> Launch:
    """The launch of ``moe_sums``: a thread a chunk of tokens and an expert."""
    grid = (chunks, ceil_div(e, SUM_COLUMNS))
    return Launch("moe_sums.cu", "tigon::moe_sums", grid, SUM_COLUMNS, 0)


def plan_join(sequences: int, e: int) -> Launch:
    """The launch of ``moe_join``: eight threads share an expert's column of a sequence's parts."""
    grid = (sequences * ceil_div(e, JOIN_COLUMNS), 1)
    return Launch("moe_sums.cu", "tigon::moe_join", grid, 256, 8 * 256)


@functools.lru_cache(maxsize=1024)
def plan_backward(t: int, e: int) -> Launch:
    """The launch of ``moe_route_backward``: a warp a token, as many as 32 KB of rows hold."""
    if t > LONGEST:
        raise ValueError(f"moe_route_backward: {t} tokens are over {LONGEST}")
    row = _round_up(e, 32)
    warps = min(8, max(1, 8192 // row))
    grid = (ceil_div(t, warps), 1)
    return Launch(
        "moe_route_backward.cu", "tigon::moe_route_backward", grid, 32 * warps, 4 * warps * row
    )


def _explain_route(**sizes: int) -> dict[str, Launch]:
    t, e = sizes["t"], sizes["e"]
    route, chunk = plan_route(t, e, sizes.get("groups", 1))
    launches, chunks = {"moe_route": route}, ceil_div(t, chunk)
    if chunks > 1:
        launches |= {"moe_count": plan_count(e), "moe_sort": plan_sort(chunks, e)}
    if sequences := sizes.get("sequences"):
        launches |= {"moe_sums": plan_sums(chunks, e), "moe_join": plan_join(sequences, e)}
    return launches


def _explain_sort(**sizes: int) -> dict[str, Launch]:
    choices, e = sizes["t"] * sizes["k"], sizes["e"]
    chunks = ceil_div(choices, chunk_of(choices, 8))
    plans = {"moe_histogram": plan_histogram(chunks, e), "moe_count": plan_count(e)}
    return plans | {"moe_sort": plan_sort(chunks, e)}


def _explain_backward(**sizes: int) -> dict[str, Launch]:
    return {"moe_route_backward": plan_backward(sizes["t"], sizes["e"])}


PLANS = {
    "moe_route": _explain_route,
    "moe_route_backward": _explain_backward,
    "moe_sort": _explain_sort,
}


class _Sequences:
    """cu_seqlens as the kernels take it, and the copies that must live until the launch."""

    def __init__(self, cu_seqlens: Tensor | None):
        self.bounds = packed(cu_seqlens)
        self.count = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.wide = cu_seqlens is not None and cu_seqlens.element_size() == 8


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scale: float,
    score: str,
    normalize: bool,
    eps: float,
    groups: int,
    top_groups: int,
    sums: bool,
    z_loss: bool,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """(indices (t,k), weights (t,k), scores (t,k), counts (e), offsets (e+1), order (tk), inverse (tk),
    score_sums (s,e), aux_counts (s,e), z_sum ()), as the reference says it; e up to 4,096, k up to 64.

    logits (t,e) fp32, rows strided at will; bias (e), taken as fp32. Raises ValueError for more tokens than fit
    into a grid, RuntimeError where no kernel can be reached or launched.
    """
    import torch

    t, e = logits.shape
    device = logits.device
    int32, float32 = torch.int32, torch.float32
    sequences = _Sequences(cu_seqlens)
    loss_shape = (sequences.count, e) if sums else (0,)
    if t == 0:
        shapes = [(0, top_k)] * 3 + [(e,), (e + 1,), (0,), (0,), loss_shape, loss_shape]
        dtypes = [int32, float32, float32] + [int32] * 4 + [float32, int32]
        made = [torch.zeros(s, dtype=d, device=device) for s, d in zip(shapes, dtypes)]
        return (*made, torch.zeros(() if z_loss else (0,), dtype=float32, device=device))

    launch, chunk = plan_route(t, e, groups)
    chunks = launch.grid[0]
    alone = chunks == 1
    bias = packed(None if bias is None else bias.to(float32))
    mask = packed(mask)

    def made(*shape: int, dtype: torch.dtype = int32) -> Tensor:
        return allocate(shape, dtype, device)

    indices, weights = made(t, top_k), made(t, top_k, dtype=float32)
    scores = made(t, top_k, dtype=float32)
    counts, offsets, order, inverse = made(e), made(e + 1), made(t * top_k), made(t * top_k)
    score_sums, aux_counts = made(*loss_shape, dtype=float32), made(*loss_shape)
    z_sum = made(*(() if z_loss else (0,)), dtype=float32)
    histogram = counts if alone else made(chunks, e)
    z_sums = z_sum if alone or not z_loss else made(chunks, dtype=float32)
    shares = made(t, 2, dtype=float32) if sums else None
    plain = made(t, ceil_div(e, 32)) if sums else None

    stride = logits.stride(0)
    arguments = MOE_ROUTE.pack(
        logits.data_ptr(),
        pointer(bias),
        pointer(mask),
        indices.data_ptr(),
        weights.data_ptr(),
        scores.data_ptr(),
        histogram.data_ptr(),
        z_sums.data_ptr() if z_loss else 0,
        pointer(shares),
        pointer(plain),
        offsets.data_ptr() if alone else 0,
        order.data_ptr() if alone else 0,
        inverse.data_ptr() if alone else 0,
        stride,
        t,
        e,
        top_k,
        chunk,
        groups,
        top_groups,
        score == "softmax",
        normalize,
        scale,
        eps,
    )
    run(launch, device, arguments)
    if not alone:
        losses = (z_sums.data_ptr(), z_sum.data_ptr()) if z_loss else (0, 0)
        places = (indices, histogram, counts, offsets, order, inverse)
        _sort(places, losses, t, e, top_k, chunk)
    if sums:
        parts = (chunks + sequences.count, e)
        part_sums, part_counts = made(*parts, dtype=float32), made(*parts)
        sizes = (t, e, chunk, sequences.count, sequences.wide)
        arguments = MOE_SUMS.pack(
            logits.data_ptr(),
            shares.data_ptr(),
            plain.data_ptr(),
            pointer(mask),
            pointer(sequences.bounds),
            part_sums.data_ptr(),
            part_counts.data_ptr(),
            stride,
            *sizes,
            score == "softmax",
        )
        run(plan_sums(chunks, e), device, arguments)
        tensors = (part_sums, part_counts, score_sums, aux_counts)
        pointers = (pointer(sequences.bounds), *(p.data_ptr() for p in tensors))
        run(plan_join(sequences.count, e), device, MOE_JOIN.pack(*pointers, *sizes, 0))
    results = (indices, weights, scores, counts, offsets, order, inverse)
    return (*results, score_sums, aux_counts, z_sum)


def _sort(places: tuple[Tensor, ...], losses: tuple[int, int], t: int, e: int, k: int, chunk: int):
    """From the indices and the chunks' histogram to counts, offsets, order and inverse. losses: the chunks' sums and
    where theirs goes."""
    indices, histogram, counts, *_ = places
    chunks = histogram.shape[0]
    arguments = MOE_COUNT.pack(histogram.data_ptr(), counts.data_ptr(), *losses, chunks, e)
    run(plan_count(e), indices.device, arguments)
    arguments = MOE_SORT.pack(*(p.data_ptr() for p in places), t, e, k, chunk)
    run(plan_sort(chunks, e), indices.device, arguments)


def moe_sort(indices: Tensor, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(counts (e), offsets (e+1), order (tk), inverse (tk)), as the reference says it. indices (t,k) int32, any
    numbers; e up to 4,096. Raises as moe_route."""
    import torch

    choices, device = indices.numel(), indices.device
    if choices > LONGEST:
        raise ValueError(f"moe_sort: {choices} choices are over {LONGEST}")
    results = [allocate((n,), torch.int32, device) for n in (e, e + 1, choices, choices)]
    if not choices:
        return tuple(v.zero_() for v in results)
    # A token might name an expert twice here: each choice is a token of its own.
    indices = indices.contiguous()
    chunk = chunk_of(choices, 8)
    histogram = allocate((ceil_div(choices, chunk), e), torch.int32, device)
    arguments = MOE_HISTOGRAM.pack(indices.data_ptr(), histogram.data_ptr(), choices, e, 1, chunk)
    run(plan_histogram(histogram.shape[0], e), device, arguments)
    _sort((indices, histogram, *results), (0, 0), choices, e, 1, chunk)
    return tuple(results)


def moe_route_backward(
    dweights: Tensor,
    dscore_sums: Tensor | None,
    dz_sum: Tensor | None,
    logits: Tensor | None,
    indices: Tensor,
    scores: Tensor,
    e: int,
    scale: float,
    score: str,
    normalize: bool,
    eps: float,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """dlogits (t,e) fp32, as the reference says it. logits: only where a loss, or a softmax that is not normalized
    again, needs them. Raises as moe_route."""
    import torch

    t, k = indices.shape
    dlogits = allocate((t, e), torch.float32, dweights.device)
    if t == 0:
        return dlogits
    sequences, mask = _Sequences(cu_seqlens), packed(mask)
    dweights, indices, scores = (v.contiguous() for v in (dweights, indices, scores))
    dscore_sums = None if dscore_sums is None else dscore_sums.contiguous()
    arguments = MOE_ROUTE_BACKWARD.pack(
        dweights.data_ptr(),
        pointer(dscore_sums),
        pointer(dz_sum),
        pointer(logits),
        indices.data_ptr(),
        scores.data_ptr(),
        pointer(sequences.bounds),
        pointer(mask),
        dlogits.data_ptr(),
        0 if logits is None else logits.stride(0),
        t,
        e,
        k,
        sequences.count,
        sequences.wide,
        score == "softmax",
        normalize,
        scale,
        eps,
        0,
    )
    run(plan_backward(t, e), dweights.device, arguments)
    return dlogits
