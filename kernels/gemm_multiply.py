"""The kernels of `scaled_mm`: tiles of left x right^T, partial sums over k, and the epilogue.

    out[i, j] = act(alpha_ij sum_k left[i, k] right[j, k] + bias)        alpha_ij = left_outer[i] * right_outer[j]

The left operand is on the side of the MMA that has 64 rows or more; the launcher puts the weights there when there are
few activations, and `out` is then written through swapped strides. k is cut into segments of `split_k`; a program owns
one segment (SPLITS of them, `add_splits` adds up) or walks all, and adds them up in the same order and rounding: who
does it does not show in the result.

Sums are fp32. PROMOTE: a tile's sum over BLOCK_K leaves the MMA before it is added up; scales of 128 k are applied
then, and Hopper's FP8 sums, which keep some 14 bits inside the MMA, do not grow long.
"""

import triton
import triton.language as tl

from tigon.kernels.gemm_operands import (
    codes_source,
    load_operand,
    load_scaled_operand,
    scaled_scale_source,
)
from tigon.kernels.ssd_common import dot, narrow


@triton.jit
def load_granule(ptr, row, tile, pitch, k0, GRANULE: tl.constexpr, ROWS: tl.constexpr):
    """fp32 scales of a tile's 128 k: (ROWS,) of 1x128, a scalar of 128x128."""
    if GRANULE == 1:
        return tl.load(ptr + row * pitch + k0 // 128)
    else:
        tl.static_assert(ROWS <= 128)
        return tl.load(ptr + (tile.to(tl.int64) * ROWS // 128 * pitch + k0 // 128))


@triton.jit
def load_outer(ptr, index, step):
    """fp32 scale of each row (step 1) or of the tensor (step 0)."""
    return tl.load(ptr + index * step)


@triton.jit
def finish(
    acc, i, j, rows, columns, i_outer, i_step, j_outer, j_step, bias_ptr, out_ptr, out_i, out_j,
    FOLDED: tl.constexpr, BIAS_I: tl.constexpr, RELU2: tl.constexpr, ACCUMULATE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scales, bias (along i if BIAS_I, else along j), activation; then store, or add to what is there."""
    here, there = tl.minimum(i, rows - 1), tl.minimum(j, columns - 1)
    acc *= FOLDED
    if i_outer is not None and j_outer is not None:
        left = load_outer(i_outer, here, i_step)
        acc *= left[:, None] * load_outer(j_outer, there, j_step)[None, :]
    elif i_outer is not None:
        acc *= load_outer(i_outer, here, i_step)[:, None]
    elif j_outer is not None:
        acc *= load_outer(j_outer, there, j_step)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + (here if BIAS_I else there)).to(tl.float32)
        acc += bias[:, None] if BIAS_I else bias[None, :]
    if RELU2:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc *= acc
    at = out_ptr + (i * out_i)[:, None] + (j * out_j)[None, :]
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, narrow(acc, out_ptr.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def add_segment(
    acc, first, last, i, j, tile_i, tile_j,
    left_ptr, left_scale, right_ptr, right_scale, rows, columns, k,
    left_row, left_scale_row, right_row, right_scale_row,
    LEFT_FORMAT: tl.constexpr, LEFT_E5M2: tl.constexpr, LEFT_GRANULE: tl.constexpr, LEFT_SWIZZLED: tl.constexpr,
    RIGHT_FORMAT: tl.constexpr, RIGHT_E5M2: tl.constexpr, RIGHT_GRANULE: tl.constexpr, RIGHT_SWIZZLED: tl.constexpr,
    DTYPE: tl.constexpr, SCALED: tl.constexpr, PROMOTE: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    QUADS: tl.constexpr, TMA: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """acc (LEFT, RIGHT) plus the products over k in [first, last)."""
    left_codes = codes_source(left_ptr, rows, k, left_row, LEFT_FORMAT, LEFT, BLOCK_K, TMA)
    right_codes = codes_source(right_ptr, columns, k, right_row, RIGHT_FORMAT, RIGHT, BLOCK_K, TMA)
    if SCALED:
        left_scale = scaled_scale_source(
            left_ptr, left_scale, rows, k, LEFT_FORMAT, LEFT_SWIZZLED, LEFT, BLOCK_K, TMA
        )
        right_scale = scaled_scale_source(
            right_ptr, right_scale, columns, k, RIGHT_FORMAT, RIGHT_SWIZZLED, RIGHT, BLOCK_K, TMA
        )
    # Counted in steps, so that the compiler sees what k0 is a multiple of, and loads scales 8 at a time.
    for step in range(first // BLOCK_K, tl.cdiv(last, BLOCK_K)):
        k0 = step * BLOCK_K
        if SCALED:
            LEFT_CODES: tl.constexpr = (
                "e2m1" if LEFT_FORMAT == "nvfp4" else "e5m2" if LEFT_E5M2 else "e4m3"
            )
            RIGHT_CODES: tl.constexpr = (
                "e2m1" if RIGHT_FORMAT == "nvfp4" else "e5m2" if RIGHT_E5M2 else "e4m3"
            )
            left, scale_l = load_scaled_operand(
                left_codes, left_scale, i, tile_i, rows, left_row, left_scale_row, k0, k,
                LEFT_FORMAT, LEFT_SWIZZLED, BLOCK_K, WHOLE, TMA,
            )  # fmt: skip
            right, scale_r = load_scaled_operand(
                right_codes, right_scale, j, tile_j, columns, right_row, right_scale_row, k0, k,
                RIGHT_FORMAT, RIGHT_SWIZZLED, BLOCK_K, WHOLE, TMA,
            )  # fmt: skip
            acc = tl.dot_scaled(left, scale_l, LEFT_CODES, right.T, scale_r, RIGHT_CODES, acc)
        else:
            left = load_operand(
                left_codes, left_scale, i, tile_i, left_row, left_scale_row, k0, k,
                LEFT_FORMAT, LEFT_E5M2, LEFT_SWIZZLED, DTYPE, BLOCK_K, WHOLE, QUADS, TMA, UPCAST,
            )  # fmt: skip
            right = load_operand(
                right_codes, right_scale, j, tile_j, right_row, right_scale_row, k0, k,
                RIGHT_FORMAT, RIGHT_E5M2, RIGHT_SWIZZLED, DTYPE, BLOCK_K, WHOLE, QUADS, TMA, UPCAST,
            )  # fmt: skip
            if PROMOTE:
                part = dot(left, right.T, None, PRECISION, UPCAST)
                if LEFT_GRANULE == 1 and RIGHT_GRANULE == 1:
                    over = load_granule(left_scale, i, tile_i, left_scale_row, k0, 1, LEFT)
                    part *= over[:, None]
                    over = load_granule(right_scale, j, tile_j, right_scale_row, k0, 1, RIGHT)
                    part *= over[None, :]
                elif LEFT_GRANULE == 1:
                    over = load_granule(left_scale, i, tile_i, left_scale_row, k0, 1, LEFT)
                    if RIGHT_GRANULE == 128:
                        over *= load_granule(
                            right_scale, j, tile_j, right_scale_row, k0, 128, RIGHT
                        )
                    part *= over[:, None]
                elif RIGHT_GRANULE == 1:
                    over = load_granule(right_scale, j, tile_j, right_scale_row, k0, 1, RIGHT)
                    if LEFT_GRANULE == 128:
                        over *= load_granule(left_scale, i, tile_i, left_scale_row, k0, 128, LEFT)
                    part *= over[None, :]
                acc += part
            else:
                acc = dot(left, right.T, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def multiply(
    left_ptr, left_scale, left_outer, right_ptr, right_scale, right_outer, bias_ptr, out_ptr,
    rows, columns, k, split_k, left_row, left_scale_row, left_step, right_row, right_scale_row, right_step,
    out_i, out_j,
    LEFT_FORMAT: tl.constexpr, LEFT_E5M2: tl.constexpr, LEFT_GRANULE: tl.constexpr, LEFT_SWIZZLED: tl.constexpr,
    RIGHT_FORMAT: tl.constexpr, RIGHT_E5M2: tl.constexpr, RIGHT_GRANULE: tl.constexpr, RIGHT_SWIZZLED: tl.constexpr,
    DTYPE: tl.constexpr, SCALED: tl.constexpr, PROMOTE: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
    QUADS: tl.constexpr, TMA: tl.constexpr, WALK: tl.constexpr, PARTIAL: tl.constexpr,
    FOLDED: tl.constexpr, SWAPPED: tl.constexpr, RELU2: tl.constexpr, ACCUMULATE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, segments). WALK: one program adds up all segments. PARTIAL: out is (segments, m, n) fp32.

    Tiles go in bands of BAND tile rows, so that programs that run together share operands in L2.
    """
    tiles_i, tiles_j = tl.cdiv(rows, LEFT), tl.cdiv(columns, RIGHT)
    program = tl.program_id(0)
    tile_i, tile_j = tl.swizzle2d(program // tiles_j, program % tiles_j, tiles_i, tiles_j, BAND)
    i = tile_i.to(tl.int64) * LEFT + tl.arange(0, LEFT)
    j = tile_j.to(tl.int64) * RIGHT + tl.arange(0, RIGHT)
    here, there = tl.minimum(i, rows - 1), tl.minimum(j, columns - 1)
    first = tl.program_id(1) * split_k
    acc = tl.zeros((LEFT, RIGHT), tl.float32)
    if WALK:
        for start in range(0, k, split_k):
            part = tl.zeros((LEFT, RIGHT), tl.float32)
            acc += add_segment(
                part, start, tl.minimum(start + split_k, k), here, there, tile_i, tile_j,
                left_ptr, left_scale, right_ptr, right_scale, rows, columns, k,
                left_row, left_scale_row, right_row, right_scale_row,
                LEFT_FORMAT, LEFT_E5M2, LEFT_GRANULE, LEFT_SWIZZLED,
                RIGHT_FORMAT, RIGHT_E5M2, RIGHT_GRANULE, RIGHT_SWIZZLED,
                DTYPE, SCALED, PROMOTE, PRECISION, WHOLE, QUADS, TMA, LEFT, RIGHT, BLOCK_K, UPCAST,
            )  # fmt: skip
    else:
        acc = add_segment(
            acc, first, tl.minimum(first + split_k, k), here, there, tile_i, tile_j,
            left_ptr, left_scale, right_ptr, right_scale, rows, columns, k,
            left_row, left_scale_row, right_row, right_scale_row,
            LEFT_FORMAT, LEFT_E5M2, LEFT_GRANULE, LEFT_SWIZZLED,
            RIGHT_FORMAT, RIGHT_E5M2, RIGHT_GRANULE, RIGHT_SWIZZLED,
            DTYPE, SCALED, PROMOTE, PRECISION, WHOLE, QUADS, TMA, LEFT, RIGHT, BLOCK_K, UPCAST,
        )  # fmt: skip
    if PARTIAL:
        share = out_ptr + tl.program_id(1).to(tl.int64) * rows * columns
        finish(
            acc, i, j, rows, columns, None, 0, None, 0, None, share, out_i, out_j,
            1.0, False, False, False, UPCAST,
        )  # fmt: skip
    else:
        finish(
            acc, i, j, rows, columns, left_outer, left_step, right_outer, right_step,
            bias_ptr, out_ptr, out_i, out_j, FOLDED, SWAPPED, RELU2, ACCUMULATE, UPCAST,
        )  # fmt: skip


@triton.jit
def add_splits(
    parts_ptr, a_outer, b_outer, bias_ptr, out_ptr, m, n, splits, a_step, b_step, out_row,
    FOLDED: tl.constexpr, RELU2: tl.constexpr, ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (m,n) from parts (splits, m, n), first to last, and the epilogue."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (i < m)[:, None] & (j < n)[None, :]
    at = parts_ptr + (i * n)[:, None] + j[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for _ in range(splits):
        acc += tl.load(at, mask=mask, other=0.0)
        at += tl.cast(m, tl.int64) * n
    finish(
        acc, i, j, m, n, a_outer, a_step, b_outer, b_step, bias_ptr, out_ptr, out_row, 1,
        FOLDED, False, RELU2, ACCUMULATE, UPCAST,
    )  # fmt: skip
