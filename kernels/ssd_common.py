"""Device functions that the SSD forward and backward walks share.

Step sizes         dt' = clamp(softplus(dt + bias), dt_min, dt_max); softplus passes through above 20.
Decays             cs_l = sum_{i<=l} A dt'_i inside a chunk, kept in units of log2 (A is multiplied by log2 e
                   once a program), so that every decay is one exp2: decay(l <- s) = exp2(cs_l - cs_s).
Segments           which tokens a program owns (see ``tigon.segments``): rows of a table on the device when the
                   stream is packed, arithmetic when the batch is dense.
Tiles              (tokens, width) tiles come through a tensor descriptor (TMA) bounded by the segment, or masked loads.
Matrix products    ``dot`` feeds the tensor cores; the interpreter needs its bf16 operands upcast.
Rounding           ``narrow`` rounds fp32 to the io dtype; the interpreter alone would cut bf16 off.

Chunk vectors are fp32 of length Q. Masks say "this token is inside the segment"; loads outside it give 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import _allocation

INTERPRETED = (
    triton.knobs.runtime.interpret
)  # read when Triton decorates a kernel, so fixed from here on
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in fp32 (acc may be None). UPCAST: in the interpreter, where bf16 operands give garbage."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(v, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 -> DTYPE, to nearest even. UPCAST: in the interpreter, whose own cast to bf16 truncates."""
    if UPCAST and tl.bfloat16 == DTYPE:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(DTYPE)


@triton.jit
def softplus(v):
    """log(1 + e^v), v above 20. Small e^v goes through 2 atanh(u / (2 + u)): log(1 + u) would keep no digits."""
    u = tl.exp(tl.minimum(v, 20.0, propagate_nan=tl.PropagateNan.ALL))
    s = u / (2.0 + u)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9)))))
    return tl.where(v > 20.0, v, tl.where(u < 0.35, series, tl.log(1.0 + u)))


@triton.jit
def step_size(v, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """dt' from v = dt + bias (fp32). NaN passes through the clamp."""
    if SOFTPLUS:
        v = softplus(v)
    v = tl.maximum(v, dt_min, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, dt_max, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_head(ptr, head):
    """fp32 scalar of a head's vector (A, D, dt_bias), 0 where the argument is None."""
    if ptr is None:
        return 0.0
    else:
        return tl.load(ptr + head).to(tl.float32)


@triton.jit
def load_step_size(ptr, stride, tokens, mask, bias, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """dt' of a chunk, 0 outside the mask (so that a missing token neither decays nor adds).

    ptr: the head's dt of the batch row; tokens (Q) int64; stride: elements from token to token (int64).
    """
    v = tl.load(ptr + tokens * stride, mask=mask, other=0.0).to(tl.float32) + bias
    return tl.where(mask, step_size(v, dt_min, dt_max, SOFTPLUS), 0.0)


@triton.jit
def _carry(a, _, b, dt):
    return a + b, dt


@triton.jit
def chunk_cumsum(A, dt):
    """(cs, dt): cs_l = sum_{i<=l} A dt'_i. Use the dt that comes back.

    It is the same, but it comes out of the scan, and the compiler cannot copy a scan: from the load it would compute
    dt' again, softplus and all, in every layout that uses it (200 bytes of spills in the walk on sm_90).
    """
    return tl.associative_scan((A * dt, dt), 0, _carry)


@triton.jit
def decay_limit(A):
    """Largest exponent a decay may have: 0 where the maths says so (A <= 0), none otherwise."""
    return tl.where(A <= 0.0, 0.0, float("inf"))


@triton.jit
def decay(exponent, limit):
    """exp2(min(exponent, limit)): rounding in a cumulative sum never makes a decay grow. NaN stays NaN."""
    return tl.exp2(tl.minimum(exponent, limit, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def segment_bounds(row, starts, ends, sequences, offsets, length, size, per_sequence):
    """What program row `row` owns: (batch, start, end, sequence, first, last), all int64, tokens [start, end).

    Packed (starts is a tensor): the row of the segment table; batch is 0; rows past the last segment are empty.
    Dense (starts is None): every batch row is one sequence cut into `per_sequence` segments of `size` tokens.
    first, last: whether the segment begins or ends its sequence.
    """
    row = row.to(tl.int64)
    if starts is None:
        sequence = row // per_sequence
        part = row % per_sequence
        start = part * size
        end = tl.minimum(start + size, length)
        return sequence, start, end, sequence, part == 0, part == per_sequence - 1
    else:
        sequence = tl.load(sequences + row)
        start = tl.load(starts + row)
        end = tl.load(ends + row)
        # The dummy sequence of unused rows has no entry after its offset; such rows own no token.
        used = end > start
        # Row 0 whatever cu_seqlens holds: a row that is not the first takes what the row before it left.
        first = (row == 0) | (row == tl.load(offsets + sequence))
        last = row + 1 == tl.load(offsets + (sequence + 1), mask=used, other=0)
        return row * 0, start, end, sequence, first, last


@triton.jit
def tile_source(
    ptr,
    tokens,
    stride,
    WIDTH: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Where the (Q, BLOCK) tiles of a (tokens, WIDTH) stretch come from: a descriptor, or the bare pointer."""
    if TMA:
        return tl.make_tensor_descriptor(ptr, [tokens, WIDTH], [stride, 1], [Q, BLOCK])
    else:
        return ptr


@triton.jit
def tile_offsets(
    t, tokens, column, stride, WIDTH: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets and mask of the tile at token t. Inside a tile 32 bits suffice (`rows_of` sees to it)."""
    rows = tl.arange(0, Q)
    columns = column + tl.arange(0, BLOCK)
    mask = (rows < tokens - t)[:, None] & (columns < WIDTH)[None, :]
    return tl.cast(t, tl.int64) * stride + (rows[:, None] * stride + columns[None, :]), mask


@triton.jit
def load_tile(
    source, t, tokens, column, stride,
    WIDTH: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        return source.load([t, column])
    else:
        offsets, mask = tile_offsets(t, tokens, column, stride, WIDTH, Q, BLOCK)
        return tl.load(source + offsets, mask=mask, other=0.0)


@triton.jit
def state_tile(
    tile, FIRST_N: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a program's share of a (p, n) state, held as (BLOCK_P, BLOCK_N) or, if NP, transposed."""
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = FIRST_N + tl.arange(0, BLOCK_N)
    if NP:
        return p[None, :] * N + n[:, None], (p < P)[None, :] & (n < N)[:, None]
    else:
        return p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]


def rows_of(t: Tensor) -> Tensor:
    """`t` (b,l,...), copied if tokens lie so far apart (16M elements) that a tile's offsets would pass 32 bits."""
    return t.contiguous() if abs(t.stride(1)) >= 1 << 24 else t


def pitch(t: Tensor | None) -> tuple[int, int]:
    """Batch and token stride; what torch leaves there for a dimension of size 1 may be anything, so not that."""
    if t is None:
        return 0, 0
    row = t.shape[2] * t.shape[3]
    batch, token = t.stride()[:2]
    return batch if t.shape[0] > 1 else 0, token if t.shape[1] > 1 else row


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether every (head, token) row of every tensor starts on 16 bytes, as tensor descriptors need."""
    return all(
        size * t.element_size() % 16 == 0
        for t in tensors
        if t is not None
        for size in (*pitch(t), t.shape[3])
    ) and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def ensure_scratch() -> None:
    """Let Triton allocate the device memory that tensor descriptors live in, unless the caller's allocator is set."""
    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device="cuda"))
