"""Tiles of the operands of `scaled_mm`: codes and block scales from memory, widened to what the MMA takes.

An operand is a matrix of `rows` rows along k. Its FORMAT is "plain", "fp8", "nvfp4" or "mxfp8". Rows past the end are
read as the last row (their results are not stored); k past the end is masked to 0, unless WHOLE says that tiles
end where k ends. Padding of codes and of scales is never taken for data.

Block scales are (rows, blocks), or SWIZZLED to 128x4 tiles of 512 bytes (rows padded to 128, blocks to 4):

    offset(row, block) = (row/128 * blocks/4 + block/4) * 512 + row%32 * 16 + row%128/32 * 4 + block%4
"""

import triton
import triton.language as tl

from tigon.kernels.gemm_decode import decode_fp8, decode_mxfp8, decode_nvfp4, quad_order


@triton.jit
def load_codes(ptr, start, column, columns, WHOLE: tl.constexpr):
    """(ROWS, COLUMNS) as stored; start (ROWS): where rows begin (int64), column (COLUMNS), of `columns` in all."""
    at = ptr + start[:, None] + column[None, :]
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=(column < columns)[None, :], other=0.0)


@triton.jit
def load_scales(
    ptr, row, pitch, first, blocks, COUNT: tl.constexpr, SWIZZLED: tl.constexpr, WHOLE: tl.constexpr
):
    """(ROWS, COUNT) bytes from block `first` on, of `blocks` in all; row (ROWS) int64."""
    block = first + tl.arange(0, COUNT)
    if SWIZZLED:
        start = row // 128 * ((blocks + 3) // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4
        at = ptr + start[:, None] + (block // 4 * 512 + block % 4)[None, :]
    else:
        at = ptr + (row * pitch)[:, None] + block[None, :]
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=(block < blocks)[None, :], other=0)


@triton.jit
def load_scale_tiles(
    ptr, tile, rows, first, blocks, ROWS: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr
):
    """(ROWS, COUNT) bytes of whole 128x4 tiles, in the order that sm_100 copies to tensor memory as they are."""
    high = tile.to(tl.int64) * (ROWS // 128) + tl.arange(0, ROWS // 128)
    high = tl.minimum(high, (rows - 1) // 128)[:, None, None, None, None]
    wide = (first // 4 + tl.arange(0, COUNT // 4))[None, :, None, None, None]
    row = tl.arange(0, 32)[None, None, :, None, None]
    quarter = tl.arange(0, 4)[None, None, None, :, None]
    block = tl.arange(0, 4)[None, None, None, None, :]
    groups = (blocks + 3) // 4
    at = ptr + (high * groups + wide) * 512 + row * 16 + quarter * 4 + block
    if WHOLE:
        scales = tl.load(at)
    else:
        scales = tl.load(at, mask=wide < groups, other=0)
    return scales.trans(0, 3, 2, 1, 4).reshape(ROWS, COUNT)


@triton.jit
def load_operand(
    ptr, scale_ptr, row, pitch, scale_pitch, k0, k,
    FORMAT: tl.constexpr, E5M2: tl.constexpr, SWIZZLED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, QUADS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK_K) of DTYPE; E4M3 or E5M2 codes stay what they are if DTYPE is None."""
    start = row * pitch
    if FORMAT == "nvfp4":
        blocks = (k + 15) // 16
        column = k0 // 2 + tl.arange(0, BLOCK_K // 2)
        codes = load_codes(ptr, start, column, blocks * 8, WHOLE)
        scale = load_scales(
            scale_ptr, row, scale_pitch, k0 // 16, blocks, BLOCK_K // 16, SWIZZLED, WHOLE
        )
        return decode_nvfp4(codes, scale, DTYPE, QUADS, UPCAST)
    else:
        column = k0 + (quad_order(BLOCK_K) if QUADS else tl.arange(0, BLOCK_K))
        codes = load_codes(ptr, start, column, k, WHOLE)
        if FORMAT == "plain" or DTYPE is None:
            return codes
        elif FORMAT == "fp8":
            return decode_fp8(codes, E5M2)
        else:
            scale = load_scales(
                scale_ptr,
                row,
                scale_pitch,
                k0 // 32,
                (k + 31) // 32,
                BLOCK_K // 32,
                SWIZZLED,
                WHOLE,
            )
            value = decode_mxfp8(codes, scale, E5M2)
            return value if UPCAST else value.to(DTYPE)


@triton.jit
def load_scaled_operand(
    ptr, scale_ptr, row, tile, rows, pitch, scale_pitch, k0, k,
    FORMAT: tl.constexpr, SWIZZLED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(codes, scales) as `tl.dot_scaled` takes them: E4M3 scales of 16 beside 4-bit codes, E8M0 of 32 beside fp8.

    The other pairings are refused: fp8 codes with E4M3 scales compile on sm_120 to an instruction that reads
    those bytes as exponents, of blocks of 32.
    """
    tl.static_assert(FORMAT == "nvfp4" or FORMAT == "mxfp8", "dot_scaled takes nvfp4 and mxfp8")
    tl.static_assert(
        (FORMAT == "nvfp4") == (ptr.dtype.element_ty == tl.uint8),
        "E4M3 scales go with 4-bit codes, E8M0 scales with 8-bit ones",
    )
    PACK: tl.constexpr = 2 if FORMAT == "nvfp4" else 1
    GROUP: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    blocks = (k + (GROUP - 1)) // GROUP
    columns = blocks * 8 if FORMAT == "nvfp4" else k
    column = k0 // PACK + tl.arange(0, BLOCK_K // PACK)
    codes = load_codes(ptr, row * pitch, column, columns, WHOLE)
    if SWIZZLED and ROWS % 128 == 0:
        scale = load_scale_tiles(
            scale_ptr, tile, rows, k0 // GROUP, blocks, ROWS, BLOCK_K // GROUP, WHOLE
        )
    else:
        scale = load_scales(
            scale_ptr, row, scale_pitch, k0 // GROUP, blocks, BLOCK_K // GROUP, SWIZZLED, WHOLE
        )
    if FORMAT == "nvfp4":
        scale = scale.to(tl.float8e4nv, bitcast=True)
    return codes, scale
